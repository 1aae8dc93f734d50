"""How often the most likely class is the right one."""

import numpy as np
from jaxtyping import Float, Int


def accuracy(scores: Float[np.ndarray, "B C"], labels: Int[np.ndarray, "B"]) -> float:
    """The share of rows whose highest score is that of the label."""
    return float((scores.argmax(axis=1) == labels).mean())
