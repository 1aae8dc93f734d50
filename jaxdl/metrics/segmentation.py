"""How well every pixel is told apart, counted over a whole set of images: no image weighs more for having few pixels of a class."""

import numpy as np
from jaxtyping import Float, Int, Int64, Integer

IGNORE = 255
"""The class of pixels that nobody knows, and that do not count."""


def class_counts(
    true: Integer[np.ndarray, "*shape"], predicted: Integer[np.ndarray, "*shape"], num_classes: int
) -> Int64[np.ndarray, "C C"]:
    """How many pixels of each class, downwards, were taken for each, across; those of which the true class is `IGNORE` are left out. Counts of several images add up to those of all.

    Raises `ValueError` for other classes than 0 to `num_classes − 1`.
    """
    known = true != IGNORE
    rows, columns = true[known].astype(np.int64), predicted[known].astype(np.int64)
    if rows.size and not 0 <= min(rows.min(), columns.min()) <= max(rows.max(), columns.max()) < num_classes:
        raise ValueError(f"classes of pixels are not all among the {num_classes} from 0 on, nor {IGNORE}")
    return np.bincount(rows * num_classes + columns, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(counts: Int[np.ndarray, "C C"]) -> Float[np.ndarray, "C"]:
    """Intersection over union of what is of each class and what was taken for it, from 0 to 1 (Everingham et al. 2010); NaN for a class that is in neither."""
    both = np.diag(counts)
    return _ratio(both, counts.sum(0) + counts.sum(1) - both)


def class_dice(counts: Int[np.ndarray, "C C"]) -> Float[np.ndarray, "C"]:
    """Twice the intersection over the sum of both sizes, from 0 to 1 (Dice 1945), which is `2 IoU / (1 + IoU)`; NaN for a class that is in neither."""
    return _ratio(2 * np.diag(counts), counts.sum(0) + counts.sum(1))


def mean_iou(counts: Int[np.ndarray, "C C"]) -> float:
    """The mean of `class_iou` over the classes that occur; NaN where no pixel was counted."""
    return _mean(class_iou(counts))


def mean_dice(counts: Int[np.ndarray, "C C"]) -> float:
    """The mean of `class_dice` over the classes that occur; NaN where no pixel was counted."""
    return _mean(class_dice(counts))


def pixel_accuracy(counts: Int[np.ndarray, "C C"]) -> float:
    """The share of pixels whose class is the right one; NaN where no pixel was counted. Where most are background, to say so everywhere is most of the way to 1."""
    return float(_ratio(np.trace(counts), counts.sum()))


def _ratio(part: np.ndarray | np.generic, whole: np.ndarray | np.generic) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean(values: Float[np.ndarray, "C"]) -> float:
    return float(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else float("nan")
