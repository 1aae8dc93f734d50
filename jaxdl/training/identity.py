"""Which run a folder holds: the form of its `config.json`, and how another command differs from it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxdl.errors import UserError

NOT_IDENTITY = {"identity": False}
"""Metadata of a config's field that is not part of a run's identity, such as a question to the finished model: `config.json` is without it, and a resumed run may change it."""

Identity = dict[str, Any]
"""What is in a `config.json`: the `experiment` and the `preset` by name, and the `config` as a dict."""


def plain(config: Any) -> dict[str, Any]:
    """A config as JSON reads it back, tuples as lists, without the fields that are `NOT_IDENTITY`."""
    aside = {field.name for field in dataclasses.fields(config) if not _is_identity(field)}
    return _as_json({name: value for name, value in dataclasses.asdict(config).items() if name not in aside})


def as_identity(found: Any) -> Identity | None:
    """What was read of a file, if it has the form of a run's `config.json`: published models have files of that name too."""
    if not isinstance(found, dict) or found.keys() != {"experiment", "preset", "config"}:
        return None
    return found if isinstance(found["experiment"], str) and isinstance(found["config"], dict) else None


def refuse_another(directory: Path, found: Identity, experiment: str, config: Any, way_out: str) -> None:
    """Raises `UserError` with the differences if the run in the directory is not the one that is wanted. `way_out` says what else can be done than to resume it."""
    if found["experiment"] != experiment:
        raise UserError(
            f"{directory} holds a run of another experiment (experiment: {found['experiment']} → {experiment}): "
            f"resume it as that, or give {way_out}"
        )
    if not (changed := differences(found["config"], config)):
        return
    shown = f"({'; '.join(changed)})"
    if (reason := _cannot_be_given(found["config"], config, directory / "config.json")) is not None:
        raise UserError(
            f"{directory} holds a run of another version of its experiment {shown}, which cannot be resumed now "
            f"({reason}): give {way_out}"
        )
    raise UserError(f"{directory} holds a run with another config {shown}: give the same flags to resume it, {way_out}")


def differences(there: dict[str, Any], config: Any) -> list[str]:
    """What would change, as `name: there → here`. A field that the other config is without, since it was added later, has its default there."""
    here, fields = plain(config), {field.name: field for field in dataclasses.fields(config)}
    known = {name: default for name, field in fields.items() if (default := _default(field)) is not dataclasses.MISSING}
    there = {name: value for name, value in (known | there).items() if name not in fields or _is_identity(fields[name])}
    names = [*there, *(name for name in here if name not in there)]
    return [f"{name}: {there.get(name)} → {here.get(name)}" for name in names if there.get(name) != here.get(name)]


def _cannot_be_given(there: dict[str, Any], config: Any, path: Path) -> str | None:
    """Why no command gives that config now, if none does: it has a field that is no more, or a value that is not accepted."""
    try:
        config_from_json(there, type(config), path)
    except UserError as error:
        return str(error).partition("; give ")[0].partition(": give ")[0]
    return None


def config_from_json(values: dict[str, Any], config_class: type, path: Path) -> Any:
    """The config that was written to a `config.json`: lists become tuples where its fields are tuples. Raises `UserError` for what does not fit the class."""
    import pydantic  # Here, so that help does not wait for it.

    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown_fields := sorted(values.keys() - known):
        raise UserError(
            f"{path} has {', '.join(unknown_fields)}, which {config_class.__module__} does not know: give a run of that experiment, begun with this version of it"
        )
    try:
        return pydantic.TypeAdapter(config_class).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}, {where}: {first['msg']}; give a run of {config_class.__module__}") from None


def _is_identity(field: dataclasses.Field) -> bool:
    return field.metadata.get("identity", True)


def _default(field: dataclasses.Field) -> Any:
    """Of a field as JSON has it, or `MISSING`."""
    if field.default_factory is not dataclasses.MISSING:
        return _as_json(field.default_factory())
    return field.default if field.default is dataclasses.MISSING else _as_json(field.default)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
