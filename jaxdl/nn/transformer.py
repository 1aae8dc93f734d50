"""Transformers: feed-forwards (plain and gated), the block of encoders and decoders, its stack, and attention pooling."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxdl.errors import UserError
from jaxdl.nn.activations import gelu_tanh, silu
from jaxdl.nn.attention import Attention, MultiHeadAttention, dot_product_attention
from jaxdl.nn.cache import Cache
from jaxdl.nn.normalization import LayerNorm


def as_rows(x: Float[Array, "*batch D"]) -> Float[Array, "rows D"]:
    """Flattens all axes but the last before a linear map: the gradient of its kernel then sums over one axis. Over two, XLA's CPU transposes a copy of an operand first."""
    return x.reshape(-1, x.shape[-1])


class FeedForward(nn.Module):
    """Two linear maps with an activation between, position by position (Vaswani et al. 2017, eq. 2).

    `mlp_dim` is the hidden width. The default GELU is the tanh approximation of SigLIP, GPT-2 and Gemma; BERT and ViT have the exact one, `jaxdl.nn.gelu`. `out_init` initialises the second map, smaller in GPT-2; `kernel_init` by default.
    """

    mlp_dim: int
    activation: Callable[[Array], Array] = gelu_tanh
    dropout: float = 0.0
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    out_init: nn.initializers.Initializer | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"], *, train: bool = False) -> Float[Array, "*batch D"]:
        def dense(features: int, name: str, kernel_init: nn.initializers.Initializer = self.kernel_init) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=kernel_init,
                bias_init=nn.initializers.normal(1e-6),
                name=name,
            )

        rows = as_rows(x)
        hidden = self.activation(dense(self.mlp_dim, "expand")(rows))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return dense(x.shape[-1], "contract", self.out_init or self.kernel_init)(hidden).reshape(x.shape)


class GatedFeedForward(nn.Module):
    """`(activation(x W) ⊙ x V) W₂`, without biases: one of two linear maps gates the other (Shazeer 2020, eq. 5 and 6).

    The activation names it: `silu` SwiGLU (Llama, the default), `gelu` or `gelu_tanh` GeGLU (Gemma), `jax.nn.relu` ReGLU, `jax.nn.sigmoid` GLU. `gated_mlp_dim` is the width with as many parameters as a plain `FeedForward`.
    """

    mlp_dim: int
    activation: Callable[[Array], Array] = silu
    dropout: float = 0.0
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    out_init: nn.initializers.Initializer | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"], *, train: bool = False) -> Float[Array, "*batch D"]:
        def dense(features: int, name: str, kernel_init: nn.initializers.Initializer = self.kernel_init) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=self.use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=kernel_init,
                name=name,
            )

        rows = as_rows(x)
        hidden = self.activation(dense(self.mlp_dim, "gate")(rows)) * dense(self.mlp_dim, "expand")(rows)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return dense(x.shape[-1], "contract", self.out_init or self.kernel_init)(hidden).reshape(x.shape)


