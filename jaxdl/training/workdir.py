"""A run's working directory: what may lie in it, whose it is, and how it is claimed. Nothing that no run has written is ever changed or deleted."""

import contextlib
import dataclasses
import fcntl
import fnmatch
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxdl.errors import UserError
from jaxdl.files import parse_json, replace_text
from jaxdl.training import aside
from jaxdl.training.aside import CONFIG
from jaxdl.training.identity import Identity, as_identity, differences, plain, refuse_another

LOCK = ".lock"

KEPT = ("tokenizer.json", "tokenizer_config.json", "tokens.npy", "alphabet.json")
"""What is made of the data when a run begins, and read again when it goes on."""
_ENDED = ".ended"
"""An empty file in a run without checkpoints: a process ended well, and what is there was not left by one that failed or was killed."""
_LOGS = ("metrics.jsonl", "layers.jsonl")
_RESULTS = ("result.json", "sweep.json", "tiles.json")
_WHOLE = (
    CONFIG, "environment.json", *KEPT, *_LOGS, *_RESULTS, "sample.txt", "answers.txt", "translations.txt", "table.md", "target.txtpb",
)  # fmt: skip
_UNFINISHED = (*(f"{name}.tmp" for name in _WHOLE), "tokens.part", "alphabet.unfinished", ".unfinished-*")
FILES = (*_WHOLE, *_UNFINISHED, LOCK, _ENDED, "*_translations.txt", "*_translations.txt.tmp", "wandb_id")
"""Names of the files that runs write. A new one has to be added here."""
_CHECKPOINTS, _OTHER_RUNS = "checkpoints", "beside"
FOLDERS = {
    _CHECKPOINTS: ("[0-9]*", ".writable-*"),
    "figures": ("*.png", "*.gif"),
    "tensorboard": ("events.out.tfevents.*",),
    "model": ("*.json", "*.model", "*.spm", "*.txt", "*.safetensors", ".unfinished-*"),
    "profile": ("plugins",),
    "wandb": ("*",),
    **dict.fromkeys(aside.ASIDE, ("*",)),
}
"""Names of the folders, each with what lies in it."""
_RUNS = ("tower", f"{_OTHER_RUNS}/*")
RUN_FOLDERS = ("tower", _OTHER_RUNS)
"""Folders that are runs of their own, or hold such."""


@contextlib.contextmanager
def claimed(directory: Path, experiment: str, preset: str, config: Any, overwrite: bool) -> Iterator[None]:
    """Holds the directory for this run, with its `config.json` in it.

    What a run has left that made no step gives way to another config; what it had made of the data when it failed is made anew. Raises `UserError` if the directory holds another run (the difference is shown) or other people's files, if it cannot be written, if another process is at work in it, and with `overwrite` if there is more in it than a run writes, or something that the config names. Nothing is touched then.
    """
    _find(directory)  # Before there is a lock in what may be somebody else's.
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Not emptied, and no link is followed.
        lock = os.fdopen(os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        raise _not_writable(directory, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {directory}: wait for it, or give another --workdir") from None
        except OSError as error:
            raise UserError(
                f"{directory / LOCK} cannot be locked ({error.strerror}): give a --workdir on a file system with locks"
            ) from None
        try:
            _make_room(directory, experiment, config, overwrite)
            identity = {"experiment": experiment, "preset": preset, "config": plain(config)}
            replace_text(directory / CONFIG, json.dumps(identity, indent=2) + "\n")
            (directory / "figures").mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(directory, error) from None
        try:
            yield
        except BaseException:
            _settle(directory)
            raise
        if not steps(directory):
            (directory / _ENDED).touch()
        aside.discard(directory)


def steps(directory: Path) -> list[int]:
    """Of the checkpoints of a run that are whole, the newest first."""
    folder = directory / _CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(entry.name) for entry in found if entry.name.isdecimal()), reverse=True)


