"""Images with labels, captions and annotations: folders, TFDS records, and the digits of scikit-learn."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.data.digests import digest_of
from jaxdl.data.elements import AnnotatedImage, CaptionedImage, LabelledImage
from jaxdl.data.folders import require_folder
from jaxdl.data.image_files import as_image
from jaxdl.data.image_folders import ClassFolder, MetadataFolder, metadata_file
from jaxdl.data.sources import Info, Mapped, Source, Split
from jaxdl.data.tfds import Record
from jaxdl.errors import UserError

TEMPLATES = ("a photo of {}", "a picture of {}", "this is {}", "{}")
"""Captions of a labelled image, and prompts that its class is recognised by."""


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
METADATA_WORDS = f"images and a metadata.jsonl or .csv, or {FOLDER_WORDS}"


def read_labelled(directory: Path) -> Source[LabelledImage]:
    """A `ClassFolder`."""
    if metadata := _metadata(directory):
        raise UserError(f"{directory} has captions ({metadata.name}) and no labels: give {FOLDER_WORDS}, and no such file")
    return ClassFolder(directory)


def read_captioned(directory: Path, *, templates: tuple[str, ...] = TEMPLATES) -> Source[CaptionedImage]:
    """The captions of a `MetadataFolder`, without the images that have none, or those that the classes of a `ClassFolder` make."""
    if not _metadata(directory):
        return captioned(ClassFolder(directory), templates)
    return with_captions(MetadataFolder(directory).where(lambda each: bool(each.captions), "have no caption"))


def read_annotated(directory: Path) -> Source[AnnotatedImage]:
    """A `MetadataFolder`, or the labels of a `ClassFolder`."""
    return MetadataFolder(directory) if _metadata(directory) else annotated(ClassFolder(directory))


def _metadata(directory: Path) -> Path | None:
    require_folder(directory, METADATA_WORDS)
    return metadata_file(directory)


RECORD_WORDS = "`image` and `label`, of which the classes have names"


def labelled_records(features: Mapping[str, Any]) -> Callable[[Record], LabelledImage] | None:
    """How TFDS' records with an image and a label become elements; None where they have not both, or classes have no names. A record raises `UserError` for a label that is none of the classes, as those of a split without labels are."""
    names = getattr(features.get("label"), "names", None)
    if "image" not in features or not names:
        return None

    def element(record: Record) -> LabelledImage:
        label = int(record["label"])
        if not 0 <= label < len(names):
            raise UserError(
                f"a record has the label {label}, and the {len(names)} classes count from 0: choose a split with labels"
            )
        return LabelledImage(as_image(record["image"]), label)

    return element


def captioned_records(
    features: Mapping[str, Any], *, templates: tuple[str, ...] = TEMPLATES
) -> Callable[[Record], CaptionedImage] | None:
    """As `labelled_records`, with captions made of the label's name."""
    labelled = labelled_records(features)
    if labelled is None:
        return None
    captions = template_captions(features["label"].names, templates)

    def element(record: Record) -> CaptionedImage:
        found = labelled(record)
        return CaptionedImage(found.image, captions[found.label], found.label)

    return element


def annotated_records(features: Mapping[str, Any]) -> Callable[[Record], AnnotatedImage] | None:
    """As `labelled_records`."""
    labelled = labelled_records(features)
    if labelled is None:
        return None

    def element(record: Record) -> AnnotatedImage:
        found = labelled(record)
        return AnnotatedImage(found.image, label=found.label)

    return element
