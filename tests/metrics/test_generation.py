"""Metrics of generated sets against closed forms, scipy and loops over all pairs."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from jaxdl.errors import UserError
from jaxdl.metrics import frechet_distance, inception_score, kernel_distance, precision_recall


def some(seed: int, count: int, size: int, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, size)) @ random.normal(size=(size, size)) + shift


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_frechet_distance_is_that_of_the_matrix_root(seed, size):
    a, b = some(seed, 40, size), some(seed + 1, 55, size, shift=0.7)
    (m, s), (n, t) = ((x.mean(0), np.atleast_2d(np.cov(x.T))) for x in (a, b))
    root = scipy.linalg.sqrtm(s @ t)
    expected = ((m - n) ** 2).sum() + np.trace(s + t - 2 * np.real(root))
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6, atol=1e-8)


def test_frechet_distance_of_gaussians_of_independent_coordinates_is_known():
    """`Σ (μ − ν)² + (σ − τ)²`; examples are moved so that their means and deviations are exact."""
    random = np.random.default_rng(0)

    def exact(mean: list[float], deviation: list[float]) -> np.ndarray:
        white = random.normal(size=(500, 3))
        white = white - white.mean(0)
        white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
        return white * deviation + mean

    distance = frechet_distance(exact([0, 1, 2], [1, 2, 3]), exact([0, 3, 1], [4, 2, 1]))
    np.testing.assert_allclose(distance, (0 + 4 + 1) + (9 + 0 + 4), rtol=1e-9)


def test_frechet_distance_of_fewer_examples_than_features():
    features = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    assert frechet_distance(features, features) < 1e-4  # Of a trace of 64: a root loses half of the digits.
    np.testing.assert_allclose(frechet_distance(features, features + 0.5), 64 * 0.25, rtol=1e-4)
    far = features * 1e4 + 1e6  # What float32 moments would lose.
    np.testing.assert_allclose(frechet_distance(far, far + 1e4), 64e8, rtol=1e-3)


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_inception_score_is_the_exponential_of_a_mutual_information(seed, splits):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.full(5, 0.3), 23)
    probabilities[::4] = np.eye(5)[random.integers(0, 5, 6)]
    values = []
    for part in np.array_split(probabilities, splits):
        marginal = part.mean(0)
        divergences = [sum(p * np.log(p / q) for p, q in zip(row, marginal) if p > 0) for row in part]
        values.append(np.exp(np.mean(divergences)))
    np.testing.assert_allclose(inception_score(probabilities, splits), (np.mean(values), np.std(values)), rtol=1e-9, atol=1e-12)


def test_inception_score_goes_from_one_to_the_number_of_classes():
    np.testing.assert_allclose(inception_score(np.tile(np.eye(10), (10, 1))), (10, 0), atol=1e-9)
    np.testing.assert_allclose(inception_score(np.full((50, 10), 0.1)), (1, 0), atol=1e-9)
    np.testing.assert_allclose(inception_score(np.tile(np.eye(10)[0], (50, 1))), (1, 0), atol=1e-9)  # One class alone.


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9), st.integers(1, 4))
def test_kernel_distance_is_the_double_loop(seed, count, others, block):
    a, b = some(seed, count, 3), some(seed + 1, others, 3, shift=0.3)
    kernel = lambda x, y: (sum(p * q for p, q in zip(x, y)) / 3 + 1) ** 3
    within = lambda x: np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    expected = within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    np.testing.assert_allclose(kernel_distance(a, b, block=block), expected, rtol=1e-9, atol=1e-7)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    values = [kernel_distance(*np.split(np.random.default_rng(seed).normal(size=(100, 4)), 2)) for seed in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200) and min(values) < 0


@given(st.integers(0, 10_000), st.integers(5, 12), st.integers(5, 12), st.integers(1, 4), st.integers(1, 5))
def test_precision_and_recall_are_the_double_loop(seed, count, others, k, block):
    real, generated = some(seed, count, 2), some(seed + 1, others, 2, shift=0.5)
    distance = lambda x, y: float(np.sqrt(((x - y) ** 2).sum()))

    def share(examples: np.ndarray, manifold: np.ndarray) -> float:
        radius = [sorted(distance(x, y) for j, y in enumerate(manifold) if j != i)[k - 1] for i, x in enumerate(manifold)]
        return float(np.mean([any(distance(x, y) <= r for y, r in zip(manifold, radius)) for x in examples]))

    np.testing.assert_allclose(precision_recall(real, generated, k, block), (share(generated, real), share(real, generated)))


def test_precision_is_faithfulness_and_recall_is_coverage():
    random = np.random.default_rng(0)
    real = np.concatenate([random.normal(size=(200, 2)), random.normal(size=(200, 2)) + 50])
    one_mode = random.normal(size=(400, 2))
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.95 and 0.4 < recall <= 0.5
    scattered = random.uniform(-20, 70, (400, 2))
    precision, recall = precision_recall(real, scattered)
    assert precision < 0.2 and recall > 0.9
    assert precision_recall(real, real) == (1, 1)


def test_too_few_examples_are_refused():
    few = np.zeros((1, 2))
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(few, few)
    with pytest.raises(UserError, match="at least 2"):
        kernel_distance(few, few)
    with pytest.raises(UserError, match="at least 4"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
    for splits in (0, 4):
        with pytest.raises(UserError, match="splits of 3"):
            inception_score(np.full((3, 2), 0.5), splits)