def gated_mlp_dim(mlp_dim: int, multiple_of: int = 1) -> int:
    """Two thirds of a plain feed-forward's hidden width, since a gated one has three kernels and not two (Shazeer 2020, section 2).

    Rounded up to a multiple: 256 in Llama, whose 4 · 4096 becomes 11008.
    """
    return -(-(2 * mlp_dim // 3) // multiple_of) * multiple_of


def stochastic_depth(x: Float[Array, "B *shape"], rate: float | Float[Array, ""], key: PRNGKeyArray) -> Float[Array, "B *shape"]:
    """Drops a residual branch for a share `rate` (below 1) of the examples and divides by `1 − rate` for the others (Huang et al. 2016, eq. 2).

    The paper multiplies by `1 − rate` at test time instead: the expectations are equal.
    """
    keep = jax.random.bernoulli(key, 1 - rate, (len(x),) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), 0)


def _given(**options: Any) -> dict[str, Any]:
    """Drops options that are None, so that layers without a bias or mask argument work too."""
    return {name: value for name, value in options.items() if value is not None}


class TransformerBlock(nn.Module):
    """Self-attention, optional cross-attention to a memory, and a feed-forward, each with a residual connection. Encoders and decoders differ only in `is_causal` and `cross_attention`.

    - `attention` is the attention function; `attention_layer`, `feed_forward_layer` and `norm` construct the parts, with their options bound by `functools.partial`. `mlp_dim` is the hidden width of the feed-forward. Llama has `partial(MultiHeadAttention, num_kv_heads=8, rotary=rope, use_bias=False)`, `GatedFeedForward` and `partial(RMSNorm, 1e-5)`.
    - `norm_first`: pre-norm, `x + f(norm(x))` (Xiong et al. 2020, GPT-2, ViT), or post-norm, `norm(x + f(x))` (Vaswani et al. 2017, section 3.1, BERT), which needs a warm-up of the learning rate.
    - `sandwich_norm` also normalises the output of each part, `x + norm(f(norm(x)))` (Gemma 2: Riviere et al. 2024, section 2).
    - `is_causal` is for full sequences; decoding is causal by default.
    - `dropout` applies to the output of each part (Vaswani et al. 2017, section 5.4) and within the feed-forward.
    - `dtype` is the parts' computation dtype; the residual stream keeps that of `x`.
    """

    num_heads: int
    mlp_dim: int
    attention: Attention = dot_product_attention
    attention_layer: Callable[..., nn.Module] = MultiHeadAttention
    feed_forward_layer: Callable[..., nn.Module] = FeedForward
    norm: Callable[..., nn.Module] = LayerNorm
    norm_first: bool = True
    sandwich_norm: bool = False
    is_causal: bool = False
    cross_attention: bool = False
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B S E"] | None = None,
        *,
        mask: Bool[Array, "#B #N #T #T"] | None = None,
        memory_mask: Bool[Array, "#B #N #T #S"] | None = None,
        bias: Float[Array, "#B #N #T #T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        prefix: Int[Array, "B"] | None = None,
        drop_rate: float | Float[Array, ""] = 0.0,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """The block on full sequences; `prefix` as in `MultiHeadAttention`, `drop_rate` as in `stochastic_depth`, for each part. Raises `UserError` if a memory is missing or unexpected."""
        how = _given(mask=mask, bias=bias, positions=positions, prefix=prefix)
        parts = {"attention": lambda layer, x: layer(x, is_causal=self.is_causal, **how)}
        if self._attends_to(memory):
            parts["cross_attention"] = lambda layer, x: layer(x, memory, **_given(mask=memory_mask))
        parts["feed_forward"] = lambda layer, x: layer(x, train=train)
        for name, part in parts.items():
            x = self._residual(name, part, x, drop_rate, train)
        return x

    def empty_cache(self, batch: int, slots: int, width: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for up to `slots` tokens, as of `MultiHeadAttention.empty_cache`. Needs no parameters."""
        return self._attention_layer(parent=None).empty_cache(batch, slots, width, dtype)

    def cache_memory(self, memory: Float[Array, "B S E"], valid: Bool[Array, "B S"] | None = None) -> Cache:
        """Projects a memory to keys and values for `decode`; `valid` is true for its real tokens."""
        return self._part("cross_attention").cache_memory(memory, valid)

    def decode(
        self, x: Float[Array, "B T D"], cache: Cache, memory: Cache | None = None, **options: Any
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Decodes the next `T` tokens and returns the extended cache; `options` and errors are those of `MultiHeadAttention.decode`."""

        def attend(layer: nn.Module, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            nonlocal cache
            x, cache = layer.decode(x, cache, **options)
            return x

        parts = {"attention": attend}
        if self._attends_to(memory):
            parts["cross_attention"] = lambda layer, x: layer.cross_attend(x, memory)
        parts["feed_forward"] = lambda layer, x: layer(x)
        for name, part in parts.items():
            x = self._residual(name, part, x)
        return x, cache

    def _attends_to(self, memory: PyTree) -> bool:
        if self.cross_attention != (memory is not None):
            fault = "needs a memory, and none is given" if self.cross_attention else "takes no memory: set `cross_attention`"
            raise UserError(f"a block with cross_attention={self.cross_attention} {fault}")
        return self.cross_attention

    def _residual(
        self,
        name: str,
        part: Callable[[nn.Module, Array], Array],
        x: Float[Array, "B T D"],
        drop_rate: float | Float[Array, ""] = 0.0,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        norm = self._part(f"{name}_norm")
        y = part(self._part(name), norm(x) if self.norm_first else x)
        if self.sandwich_norm:
            y = self._part(f"{name}_added_norm")(y)
        y = self._part(f"{name}_dropout")(y, deterministic=not train)
        if train and not (isinstance(drop_rate, float) and drop_rate == 0):
            y = stochastic_depth(y, drop_rate, self.make_rng("dropout"))
        return (x + y if self.norm_first else norm(x + y)).astype(x.dtype)

    @nn.compact
    def _part(self, name: str) -> nn.Module:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if name.endswith("_norm"):
            # The output of a post-norm is the residual stream, which keeps its dtype: None means that of the input.
            of_stream = not self.norm_first and not name.endswith("_added_norm")
            return self.norm(**types | (dict(dtype=None) if of_stream else {}), name=name)
        if name.endswith("_dropout"):
            return nn.Dropout(self.dropout, name=name)
        if name == "feed_forward":
            return self.feed_forward_layer(self.mlp_dim, dropout=self.dropout, **types, name=name)
        return self._attention_layer(name=name)

    def _attention_layer(self, **options: Any) -> nn.Module:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        return self.attention_layer(self.num_heads, attention=self.attention, **types, **options)


class _Apart(nn.Module):
    """Constructs a block without registering it as a submodule of the module whose method constructs it."""

    @nn.compact
    def __call__(self, block: Callable[[int], nn.Module], layer: int) -> nn.Module:
        return block(layer).clone(parent=None)


class Transformer(nn.Module):
    """`depth` blocks, followed by a final normalisation if they are pre-norm.

    - `block` may also be a function from the index 0, 1 … to a block: in Gemma 2 every other one has a window. Norms and dtypes must be the same in all.
    - `stochastic_depth` is the drop rate of the last block; that of block l of L is `l/L` of it (Huang et al. 2016, eq. 4). Swin and ConvNeXt have `(l − 1)/(L − 1)`.
    - `scan` compiles one block and runs it `depth` times: compilation no longer grows with the depth. Parameters are stacked along a leading axis, under `blocks` instead of `block_0`, `block_1` …; `stack_blocks` and `unstack_blocks` convert them. All blocks must be alike.
    - `remat` recomputes the activations within each block in the backward pass (Chen et al. 2016, section 3), but for those saved by a policy of `jax.checkpoint_policies`, if one is given.
    """

    depth: int
    block: nn.Module | Callable[[int], nn.Module]
    stochastic_depth: float = 0.0
    scan: bool = False
    remat: bool | Callable[..., Any] = False

    def __call__(
        self, x: Float[Array, "B T D"], memory: Float[Array, "B S E"] | None = None, *, train: bool = False, **options: Any
    ) -> Float[Array, "B T D"]:
        """All blocks on full sequences; `options` are those of `TransformerBlock.__call__`, the same for all blocks. Raises `UserError` for a rate of stochastic depth outside [0, 1)."""
        if not 0 <= self.stochastic_depth < 1:
            raise UserError(f"stochastic_depth is {self.stochastic_depth}: choose a rate from 0 to below 1")

        def run(block: nn.Module, x: Float[Array, "B T D"], drop_rate: float | Float[Array, ""] = 0.0) -> tuple[Array, None]:
            return block(x, memory, train=train, drop_rate=drop_rate, **options), None

        if self.remat:
            policy = self.remat if callable(self.remat) else None
            run = nn.remat(run, prevent_cse=not self.scan, policy=policy)
        drops = train and self.stochastic_depth > 0
        rates = [np.linspace(0, self.stochastic_depth, self.depth + 1)[1:]] if drops else []
        return self._last(self._through(run, x, *rates)[0])

    def empty_cache(self, batch: int, slots: int, width: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for up to `slots` tokens, prompt and padding included, at the model width `width`. Needs no parameters."""
        layers = [self._block(layer).empty_cache(batch, slots, width, dtype) for layer in range(self.depth)]
        entries = tuple(layer.entries for layer in layers)
        return layers[0].replace(entries=jax.tree.map(lambda *each: jnp.stack(each), *entries) if self.scan else entries)

    def cache_memory(self, memory: Float[Array, "B S E"], valid: Bool[Array, "B S"] | None = None) -> Cache:
        """Projects a memory to every block's keys and values for `decode`, once; `valid` is true for its real tokens."""
        valid = jnp.ones(memory.shape[:2], bool) if valid is None else valid
        _, entries = self._through(lambda block, x: (x, block.cache_memory(memory, valid).entries), ())
        return Cache(entries, valid, jnp.asarray(valid.shape[1], jnp.int32))

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        memory: Cache | None = None,
        *,
        valid: Bool[Array, "B T"] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Decodes the next `T` tokens (a whole prompt or a single one) and returns the extended cache; `options` and errors are those of `MultiHeadAttention.decode`."""
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid

        def run(block: nn.Module, x: Float[Array, "B T D"], entries: PyTree, *memories: PyTree) -> tuple[Array, PyTree]:
            known = [memory.replace(entries=each) for each in memories]
            x, grown = block.decode(x, cache.replace(entries=entries), *known, valid=valid, **options)
            return x, grown.entries

        memories = () if memory is None else (memory.entries,)
        x, entries = self._through(run, x, cache.entries, *memories)
        return self._last(x), cache.replace(entries=()).advance(valid).replace(entries=entries)

    def _through(self, run: Callable[..., tuple[PyTree, PyTree]], x: PyTree, *inputs: PyTree) -> tuple[PyTree, PyTree]:
        """`x, output = run(block, x, *inputs of this block)` from block to block: the last `x` and all outputs."""
        if self.scan:
            if not isinstance(self.block, nn.Module):
                raise UserError("blocks that are not alike cannot be compiled as one: leave `scan` out")
            scan = nn.scan(
                lambda block, x, inputs: run(block, x, *inputs),
                variable_axes={True: 0},
                split_rngs={True: True},
                length=self.depth,
            )
            return scan(self._part("blocks"), x, inputs)
        outputs = []
        for layer in range(self.depth):
            x, output = run(self._part(f"block_{layer}", layer), x, *(each[layer] for each in inputs))
            outputs.append(output)
        return x, tuple(outputs)

    def _last(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self._part("norm")(x) if self._block(0).norm_first else x

    def _block(self, layer: int) -> nn.Module:
        return self.block if isinstance(self.block, nn.Module) else _Apart(parent=None).apply({}, self.block, layer)

    @nn.compact
    def _part(self, name: str, layer: int = 0) -> nn.Module:
        block = self._block(layer)
        if name == "norm":
            return block.norm(dtype=block.dtype, param_dtype=block.param_dtype, name=name)
        return block.clone(parent=self, name=name)


def stack_blocks(params: PyTree) -> PyTree:
    """Converts parameters for `Transformer`s with `scan`: in every nested dictionary, `block_0`, `block_1` … are stacked as `blocks`."""
    if not isinstance(params, Mapping):
        return params
    names = [name for name in (f"block_{layer}" for layer in range(len(params))) if name in params]
    stacked = {name: stack_blocks(part) for name, part in params.items() if name not in names}
    if names:
        stacked["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return stacked


def unstack_blocks(params: PyTree) -> PyTree:
    """The inverse of `stack_blocks`."""
    if not isinstance(params, Mapping):
        return params
    unstacked = {name: unstack_blocks(part) for name, part in params.items() if name != "blocks"}
    if "blocks" in params:
        leaves, structure = jax.tree.flatten(params["blocks"])
        for layer, each in enumerate(zip(*leaves, strict=True)):
            unstacked[f"block_{layer}"] = jax.tree.unflatten(structure, each)
    return unstacked


@functools.partial(jax.jit, static_argnums=0)
def attention_weights(module: nn.Module, params: PyTree, *inputs: Array) -> list[Float[Array, "B N T S"]]:
    """The attention weights of every layer, in call order, of `module.apply({"params": params}, *inputs)` on full sequences.

    The module must have the fields `attention`, `scan` and `remat`, as those of `jaxdl.models` do, with any values.
    """
    weights: list[Array] = []

    def noted(query: Array, key: Array, value: Array, bias: Any = None, mask: Any = None, **options: Any) -> Array:
        """With unit vectors as values, attention returns the weights themselves."""
        count = key.shape[1]
        units = jnp.broadcast_to(jnp.eye(count, dtype=value.dtype)[None, :, None], (len(key), count, key.shape[2], count))
        weights.append(dot_product_attention(query, key, units, bias, mask, **options).swapaxes(1, 2))
        return dot_product_attention(query, key, value, bias, mask, **options)

    plain = module.clone(attention=noted, scan=False, remat=False)
    plain.apply({"params": unstack_blocks(params) if module.scan else params}, *inputs)
    return weights


class AttentionPooling(nn.Module):
    """Pools a sequence into one vector by attention with a learned query, the probe, and a feed-forward of hidden width `mlp_dim` (MAP head; Lee et al. 2019, Zhai et al. 2022)."""

    num_heads: int
    mlp_dim: int
    attention: Attention = dot_product_attention
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
        return (x + FeedForward(self.mlp_dim, **types, name="feed_forward")(y))[:, 0]
