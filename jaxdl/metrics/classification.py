"""How often the most likely class is the right one."""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxdl.data import Source


def classify(
    predict: Callable[[Iterable[np.ndarray]], Float[np.ndarray, "B C"]],
    held_out: Source,
    process: Callable[[UInt8[np.ndarray, "_ _ _"]], Float[np.ndarray, "_ _ _"]],
) -> tuple[Float[np.ndarray, "B C"], Int[np.ndarray, "B"]]:
    """The scores that `predict` gives to every picture of a labelled source, each prepared by `process`, and the labels."""
    labels = np.array([held_out[index]["label"] for index in range(len(held_out))])
    images = (process(held_out[index]["image"]) for index in range(len(held_out)))
    return predict(images).astype(np.float32), labels


def accuracy(scores: Float[np.ndarray, "B C"], labels: Int[np.ndarray, "B"]) -> float:
    """The share of rows whose highest score is that of the label."""
    return float((scores.argmax(axis=1) == labels).mean())
