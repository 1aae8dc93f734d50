"""Average precision against values worked out by hand, loops, and what must hold."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data import Boxes
from jaxdl.errors import UserError
from jaxdl.metrics import Detections, average_precision, box_iou, constant_detections

A, B, C = [0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.8], [0.0, 0.6, 0.3, 1.0]


def there(*boxes: list[float], labels: list[int] | None = None) -> Boxes:
    labels = [0] * len(boxes) if labels is None else labels
    return Boxes(np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int32))


def found(*boxes: list[float], scores: list[float], labels: list[int] | None = None) -> Detections:
    true = there(*boxes, labels=labels)
    return Detections(true.xyxy, true.labels, np.array(scores, np.float32))


def test_average_precision_worked_out_by_hand():
    """Two of two are found, the second after something that is not there: precision 1 up to a recall of ½, ⅔ beyond, at 101 recalls."""
    score = average_precision([found(A, C, B, scores=[0.9, 0.8, 0.7])], [there(A, B)], 1)
    expected = (51 + 50 * 2 / 3) / 101
    assert (score.ap, score.ap50, score.ap75) == pytest.approx((expected,) * 3)
    assert score.recall == 1 and score.of_class == pytest.approx([expected])


def test_a_box_counts_at_the_ious_that_it_reaches():
    """An IoU of 0.62 is enough at 0.50, 0.55 and 0.60, of ten."""
    score = average_precision([found([0, 0, 0.62, 1], scores=[0.3])], [there([0, 0, 1, 1])], 1)
    assert (score.ap, score.ap50, score.ap75, score.recall) == pytest.approx((0.3, 1, 0, 0.3))


def test_classes_that_are_nowhere_are_in_no_mean_and_labels_must_be_right():
    true = [there(A, B, labels=[0, 2]), there(), there(C, labels=[2])]
    right = [found(A, B, scores=[1, 1], labels=[0, 2]), found(scores=[]), found(C, scores=[0.5], labels=[2])]
    score = average_precision(right, true, 4)
    assert (score.ap, score.ap50, score.recall) == (1, 1, 1)
    np.testing.assert_array_equal(score.of_class, [1, np.nan, 1, np.nan])
    wrong = [found(A, B, scores=[1, 1], labels=[1, 2]), *right[1:]]
    np.testing.assert_array_equal(average_precision(wrong, true, 4).of_class, [0, np.nan, 1, np.nan])


def test_what_fills_up_and_what_is_no_number_was_not_found():
    filled = found(A, C, [np.nan] * 4, B, scores=[0.9, 0, 0.8, 0.7])
    assert average_precision([filled], [there(A, B)], 1).ap == 1
    assert average_precision([found(A, scores=[0])], [there(A)], 1).ap == 0
    np.testing.assert_allclose(filled.above(0.75).xyxy, [A])


def test_a_box_that_is_inside_out_was_found_wrongly():
    """COCO's own tools take its negative area for one that is not asked for, and forgive it."""
    inside_out = found([0.3, 0.1, 0.1, 0.3], A, scores=[0.9, 0.8])
    assert average_precision([inside_out], [there(A)], 1).ap == pytest.approx(0.5)


def brute_ap50(detections: list[Detections], true: list[Boxes]) -> float:
    """For one class: each box, the surest first, takes the nearest free true one of its image; precision is made to fall only, and read at 101 recalls."""
    ranked = sorted(((s, image, i) for image, each in enumerate(detections) for i, s in enumerate(each.scores)), reverse=True)
    taken, hits = set(), []
    for _, image, index in ranked:
        overlaps = box_iou(detections[image].xyxy[index : index + 1].astype(np.float64), true[image].xyxy.astype(np.float64))[0]
        free = [(iou, j) for j, iou in enumerate(overlaps) if iou >= 0.5 and (image, j) not in taken]
        hits.append(bool(free))
        if free:
            taken.add((image, max(free)[1]))
    total, points = sum(map(len, true)), []
    for rank in range(1, len(hits) + 1):
        points.append((sum(hits[:rank]) / total, sum(hits[:rank]) / rank))
    return float(np.mean([max((p for r, p in points if r >= level), default=0) for level in np.linspace(0, 1, 101)]))


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_average_precision_at_one_half_is_the_loop(seed):
    random = np.random.default_rng(seed)

    def place(count: int) -> np.ndarray:
        corners = random.uniform(0, 0.6, (count, 2))
        return np.concatenate([corners, corners + random.uniform(0.1, 0.4, (count, 2))], 1).astype(np.float32)

    true = [Boxes(place(n), np.zeros(n, np.int32)) for n in (3, 1, 0, 4)]
    near = [np.concatenate([each.xyxy + random.normal(0, 0.03, each.xyxy.shape), place(2)]).astype(np.float32) for each in true]
    scores = np.split(random.permutation(16).astype(np.float32) + 1, np.cumsum([5, 3, 2]))
    detections = [Detections(boxes, np.zeros(len(boxes), np.int32), each) for boxes, each in zip(near, scores)]
    assert average_precision(detections, true, 1).ap50 == pytest.approx(brute_ap50(detections, true), abs=1e-9)


def test_a_constant_detector_finds_what_is_always_there_and_little_else():
    true = [there(A, B, labels=[0, 1])] * 6
    constant = constant_detections(true)
    assert len(constant) == 2 and average_precision([constant] * 6, true, 2).ap == 1
    random = np.random.default_rng(0)
    anywhere = [there([x, y, x + 0.1, y + 0.1]) for x, y in random.uniform(0, 0.9, (60, 2)).tolist()]
    constant = constant_detections(anywhere[:30], 10)
    assert len(constant) == 10 and average_precision([constant] * 30, anywhere[30:], 1).ap50 < 0.2


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(UserError, match="no box to be found"):
        average_precision([found(A, scores=[1])], [there()], 1)
    with pytest.raises(UserError, match="no box to be found"):
        constant_detections([there()])
    with pytest.raises(UserError, match="labels from 0 to 2, and there are 2 classes"):
        average_precision([found(A, scores=[1], labels=[2])], [there(A)], 2)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"pip install 'jaxdl\[detection\]'"):
        average_precision([found(A, scores=[1])], [there(A)], 1)
