"""Where a run's numbers and pictures go: `metrics.jsonl`, TensorBoard, and Weights & Biases if asked for."""

import contextlib
import functools
import json
import secrets
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from jaxdl.errors import UserError
from jaxdl.files import replace_text


@runtime_checkable
class Writer(Protocol):
    """Takes rows of named numbers, and pictures."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def draw(self, step: int, name: str, file: Path) -> None:
        """A picture that lies in a PNG or GIF file."""

    def close(self) -> None: ...


class JsonLines:
    """One object a line with `step` and the metrics' names, flushed as written.

    A run that resumes at `step` drops what was logged after it, and a line that a kill cut short.
    """

    def __init__(self, path: Path, step: int):
        kept = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() and step else []
        replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def draw(self, step: int, name: str, file: Path) -> None:
        """Pictures are in `figures/`, and none is in the log."""

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in `directory`; events after `step` of an earlier attempt are hidden."""

    def __init__(self, directory: Path, step: int):
        self._directory, self._step = directory, step

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def draw(self, step: int, name: str, file: Path) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        with Image.open(file) as picture:  # The file itself is shown, so that a GIF moves.
            width, height = picture.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes())
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()

    @functools.cached_property
    def _writer(self) -> Any:
        """Made when there is something to write: importing it takes seconds where torch is installed, which it imports too."""
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._directory), purge_step=self._step + 1, flush_secs=2)


class WandB:
    """A Weights & Biases run that resumes under the id kept in the run's directory. Raises `UserError` where there is no wandb, or it cannot begin, as without a key."""

    def __init__(self, directory: Path, name: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"--wandb needs the wandb package ({error}): pip install 'jaxdl[wandb]'") from None
        id_file = directory / "wandb_id"
        if not id_file.exists():
            replace_text(id_file, secrets.token_hex(4))
        identity = id_file.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(project="jaxdl", name=name, id=identity, resume="allow", dir=str(directory), config=config)
        except Exception as error:  # Its own, those of its settings, and what several HTTP libraries raise.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"--wandb: Weights & Biases cannot begin ({reason}): run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline, or leave the flag out"
            ) from None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def draw(self, step: int, name: str, file: Path) -> None:
        import wandb

        picture = wandb.Video(str(file), format="gif") if file.suffix == ".gif" else wandb.Image(str(file))
        self._run.log({name: picture}, step=step)

    def close(self) -> None:
        self._run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` or a `layers.jsonl`. What is no row, such as a line that a kill cut short or a power failure filled with zeros, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # JSON may hold what else ends a line.
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows
