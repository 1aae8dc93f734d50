"""Average precision of boxes that were found, as COCO defines it (Lin et al. 2014, arXiv:1405.0312; cocodataset.org/#detection-eval), by faster-coco-eval."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxdl.data.elements import Boxes
from jaxdl.errors import UserError

MOST = 100
"""Of the boxes that were found in an image so many of the highest scores count."""


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """Boxes that were found in an image."""

    xyxy: Float[np.ndarray, "N 4"]
    """`(left, top, right, bottom)`, in the units of the true ones."""
    labels: Int[np.ndarray, "N"]
    scores: Float[np.ndarray, "N"]
    """The higher, the surer. What has 0 was not found: it fills arrays of one size, and does not count."""

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, least: float) -> "Detections":
        """Those of a higher score than `least`, and with coordinates that are numbers; the surest first."""
        order = np.argsort(-self.scores, kind="stable")
        kept = order[(self.scores[order] > least) & np.isfinite(self.xyxy[order]).all(1)]
        return Detections(self.xyxy[kept], self.labels[kept], self.scores[kept])


@dataclasses.dataclass(frozen=True, eq=False)
class AveragePrecision:
    """What COCO's evaluation says, each from 0 to 1, over images of all sizes together."""

    ap: float
    """Mean over classes, and over the ten IoU from 0.50 to 0.95 from which a box counts as found."""
    ap50: float
    """At an IoU of 0.50."""
    ap75: float
    recall: float
    """Share of the true boxes that are found, averaged as `ap` is: COCO's AR with 100 boxes an image."""
    of_class: Float[np.ndarray, "C"]
    """`ap` of each class, NaN for one that has no true box; it is in no mean."""


def average_precision(found: Sequence[Detections], true: Sequence[Boxes], num_classes: int) -> AveragePrecision:
    """How well boxes were found in images, of which the i-th has `true[i]`. Sizes do not count, so that any unit will do.

    Raises `UserError` if there is no true box at all, for a label of `num_classes` or more, and if faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster  # Here, so that the rest works without it.
    except ImportError:
        raise UserError("average precision needs the package faster-coco-eval: pip install 'jaxdl[detection]'") from None
    found = [each.above(0.0) for each in found]
    labels = np.concatenate([each.labels for each in (*true, *found)]) if len(true) else np.zeros(0, np.int32)
    if not sum(map(len, true)):
        raise UserError("there is no box to be found: give images that have some")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"boxes have labels from {labels.min()} to {labels.max()}, and there are {num_classes} classes")

    images = [{"id": index} for index in range(len(true))]
    categories = [{"id": index, "name": str(index)} for index in range(num_classes)]
    truth = COCO({"images": images, "categories": categories, "annotations": _annotations(true)})
    answer = COCO({"images": images, "categories": categories, "annotations": _annotations(found)})
    evaluation = COCOeval_faster(truth, answer, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    # IoU, recall levels, classes, ranges of area (the first: all), most boxes (the last: 100); -1 where a class has no true box.
    precision = np.where(evaluation.eval["precision"] < 0, np.nan, evaluation.eval["precision"])[:, :, :, 0, -1].mean(1)
    recall = np.where(evaluation.eval["recall"] < 0, np.nan, evaluation.eval["recall"])[:, :, 0, -1]
    at_50, at_75 = np.nanmean(precision[0]), np.nanmean(precision[5])
    return AveragePrecision(
        float(np.nanmean(precision)), float(at_50), float(at_75), float(np.nanmean(recall)), precision.mean(0)
    )


def _annotations(images: Sequence[Boxes | Detections]) -> list[dict]:
    """COCO's, whose boxes are (left, top, width, height), numbered from 1: 0 would be taken for "no partner". A box whose right is left of its left has no area: a negative one would be outside of COCO's range, and not count as wrong."""
    annotations: list[dict] = []
    for image, boxes in enumerate(images):
        places = np.concatenate([boxes.xyxy[:, :2], np.maximum(boxes.xyxy[:, 2:] - boxes.xyxy[:, :2], 0)], 1).astype(np.float64)
        scores = boxes.scores.tolist() if isinstance(boxes, Detections) else [1.0] * len(boxes)
        for place, label, score in zip(places.tolist(), boxes.labels.tolist(), scores):
            common = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": place}
            annotations.append(common | {"area": place[2] * place[3], "iscrowd": 0, "score": score})
    return annotations


def constant_detections(true: Sequence[Boxes], count: int = MOST) -> Detections:
    """What a detector would best say of every image if it saw none: the centres of as many clusters of all boxes, of the most frequent class of each, scored by its share. A network that has learnt to look beats it.

    `true` are the boxes of training images, in units of their sides. Raises `UserError` if there are none.
    """
    from sklearn.cluster import KMeans  # Takes half a second to import.

    xyxy, labels = (np.concatenate([getattr(boxes, name) for boxes in true] or [[]]) for name in ("xyxy", "labels"))
    if not len(labels):
        raise UserError("there is no box to be found: give images that have some")
    count = min(count, len(np.unique(np.column_stack([xyxy, labels]), axis=0)))
    # Boxes of different classes are at least 4 apart, those of one class at most 2, so that a cluster keeps to one class.
    apart = np.column_stack([xyxy, np.eye(int(labels.max()) + 1, dtype=np.float32)[labels] * 4 / np.sqrt(2)])
    clusters = KMeans(count, n_init=1, random_state=0).fit_predict(apart)
    sizes = np.bincount(clusters, minlength=count)
    centres = np.stack([xyxy[clusters == index].mean(0) for index in range(count)]).astype(np.float32)
    classes = np.array([np.bincount(labels[clusters == index]).argmax() for index in range(count)], np.int32)
    return Detections(centres, classes, (sizes / len(labels)).astype(np.float32))
