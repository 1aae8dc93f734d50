"""What a run depends on besides its config: versions, precision, data. Recorded when it begins, and compared when it goes on."""

import json
from pathlib import Path
from typing import Any

import jax

from jaxdl.data import Source
from jaxdl.files import parse_json, replace_text


class Environment:
    """The record of a run in a file, `environment.json`. It is no part of the run's identity: what differs is said, and the run goes on."""

    def __init__(self, path: Path):
        self.path = path
        self._specs: dict[str, str] = {}
        """By their digests, what the data were opened by."""

    def reads(self, *sources: Source) -> None:
        """Keeps in mind which data these are, where that is known."""
        self._specs |= {source.info.digest: source.info.spec for source in sources if source.info.digest}

    def now(self) -> dict[str, Any]:
        """What the run depends on here."""
        settings = ("jax_enable_x64", "jax_default_matmul_precision")
        return {"jax": jax.__version__, **{name: getattr(jax.config, name) for name in settings}, "data": self._specs}

    def record(self) -> None:
        """Writes the file."""
        replace_text(self.path, json.dumps(self.now(), indent=2) + "\n")

    def changes(self) -> str:
        """In a line what has changed since the run began; nothing if nothing has, or it is not known."""
        try:
            before, now = parse_json(self.path), self.now()
        except ValueError:
            return ""
        if not isinstance(before, dict) or not isinstance(before.get("data"), dict):
            return ""
        changed = [
            f"{name}: {before[name]} → {value}"
            for name, value in now.items()
            if name != "data" and before.get(name, value) != value
        ]
        known = set(before["data"].values())
        others = [spec for digest, spec in self._specs.items() if spec in known and digest not in before["data"]]
        changed += [f"the data of {spec} are others" for spec in dict.fromkeys(others)]
        return f"the run goes on in another way than it began: {'; '.join(changed)}" if changed else ""
