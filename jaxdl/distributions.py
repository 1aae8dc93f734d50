"""What policies draw actions from: few distributions, with their densities written out."""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree


@flax.struct.dataclass
class Categorical:
    """One of `C` actions, from logits `*B C`."""

    logits: PyTree

    @property
    def log_probabilities(self) -> Float[Array, "*B C"]:
        return jax.nn.log_softmax(self.logits)

    def sample(self, key: Key[Array, ""]) -> Int[Array, "*B"]:
        """An action for each row."""
        return jax.random.categorical(key, self.logits)

    def mode(self) -> Int[Array, "*B"]:
        """The likeliest one."""
        return self.logits.argmax(-1)

    def log_prob(self, action: Int[Array, "*B"]) -> Float[Array, "*B"]:
        """In nats."""
        return jnp.take_along_axis(self.log_probabilities, action[..., None], -1)[..., 0]

    def entropy(self) -> Float[Array, "*B"]:
        """In nats."""
        return -(jnp.exp(self.log_probabilities) * self.log_probabilities).sum(-1)


@flax.struct.dataclass
class Normal:
    """`A` independent numbers with a normal distribution each, from means and logarithms of deviations `*B A`."""

    mean: PyTree
    log_deviation: PyTree

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*B A"]:
        """Differentiable by mean and deviation (the reparametrisation of Kingma and Welling 2014)."""
        return self.mean + jnp.exp(self.log_deviation) * jax.random.normal(key, self.mean.shape)

    def mode(self) -> Float[Array, "*B A"]:
        """The mean."""
        return self.mean

    def log_prob(self, action: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        """Summed over the numbers, in nats."""
        distance = (action - self.mean) * jnp.exp(-self.log_deviation)
        return (-0.5 * distance**2 - self.log_deviation - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Float[Array, "*B"]:
        """Summed over the numbers, in nats."""
        return (self.log_deviation + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


@flax.struct.dataclass
class TanhNormal:
    """The hyperbolic tangent of a `Normal`: numbers between −1 and 1 (Haarnoja et al. 2018, arXiv:1812.05905, appendix C)."""

    normal: Normal

    def sample_and_log_prob(self, key: Key[Array, ""]) -> tuple[Float[Array, "*B A"], Float[Array, "*B"]]:
        """A draw with its log-density, which is taken before the tangent is: its inverse has no digits left near ±1."""
        before = self.normal.sample(key)
        return jnp.tanh(before), self.normal.log_prob(before) - log_slope(before).sum(-1)

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*B A"]:
        return jnp.tanh(self.normal.sample(key))

    def mode(self) -> Float[Array, "*B A"]:
        """The tangent of the mean: its median, and not where the density is highest."""
        return jnp.tanh(self.normal.mean)


def log_slope(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`log(1 − tanh² x) = 2 (log 2 − x − softplus(−2x))`, exact where tanh rounds to ±1."""
    return 2 * (math.log(2) - x - jax.nn.softplus(-2 * x))


Distribution = Categorical | Normal | TanhNormal
