"""Detection: annotated images to padded batches of boxes, average precision, and pictures of what was found."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from annotated_types import Ge
from grain import DatasetIterator
from jaxtyping import Array, Key, PyTree

from jaxdl import figures
from jaxdl.data import AnnotatedImage, Boxes, Image, Source, evenly_spaced, pad
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.metrics import Detections, average_precision, constant_detections
from jaxdl.tasks.annotated import open_annotated
from jaxdl.tasks.memory import Latest
from jaxdl.training import Report, Run

Example = TypeVar("Example", bound=Image)
Augment = Callable[[AnnotatedImage, np.random.Generator], AnnotatedImage]

FITTED, SHOWN = 2_000, 12
"""Training images that a detector which sees nothing is made of, and images that are drawn, at most."""


@dataclasses.dataclass(frozen=True)
class DetectionFields:
    """Fields of a config: what a detector is given."""

    resolution: Annotated[int, Ge(1)] = 64
    """Side of the square that every image is brought to, in pixels."""
    fit: Literal["stretch", "letterbox"] = "letterbox"
    """How: `stretch` changes the aspect ratio, `letterbox` keeps it and fills up with black."""
    max_boxes: Annotated[int, Ge(1)] = 20
    """Boxes of an image that are learned from, at most."""
    eval_examples: Annotated[int, Ge(1)] = 500
    """Held-out images that are measured on, at most."""


def open_boxes(run: Run, **options: Any) -> tuple[Source[AnnotatedImage], Source[AnnotatedImage]]:
    """The images to train on and those held out, as the run's config names them; each is decoded once. Of a folder those are left out whose boxes nobody has drawn; in other data all images have the same annotations. An image in which there is nothing has no boxes, but stays. `options` are those of `ANNOTATED_IMAGES`. Raises `UserError` for data that is not there, or has no boxes."""
    return open_annotated(run, lambda example, classes: example.boxes is not None, "have no boxes", **options)


def letterbox(example: Example, size: tuple[int, int]) -> Example:
    """The image in the middle of the smallest black one that has the aspect ratio of `size`, height and width; what has a place in it follows. To be scaled to that size, where it is then as large as it can be."""
    height, width = example.image.shape[:2]
    scale = max(height / size[0], width / size[1])
    new_height, new_width = (max(old, round(scale * side)) for old, side in zip((height, width), size))
    return example.window((height - new_height) // 2, (width - new_width) // 2, new_height, new_width)


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Brings images and their boxes to what a detector is given."""

    process: ImageProcessor
    fit: Literal["stretch", "letterbox"] = "letterbox"

    def __post_init__(self) -> None:
        if self.process.resize_mode != "stretch":
            raise UserError("an image processor that crops would lose boxes: give one with resize_mode='stretch'")

    def place(self, example: Example) -> Example:
        """The example with the aspect ratio that it will have."""
        return letterbox(example, self.process.size) if self.fit == "letterbox" else example

    def small(self, example: AnnotatedImage) -> AnnotatedImage:
        """The example at the size that it will have, with its boxes alone: a photograph takes a thousandth of its memory then."""
        placed = self.place(example)
        return AnnotatedImage(self.process.resize(placed.image), boxes=placed.boxes)

    def row(self, example: AnnotatedImage) -> dict[str, Any]:
        """`image`, `H W C` float32, and `boxes`, whose `xyxy` (`N 4`) are in units of the sides of that image, with `labels`."""
        placed = self.place(example)
        return {"image": self.process(placed.image), "boxes": placed.boxes.arrays()}


def detection_batches(
    run: Run, source: Source[AnnotatedImage], prepare: Prepare, max_boxes: int, augment: Augment = lambda example, rng: example
) -> DatasetIterator:
    """Endless batches `{"image": B H W C, "boxes": {"xyxy": B M 4, "labels": B M, "valid": B M, "cut": B}}`, `M` being `max_boxes`: `valid` is false for padding, `cut` says how many boxes of an image did not fit, which an objective should log."""
    return run.batches(source, functools.partial(_row, prepare=prepare, augment=augment), pad(boxes=max_boxes))


def _row(example: AnnotatedImage, rng: np.random.Generator, *, prepare: Prepare, augment: Augment) -> dict[str, Any]:
    return prepare.row(augment(example, rng))


class Detection:
    """How well things are found in images that are held out: what `train` takes as `evaluate`, `show` and `conclude`."""

    def __init__(
        self,
        run: Run,
        detect: Callable[[PyTree, Array], dict[str, Array]],
        train: Source[AnnotatedImage],
        held_out: Source[AnnotatedImage],
        prepare: Prepare,
        *,
        count: int = 500,
        batch_size: int = 32,
    ):
        """`detect(variables, images)` gives `xyxy` (`B Q 4`, in units of the sides of what `prepare` makes of an image), `labels` (`B Q`) and `scores` (`B Q`) of as many boxes in every image, with a score of 0 for what is none. Measured are at most `count` images, of which IoU is the same whether stretched, letterboxed or as they were."""
        self.train, self.prepare, self.classes = train, prepare, held_out.info.classes
        self.images = [prepare.small(example) for example in evenly_spaced(held_out, count)]
        self.true = [image.boxes for image in self.images]
        self._detect = run.layout.inference(detect, batch_size)
        self.found = Latest(self._found)
        """`(variables)` to what is found in each image; computed once for the same variables."""

    def _found(self, variables: PyTree) -> list[Detections]:
        found = self._detect(variables, (self.prepare.process(image.image) for image in self.images))
        columns = (found["xyxy"].astype(np.float32), found["labels"], found["scores"].astype(np.float32))
        return [Detections(*row) for row in zip(*columns)]

    def evaluate(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """`ap`, `ap50`, `ap75` and `recall`, as COCO defines them (`jaxdl.metrics.AveragePrecision`)."""
        return self._score(self.found(variables))

    def conclude(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """What a detector gets that says of every image what is most frequent in those to train on, as `constant_ap` and so on: the network has to show more."""
        boxes: list[Boxes] = [self.prepare.place(example).boxes for example in evenly_spaced(self.train, FITTED)]
        constant = constant_detections(boxes)
        return {f"constant_{name}": value for name, value in self._score([constant] * len(self.true)).items()}

    def _score(self, found: list[Detections]) -> Report:
        score = average_precision(found, self.true, len(self.classes))
        return {"ap": score.ap, "ap50": score.ap50, "ap75": score.ap75, "recall": score.recall}

    def show(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """The boxes of a score above ½, with the true ones dashed."""
        sure = [each.above(0.5) for each in self.found(variables)[:SHOWN]]
        name = lambda label, score: f"{self.classes[label]} {score:.0%}"
        named = [(each.xyxy, [name(*pair) for pair in zip(each.labels, each.scores)]) for each in sure]
        titles = [f"{len(true)} there, {len(each)} found" for true, each in zip(self.true, sure)]
        true = [boxes.xyxy for boxes in self.true[:SHOWN]]
        return {"boxes": figures.boxes([image.image for image in self.images[:SHOWN]], titles, named, true=true)}
