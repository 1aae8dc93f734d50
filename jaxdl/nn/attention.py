"""Scaled dot-product attention and multi-head attention."""

import functools
import math
import operator
from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from jaxdl.errors import UserError, unknown
from jaxdl.nn.cache import Cache, cache_dtype, empty_state, from_cache, state_decoder
from jaxdl.nn.masks import Window, causal_mask, length_mask, padding_mask, window_mask, window_sides
from pallas_kernels.attention import checks

Attention = Callable[..., Array]
"""`attention(query, key, value, bias=None, mask=None, *, scale=None, is_causal=False, ...)` on `B T N H`, `B S K H`, `B S K H`; a mask is true where a query may look."""

Rotary = Callable[[Array, Array], Array]
"""`rotary(x, positions)` turns the heads `B T N H` by their positions `B T`: `jaxdl.nn.rope`, or a `functools.partial` of it."""


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: Window | None = None,
    logits_soft_cap: float | None = None,
) -> Float[Array, "B T N V"]:
    """`softmax(scale · QKᵀ + bias) V`, by default with a scale of `1/√H` (Vaswani et al. 2017, eq. 1), over the keys that every mask allows.

    Masks are true where a query may look. A query that may look nowhere gets 0, and gives no gradient; `jax.nn.dot_product_attention`, whose arguments these are but for the last, gives it the mean of all values. `is_causal` and the window `(left, right)` count from the first query and the first key; the window includes the query and both of its ends. Hide keys by masks and not by a bias of −∞, which is NaN where nothing else is left. `logits_soft_cap` makes `cap · tanh(logit / cap)` of each logit before the bias (Gemma 2; Bello et al. 2016, eq. 16).

    With K < N key heads, heads `i · N/K` to `(i + 1) · N/K − 1` share the i-th (Ainslie et al. 2023, section 2.2): no key is copied. Logits and softmax are in float32 (or wider), the weights are rounded to the dtype of the values. Raises `UserError` if K does not divide N, for arrays, a bias or a mask of other than four axes, and for a negative window.
    """
    check_operands(query, key, value, bias, mask, scale=scale, soft_cap=logits_soft_cap)
    (batch, queries, heads, width), (keys, groups) = query.shape, key.shape[1:3]
    masks = [] if mask is None else [mask]
    if is_causal:
        masks.append(causal_mask(queries, keys))
    if local_window_size is not None:
        left, right = window_sides(local_window_size)
        masks.append(window_mask(queries, keys, left=left, right=right))
    if query_seq_lengths is not None:
        masks.append(length_mask(query_seq_lengths, queries).swapaxes(2, 3))
    if key_value_seq_lengths is not None:
        masks.append(length_mask(key_value_seq_lengths, keys))
    mask = functools.reduce(operator.and_, masks) if masks else None
    key, value, broken = finite(key, value) if masks else (key, value, None)

    # Heads before positions, so that products are of matrices as they lie in memory. Queries that share a key are rows of one of them.
    by_groups = batch, groups, heads // groups * queries
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = _products(query.reshape(*by_groups, width), key).reshape(batch, heads, queries, keys)
    logits *= width**-0.5 if scale is None else scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits += bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits).astype(value.dtype)
    attended = jnp.einsum("bkrs,bksv->bkrv", weights.reshape(*by_groups, keys), value)
    attended = attended.reshape(batch, heads, queries, value.shape[-1]).swapaxes(1, 2)
    if mask is not None:
        seen = lambda keys: (mask & keys).any(-1).swapaxes(1, 2)[..., None]
        attended = jnp.where(seen(True), attended, 0)
        attended = jnp.where(seen(jnp.repeat(broken.swapaxes(1, 2)[:, :, None], heads // groups, 1)), jnp.nan, attended)
    return attended


ATTENTIONS = {"plain": dot_product_attention, "flash": pallas_kernels.dot_product_attention}
"""By the names that experiments have for them on the command line: the function above, and a tiled one that never holds `T × S` logits and runs the platform's kernel where there is one.

Both compute the same function, so any Transformer of the library can use either. The others change the model and are chosen in code, as `attention=` of a block: `sliding_window_attention` needs a width, which is a field of `MultiHeadAttention` and `LatentAttention` and no name; `linear_attention` and `RandomFeatureAttention` have no softmax, so that there is no soft cap (Gemma 2), no prefix (PaliGemma), no packing of several sentences into a row and no weights to plot, and the second has random features to carry beside the parameters.
"""


def check_operands(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | Array | None = None,
    soft_cap: float | None = None,
) -> None:
    """Raises `UserError` unless query, key and value are `B T N H`, `B S K H` and `B S K V` of one dtype with K dividing N, and bias and mask have four axes, each 1 or that of `B N T S`: three would be taken for `N T S`, whoever meant `B T S`. What they and the numbers may hold is what `pallas_kernels` takes."""
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes) or key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise UserError(f"queries, keys and values are `B T N H`, `B S K H`, `B S K V`, and were given as {shapes}")
    (batch, queries, heads, width), (_, keys, groups, key_width) = query.shape, key.shape
    if width != key_width:
        raise UserError(f"queries of width {width} have no product with keys of width {key_width}: give both one width")
    if not groups or heads % groups:
        raise UserError(f"{heads} query heads cannot share {groups} key/value heads: choose a divisor of {heads}")
    whole = batch, heads, queries, keys
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and (x.ndim != 4 or any(given not in (1, full) for given, full in zip(x.shape, whole))):
            raise UserError(f"a {name} of shape {x.shape} does not fit: give four axes `B N T S`, each 1 or that of {whole}")
    try:
        checks.check_dtypes(query, key, value, bias, mask)
        checks.check_numbers(scale, soft_cap)
    except ValueError as error:
        raise UserError(str(error)) from None


def finite(
    key: Float[Array, "B S K H"], value: Float[Array, "B S K V"]
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"], Bool[Array, "B S K"]]:
    """Keys and values with 0 where one of them is not finite, and where that is: a weight of 0 does not hide NaN, here or in a gradient. Who sees such a key gets NaN all the same."""
    broken = ~(jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1))
    return jnp.where(broken[..., None], 0, key), jnp.where(broken[..., None], 0, value), broken


def _products(query: Float[Array, "B K R H"], key: Float[Array, "B K S H"]) -> Float[Array, "B K R S"]:
    """Of each query and key, summed in float32 or wider. With the default precision, the float32 of the sum would widen the factors of the gradient."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    multiply = functools.partial(jnp.einsum, "bkrh,bksh->bkrs", preferred_element_type=wide)
    if query.dtype == jnp.bfloat16:
        return multiply(query, key, precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32)
    if query.dtype == jnp.float16:  # No CPU has such an algorithm.
        narrow = functools.partial(multiply, precision=jax.lax.DotAlgorithmPreset.F16_F16_F32)
        return jax.lax.platform_dependent(query, key, cpu=lambda q, k: multiply(q.astype(wide), k.astype(wide)), default=narrow)
    return multiply(query, key)


def within(
    length: int,
    mask: Bool[Array, "#B #N #T #S"] | None,
    window: Window | None,
    prefix: Int[Array, "B"] | None,
    is_causal: bool,
) -> dict[str, Any]:
    """Mask arguments of an attention for a full sequence with a bidirectional prefix, which ignores the window and `is_causal`."""
    if prefix is None:
        return dict(mask=mask, is_causal=is_causal) | ({} if window is None else dict(local_window_size=window))
    left, right = (None, None) if window is None else window_sides(window)
    seen = window_mask(length, left=left, right=0 if is_causal else right)
    first = jnp.arange(length) < prefix[:, None]
    seen |= first[:, None, :, None] & padding_mask(first)
    return dict(mask=seen if mask is None else mask & seen)


_PROJECTIONS = ("query", "key", "value", "out")


class MultiHeadAttention(nn.Module):
    """Attention of `num_heads` heads between learned projections (Vaswani et al. 2017, section 3.2.2).

    - `attention` is the function between the projections: a flash kernel, another `scale`, a windowed or a linear form. A linear one decodes from its state.
    - `num_kv_heads` below `num_heads` lets several heads share a key and a value: grouped-query attention (Ainslie et al. 2023), with 1 multi-query attention (Shazeer 2019).
    - `head_width` is `D / num_heads` unless given, as in Gemma.
    - `use_bias` is for all four projections or none (Llama, Gemma), or names those that have one: `("query", "key", "value")` in Qwen2, all but `"key"` in Whisper.
    - `rotary` rotates queries and keys by their positions, in self-attention only.
    - `local_window_size` is how many keys to the left and right of itself a query sees, in self-attention only; in decoding it counts real tokens.
    - `out_init` initialises the output projection, smaller in GPT-2; `kernel_init` by default.

    There is no dropout on attention weights, which flash kernels never materialise; ViT and Llama train without. Apply it to the output.
    """

    num_heads: int
    attention: Attention = dot_product_attention
    num_kv_heads: int | None = None
    head_width: int | None = None
    use_bias: bool | Collection[str] = True
    rotary: Rotary | None = None
    local_window_size: Window | None = None
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    out_init: nn.initializers.Initializer | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __call__(
        self,
        queries: Float[Array, "B T D"],
        keys_values: Float[Array, "B S E"] | None = None,
        *,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        is_causal: bool = False,
        prefix: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention over full sequences; self-attention without `keys_values`. Positions, for `rotary`, default to 0, 1, 2 …

        The first `prefix` tokens attend to each other in both directions, regardless of `is_causal` and the window (Raffel et al. 2020, section 3.2.1). Raises `UserError` for numbers of heads that do not divide the width or one another, and for positions or a prefix in cross-attention.
        """
        if keys_values is None:
            positions = jnp.arange(queries.shape[1])[None] if positions is None else positions
        elif positions is not None or prefix is not None:
            raise UserError(
                "positions and a prefix are those of one sequence, which attends to itself: leave them out of cross-attention"
            )
        width = self._head_width(queries.shape[-1])
        query = self._heads("query", queries, self.num_heads, width, positions)
        key, value = self._key_value(queries if keys_values is None else keys_values, width, positions)
        how = within(queries.shape[1], mask, self.local_window_size if keys_values is None else None, prefix, is_causal)
        return self._out(self.attention(query, key, value, bias, **how), queries)

    def empty_cache(self, batch: int, slots: int, width: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for self-attention over up to `slots` tokens, prompt and padding included, at the model width `width`. Needs no parameters. `dtype` defaults to that of the layer, or else of the parameters, in float32 or wider."""
        heads, width = self.num_kv_heads or self.num_heads, self._head_width(width)
        dtype = cache_dtype(dtype, self.dtype, self.param_dtype)
        if state_decoder(self.attention) is not None:
            state = empty_state(self.attention, batch, heads, width, dtype)
            return Cache(state, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))
        shape = batch, slots, heads, width
        return Cache.empty((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        *,
        valid: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        is_causal: bool = True,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Causal self-attention of the next `T` tokens (a whole prompt or a single one), and the cache extended by them.

        With `is_causal=False`, new tokens attend to each other and to the whole cache, ignoring the window; use it to read the `prefix` of `__call__`. `valid` is true for real tokens: prompts of different lengths may be padded on either side. Positions count the real tokens unless given. `mask` and `bias` are over the slots of the cache. Raises `UserError` if the cache is full (see `Cache.append`), for an attention with a bound positional argument (see `from_cache`), and for a linear attention with a window, mask, bias or prefix.
        """
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        positions = cache.positions(valid) if positions is None else positions
        width = self._head_width(x.shape[-1])
        query = self._heads("query", x, self.num_heads, width, positions)
        key, value = self._key_value(x, width, positions)
        decode_state = state_decoder(from_cache(self.attention))
        if decode_state is None:
            cache = cache.append((key, value), valid)
            seen = cache.mask(x.shape[1], self.local_window_size, is_causal=is_causal)
            return self._out(self._from_cache(query, cache, seen, mask, bias), x), cache
        if not is_causal or any(given is not None for given in (self.local_window_size, mask, bias)):
            raise UserError(
                "a linear attention decodes from a state that has summed all earlier tokens: leave out window, mask, bias and prefix"
            )
        cache = cache.advance(valid)
        attended, state = decode_state(query, key, value, cache.entries, valid)
        return self._out(attended, x), cache.replace(entries=state)

    def cache_memory(self, keys_values: Float[Array, "B S E"], valid: Bool[Array, "B S"] | None = None) -> Cache:
        """Projects another sequence to keys and values once, as a full cache for `cross_attend`. Where E is not D, `head_width` must be given."""
        valid = jnp.ones(keys_values.shape[:2], bool) if valid is None else valid
        entries = self._key_value(keys_values, self._head_width(keys_values.shape[-1]), None)
        return Cache(entries, valid, jnp.asarray(valid.shape[1], jnp.int32))

    def cross_attend(
        self, queries: Float[Array, "B T D"], cache: Cache, *, mask: Bool[Array, "#B #N #T #S"] | None = None
    ) -> Float[Array, "B T D"]:
        """Cross-attention to the real tokens of a cache made by `cache_memory`."""
        query = self._heads("query", queries, self.num_heads, self._head_width(queries.shape[-1]), None)
        return self._out(self._from_cache(query, cache, padding_mask(cache.valid), mask, None), queries)

    def _head_width(self, width: int) -> int:
        if self.head_width is None and width % self.num_heads:
            raise UserError(f"a width of {width} cannot be split into {self.num_heads} heads: choose a divisor of {width}")
        return self.head_width or width // self.num_heads

    def _key_value(
        self, x: Float[Array, "B S E"], width: int, positions: Int[Array, "#B S"] | None
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        heads = self.num_kv_heads or self.num_heads
        return self._heads("key", x, heads, width, positions), self._heads("value", x, heads, width, None)

    def _heads(
        self, name: str, x: Float[Array, "B T D"], heads: int, width: int, positions: Int[Array, "#B T"] | None
    ) -> Float[Array, "B T N H"]:
        """Projects to heads, and rotates them if there are positions and `rotary`."""
        x = self._project(name, x, (x.shape[-1],), (heads, width))
        return x if self.rotary is None or positions is None else self.rotary(x, positions)

    def _from_cache(
        self,
        query: Float[Array, "B T N H"],
        cache: Cache,
        seen: Bool[Array, "B 1 #T S"],
        mask: Bool[Array, "#B #N #T #S"] | None,
        bias: Float[Array, "#B #N #T #S"] | None,
    ) -> Float[Array, "B T N H"]:
        key, value = (entry.astype(query.dtype) for entry in cache.entries)
        return from_cache(self.attention)(query, key, value, bias, seen if mask is None else seen & mask)

    def _out(self, attended: Float[Array, "B T N H"], like: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self._project("out", attended, attended.shape[2:], like.shape[2:])

    @nn.compact
    def _project(self, name: str, x: Float[Array, "B T *inputs"], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Array:
        if not isinstance(self.use_bias, bool):
            for given in self.use_bias:
                if given not in _PROJECTIONS:
                    raise unknown("projection", given, _PROJECTIONS)
        has_bias = self.use_bias if isinstance(self.use_bias, bool) else name in self.use_bias
        kernel_init = self.out_init if name == "out" and self.out_init else self.kernel_init
        return _Projection(inputs, outputs, has_bias, kernel_init, self.dtype, self.param_dtype, name=name)(x)


class _Projection(nn.Module):
    """A linear map whose features are an axis or, as heads, two. The kernel is kept as a matrix, but heads are not flattened to meet it: XLA then has the choice of their layout, which saves copies in training."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool
    kernel_init: nn.initializers.Initializer
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T *inputs"]) -> Float[Array, "B T *outputs"]:
        size = math.prod(self.outputs)
        kernel = self.param("kernel", self.kernel_init, (math.prod(self.inputs), size), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (size,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jnp.tensordot(x, kernel.reshape(self.inputs + self.outputs), len(self.inputs))
        return y if bias is None else y + bias.reshape(self.outputs)
