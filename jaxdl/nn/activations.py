"""Activations, element by element: each is its paper's equation, finite with a finite gradient for inputs of ±1e4 and far beyond.

The result has the shape and dtype of the input. The gated feed-forward block is in `jaxdl.nn.transformer`.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdl.errors import UserError


def leaky_relu(x: Float[Array, "*shape"], slope: float = 0.01) -> Float[Array, "*shape"]:
    """`x` where it is positive, `slope · x` elsewhere (Maas et al. 2013). The gradient at 0 is `slope`, as torch has it; Flax has 1.

    Of the usual slopes, 0.01 is the paper's, torch's and Flax's; GANs take 0.2 (Radford et al. 2016).
    """
    return jnp.where(x > 0, x, slope * x)


def prelu(x: Float[Array, "*shape D"], slope: Float[Array, ""] | Float[Array, "D"]) -> Float[Array, "*shape D"]:
    """`leaky_relu` whose slope is learned, one for all or one for each channel of the last axis (He et al. 2015a, eq. 1)."""
    return x * jnp.where(x > 0, 1, slope.astype(x.dtype))


def elu(x: Float[Array, "*shape"], alpha: float = 1.0) -> Float[Array, "*shape"]:
    """`x` where it is positive, `α (eˣ − 1)` elsewhere (Clevert et al. 2016, eq. 15).

    Where the second branch is not used it is given 0: its overflow would come back as `0 · ∞` in the gradient.
    """
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0, x)))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x Φ(x)` with the distribution function Φ of the normal distribution (Hendrycks and Gimpel 2016, section 2), as in BERT and ViT.

    `Φ(x) = (1 + erf(x/√2)) / 2`, in float32 at least: below −2 the sum has no digit left in bfloat16. This is `torch.nn.functional.gelu`; `jax.nn.gelu` is `gelu_tanh` by default, up to 4.7e-4 away.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def gelu_tanh(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, the approximation of `gelu` (ibid.) in SigLIP, GPT-2 (`gelu_new`) and Gemma. In float32 at least, as `gelu`."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    factor = math.sqrt(2 / math.pi)
    # From 10 on, tanh is ±1 to the last digit, of float64 too. The minimum keeps the square from overflowing, which the gradient would multiply by 0.
    square = jnp.minimum(wide * wide, 100)
    return (0.5 * wide * (1 + jnp.tanh(wide * (factor + (0.044715 * factor) * square)))).astype(x.dtype)


def silu(x: Float[Array, "*shape"], beta: float | Float[Array, ""] = 1.0) -> Float[Array, "*shape"]:
    """`x σ(βx)`: SiLU for β = 1, Swish with any β, learned ones too (Ramachandran et al. 2017, section 4).

    β = 1.702 is the "quick GELU" of CLIP.
    """
    return x * jax.lax.logistic(jnp.asarray(beta, x.dtype) * x)


def mish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x tanh(ln(1 + eˣ))` (Misra 2020, eq. 1).

    By `tanh(ln y) = (y² − 1) / (y² + 1)` the factor is `n / (n + 2)` with `n = eˣ(eˣ + 2)`: one exponential instead of three transcendental functions. From 20 on it is 1 to the last digit, also of float64, and the minimum keeps the exponential from overflowing. It is in float32 at least: the quotient's gradient cancels in bfloat16.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    power = jnp.exp(jnp.minimum(wide, 20))
    n = power * (power + 2)
    return (wide * (n / (n + 2))).astype(x.dtype)


def hard_sigmoid(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`min(max(x + 3, 0), 6) / 6` (Howard et al. 2019, section 5.2). The gradient at both kinks is 0, as torch has it."""
    return _ramp(x)


@jax.custom_jvp
def _ramp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.minimum(jnp.maximum(x + 3, 0), 6) / 6


@_ramp.defjvp
def _ramp_derivative(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Of `min` and `max` themselves it would be a half at the kinks."""
    (x,), (dx,) = primals, tangents
    return _ramp(x), jnp.where((x > -3) & (x < 3), dx / 6, 0)


def hard_swish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x · hard_sigmoid(x)` (Howard et al. 2019, section 5.2). The gradients at −3 and 3 are 0 and 1, as torch has them."""
    return x * hard_sigmoid(x)


def glu(x: Float[Array, "*shape D"], activation: Callable[[Array], Array] = jax.lax.logistic) -> Float[Array, "*shape half"]:
    """`a · σ(b)` where `a` is the first half of the last axis, the value, and `b` the second, the gate (Dauphin et al. 2017, eq. 1).

    This is the order of torch and `jax.nn`. Shazeer (2020) writes the gate first, and so do published SwiGLU checkpoints that pack both in one kernel: exchange the halves of those. Raises `UserError` if the axis is of odd length.
    """
    if x.shape[-1] % 2:
        raise UserError(f"a last axis of {x.shape[-1]} has no two halves: a gated linear unit needs an even width")
    value, gate = jnp.split(x, 2, axis=-1)
    return value * activation(gate)


class PReLU(nn.Module):
    """`prelu` with one learned slope, or one for each channel of the last axis with `per_channel`.

    It starts from 0.25, as in the paper and in torch; Flax has 0.01. Keep weight decay away from it: at 0 this is ReLU (He et al. 2015a, section 2.1).
    """

    per_channel: bool = False
    initial: float = 0.25
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        shape = (x.shape[-1],) if self.per_channel else ()
        return prelu(x, self.param("slope", nn.initializers.constant(self.initial), shape, self.param_dtype))
