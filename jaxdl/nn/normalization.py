"""Normalisation over features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def layer_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float = 1e-6
) -> Float[Array, "*batch D"]:
    """`(x − mean) / √(variance + eps) · scale + bias` over the last axis (Ba et al. 2016, eq. 4).

    The variance is the biased one, taken from centred values: `E[x²] − E[x]²` would cancel where `|mean| ≫ deviation`. Statistics are in float32; the result has the dtype of `x`. Torch's default `eps` is 1e-5.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned scale (from 1) and bias (from 0). The output is in `dtype`, or that of the input."""

    eps: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return layer_norm(x, scale, bias, self.eps).astype(self.dtype or x.dtype)
