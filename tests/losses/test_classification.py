"""Cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.losses import cross_entropy, soft_cross_entropy


def by_loops(logits, labels, smoothing, mask) -> float:
    """The definition, target by target, in double precision."""
    total, count = 0.0, 0
    for row, label, counts in zip(np.float64(logits).reshape(-1, logits.shape[-1]), labels.ravel(), mask.ravel()):
        if not counts:
            continue
        probabilities = np.exp(row) / np.exp(row).sum()
        wanted = np.full(len(row), smoothing / len(row))
        wanted[label] += 1 - smoothing
        total -= (wanted * np.log(probabilities)).sum()
        count += 1
    return total / max(count, 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_equals_the_loop_over_targets(smoothing):
    random = np.random.default_rng(0)
    logits = random.standard_normal((3, 4, 5), np.float32)
    labels, mask = random.integers(0, 5, (3, 4)), random.random((3, 4)) < 0.6
    given = jnp.asarray(logits), jnp.asarray(labels)
    value = cross_entropy(*given, smoothing=smoothing)
    np.testing.assert_allclose(value, by_loops(logits, labels, smoothing, np.ones_like(mask)), rtol=1e-6)
    value = cross_entropy(*given, smoothing=smoothing, mask=jnp.asarray(mask))
    np.testing.assert_allclose(value, by_loops(logits, labels, smoothing, mask), rtol=1e-6)


def test_what_is_masked_has_no_gradient_and_may_have_no_label():
    logits, labels = jnp.array([[1.0, 2.0], [jnp.inf, 0.0], [3.0, -1.0]]), jnp.array([0, -100, 1])
    mask = jnp.array([True, False, True])
    gradient = jax.grad(lambda x: cross_entropy(x, labels, mask=mask))(logits.at[1, 0].set(5.0))
    assert np.isfinite(gradient).all() and not gradient[1].any() and gradient[0].any()
    assert cross_entropy(logits, labels, mask=jnp.zeros(3, bool)) == 0


def test_huge_logits_do_no_harm_and_a_wrong_label_is_seen():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    assert cross_entropy(logits, jnp.array([0])) == 0
    assert cross_entropy(logits, jnp.array([1])) == 2e4
    assert np.isfinite(jax.grad(lambda x: cross_entropy(x, jnp.array([1])))(logits)).all()
    assert np.isnan(cross_entropy(logits, jnp.array([3])))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_that_are_shared_cost_the_shares_of_what_their_classes_cost(smoothing):
    """Cross-entropy is linear in the target; with one class it is that of the label."""
    random = np.random.default_rng(0)
    logits, labels, others = jnp.asarray(random.standard_normal((6, 5), np.float32)), *jnp.asarray(random.integers(0, 5, (2, 6)))
    one, other = (cross_entropy(logits, which, smoothing=smoothing) for which in (labels, others))
    shared = 0.3 * jnp.eye(5)[labels] + 0.7 * jnp.eye(5)[others]
    np.testing.assert_allclose(soft_cross_entropy(logits, jnp.eye(5)[labels], smoothing=smoothing), one, rtol=1e-6)
    np.testing.assert_allclose(soft_cross_entropy(logits, shared, smoothing=smoothing), 0.3 * one + 0.7 * other, rtol=1e-6)
