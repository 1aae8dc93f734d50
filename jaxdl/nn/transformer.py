"""Transformer encoder: feed-forward (plain and gated), pre-norm block, stack, and attention pooling."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxdl.nn.activations import silu
from jaxdl.nn.attention import Attention, MultiHeadAttention
from jaxdl.nn.normalization import LayerNorm


class FeedForward(nn.Module):
    """Two linear maps with an activation between, position by position (Vaswani et al. 2017, eq. 2).

    The default GELU is the tanh approximation, as SigLIP, GPT-2 and Gemma have it; BERT and ViT have the exact one.
    """

    hidden: int
    activation: Callable[[Array], Array] = nn.gelu
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"], *, train: bool = False) -> Float[Array, "*batch D"]:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                bias_init=nn.initializers.normal(1e-6),
                name=name,
            )

        hidden = self.activation(dense(self.hidden, "expand")(x))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return dense(x.shape[-1], "contract")(hidden)


class GatedFeedForward(nn.Module):
    """`(activation(x W) ⊙ x V) W₂`, without biases: one of two linear maps gates the other (Shazeer 2020, eq. 5 and 6).

    The activation names it: `silu` SwiGLU (Llama, the default), `gelu` or `gelu_tanh` GeGLU (Gemma), `jax.nn.relu` ReGLU, `jax.nn.sigmoid` GLU. `gated_hidden` gives the width at which it has the parameters of a plain `FeedForward`.
    """

    hidden: int
    activation: Callable[[Array], Array] = silu
    dropout: float = 0.0
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"], *, train: bool = False) -> Float[Array, "*batch D"]:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                name=name,
            )

        hidden = self.activation(dense(self.hidden, "gate")(x)) * dense(self.hidden, "expand")(x)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return dense(x.shape[-1], "contract")(hidden)


def gated_hidden(hidden: int, multiple_of: int = 1) -> int:
    """Two thirds of a plain feed-forward's hidden width, since a gated one has three kernels and not two (Shazeer 2020, section 2).

    Rounded up to a multiple: 256 in Llama, whose 4 · 4096 becomes 11008.
    """
    return -(-(2 * hidden // 3) // multiple_of) * multiple_of


class EncoderBlock(nn.Module):
    """Pre-norm block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))` (Xiong et al. 2020)."""

    num_heads: int
    hidden: int
    attention: Attention = jax.nn.dot_product_attention
    eps: float = 1e-6
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, mask: Bool[Array, "#B #N #T #T"] | None = None, train: bool = False
    ) -> Float[Array, "B T D"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        dropout = nn.Dropout(self.dropout, deterministic=not train)
        y = LayerNorm(self.eps, **types, name="attention_norm")(x)
        x = x + dropout(MultiHeadAttention(self.num_heads, self.attention, **types, name="attention")(y, mask=mask))
        y = LayerNorm(self.eps, **types, name="feed_forward_norm")(x)
        y = FeedForward(self.hidden, dropout=self.dropout, **types, name="feed_forward")(y, train=train)
        return x + dropout(y)


class Encoder(nn.Module):
    """`depth` pre-norm blocks and a last normalisation."""

    depth: int
    num_heads: int
    hidden: int
    attention: Attention = jax.nn.dot_product_attention
    eps: float = 1e-6
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, mask: Bool[Array, "#B #N #T #T"] | None = None, train: bool = False
    ) -> Float[Array, "B T D"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        for layer in range(self.depth):
            block = EncoderBlock(
                self.num_heads, self.hidden, self.attention, self.eps, self.dropout, **types, name=f"block_{layer}"
            )
            x = block(x, mask=mask, train=train)
        return LayerNorm(self.eps, **types, name="norm")(x)


class AttentionPooling(nn.Module):
    """One learned query, the probe, gathers a sequence into a vector (MAP head; Lee et al. 2019, Zhai et al. 2022)."""

    num_heads: int
    hidden: int
    attention: Attention = jax.nn.dot_product_attention
    eps: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]), self.param_dtype)
        probe = jnp.broadcast_to(probe.astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = MultiHeadAttention(self.num_heads, self.attention, **types, name="attention")(probe, x)
        y = LayerNorm(self.eps, **types, name="norm")(x)
        return (x + FeedForward(self.hidden, **types, name="feed_forward")(y))[:, 0]
