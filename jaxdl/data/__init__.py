"""Sources, image and text processors, pipelines: numpy and grain, no jax."""

from jaxdl.data.pipeline import eval_batches, train_batches
from jaxdl.data.sources import Cached, Source, open_labelled, open_source, open_told, some

__all__ = [
    "Cached",
    "Source",
    "eval_batches",
    "open_labelled",
    "open_source",
    "open_told",
    "some",
    "train_batches",
]
