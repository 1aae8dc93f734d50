"""Multi-head attention around any function with the signature of `jax.nn.dot_product_attention`."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxdl.errors import UserError

Attention = Callable[..., Array]
"""`attention(query, key, value, bias=None, mask=None, *, scale=None, is_causal=False, ...)` on `B T N H`, `B S K H`, `B S K H`; a mask is true where a query may look."""


class MultiHeadAttention(nn.Module):
    """Attention of `num_heads` heads between learned projections (Vaswani et al. 2017, section 3.2.2).

    The head width is `D / num_heads`. `attention` computes softmax(QKᵀ/√H)V: the flash kernel, a windowed or a linear form drops in here.
    """

    num_heads: int
    attention: Attention = jax.nn.dot_product_attention
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "B T D"],
        keys_values: Float[Array, "B S E"] | None = None,
        *,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        is_causal: bool = False,
    ) -> Float[Array, "B T D"]:
        """Self-attention where `keys_values` is left out. Raises `UserError` if the width is no multiple of the heads."""
        keys_values = queries if keys_values is None else keys_values
        width = queries.shape[-1]
        if width % self.num_heads:
            raise UserError(f"a width of {width} cannot be split into {self.num_heads} heads: choose a divisor of {width}")

        def project(name: str, x: Array) -> Float[Array, "B S N H"]:
            dense = nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init, name=name)
            return dense(x).reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)

        query, key, value = project("query", queries), project("key", keys_values), project("value", keys_values)
        attended = self.attention(query, key, value, mask=mask, is_causal=is_causal)
        out = nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init, name="out")
        return out(attended.reshape(queries.shape))
