"""Annotated images of which a task can make something."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxdl.data import ANNOTATED_IMAGES, AnnotatedImage, Cached, Source
from jaxdl.errors import UserError
from jaxdl.training import Run


def open_annotated(
    run: Run, wanted: Callable[[AnnotatedImage, Sequence[str]], bool], reason: str, **options: Any
) -> tuple[Source[AnnotatedImage], Source[AnnotatedImage]]:
    """The images to train on and those held out, as the run's config names them, of whose annotations `wanted(example, classes)` is true; each of those to train on is decoded once. Of a folder the others are left out, since they "have no …", as `reason` says; in other data all images have the same annotations. `options` are those of `ANNOTATED_IMAGES`. Raises `UserError` for data that is not there, and where none is wanted."""
    config = run.config
    options |= dict(data_dir=config.data_dir, resolution=config.resolution)
    opened = []
    for source in ANNOTATED_IMAGES.open(config.data, config.eval_data, **options):
        fits = lambda example, classes=source.info.classes: wanted(example, classes)
        if source.info.spec.startswith("folder:"):
            source = source.where(fits, reason)
        if not len(source) or not fits(source.annotations(0)):
            raise UserError(f"{source.info.spec}: its images {reason}: choose other data")
        opened.append(source)
    run.reads(*opened)
    train, held_out = opened
    return Cached(train), held_out
