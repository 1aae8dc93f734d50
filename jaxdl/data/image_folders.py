"""Folders of images, with a file that says what is on them or with a sub-folder for each class."""

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdl.data.digests import digest_of_files
from jaxdl.data.elements import NO_PIXELS, AnnotatedImage, LabelledImage
from jaxdl.data.folders import list_files, require_text, told
from jaxdl.data.image_files import decode
from jaxdl.data.sources import Info, Source
from jaxdl.data.text_files import read_lines, read_text, replace_surrogates
from jaxdl.errors import UserError

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")
"""What says what is on images; the first that is there does."""


def metadata_file(directory: Path) -> Path | None:
    """The file with annotations in a folder, if there is one."""
    return next((directory / name for name in METADATA if (directory / name).is_file()), None)


class MetadataFolder(Source[AnnotatedImage]):
    """Images beside a `metadata.jsonl`, or a `metadata.csv`. Its rows have `file_name` and `text`, one caption or a list of them, or `questions`, a list of [question, answer], or both. An image may have several rows; images without one are left out, and told.

    Raises `UserError` for rows that have not, or whose image is not there, with their line.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        path = metadata_file(directory) or directory / METADATA[0]
        self.rows: list[tuple[str, AnnotatedImage]] = []
        lines: list[int] = []
        for number, row, written in _rows(path):
            try:
                self.rows.append((_file_name(row["file_name"]), _annotations(row)))
            except (TypeError, KeyError):
                raise UserError(
                    f'{path}, line {number}: expected {{"file_name": ..., "text": caption or list of captions}}, found {written[:80]}'
                ) from None
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            lines.append(number)
        if not self.rows:
            raise UserError(f"{path} has no rows: give one line per image")
        self.info = self._info(path, lines)

    def _info(self, path: Path, lines: list[int]) -> Info:
        """Raises `UserError` where images are not there."""
        listing, named = list_files(self.directory, IMAGE_ENDINGS), {self.directory / name for name, _ in self.rows}
        missing = {file for file in named - set(listing.files) if not file.is_file()}
        for (name, _), number in zip(self.rows, lines):
            if self.directory / name in missing:
                more = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
                raise UserError(
                    f"{path}, line {number}: there is no image {self.directory / name}{more}: put it there, or remove the line"
                )
        unnamed = Counter({f"images that {path.name} does not name": len(set(listing.files) - named)})
        return Info(digest=digest_of_files(self.directory, named, path.read_bytes()), remarks=told(+unnamed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> AnnotatedImage:
        name, row = self.rows[index]
        return AnnotatedImage(decode(self.directory / name), row.captions, row.questions)

    def annotations(self, index: int) -> AnnotatedImage:
        return self.rows[index][1]


def _rows(path: Path) -> Iterator[tuple[int, Any, str]]:
    """The rows of a file with their lines, as values and as they are written."""
    if path.suffix == ".csv":
        yield from _rows_of_csv(path)
        return
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            try:
                yield number, json.loads(line), line
            except (ValueError, RecursionError):
                yield number, None, line


def _rows_of_csv(path: Path) -> Iterator[tuple[int, dict[str, str], str]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        columns = reader.fieldnames or ()
        if not {"file_name", "text"} <= set(columns):
            raise UserError(f"{path} has the columns {', '.join(columns) or 'none'}: it needs file_name and text")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num}: expected as many cells as there are columns, {len(columns)}")
            yield reader.line_num, row, str(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: no CSV ({error}): repair it") from None


def _file_name(name: Any) -> str:
    """The name of a file in a folder. Raises `UserError` for what is none, or leads out of it."""
    if not isinstance(name, str) or not name.strip() or "\0" in name or replace_surrogates(name) != name:
        raise UserError(f"file_name must be the name of an image, found {name!r}")
    inside = posixpath.normpath(name)
    if posixpath.isabs(inside) or inside == ".." or inside.startswith("../"):
        raise UserError(f"file_name must be below the folder, found {name!r}: move the image there")
    return inside


def _annotations(row: dict[str, Any]) -> AnnotatedImage:
    """What a row says about its image. Raises `UserError` where that is not what it should be, `KeyError` where there is nothing."""
    captions: tuple[str, ...] = ()
    if "text" in row or "questions" not in row:
        text = row["text"]
        captions = tuple(text) if isinstance(text, list) else (text,)
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"text must be a caption or a list of captions, found {text!r}")
    questions = row.get("questions", ())
    if "questions" in row and (
        not isinstance(questions, list)
        or not questions
        or not all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in questions)
    ):
        raise UserError(f"questions must be a list of [question, answer], found {questions!r}")
    captions = tuple(replace_surrogates(caption) for caption in captions if caption.strip())
    return AnnotatedImage(NO_PIXELS, captions, tuple(tuple(map(replace_surrogates, pair)) for pair in questions))


class ClassFolder(Source[LabelledImage]):
    """One sub-folder of images per class, also in folders below it. Classes are in alphabetical order; one without images stays a class, and is told. Raises `UserError` if there is no image."""

    def __init__(self, directory: Path):
        listing = list_files(directory, IMAGE_ENDINGS)
        classes = tuple(require_text(folder.name, folder) for folder in listing.folders)
        numbers, depth = {name: label for label, name in enumerate(classes)}, len(directory.parts)
        self.files = [(path, numbers[path.parts[depth]]) for path in listing.files if len(path.parts) > depth + 1]
        if not self.files:
            raise UserError(
                f"{directory} has neither a metadata.jsonl nor sub-folders with images ({', '.join(IMAGE_ENDINGS)}): put some in"
            )
        left_out = listing.left_out + Counter({"images in no class's folder": len(listing.files) - len(self.files)})
        seen = {label for _, label in self.files}
        empty = [name for label, name in enumerate(classes) if label not in seen]
        remarks = [told(left_out), f"there are no images of {', '.join(empty)}" if empty else ""]
        digest = digest_of_files(directory, (path for path, _ in self.files), *classes)
        self.info = Info(classes=classes, digest=digest, remarks="; ".join(filter(None, remarks)))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LabelledImage:
        path, label = self.files[index]
        return LabelledImage(decode(path), label)

    def annotations(self, index: int) -> LabelledImage:
        return LabelledImage(NO_PIXELS, self.files[index][1])
