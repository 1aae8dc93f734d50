"""Semantic segmentation: instance masks to a class for each pixel, intersection over union, and pictures of what was taken for what."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Int32, Integer, Key, PyTree, UInt8
from PIL import Image as Picture

from jaxdl import figures
from jaxdl.data import AnnotatedImage, Source, evenly_spaced
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.metrics import IGNORE, class_counts, mean_dice, mean_iou, pixel_accuracy
from jaxdl.tasks.detection import open_boxes
from jaxdl.tasks.memory import Latest
from jaxdl.training import Report, Run

Augment = Callable[[AnnotatedImage, np.random.Generator], AnnotatedImage]

FITTED, PIXELS, SHOWN = 200, 100_000, 8
"""Training images and pixels of them that a classifier of single pixels learns from, and images that are drawn, at most."""


def open_masks(run: Run, **options: Any) -> tuple[Source[AnnotatedImage], Source[AnnotatedImage]]:
    """As `jaxdl.tasks.detection.open_boxes`, with masks. Raises `UserError` also for data whose first image has none, and for more than 254 classes."""
    opened = open_boxes(run, masks=True, **options)
    for source in opened:
        if source[0].masks is None:
            raise UserError(f"{source.info.spec}: its images have no masks: choose other data")
        if len(class_names(source)) > IGNORE:
            raise UserError(f"{source.info.spec} has {len(source.info.classes)} classes: at most {IGNORE - 1} can be told apart")
    return opened


def class_names(source: Source[AnnotatedImage]) -> tuple[str, ...]:
    """Of the classes of pixels: 0 is what is in no mask, `c + 1` what is in one with the label `c`."""
    return ("background", *source.info.classes)


def class_map(
    example: AnnotatedImage, augment: Callable[[AnnotatedImage], AnnotatedImage] = lambda e: e
) -> tuple[np.ndarray, Int32[np.ndarray, "H W"]]:
    """The image, and the class of each of its pixels as `class_names` counts them, after `augment`; later masks lie on earlier ones. What augmentation brought in from beyond the image's edge is `IGNORE`."""
    height, width = example.image.shape[:2]
    whole = np.ones((1, height, width), bool)
    # Without boxes no mask is dropped that leaves the image, so that labels go on belonging to them.
    moved = augment(dataclasses.replace(example, boxes=None, masks=np.concatenate([whole, example.masks])))
    inside, masks = moved.masks[0], moved.masks[1:]
    classes = np.where(inside, 0, IGNORE).astype(np.int32)
    for mask, label in zip(masks, example.boxes.labels):
        classes[mask] = label + 1
    return moved.image, classes


def resize_classes(classes: Integer[np.ndarray, "H W"], size: tuple[int, int]) -> Int32[np.ndarray, "h w"]:
    """To a height and a width, each pixel with the class of the nearest one: classes have no mean."""
    if classes.shape == size:
        return classes.astype(np.int32)
    return np.asarray(Picture.fromarray(classes.astype(np.uint8)).resize(size[::-1], Picture.Resampling.NEAREST), np.int32)


def row(
    example: AnnotatedImage, rng: np.random.Generator, *, process: ImageProcessor, augment: Augment = lambda example, rng: example
) -> dict[str, np.ndarray]:
    """`image`, `H W C` float32, and `classes`, `H W` int32: what `run.batches` makes batches of. Pixels that are `IGNORE` must not count in a loss."""
    image, classes = class_map(example, lambda each: augment(each, rng))
    return {"image": process(image), "classes": resize_classes(classes, process.size)}


class Segmentation:
    """How well the pixels of held-out images are told apart: what `train` takes as `evaluate`, `show` and `conclude`."""

    def __init__(
        self,
        run: Run,
        apply: Callable[[PyTree, Array], Array],
        train: Source[AnnotatedImage],
        held_out: Source[AnnotatedImage],
        process: ImageProcessor,
        *,
        count: int = 500,
        batch_size: int = 32,
    ):
        """`apply(variables, images)` gives the logits `B H W C` of the classes of each pixel of images as `process` prepares them. Measured are at most `count` images at their own size, to which what is predicted is brought. Raises `UserError` for a processor that crops."""
        if process.resize_mode != "stretch":
            raise UserError("an image processor that crops leaves pixels without a class: give one with resize_mode='stretch'")
        self.train, self.held_out, self.count = train, held_out, count
        self.process, self.classes = process, class_names(held_out)
        # At the size that the network sees, and in 8 bits: a photograph and its classes take 84 MB otherwise.
        small = lambda image, classes: (process.resize(image), classes.astype(np.uint8))
        self.images, self.true = zip(*(small(*class_map(example)) for example in evenly_spaced(held_out, count)))
        self._classify = run.layout.inference(lambda variables, images: apply(variables, images).argmax(-1), batch_size)
        self.predicted = Latest(self._predicted)
        """`(variables)` to the class of each pixel of each image as the network sees it; computed once for the same variables."""

    def _predicted(self, variables: PyTree) -> UInt8[np.ndarray, "N H W"]:
        return self._classify(variables, map(self.process, self.images)).astype(np.uint8)

    def evaluate(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """`mean_iou`, `pixel_accuracy` and `dice`, counted over all pixels of all images."""
        return self._score(self.predicted(variables))

    def conclude(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """What a decision tree gets that sees one pixel and nothing around it, as `single_pixel_mean_iou` and so on: the network has to show more."""
        from sklearn.tree import DecisionTreeClassifier  # Takes half a second to import.

        images, classes = zip(*(class_map(example) for example in evenly_spaced(self.train, FITTED)))
        colors, labels = (
            np.concatenate([image.reshape(-1, image.shape[-1]) for image in images]),
            np.concatenate([each.ravel() for each in classes]),
        )
        chosen = np.linspace(0, len(labels) - 1, min(len(labels), PIXELS)).astype(np.int64)
        tree = DecisionTreeClassifier(max_leaf_nodes=256, random_state=0).fit(colors[chosen], labels[chosen])
        images = (example.image for example in evenly_spaced(self.held_out, self.count))
        told = (tree.predict(image.reshape(-1, image.shape[-1])).reshape(image.shape[:2]) for image in images)
        return {f"single_pixel_{name}": value for name, value in self._score(told).items()}

    def _score(self, predicted: Iterable[Integer[np.ndarray, "_ _"]]) -> Report:
        """Of classes of pixels, which are brought to the size of each image."""
        pairs = ((true, resize_classes(found, true.shape)) for true, found in zip(self.true, predicted))
        counts = sum(class_counts(true, found, len(self.classes)) for true, found in pairs)
        return {"mean_iou": mean_iou(counts), "pixel_accuracy": pixel_accuracy(counts), "dice": mean_dice(counts)}

    def show(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """What is in some images, and beside it what was found."""
        masks: list[Bool[np.ndarray, "C H W"]] = []
        for true, found in zip(self.true[:SHOWN], self.predicted(variables)[:SHOWN]):
            pair = (resize_classes(true, self.process.size), found)
            masks += [np.stack([classes == number for number in range(1, len(self.classes))]) for classes in pair]
        images = [image for image in self.images[:SHOWN] for _ in range(2)]
        titles = ["true", "predicted"] * (len(images) // 2)
        return {"masks": figures.masks(images, masks, [self.classes[1:]] * len(images), titles)}
