"""The networks of agents: a torso that reads observations, and heads that say what to do or what it is worth."""

import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdl.distributions import Categorical, Normal, TanhNormal
from jaxdl.losses import dueling

ORTHOGONAL = nn.initializers.orthogonal
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": nn.tanh, "relu": nn.relu}


class Dense(nn.Module):
    """A linear map that starts orthogonal, `gain` times as large; computed in float32 where it is a head."""

    features: int
    gain: float = math.sqrt(2)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        return nn.Dense(self.features, dtype=self.dtype, kernel_init=ORTHOGONAL(self.gain), name="linear")(x)


class Torso(nn.Module):
    """Observations to features: two hidden layers for vectors (Schulman et al. 2017, section 6.1); for images, which have three axes, one convolution of 16 channels and one hidden layer (the network of MinAtar, Young and Tian 2019). Starts orthogonal (Engstrom et al. 2020, arXiv:2005.12729)."""

    axes: int
    """Of one observation."""
    width: int = 64
    activation: Literal["tanh", "relu"] = "tanh"
    norm: bool = False
    """Layer normalisation before each activation."""
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*inputs"]) -> Float[Array, "*B F"]:
        act = ACTIVATIONS[self.activation]
        hidden = lambda x: act(nn.LayerNorm(dtype=self.dtype)(x) if self.norm else x)
        batch = x.shape[: x.ndim - self.axes]
        if self.axes == 3:
            x = nn.Conv(16, (3, 3), dtype=self.dtype, kernel_init=ORTHOGONAL(math.sqrt(2)))(x.reshape(-1, *x.shape[-3:]))
            x = hidden(x)
        x = x.reshape(*batch, -1)
        for _ in range(1 if self.axes == 3 else 2):
            x = hidden(Dense(self.width, dtype=self.dtype)(x))
        return x


class ActorCritic(nn.Module):
    """A policy and a value, each with a torso of its own. Discrete actions have logits; of continuous ones there is a normal distribution whose deviations are parameters and do not depend on the observation."""

    actions: int
    """How many there are to choose from, or of how many numbers one consists."""
    discrete: bool
    axes: int = 1
    width: int = 64
    activation: Literal["tanh", "relu"] = "tanh"
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        self.actor_torso, self.critic_torso = (Torso(self.axes, self.width, self.activation, dtype=self.dtype) for _ in range(2))
        self.actor_head, self.critic_head = Dense(self.actions, 0.01), Dense(1, 1.0)
        if not self.discrete:
            self.log_deviation = self.param("log_deviation", nn.initializers.zeros, (self.actions,))

    def __call__(self, x: Float[Array, "*inputs"]) -> tuple[Categorical | Normal, Float[Array, "*B"]]:
        return self.policy(x), self.value(x)

    def policy(self, x: Float[Array, "*inputs"]) -> Categorical | Normal:
        """The distribution of actions."""
        out = self.actor_head(self.actor_torso(x).astype(jnp.float32))
        return Categorical(out) if self.discrete else Normal(out, jnp.broadcast_to(self.log_deviation, out.shape))

    def value(self, x: Float[Array, "*inputs"]) -> Float[Array, "*B"]:
        """What is still to come, on average, discounted."""
        return self.critic_head(self.critic_torso(x).astype(jnp.float32))[..., 0]


class QNetwork(nn.Module):
    """The value of each action. A dueling network says how good it is to be there, and how much better than others an action is."""

    actions: int
    axes: int = 1
    width: int = 128
    dueling: bool = True
    norm: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*inputs"]) -> Float[Array, "*B A"]:
        x = Torso(self.axes, self.width, "relu", self.norm, self.dtype, name="torso")(x).astype(jnp.float32)
        advantages = Dense(self.actions, 1.0, name="advantage")(x)
        return dueling(Dense(1, 1.0, name="value")(x), advantages) if self.dueling else advantages


class SquashedActor(nn.Module):
    """A `TanhNormal` whose deviations depend on the observation, between e⁻⁵ and e² (Haarnoja et al. 2018; the smooth bound is CleanRL's)."""

    actions: int
    width: int = 256
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> TanhNormal:
        x = Torso(1, self.width, "relu", dtype=self.dtype, name="torso")(x).astype(jnp.float32)
        mean, deviation = jnp.split(Dense(2 * self.actions, 0.01, name="head")(x), 2, -1)
        return TanhNormal(Normal(mean, -5 + 3.5 * (nn.tanh(deviation) + 1)))


class TwinCritic(nn.Module):
    """Two values of an action, whose networks share nothing: the smaller one errs less on the high side (Fujimoto et al. 2018, arXiv:1802.09477)."""

    width: int = 256
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], action: Float[Array, "*B A"]) -> Float[Array, "*B 2"]:
        joined = jnp.concatenate([x, action], -1)
        values = [Dense(1, 1.0)(Torso(1, self.width, "relu", dtype=self.dtype)(joined).astype(jnp.float32)) for _ in range(2)]
        return jnp.concatenate(values, -1)
