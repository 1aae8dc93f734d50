"""The one way in which folders of data are read: what counts as a file of them, and what is left out."""

import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from jaxdl.errors import UserError

_CLUTTER = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")
"""What systems put into folders, in small letters, beside what begins with a dot."""
_TOLD = 5
"""Kinds of things that are left out of which a line tells."""


class Listing(NamedTuple):
    """What is in a folder."""

    files: list[Path]
    """Those that were asked for, ordered by their paths part by part: alike on every system."""
    folders: list[Path]
    """Directly in it."""
    left_out: Counter[str]
    """In words what else there is, such as "hidden" or ".txt", and how often."""


def list_files(folder: Path, endings: Collection[str], *, below: bool = True) -> Listing:
    """The files with one of some endings, which are in small letters and match large ones too, in a folder and `below` it. Links are followed, but not round and round.

    Raises `UserError` for a folder that may not be read.
    """
    listing = Listing([], [], Counter())
    waiting = [(os.fspath(folder), frozenset[tuple[int, int]]())]
    try:
        while waiting:
            path, above = waiting.pop()
            found = os.stat(path)
            if (here := (found.st_dev, found.st_ino)) in above:
                listing.left_out["links to a folder that they are in"] += 1
                listing.folders[:] = [each for each in listing.folders if each != Path(path)]
                continue
            with os.scandir(path) as entries:
                for entry in entries:
                    ending = os.path.splitext(entry.name)[1].lower()
                    if is_hidden(entry.name):
                        listing.left_out["hidden"] += 1
                    elif entry.is_dir():
                        if not above:
                            listing.folders.append(Path(entry.path))
                        if below:
                            waiting.append((entry.path, above | {here}))
                        else:
                            listing.left_out["folders"] += 1
                    elif not entry.is_file():
                        listing.left_out["broken links"] += 1
                    elif ending in endings:
                        listing.files.append(Path(entry.path))
                    else:
                        listing.left_out[ending.encode("utf-8", "replace").decode() or "without an ending"] += 1
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}): change its permissions, or take it out of {folder}"
        ) from None
    for paths in (listing.files, listing.folders):
        paths.sort(key=lambda each: each.parts)
    return listing


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the data."""
    return name.startswith(".") or name.lower() in _CLUTTER


def told(left_out: Counter[str]) -> str:
    """What is left out, in words: "not read: 2 .txt, 1 hidden"; empty where nothing is."""
    common = left_out.most_common(_TOLD)
    others = left_out.total() - sum(count for _, count in common)
    counted = ", ".join(f"{count:,} {kind}" for kind, count in common)
    return f"not read: {counted}" + (f", {others:,} others" if others else "") if counted else ""


def require_folder(folder: Path, words: str) -> None:
    """Raises `UserError` where there is no folder; `words` say what it should hold, as the end of "give folder:PATH with"."""
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a folder: unpack it if it is an archive, and give folder:PATH with {words}")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give folder:PATH with {words}")


def require_text(name: str, folder: Path) -> str:
    """The name of a file or folder that names a class. Raises `UserError` where it is no Unicode, and could not be printed or tokenised."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{folder} has a name that is no UTF-8: {os.fsencode(name)!r}: rename it") from None
    return name
