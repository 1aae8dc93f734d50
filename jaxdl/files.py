"""Files that are there whole or not at all, whatever interrupts who writes them; and what is read of a file of JSON."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxdl.errors import UserError


def parse_json(path: Path) -> Any:
    """What a file of JSON says. Raises `ValueError` if it is none, is cut, or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a published model. Raises `UserError` where it holds anything else, naming it."""
    try:
        content = parse_json(path)
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} and no JSON object: fetch it again")
    return content


def refused(path: Path, field: str, value: Any, reason: str) -> UserError:
    """The error for an entry of such an object, which is shown as far as a line has room for it."""
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}…"
    return UserError(f"{path}: {field!r} ({shown}) {reason}")


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
    """Writes a file of UTF-8, which is on the disk before it takes the place of another: a power failure leaves one of the two. What is no Unicode, as a model may write, becomes `?`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


@contextlib.contextmanager
def written_whole(directory: Path, last: str, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write into, whose files go to their places in the directory when all are there, the one called `last` after the others: where it is, they are. Files that match the patterns `instead_of` and are not among them are removed before that. Raises `UserError` where the directory cannot be written to."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".unfinished-") as folder:
            yield Path(folder)
            files = sorted(Path(folder).iterdir(), key=lambda file: (file.name == last, file.name))
            for file in files:
                _flush(file)
            for file in files[:-1]:
                os.replace(file, directory / file.name)
            for other in {found for pattern in instead_of for found in directory.glob(pattern)}:
                if other.name not in {file.name for file in files}:
                    other.unlink()
            os.replace(files[-1], directory / files[-1].name)
    except OSError as error:
        raise UserError(f"{directory} cannot be written to ({error}): give another directory, or make room") from error


def _flush(file: Path) -> None:
    """Brings a file to the disk before it is moved to its place: a power failure would leave zeros there."""
    if file.is_file():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
