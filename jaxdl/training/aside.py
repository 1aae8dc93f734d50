"""An old run is set aside while a new one begins in its place: if that fails before its first step, as with a mistyped setting, the old one is there again."""

import shutil
from collections.abc import Iterable
from pathlib import Path

CONFIG = "config.json"
_MOVING, _ASIDE, _DISCARDED = ".moving", ".aside", ".discarded"
"""An old run as it is moved, as it can be put back in the place of a new one, and as it is deleted."""
ASIDE = (_MOVING, _ASIDE, _DISCARDED)


def set_aside(directory: Path, names: Iterable[str]) -> None:
    """Moves these entries away, one by one, and a copy of `config.json`, which stays until it is replaced."""
    moving = directory / _MOVING
    moving.mkdir()
    for name in names:
        (directory / name).rename(moving / name)
    shutil.copyfile(directory / CONFIG, moving / CONFIG)
    moving.rename(directory / _ASIDE)


def finish_moving(directory: Path) -> None:
    """Undoes a `set_aside` that was interrupted, or ends a `put_back` that was."""
    moving = directory / _MOVING
    if moving.is_dir():
        for entry in moving.iterdir():
            if entry.name != CONFIG:
                entry.rename(directory / entry.name)
        shutil.rmtree(moving)


def is_aside(directory: Path) -> bool:
    """Whether there is a run that can be put back."""
    return (directory / _ASIDE).is_dir()


def put_back(directory: Path, instead_of: Iterable[str]) -> None:
    """Brings the old run to its place again, and deletes these entries of the new one."""
    for name in instead_of:
        delete(directory / name)
    unfinished = directory / (CONFIG + ".tmp")
    shutil.copyfile(directory / _ASIDE / CONFIG, unfinished)
    unfinished.replace(directory / CONFIG)
    (directory / _ASIDE).rename(directory / _MOVING)
    finish_moving(directory)


def discard(directory: Path) -> None:
    """Deletes what was set aside."""
    delete(directory / _DISCARDED)  # Of a process that was killed.
    if is_aside(directory):
        (directory / _ASIDE).rename(directory / _DISCARDED)
        delete(directory / _DISCARDED)


def delete(entry: Path) -> None:
    """A file, a folder with all that is in it, or a link."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
