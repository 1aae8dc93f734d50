"""How often the most likely class is the right one."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import Float, Int


def classify(
    predict: Callable[[Iterable[np.ndarray]], Float[np.ndarray, "B C"]], examples: Iterable[tuple[np.ndarray, int | np.integer]]
) -> tuple[Float[np.ndarray, "B C"], Int[np.ndarray, "B"]]:
    """The scores that `predict` gives to every image of pairs (image, label), and the labels. Pairs are read once, as they are needed, so that they may be decoded on the way."""
    labels: list[int] = []

    def images() -> Iterator[np.ndarray]:
        for image, label in examples:
            labels.append(int(label))
            yield image

    scores = predict(images()).astype(np.float32)
    return scores, np.array(labels, np.int64)


def accuracy(scores: Float[np.ndarray, "B C"], labels: Int[np.ndarray, "B"]) -> float:
    """The share of rows whose highest score is that of the label."""
    return float((scores.argmax(axis=1) == labels).mean())
