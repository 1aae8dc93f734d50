"""How well boxes that were found lie on those that are there."""

import numpy as np
from jaxtyping import Float


def box_iou(first: Float[np.ndarray, "N 4"], second: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "N M"]:
    """Intersection over union of every box with every other, from 0 to 1 (Everingham et al. 2010). A box is (left, top, right, bottom) in any unit, in both sets the same; one without an area has 0 with all."""
    first, second = first[:, None], second[None]
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    shared = np.maximum(sides, 0).prod(-1)
    area = lambda boxes: np.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(-1)
    union = area(first) + area(second) - shared
    return np.divide(shared, union, out=np.zeros(shared.shape, shared.dtype), where=union > 0)


def matched_iou(found: Float[np.ndarray, "N 4"], true: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "K"]:
    """The IoU of each box with its partner, found and true ones paired so that the sum is largest (Kuhn 1955); 0 for each that has no partner, so that `K = max(N, M)`."""
    from scipy.optimize import linear_sum_assignment  # Takes half a second to import.

    overlaps = box_iou(found, true)
    result = np.zeros(max(overlaps.shape), overlaps.dtype)
    pairs = linear_sum_assignment(overlaps, maximize=True)
    result[: len(pairs[0])] = overlaps[pairs]
    return result