def _find(directory: Path) -> Identity | None:
    """Whose run the directory holds; None if it holds nothing. Raises `UserError` for anything else."""
    try:
        str(directory).encode()
        if directory.is_symlink() and not directory.exists():
            raise UserError(f"{directory} is a link to {os.readlink(directory)}, which is not there: give another --workdir")
        if not directory.exists():
            return None
        if not directory.is_dir():
            raise UserError(f"cannot write to the working directory {directory}: it is a file; give another --workdir")
        entries = sorted(entry for entry in directory.iterdir() if not _is_nothing(entry))
    except UnicodeEncodeError:
        raise UserError(f"--workdir {str(directory)!a} is no Unicode: give another name") from None
    except OSError as error:
        raise _not_writable(directory, error) from None
    if not entries:
        return None
    identity = _identity(directory)
    if identity is None:
        raise _no_run(directory, entries[0].name)
    _check_kinds(directory)
    return identity


def _no_run(directory: Path, entry: str) -> UserError:
    """Why the directory, which holds such an entry, is none of a run."""
    if not (directory / CONFIG).is_file():
        return UserError(f"{directory} holds {entry} and is no run: give another --workdir")
    try:
        parse_json(directory / CONFIG)
    except ValueError as error:
        reason = " ".join(str(error).split())
        return UserError(
            f"{directory / CONFIG} is damaged ({reason}), and no checkpoint says whose it was: restore it from a copy, or give another --workdir"
        )
    return UserError(f"{directory} holds a {CONFIG} that no run has written and is no run: give another --workdir")


def _is_nothing(entry: Path) -> bool:
    """Whether it is what a process leaves that was killed before it had a config: an empty lock, folders without anything, a part of a config."""
    if entry.is_symlink():
        return False
    if entry.is_dir():
        return entry.name in FOLDERS and not any(entry.iterdir())
    if entry.name == CONFIG + ".tmp":
        start = entry.read_bytes()[:17]
        return b'{\n  "experiment":'.startswith(start)
    return entry.name == LOCK and not entry.stat().st_size


def _identity(directory: Path) -> Identity | None:
    """What its `config.json` says; where that is missing or damaged, as after a power failure, what its newest checkpoint does."""
    path = directory / CONFIG
    if path.exists() or path.is_symlink():
        with contextlib.suppress(ValueError):
            return as_identity(parse_json(path))
        if not path.is_file():
            return None
    for step in steps(directory):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            parts = {name: parse_json(directory / _CHECKPOINTS / str(step) / name / "metadata") for name in ("progress", "config")}
            return as_identity({"experiment": parts["progress"]["experiment"], "preset": "", "config": parts["config"]})
    return None


def _check_kinds(directory: Path) -> None:
    """Raises `UserError` for a file where a run has a folder, and the other way round."""
    for name in FOLDERS:
        entry = directory / name
        if (entry.exists() or entry.is_symlink()) and not entry.is_dir():
            raise UserError(f"{entry} is no folder, and a run keeps its {name} there: move it away")
    for name in (LOCK, *KEPT, *_LOGS, *_RESULTS):
        entry = directory / name
        if entry.is_dir() or (entry.is_symlink() and not entry.exists()):
            raise UserError(f"{entry} is no file, and a run writes one of that name: move it away")


def _make_room(directory: Path, experiment: str, config: Any, overwrite: bool) -> None:
    """Clears the locked directory of what gives way to this run."""
    _settle(directory)
    found = _find(directory)
    if found is None:
        return
    others = strangers(directory)
    if overwrite and others:
        named = ", ".join(f"{each.relative_to(directory)}{' (a link)' * each.is_symlink()}" for each in others[:3])
        named += ", …" if len(others) > 3 else ""
        raise UserError(
            f"{directory} holds {named}, which no run writes: move it away before --overwrite, or give another --workdir"
        )
    another = found["experiment"] != experiment or bool(differences(found["config"], config))
    own = _own(directory)
    if another and not overwrite and not _has_begun(directory):
        _delete(directory, config, own)
        return
    if overwrite:
        _refuse_inputs(directory, config, own)
        replace_text(directory / CONFIG, json.dumps(found, indent=2) + "\n")  # Where it was damaged.
        aside.set_aside(directory, _own(directory))
        return
    way_out = "another --workdir to keep both" if others else "another --workdir to keep both, or --overwrite to start anew"
    refuse_another(directory, found, experiment, config, way_out)
    if not steps(directory) and not (directory / _ENDED).exists():
        _delete(directory, config, [name for name in own if _matches(name, (*KEPT, *_UNFINISHED))])


