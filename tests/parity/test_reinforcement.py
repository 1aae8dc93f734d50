"""What agents learn by, beside rlax, torch's distributions, and the objectives as stable-baselines3 writes them in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from versus_torch import assert_same, normal, torch

from jaxdl.distributions import Categorical, Normal, TanhNormal
from jaxdl.losses import (
    clipped_surrogate,
    clipped_value_loss,
    dueling,
    generalized_advantages,
    policy_change,
    q_targets,
    td_errors,
)

ROWS = 12


def test_advantages_are_those_of_rlax():
    rlax = pytest.importorskip("rlax")
    rewards, values = map(jnp.asarray, normal(0, (ROWS,), (ROWS + 1,)))
    ended = np.random.default_rng(0).random(ROWS) < 0.2
    ours = lambda r, v: generalized_advantages(r, v[:-1], v[1:], jnp.asarray(ended), jnp.asarray(ended), 0.9, 0.8)
    theirs = lambda r, v: rlax.truncated_generalized_advantage_estimation(r, 0.9 * (1 - ended), 0.8, v)
    np.testing.assert_allclose(ours(rewards, values), theirs(rewards, values), rtol=1e-5, atol=1e-5)
    gradient = lambda fn: jax.grad(lambda r, v: jnp.sum(jnp.sin(fn(r, v))), argnums=(0, 1))(rewards, values)
    for own, their in zip(gradient(ours), gradient(theirs)):
        np.testing.assert_allclose(own, their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double", [True, False])
def test_errors_of_q_learning_are_those_of_rlax(double):
    rlax = pytest.importorskip("rlax")
    values, online, target = map(jnp.asarray, normal(1, *[(ROWS, 4)] * 3))
    rewards, actions = jnp.asarray(normal(2, (ROWS,))[0]), jnp.asarray(np.random.default_rng(0).integers(0, 4, ROWS))
    discounts = jnp.where(np.random.default_rng(1).random(ROWS) < 0.3, 0, 0.9)
    ours = lambda values: td_errors(values, actions, q_targets(rewards, discounts, target, online if double else None))
    if double:
        theirs = lambda values: jax.vmap(rlax.double_q_learning)(values, actions, rewards, discounts, target, online)
    else:
        theirs = lambda values: jax.vmap(rlax.q_learning)(values, actions, rewards, discounts, target)
    np.testing.assert_allclose(ours(values), theirs(values), rtol=1e-5, atol=1e-5)
    gradient = lambda fn: jax.grad(lambda values: jnp.square(fn(values)).mean())(jnp.asarray(values))
    np.testing.assert_allclose(gradient(ours), gradient(theirs), rtol=1e-5, atol=1e-6)


def test_errors_of_q_learning_are_those_of_torch():
    """Double, as van Hasselt et al. write it; the target has no gradient."""
    values, online, target, rewards = normal(3, (ROWS, 4), (ROWS, 4), (ROWS, 4), (ROWS,))
    actions = np.random.default_rng(0).integers(0, 4, ROWS)

    def theirs(values, online, target, rewards):
        with torch.no_grad():
            best = target.gather(1, online.argmax(1, keepdim=True))[:, 0]
            wanted = rewards + 0.9 * best
        return torch.nn.functional.mse_loss(values.gather(1, torch.tensor(actions)[:, None])[:, 0], wanted) + 0 * (
            online.sum() + target.sum() + rewards.sum()
        )

    def ours(values, online, target, rewards):
        return jnp.square(
            td_errors(values, jnp.asarray(actions), q_targets(rewards, jnp.full_like(rewards, 0.9), target, online))
        ).mean()

    assert_same(ours, theirs, values, online, target, rewards)


def test_a_dueling_head_is_torchs():
    assert_same(
        lambda v, a: jnp.sin(dueling(v, a)).sum(),
        lambda v, a: torch.sin(v + a - a.mean(-1, keepdim=True)).sum(),
        *normal(0, (ROWS, 1), (ROWS, 4)),
    )


def test_the_objectives_of_ppo_are_those_of_torch():
    log_ratio, advantages, values, old, targets = normal(4, *[(ROWS,)] * 5)
    log_ratio *= 0.3

    def surrogate(log_ratio, advantages):
        ratio = torch.exp(log_ratio)
        return -torch.min(advantages * ratio, advantages * torch.clamp(ratio, 0.8, 1.2)).mean()

    assert_same(lambda r, a: clipped_surrogate(r, a, 0.2), surrogate, log_ratio, advantages)

    def value(values, old, targets):
        clipped = old + torch.clamp(values - old, -0.2, 0.2)
        return 0.5 * torch.max((values - targets) ** 2, (clipped - targets) ** 2).mean()

    assert_same(lambda v, o, t: clipped_value_loss(v, o, t, 0.2), value, values, old, targets)
    tensor = torch.tensor(log_ratio)
    divergence, clipped = policy_change(jnp.asarray(log_ratio), 0.2)
    np.testing.assert_allclose(
        divergence, ((torch.exp(tensor) - 1) - tensor).mean(), rtol=1e-5
    )  # As stable-baselines3 and CleanRL log it.
    np.testing.assert_allclose(clipped, ((torch.exp(tensor) - 1).abs() > 0.2).float().mean(), rtol=1e-6)


def test_distributions_are_those_of_torch():
    logits, mean, log_deviation, action = normal(5, (ROWS, 4), (ROWS, 3), (ROWS, 3), (ROWS, 3))
    chosen = np.random.default_rng(0).integers(0, 4, ROWS)
    theirs = torch.distributions
    assert_same(
        lambda x: jnp.stack([Categorical(x).log_prob(jnp.asarray(chosen)), Categorical(x).entropy()]).sum(),
        lambda x: (theirs.Categorical(logits=x).log_prob(torch.tensor(chosen)) + theirs.Categorical(logits=x).entropy()).sum(),
        logits,
    )

    def independent(mean, log_deviation):
        return theirs.Independent(theirs.Normal(mean, torch.exp(log_deviation)), 1)

    assert_same(
        lambda m, d, x: jnp.sin(Normal(m, d).log_prob(x)).sum() + Normal(m, d).entropy().sum(),
        lambda m, d, x: torch.sin(independent(m, d).log_prob(x)).sum() + independent(m, d).entropy().sum(),
        mean, log_deviation, action,
    )  # fmt: skip


def test_log_probabilities_under_the_tangent_are_those_of_torch():
    """Through the draw, as the actor is trained."""
    mean, log_deviation, noise = normal(6, *[(ROWS, 3)] * 3)

    def theirs(mean, log_deviation):
        inner = torch.distributions.Normal(mean, torch.exp(log_deviation))
        squashed = torch.distributions.TransformedDistribution(inner, torch.distributions.TanhTransform(cache_size=1))
        before = mean + torch.exp(log_deviation) * torch.tensor(noise, dtype=mean.dtype)
        return squashed.log_prob(squashed.transforms[0](before)).sum(-1).sin().sum()

    class Fixed(Normal):
        def sample(self, key):
            return self.mean + jnp.exp(self.log_deviation) * noise

    def ours(mean, log_deviation):
        action, log_prob = TanhNormal(Fixed(mean, log_deviation)).sample_and_log_prob(jax.random.key(0))
        return jnp.sin(log_prob).sum() + 0 * action.sum()

    assert_same(ours, theirs, mean, log_deviation, tolerance=2e-5)


def test_where_the_tangent_rounds_to_1_log_probabilities_are_still_right():
    """20 is as far from 0 as the paper's networks come: in float32 its tangent is 1, and `log(1 − 1²)` would be −∞."""
    policy = TanhNormal(Normal(jnp.full((1, 1), 20.0), jnp.full((1, 1), -20.0)))
    action, log_prob = policy.sample_and_log_prob(jax.random.key(0))
    with jax.enable_x64(True):
        before = np.float64(20.0)
        slope = 2 * (np.log(2) - before - np.log1p(np.exp(-2 * before)))
    assert action == 1 and abs((policy.normal.log_prob(policy.normal.sample(jax.random.key(0))) - slope) - log_prob)[0] < 1e-4
