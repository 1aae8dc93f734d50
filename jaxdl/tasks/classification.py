"""Image classification: labelled images to batches, how many are recognised, and what was taken for what."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from jaxdl import figures
from jaxdl.data import LABELLED_IMAGES, Cached, LabelledImage, Source, evenly_spaced
from jaxdl.data.image import ImageProcessor, decode
from jaxdl.errors import UserError
from jaxdl.files import local_path
from jaxdl.metrics import accuracy, classify
from jaxdl.tasks.memory import Latest
from jaxdl.tasks.resized import resized
from jaxdl.training import Report, Run

FITTED = 10_000
"""Training images that the normalisation is measured on, at most."""


def open_images(run: Run, **options: Any) -> tuple[Source[LabelledImage], Source[LabelledImage]]:
    """The images to train on, each of which is decoded once, and those held out, of the same classes, as the run's config names them. `options` are those of `LABELLED_IMAGES`. Raises `UserError` for data that is not there, or has no labels, or one class only."""
    config = run.config
    train, held_out = LABELLED_IMAGES.open(config.data, config.eval_data, data_dir=config.data_dir, **options)
    if len(train.info.classes) < 2:
        raise UserError(f"{train.info.spec} has one class only, {train.info.classes[0]}: give two or more to tell apart")
    run.reads(train, held_out)
    return Cached(train), held_out


def fit_processor(train: Source[LabelledImage], resolution: int, **fields: Any) -> ImageProcessor:
    """The processor of which the training images come out with mean 0 and deviation 1, with sides of `resolution`, or where that is 0 those of the first image."""
    size = (resolution, resolution) if resolution else train[0].image.shape[:2]
    return ImageProcessor.fit((example.image for example in evenly_spaced(train, FITTED)), size, **fields)


def as_colored_as(image: UInt8[np.ndarray, "H W 3"], process: ImageProcessor) -> UInt8[np.ndarray, "H W C"]:
    """A coloured image as it is, or its luminance where the processor is one for grey images (ITU-R BT.601)."""
    if len(process.mean) == 3:
        return image
    return np.round(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]


class Classification:
    """How well images that are held out are recognised: what `train` takes as `evaluate` and `show`."""

    def __init__(
        self,
        run: Run,
        apply: Callable[[PyTree, Array], Array],
        held_out: Source[LabelledImage],
        process: ImageProcessor,
    ):
        """`apply(variables, images)` gives the logits of images as `process` prepares them."""
        self.held_out, self.process = resized(held_out, process)
        """The held-out images at the size at which the model sees them, and what prepares these."""
        self._whole = process
        self._run, self._predict = run, run.layout.inference(apply)
        self.scores = Latest(self._scores)
        """`(variables)` to the logits of all held-out images, and their labels; computed once for the same variables."""

    def _scores(self, variables: PyTree) -> tuple[Float[np.ndarray, "B C"], Int[np.ndarray, "B"]]:
        prepared = ((self.process(example.image), example.label) for example in self.held_out)
        return classify(functools.partial(self._predict, variables), prepared)

    def answer(self, files: Sequence[str]) -> Callable[[PyTree], None] | None:
        """What says of image files which classes are the likeliest, for `train`; None where no file is asked about. Raises `UserError` for what is no image, before anything is trained."""
        if not files:
            return None
        images = [self._whole(as_colored_as(decode(local_path(file)), self._whole)) for file in files]

        def say(variables: PyTree) -> None:
            for file, logits in zip(files, self._predict(variables, images)):
                shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
                likely = np.argsort(-shares)[:3]
                self._run.say(
                    f"{file}: " + ", ".join(f"{self.held_out.info.classes[each]} {shares[each]:.2f}" for each in likely)
                )

        return say

    def evaluate(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """The share of the images that are recognised."""
        return {"test_accuracy": accuracy(*self.scores(variables))}

    def show(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """What was taken for what, and the mistakes that were made with most conviction."""
        (logits, labels), classes = self.scores(variables), self.held_out.info.classes
        return {
            "confusion": figures.confusion_matrix(labels, logits.argmax(1), classes),
            "mistakes": figures.mistakes(lambda index: self.held_out[index].image, logits, labels, classes),
        }
