"""Images with labels, captions and annotations: folders, TFDS records, and the digits of scikit-learn."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.data.digests import digest_of, digest_of_files
from jaxdl.data.elements import AnnotatedImage, CaptionedImage, LabelledImage
from jaxdl.data.image import decode
from jaxdl.data.sources import Info, Mapped, Source, Split
from jaxdl.data.tfds import Record
from jaxdl.errors import UserError

TEMPLATES = ("a photo of {}", "a picture of {}", "this is {}", "{}")
"""Captions of a labelled image, and prompts that its class is recognised by."""

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
"""The image of an element of which only the annotations were asked for."""


class MetadataFolder(Source[AnnotatedImage]):
    """Images beside a `metadata.jsonl`. Its rows have `file_name` and `text`, one caption or a list of them, or `questions`, a list of [question, answer], or both.

    Raises `UserError` for rows that have not, with their line.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.rows: list[tuple[str, AnnotatedImage]] = []
        path = directory / "metadata.jsonl"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self.rows.append((row["file_name"], _annotations(row)))
            except (json.JSONDecodeError, TypeError, KeyError):
                raise UserError(
                    f'{path}, line {number}: expected {{"file_name": ..., "text": caption or list of captions}}, found {line[:80]}'
                ) from None
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
        if not self.rows:
            raise UserError(f"{path} has no rows: give one line per image")
        self.info = Info(digest=digest_of_files(directory, [directory / name for name, _ in self.rows], path.read_bytes()))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> AnnotatedImage:
        name, row = self.rows[index]
        return AnnotatedImage(decode(self.directory / name), row.captions, row.questions)

    def annotations(self, index: int) -> AnnotatedImage:
        return self.rows[index][1]


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
    return AnnotatedImage(NO_PIXELS, captions, tuple(map(tuple, questions)))


class ClassFolder(Source[LabelledImage]):
    """One sub-folder of images per class. Classes are in alphabetical order. Raises `UserError` if there is no image."""

    def __init__(self, directory: Path):
        classes = tuple(sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
        self.files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((directory / name).iterdir())
            if path.suffix.lower() in IMAGE_ENDINGS
        ]
        if not self.files:
            raise UserError(
                f"{directory} has neither a metadata.jsonl nor sub-folders with images ({', '.join(IMAGE_ENDINGS)}): put some in"
            )
        self.info = Info(classes=classes, digest=digest_of_files(directory, (path for path, _ in self.files), *classes))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LabelledImage:
        path, label = self.files[index]
        return LabelledImage(decode(path), label)

    def annotations(self, index: int) -> LabelledImage:
        return LabelledImage(NO_PIXELS, self.files[index][1])


class Digits(Source[LabelledImage]):
    """Handwritten digits, 8×8 grey, in scikit-learn's package (UCI, 1998): 1,437 to train, 360 to test, shuffled once with a fixed seed."""

    info = Info(classes=("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))

    def __init__(self, split: Split):
        from sklearn.datasets import load_digits  # Takes a second to import.

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        chosen = order[360:] if split == "train" else order[:360]
        self.images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
        self.labels = digits.target[chosen]
        self.info = dataclasses.replace(self.info, digest=digest_of(self.images, self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> LabelledImage:
        return LabelledImage(self.images[index], int(self.labels[index]))


def template_captions(classes: Sequence[str], templates: tuple[str, ...] = TEMPLATES) -> list[tuple[str, ...]]:
    """For each class its name in every template."""
    return [tuple(template.format(name) for template in templates) for name in classes]


def captioned(source: Source[LabelledImage], templates: tuple[str, ...] = TEMPLATES) -> Source[CaptionedImage]:
    """Captions from the names of classes."""
    captions = template_captions(source.info.classes, templates)
    return Mapped(source, lambda each: CaptionedImage(each.image, captions[each.label], each.label))


def with_captions(source: Source[AnnotatedImage]) -> Source[CaptionedImage]:
    """Nothing but the captions of each image, of which there must be some."""
    captions = Mapped(source, lambda each: CaptionedImage(each.image, each.captions))
    captions.info = dataclasses.replace(source.info, classes=())
    return captions


def annotated(source: Source[LabelledImage]) -> Source[AnnotatedImage]:
    """Nothing but the class of each image."""
    return Mapped(source, lambda each: AnnotatedImage(each.image, label=each.label))


FOLDER_WORDS = "one sub-folder of images per class"
METADATA_WORDS = f"images and a metadata.jsonl, or {FOLDER_WORDS}"


def read_labelled(directory: Path) -> Source[LabelledImage]:
    """A `ClassFolder`."""
    if _has_metadata(directory):
        raise UserError(f"{directory} has captions (metadata.jsonl) and no labels: give {FOLDER_WORDS}")
    return ClassFolder(directory)


def read_captioned(directory: Path, *, templates: tuple[str, ...] = TEMPLATES) -> Source[CaptionedImage]:
    """The captions of a `MetadataFolder`, without the images that have none, or those that the classes of a `ClassFolder` make."""
    if not _has_metadata(directory):
        return captioned(ClassFolder(directory), templates)
    return with_captions(MetadataFolder(directory).where(lambda each: bool(each.captions), "have no caption"))


def read_annotated(directory: Path) -> Source[AnnotatedImage]:
    """A `MetadataFolder`, or the labels of a `ClassFolder`."""
    return MetadataFolder(directory) if _has_metadata(directory) else annotated(ClassFolder(directory))


def _has_metadata(directory: Path) -> bool:
    if not directory.is_dir():
        raise UserError(f"there is no folder {directory}: give folder:PATH with {METADATA_WORDS}")
    return (directory / "metadata.jsonl").is_file()


RECORD_WORDS = "`image` and `label`"


def labelled_records(features: Mapping[str, Any]) -> Callable[[Record], LabelledImage] | None:
    """How TFDS' records with an image and a label become elements; None where they have not both."""
    if not {"image", "label"} <= set(features):
        return None
    return lambda record: LabelledImage(record["image"], int(record["label"]))


def captioned_records(
    features: Mapping[str, Any], *, templates: tuple[str, ...] = TEMPLATES
) -> Callable[[Record], CaptionedImage] | None:
    """As `labelled_records`, with captions made of the label's name."""
    if labelled_records(features) is None:
        return None
    captions = template_captions(features["label"].names, templates)
    return lambda record: CaptionedImage(record["image"], captions[record["label"]], int(record["label"]))


def annotated_records(features: Mapping[str, Any]) -> Callable[[Record], AnnotatedImage] | None:
    """As `labelled_records`."""
    if labelled_records(features) is None:
        return None
    return lambda record: AnnotatedImage(record["image"], label=int(record["label"]))