def strangers(directory: Path) -> list[Path]:
    """What lies in a run's directory and no run writes, links among it."""
    found: list[Path] = []
    for entry in sorted(directory.iterdir()):
        inside = sorted(entry.iterdir()) if entry.is_dir() and not entry.is_symlink() else []
        if entry.is_symlink():
            found.append(entry)
        elif not entry.is_dir() or _matches(entry.name, _UNFINISHED):
            found += [] if _matches(entry.name, FILES) else [entry]
        elif entry.name in FOLDERS:
            found += [each for each in inside if not _matches(each.name, FOLDERS[entry.name])]
        elif entry.name in RUN_FOLDERS:
            runs = inside if entry.name == _OTHER_RUNS else [entry]
            found += [each for run in runs for each in (strangers(run) if _is_run(run) else [run])]
        else:
            found.append(entry)
    return found


def _is_run(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    return all(map(_is_nothing, path.iterdir())) or _identity(path) is not None


def _runs(directory: Path) -> list[Path]:
    """The runs below a run."""
    return [path for pattern in _RUNS for path in directory.glob(pattern) if _is_run(path)]


def _has_begun(directory: Path) -> bool:
    """Whether anything was computed, by the run or one below it: a checkpoint, a row of a log, a result, or all that there was to do."""
    results = (directory / name for name in (*_LOGS, *_RESULTS))
    written = any(path.exists() and path.stat().st_size for path in results)
    return bool(steps(directory)) or written or (directory / _ENDED).exists() or any(map(_has_begun, _runs(directory)))


def _settle(directory: Path) -> None:
    """Puts an old run back in whose place a new one has failed before it computed anything, or was killed; if it has computed something, the old one is deleted."""
    aside.finish_moving(directory)
    if aside.is_aside(directory) and not _has_begun(directory):
        aside.put_back(directory, instead_of=_own(directory))
    aside.discard(directory)


def _own(directory: Path) -> list[str]:
    """The entries of a run's directory that a run has written, but for `config.json`; checkpoints first."""
    others = {entry.relative_to(directory).parts[0] for entry in strangers(directory)} | {CONFIG, LOCK, *aside.ASIDE}
    order = (_CHECKPOINTS, *_RESULTS)
    names = [entry.name for entry in directory.iterdir() if entry.name not in others]
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _delete(directory: Path, config: Any, names: list[str]) -> None:
    _refuse_inputs(directory, config, names)
    for name in names:
        aside.delete(directory / name)


def _refuse_inputs(directory: Path, config: Any, names: list[str]) -> None:
    """Raises `UserError` if the config names something that is about to be deleted."""
    home = directory.resolve()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for text in value if isinstance(value, tuple) else (value,):
            path = _existing(text)
            if path is not None and path.is_relative_to(home) and (path == home or path.relative_to(home).parts[0] in names):
                flag = "--" + field.name.replace("_", "-")
                raise UserError(
                    f"{flag} {text} lies in the working directory {directory}, where it would be deleted: give another --workdir"
                )


def _existing(text: Any) -> Path | None:
    """The file or folder that a setting names, if it is one."""
    if not isinstance(text, str) or not text:
        return None
    try:
        path = Path(text.removeprefix("folder:")).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _not_writable(directory: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to the working directory {directory}: {error.strerror or error}; give another --workdir")
