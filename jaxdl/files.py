"""Files that are there whole or not at all, whatever interrupts who writes them."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxdl.errors import UserError


def local_path(given: str | os.PathLike) -> Path:
    """The path that somebody has written, with `~` for a home. Raises `UserError` for a URL, which would become a folder called "gs:", for the home of nobody, and for a NUL."""
    text = os.fspath(given)
    if re.match(r"[A-Za-z][\w+.-]*://|(gs|s3|hdfs|file|https?):/", text):  # A `Path` of a URL has one slash.
        raise UserError(f"{text} is a URL, and files are read and written on this machine: mount or copy it, and give its folder")
    if "\0" in text:
        raise UserError(f"{text!r} holds a NUL, which no path can have: give another")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text} is in the home of a user who is not known here: give the whole path") from None


def file_name(name: str) -> str:
    """A name, such as that of a class, as one part of a path: what a file's name cannot have is an underscore there, and a long one is cut."""
    kept = re.sub(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", "_", name).lstrip(".")
    return kept.encode()[:_LONGEST_NAME].decode(errors="ignore") or "_"


_LONGEST_NAME = 200
"""Bytes. Most file systems allow 255, of which suffixes and numbers are to have some."""


def replace_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def written_whole(directory: Path, last: str, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write into, whose files go to their places in the directory when all are there, the one called `last` after the others: where it is, they are. Files that match the patterns `instead_of` and are not among them are removed before that. Raises `UserError` where the directory cannot be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".unfinished-") as folder:
            yield Path(folder)
            files = sorted(Path(folder).iterdir(), key=lambda file: (file.name == last, file.name))
            for file in files[:-1]:
                os.replace(file, directory / file.name)
            for other in {found for pattern in instead_of for found in directory.glob(pattern)}:
                if other.name not in {file.name for file in files}:
                    other.unlink()
            os.replace(files[-1], directory / files[-1].name)
    except OSError as error:
        raise UserError(f"{directory} cannot be written to ({error}): give another directory, or make room") from error
