"""Advantages and targets against loops over episodes, that read like their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.losses import explained_variance, generalized_advantages, n_step, policy_change, standardized

DISCOUNT, DECAY = 0.9, 0.8


def trajectory(length: int = 40, seed: int = 0):
    """Rewards, values, values of what came next, ends and cuts, of one environment; where no episode ends, what came next is what is seen next."""
    random = np.random.default_rng(seed)
    rewards, values, apart = random.standard_normal((3, length)).astype(np.float32)
    terminated, ended = random.random(length) < 0.15, random.random(length) < 0.15
    ended |= terminated
    next_values = np.where(ended, apart, np.append(values[1:], apart[-1])).astype(np.float32)
    return rewards, values, next_values, terminated, ended


@pytest.mark.parametrize("seed", range(5))
def test_advantages_are_the_sum_over_the_rest_of_the_episode(seed):
    rewards, values, next_values, terminated, ended = trajectory(seed=seed)
    wanted = []
    for start in range(len(rewards)):
        total, factor = 0.0, 1.0
        for time in range(start, len(rewards)):
            # A time limit is no end: what would have come is the value of the state that was cut off at.
            to_come = 0.0 if terminated[time] else next_values[time]
            total += factor * (rewards[time] + DISCOUNT * to_come - values[time])
            factor *= DISCOUNT * DECAY
            if ended[time]:
                break
        wanted.append(total)
    found = generalized_advantages(*map(jnp.asarray, (rewards, values, next_values, terminated, ended)), DISCOUNT, DECAY)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_time_limit_counts_what_would_have_come_and_an_end_does_not():
    """Rewards of 1 for ever, whose value is 10: cut off, all advantages are 0, and where the world ends they are not."""
    ones, values = jnp.ones(5), jnp.full(5, 1 / (1 - DISCOUNT))
    last = jnp.arange(5) == 4
    cut = generalized_advantages(ones, values, values, jnp.zeros(5, bool), last, DISCOUNT, 1.0)
    np.testing.assert_allclose(cut, 0, atol=1e-5)
    ended = generalized_advantages(ones, values, values, last, last, DISCOUNT, 1.0)
    np.testing.assert_allclose(ended, -(DISCOUNT ** np.arange(5, 0, -1)) / (1 - DISCOUNT), rtol=1e-5)


def test_with_lambda_1_advantages_are_returns_less_values():
    rewards, values, next_values, _, ended = map(jnp.asarray, trajectory())
    never = jnp.zeros_like(ended)
    returns = np.zeros(len(rewards) + 1)
    returns[-1] = next_values[-1]
    chained = jnp.append(values[1:], next_values[-1])
    found = generalized_advantages(rewards, values, chained, never, never, DISCOUNT, 1.0)
    for time in reversed(range(len(rewards))):
        returns[time] = rewards[time] + DISCOUNT * returns[time + 1]
    np.testing.assert_allclose(found, returns[:-1] - values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_n_steps_stop_at_the_end_of_an_episode(steps):
    rewards, _, _, terminated, ended = trajectory(60, seed=1)
    for start in range(60 - steps):
        window = slice(start, start + steps)
        total, discount, last = n_step(*map(jnp.asarray, (rewards[window], terminated[window], ended[window])), DISCOUNT)
        wanted, factor, time = 0.0, 1.0, start
        for time in range(start, start + steps):
            wanted += factor * rewards[time]
            factor *= DISCOUNT
            if ended[time]:
                break
        np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(discount, 0.0 if terminated[time] else factor, rtol=1e-6)
        assert int(last) == time - start


def test_standardized_numbers_have_mean_0_and_deviation_1():
    x = jnp.asarray(3 + 2 * np.random.default_rng(0).standard_normal(1000), jnp.float32)
    found = np.asarray(standardized(x))
    assert abs(found.mean()) < 1e-5 and abs(found.std() - 1) < 1e-5
    assert np.isfinite(standardized(jnp.ones(5))).all()


def test_explained_variance_is_1_for_perfect_values_and_0_for_a_constant():
    targets = jnp.asarray(np.random.default_rng(0).standard_normal(50), jnp.float32)
    assert explained_variance(targets, targets) == 1 and abs(explained_variance(jnp.zeros(50), targets)) < 1e-6


def test_the_estimate_of_the_divergence_is_right_on_average_and_never_negative():
    random, old, new = np.random.default_rng(0), np.array([0.5, 0.3, 0.2]), np.array([0.45, 0.25, 0.3])
    log_ratio = np.log(new / old)[random.choice(3, 100_000, p=old)].astype(np.float32)
    found, clipped = policy_change(jnp.asarray(log_ratio), 0.2)
    assert abs(found - (old * np.log(old / new)).sum()) < 1e-3 and abs(clipped - 0.2) < 0.01
    assert policy_change(jnp.asarray(random.standard_normal(10), jnp.float32), 0.2)[0] > 0
