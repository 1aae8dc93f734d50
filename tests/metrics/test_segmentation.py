"""Metrics of pixels against scikit-learn, over all images at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

from jaxdl.metrics import IGNORE, class_counts, class_dice, class_iou, mean_dice, mean_iou, pixel_accuracy


@given(st.integers(0, 10_000), st.integers(2, 5))
def test_metrics_of_pixels_are_those_of_scikit_learn(seed, num_classes):
    random = np.random.default_rng(seed)
    true = random.integers(0, num_classes, (4, 6, 5))
    predicted = np.where(random.random(true.shape) < 0.6, true, random.integers(0, num_classes, true.shape))
    true[random.random(true.shape) < 0.2] = IGNORE
    counts = sum(class_counts(*image, num_classes) for image in zip(true, predicted))
    flat, found = true[true != IGNORE], predicted[true != IGNORE]
    labels = range(num_classes)
    np.testing.assert_array_equal(counts, confusion_matrix(flat, found, labels=labels))
    occur = sorted(set(flat) | set(found))
    np.testing.assert_allclose(class_iou(counts)[occur], jaccard_score(flat, found, labels=occur, average=None, zero_division=0))
    np.testing.assert_allclose(class_dice(counts)[occur], f1_score(flat, found, labels=occur, average=None, zero_division=0))
    assert mean_iou(counts) == pytest.approx(jaccard_score(flat, found, labels=occur, average="macro", zero_division=0))
    assert mean_dice(counts) == pytest.approx(f1_score(flat, found, labels=occur, average="macro", zero_division=0))
    assert pixel_accuracy(counts) == pytest.approx(accuracy_score(flat, found))


def test_an_image_with_one_pixel_of_a_class_weighs_one_pixel():
    """The mean over images would be (1 + 0) / 2 for class 1, where 99 of its 100 pixels are right."""
    true, predicted = np.zeros((2, 10, 10), np.int32), np.zeros((2, 10, 10), np.int32)
    true[0].flat[:99] = predicted[0].flat[:99] = 1
    true[1, 0, 0] = 1
    counts = sum(class_counts(*image, 2) for image in zip(true, predicted))
    np.testing.assert_allclose(class_iou(counts), [100 / 101, 0.99])


def test_a_class_that_is_nowhere_is_in_no_mean_and_one_that_is_only_predicted_is():
    counts = class_counts(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]), 4)
    np.testing.assert_array_equal(class_iou(counts), [1, 0.5, 0, np.nan])
    assert mean_iou(counts) == 0.5 and mean_dice(counts) == pytest.approx((1 + 2 / 3 + 0) / 3)
    nothing = class_counts(np.full(3, IGNORE), np.zeros(3, np.int32), 2)
    assert np.isnan([mean_iou(nothing), mean_dice(nothing), pixel_accuracy(nothing)]).all()


@pytest.mark.parametrize("true, predicted", [([2], [0]), ([0], [2]), ([0], [IGNORE]), ([-1], [0])])
def test_other_classes_are_refused(true, predicted):
    with pytest.raises(ValueError, match="not all among the 2"):
        class_counts(np.array(true), np.array(predicted), 2)
