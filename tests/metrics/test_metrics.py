"""Metrics against sorting by hand and scikit-learn."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from jaxdl.metrics import accuracy, recall_at


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
