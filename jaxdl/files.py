"""Files that are there whole or not at all, whatever interrupts who writes them."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxdl.errors import UserError


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
