"""What agents learn by: advantages and targets made of rewards, and the objectives on them.

Time is the first axis, `T`; what follows it, such as environments, goes along. `terminated` says that the world ended, so that nothing is to be had after; `ended` says that the episode was over, by that or by its time limit, so that the next row is of another one. What is to be had after a time limit is the value of the observation that the episode was cut off at.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num


def generalized_advantages(
    rewards: Float[Array, "T *B"],
    values: Float[Array, "T *B"],
    next_values: Float[Array, "T *B"],
    terminated: Bool[Array, "T *B"],
    ended: Bool[Array, "T *B"],
    discount: float,
    decay: float,
) -> Float[Array, "T *B"]:
    """`A_t = δ_t + γλ A_{t+1}` within an episode, with `δ_t = r_t + γ V(s_{t+1}) − V(s_t)` (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

    `next_values` are those of the states that steps led to, the last ones of episodes among them, and so are not `values` moved by one.
    """
    surprises = rewards + discount * jnp.where(terminated, 0, next_values) - values

    def back(later: Float[Array, "*B"], now: tuple[Array, Array]) -> tuple[Array, Array]:
        surprise, ended = now
        total = surprise + discount * decay * jnp.where(ended, 0, later)
        return total, total

    return jax.lax.scan(back, jnp.zeros_like(surprises[0]), (surprises, ended), reverse=True)[1]


def standardized(x: Float[Array, "*shape"], axis_name: str | None = None) -> Float[Array, "*shape"]:
    """With mean 0 and deviation 1, over the devices of a mapped axis too."""
    over = lambda value: value if axis_name is None else jax.lax.pmean(value, axis_name)
    mean = over(x.mean())
    return (x - mean) * jax.lax.rsqrt(over(jnp.square(x - mean).mean()) + 1e-8)


def clipped_surrogate(log_ratio: Float[Array, "*B"], advantages: Float[Array, "*B"], clip: float) -> Float[Array, ""]:
    """The policy's objective, to be minimised: `−mean min(r A, clip(r, 1 − ε, 1 + ε) A)` with the ratio `r` of new to old probabilities (Schulman et al. 2017, arXiv:1707.06347, eq. 7)."""
    ratio = jnp.exp(log_ratio)
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages).mean()


def clipped_value_loss(
    values: Float[Array, "*B"], old_values: Float[Array, "*B"], targets: Float[Array, "*B"], clip: float
) -> Float[Array, ""]:
    """Half the squared error, the larger one of that of the values and that of values which have moved by `clip` at most (OpenAI's baselines; Engstrom et al. 2020, arXiv:2005.12729, section 3)."""
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values - targets), jnp.square(near - targets)).mean()


def policy_change(log_ratio: Float[Array, "*B"], clip: float) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How far a policy has moved from the one that acted: an estimate of the divergence `KL(old, new)` in nats, `mean(r − 1 − log r)`, which is never negative (Schulman 2020, http://joschu.net/blog/kl-approx.html), and the share of ratios that the clip cuts off."""
    ratio = jnp.exp(log_ratio)
    return (ratio - 1 - log_ratio).mean(), (jnp.abs(ratio - 1) > clip).mean()


def explained_variance(values: Float[Array, "*B"], targets: Float[Array, "*B"]) -> Float[Array, ""]:
    """The share of the targets' variance that values account for: 1 for perfect ones, 0 for a constant."""
    return 1 - jnp.var(targets - values) / jnp.maximum(jnp.var(targets), 1e-8)


def q_targets(
    rewards: Float[Array, "B"],
    discounts: Float[Array, "B"],
    next_target: Float[Array, "B A"],
    next_online: Float[Array, "B A"] | None = None,
) -> Float[Array, "B"]:
    """`r + γ Q⁻(s', argmax Q(s', ·))`, where the argmax is that of `next_online` (double Q-learning, van Hasselt et al. 2016, arXiv:1509.06461, eq. 4), or of the target's own values if that is None (Mnih et al. 2015). `discounts` are 0 after an end, γⁿ for n steps."""
    best = (next_target if next_online is None else next_online).argmax(-1)
    return rewards + discounts * jnp.take_along_axis(next_target, best[:, None], 1)[:, 0]


def td_errors(values: Float[Array, "B A"], actions: Int[Array, "B"], targets: Float[Array, "B"]) -> Float[Array, "B"]:
    """Targets, which are constants, less the values of the actions that were taken."""
    taken = jnp.take_along_axis(values, actions[:, None], 1)[:, 0]
    return jax.lax.stop_gradient(targets) - taken


def dueling(value: Float[Array, "*B 1"], advantages: Float[Array, "*B A"]) -> Float[Array, "*B A"]:
    """`Q = V + A − mean A` (Wang et al. 2016, arXiv:1511.06581, eq. 9)."""
    return value + advantages - advantages.mean(-1, keepdims=True)


def n_step(
    rewards: Float[Array, "T *B"], terminated: Bool[Array, "T *B"], ended: Bool[Array, "T *B"], discount: float
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Num[Array, "*B"]]:
    """Of up to `T` steps from the first one on, stopped at the end of an episode: the discounted sum of rewards, the discount of what follows, which is 0 after a terminal state, and the number of the last step, to whose next observation that discount belongs."""
    before = jnp.cumsum(ended, 0) - ended
    within = before == 0
    factors = discount ** jnp.arange(len(rewards), dtype=jnp.float32)
    factors = factors.reshape(-1, *[1] * (rewards.ndim - 1))
    last = within.sum(0) - 1
    total = (factors * jnp.where(within, rewards, 0)).sum(0)
    alive = ~(within & terminated).any(0)
    return total, jnp.where(alive, discount ** (last + 1.0), 0.0), last
