"""Metrics against counting by hand and other libraries."""

import itertools

import numpy as np
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from jaxdl.metrics import accuracy, bleu, box_iou, classify, matched_iou, recall_at


@given(st.integers(0, 10_000), st.integers(3, 30))
def test_recall_is_scikit_learns_top_k_accuracy(seed, size):
    similarity = np.random.default_rng(seed).normal(size=(size, size))
    recalls = recall_at(similarity, ks=(1, 2))
    for k, value in recalls.items():
        assert np.isclose(value, top_k_accuracy_score(np.arange(size), similarity, k=k))


def test_recall_with_other_targets_than_the_diagonal():
    similarity = np.array([[3.0, 2, 1], [1, 2, 3]])
    assert recall_at(similarity, np.array([1, 2]), ks=(1, 2)) == {1: 0.5, 2: 1.0}


def test_a_constant_similarity_earns_nothing():
    assert recall_at(np.ones((20, 20)), ks=(1, 10)) == {1: 0.0, 10: 0.0}


def test_accuracy_counts_the_highest_scores():
    assert accuracy(np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), np.array([1, 1, 1])) == 2 / 3


def test_classify_reads_each_example_once_and_keeps_scores_beside_labels():
    read = []

    def examples():
        for index in range(10):
            read.append(index)
            yield np.full((2, 2, 1), index, np.float32), np.int32(index % 3)

    def predict(images):  # In batches, as a layout does.
        rows = [image.mean() * np.ones(3) for image in images]
        return np.array(rows, np.float16)

    scores, labels = classify(predict, examples())
    assert read == list(range(10)) and labels.tolist() == [index % 3 for index in range(10)]
    assert scores.dtype == np.float32 and scores[:, 0].tolist() == read


@given(st.integers(0, 10_000), st.integers(0, 4), st.integers(0, 4))
def test_boxes_overlap_as_the_pixels_that_they_cover_do(seed, count, others):
    random = np.random.default_rng(seed)

    def some(count: int) -> np.ndarray:
        corners = np.sort(random.integers(0, 12, (count, 2, 2)), axis=1)  # Some of them without an area.
        return corners.reshape(count, 4).astype(np.float64)

    first, second = some(count), some(others)
    y, x = np.mgrid[:12, :12] + 0.5
    covers = lambda box: (box[0] < x) & (x < box[2]) & (box[1] < y) & (y < box[3])
    expected = np.zeros((count, others))
    for (i, one), (j, other) in itertools.product(enumerate(first), enumerate(second)):
        union = (covers(one) | covers(other)).sum()
        expected[i, j] = (covers(one) & covers(other)).sum() / union if union else 0
    np.testing.assert_allclose(box_iou(first, second), expected, atol=1e-12)
    matched = matched_iou(first, second)
    few, many = min(count, others), max(count, others)
    ways = itertools.permutations(range(many), few)
    best = max(sum(expected[(k, way[k]) if count <= others else (way[k], k)] for k in range(few)) for way in ways)
    assert len(matched) == many
    np.testing.assert_allclose(matched.sum(), best, atol=1e-12)


def test_bleu_takes_the_nearest_of_several_references():
    said = ["a dog runs on the grass", "two men are in a boat"]
    several = [["a dog runs on grass", "the dog runs on the green grass"], ["two men in a boat"]]
    value, _ = bleu(said, several)
    expected = sacrebleu.BLEU().corpus_score(said, [["a dog runs on grass", "two men in a boat"], [several[0][1], None]])
    assert value == expected.score
    assert bleu(said, [texts[0] for texts in several])[0] < value
