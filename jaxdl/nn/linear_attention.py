"""Attention in linear time: `exp(⟨q, k⟩)` is replaced by `⟨φ(q), φ(k)⟩`, so that the keys and values seen so far fit into one matrix, whatever their number (Katharopoulos et al. 2020; Choromanski et al. 2021).

A feature map gives `φ(x) = features · exp(log_scale)`. The scale of a query cancels in the quotient. That of a key is taken relative to the largest so far, as a flash kernel does with its logits: no scale overflows, and no later key has a say in how an earlier output is rounded. (Subtracting the largest of all keys, as the authors of the Performer do, cancels in exact arithmetic only.) A key that is masked has a scale of −∞.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxdl.errors import UserError

Features = tuple[Float[Array, "*batch M"], Float[Array, "*batch"]]
"""`φ(x)` as `features` of about 1 at most, and the logarithm of the scale that was taken out, through which no gradient goes."""
FeatureMap = Callable[[Float[Array, "*batch H"]], Features]


def elu_features(x: Float[Array, "*batch H"]) -> Features:
    """`φ(x) = elu(x) + 1`: `exp(x)` below 0 and `x + 1` above (Katharopoulos et al. 2020, eq. 7)."""
    peak = jax.lax.stop_gradient(x.max(-1, keepdims=True))
    log_scale = jnp.minimum(peak, 0) + jnp.log1p(jnp.maximum(peak, 0))
    # Where anything is above 0 the scale is at least 1; where nothing is, the second term is 0.
    features = jnp.exp(jnp.minimum(x, 0) - log_scale) + jnp.maximum(x, 0) * jnp.exp(-jnp.maximum(log_scale, 0))
    return features, log_scale[..., 0]


def positive_features(x: Float[Array, "*batch H"], projection: Float[Array, "M H"], eps: float = 1e-6) -> Features:
    """`φ(x) = exp(Wx − ‖x‖²/2)`: the mean over Gaussian rows of W of `φ(q) φ(k)` is `exp(⟨q, k⟩)` (FAVOR+; Choromanski et al. 2021, eq. 5 and lemma 1).

    `eps` is added to every feature, relative to the largest of the same vector, so that two vectors without a large feature in common still see each other. The authors' code has 1e-6 or 1e-4, relative to the largest of all keys. The factor `1/√M` cancels.
    """
    stop = jax.lax.stop_gradient
    # The exponent has a value of ‖x‖² of 1e9 in it if entries are 1e4: only differences can be had in float32.
    projected = jnp.matmul(x, projection.T.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    peak, half = projected.max(-1, keepdims=True), jnp.square(x).sum(-1, keepdims=True) / 2
    features = jnp.exp(projected - stop(peak) - (half - stop(half)))
    return features + eps * jnp.exp(peak - stop(peak) - (half - stop(half))), stop(peak - half)[..., 0]


def random_projection(key: Array, features: int, width: int, *, orthogonal: bool = True) -> Float[Array, "features width"]:
    """Rows from the standard normal distribution, by default orthogonal to each other in blocks of `width` (Choromanski et al. 2021, section 2.4).

    An orthogonal block is a uniformly random rotation whose rows get the norms of independent normal vectors, χ(width). The variance of the estimated kernel is then lower (ibid., theorem 2).
    """
    if not orthogonal:
        return jax.random.normal(key, (features, width))
    rotation_key, norm_key = jax.random.split(key)
    blocks = jax.random.orthogonal(rotation_key, width, (-(-features // width),))
    norms = jnp.linalg.norm(jax.random.normal(norm_key, (features, width)), axis=-1, keepdims=True)
    return blocks.reshape(-1, width)[:features] * norms


class LinearState(NamedTuple):
    """The state of linear attention, of the same size after one token as after a million."""

    total: Float[Array, "B K M U"]
    """The sum of `φ(k) [v, 1]ᵀ` over the keys, divided by `exp(log_scale)`: U is V + 1, and the last column is the normaliser."""
    log_scale: Float[Array, "B K"]
    """The largest scale of a key so far."""

    @classmethod
    def empty(cls, batch: int, key_heads: int, features: int, value_width: int, dtype: DTypeLike = jnp.float32) -> "LinearState":
        """The state before the first token, in float32 or wider."""
        wide = jnp.promote_types(dtype, jnp.float32)
        total = jnp.zeros((batch, key_heads, features, value_width + 1), wide)
        return cls(total, jnp.full((batch, key_heads), jnp.finfo(wide).min, wide))


def linear_decode(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    state: LinearState | None = None,
    mask: Bool[Array, "#B T"] | None = None,
    *,
    scale: float | None = None,
    feature_map: FeatureMap = elu_features,
    chunk: int = 128,
) -> tuple[Float[Array, "B T N V"], LinearState]:
    """T further tokens of causal linear attention, after those in `state` (none where it is left out): T outputs and the new state (Katharopoulos et al. 2020, eq. 16 to 20).

    One by one or in any portions, the outputs are those of `linear_attention(..., is_causal=True)` on the whole. `mask` is true where a token is real: the others, wherever they are, leave the state as it is.

    Within a chunk every query meets every earlier key; what came before the chunk is in the state. Time and memory are O(T), also backwards, where a state is kept for each chunk and the inside of a chunk is computed again.
    """
    batch, length, heads, _ = query.shape
    if mask is not None:
        key, value = (_without(mask, x) for x in (key, value))
    query_features, _ = _features(feature_map, query, scale)
    key_features, log_scales = _features(feature_map, key, scale)
    if mask is not None:
        log_scales = jnp.where(mask[..., None], log_scales, -jnp.inf)
    key_heads, features = key_features.shape[2:]
    values = _with_ones(value, key_features.dtype)
    if state is None:
        state = LinearState.empty(batch, key_heads, features, value.shape[-1], values.dtype)

    chunk = max(min(chunk, length), 1)
    chunks = -(-length // chunk)

    def split(x: Float[Array, "B T *rest"], fill: float = 0.0) -> Float[Array, "chunks B ..."]:
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), (1, 2), (0, -2 if x.ndim > 3 else -1))

    causal = jnp.tril(jnp.ones((chunk, chunk), bool))

    @jax.checkpoint
    def step(state: LinearState, tokens: tuple[Array, ...]) -> tuple[LinearState, Array]:
        query, key, value, log_scales = tokens  # B K G C M, B K C M, B K C U, B K C
        largest = jnp.maximum(jax.lax.cummax(log_scales, axis=2), state.log_scale[..., None])
        relative = jnp.exp(jnp.where(causal, log_scales[:, :, None, :] - largest[..., None], -jnp.inf))
        scores = jnp.einsum("bkgtm,bksm->bkgts", query, key) * relative[:, :, None]
        before = jnp.exp(state.log_scale[..., None] - largest)[:, :, None, :, None]
        sums = jnp.einsum("bkgts,bksv->bkgtv", scores, value) + before * jnp.einsum("bkgtm,bkmv->bkgtv", query, state.total)
        return _remember(state, key, value, log_scales), sums

    grouped = query_features.reshape(batch, length, key_heads, heads // key_heads, features)
    tokens = split(grouped), split(key_features), split(values), split(log_scales, -jnp.inf)
    state, sums = jax.lax.scan(step, state, tokens)
    sums = jnp.moveaxis(sums, (0, -2), (1, 2)).reshape(batch, chunks * chunk, heads, values.shape[-1])
    sums = sums[:, :length]
    return _quotient(sums[..., :-1], sums[..., -1:]).astype(value.dtype), state


def _features(feature_map: FeatureMap, x: Array, scale: float | None) -> Features:
    """In float32 or wider. Half of the logarithm of the scale goes to the queries and half to the keys."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return feature_map(x if scale is None else x * scale**0.5)


def _with_ones(value: Float[Array, "*batch V"], dtype: DTypeLike) -> Float[Array, "*batch U"]:
    return jnp.concatenate([value.astype(dtype), jnp.ones((*value.shape[:-1], 1), dtype)], axis=-1)


def _remember(
    state: LinearState, key: Float[Array, "B K S M"], values: Float[Array, "B K S U"], log_scales: Float[Array, "B K S"]
) -> LinearState:
    largest = jnp.maximum(log_scales.max(-1), state.log_scale)
    key = key * jnp.exp(log_scales - largest[..., None])[..., None]
    kept = state.total * jnp.exp(state.log_scale - largest)[..., None, None]
    return LinearState(kept + jnp.einsum("bksm,bksv->bkmv", key, values), largest)


def _quotient(sums: Float[Array, "*batch V"], weight: Float[Array, "*batch 1"]) -> Float[Array, "*batch V"]:
    """Weighted sum by sum of weights, and 0 where there is no weight."""
    # The gradient has 1/weight² in it, which below the root of the smallest number overflows.
    unseen = weight <= jnp.finfo(sums.dtype).tiny ** 0.5  # What is not a number is not hidden.
    return jnp.where(unseen, 0, sums / jnp.where(unseen, 1, weight))


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    bias: None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: None = None,
    feature_map: FeatureMap = elu_features,
    chunk: int = 128,
) -> Float[Array, "B T N V"]:
    """`φ(q) Σ φ(k) vᵀ / φ(q) Σ φ(k)` over all keys, or over those up to the query's own place with `is_causal` (Katharopoulos et al. 2020, eq. 5 and 9).

    The arguments are those of `jax.nn.dot_product_attention`, so that it drops into a `MultiHeadAttention(attention=...)`. N is a multiple of K. Queries and keys are multiplied by `√scale` before the features; left out it is 1, as in the paper. Sums are in float32 or wider, the result has the dtype of the values. A query that sees no key gets 0, and so does one for which all keys that it sees weigh together less than 1e-19 (the root of the smallest number of float32) of what features can weigh at most, beside the largest key so far: their gradient would overflow. `chunk` is the number of tokens that are taken at once; see `linear_decode`.

    Which keys are seen may depend on the example alone: a mask is `B 1 1 S`. Raises `UserError` for one that depends on head or query, for a bias and for a window: none of them is a product of features.
    """
    if bias is not None or local_window_size is not None:
        given = "a window" if bias is None else "a bias"
        raise UserError(f"linear attention cannot take {given}: use `jax.nn.dot_product_attention` or a windowed attention")
    if mask is not None and mask.dtype != bool:
        raise UserError(f"a mask is bool, true where a query may look, and was given as {mask.dtype}")
    if mask is not None and (mask.ndim != 4 or mask.shape[1:3] != (1, 1)):
        raise UserError(
            f"linear attention cannot take a mask of shape {mask.shape}: "
            "one of B 1 1 S can hide keys from all queries, and `is_causal=True` the later keys from each query"
        )
    if query.shape[2] % key.shape[2]:
        raise UserError(f"{query.shape[2]} query heads cannot share {key.shape[2]} key heads: choose a multiple")
    (batch, length), keys = query.shape[:2], key.shape[1]
    seen = jnp.ones((batch, keys), bool) if mask is None else jnp.broadcast_to(mask[:, 0, 0], (batch, keys))
    if key_value_seq_lengths is not None:
        seen &= jnp.arange(keys) < key_value_seq_lengths[:, None]

    if is_causal:
        # As many keys as queries: what comes after the last query is seen by none.
        def fit(x: Array) -> Array:
            return jnp.pad(x[:, :length], [(0, 0), (0, max(length - keys, 0))] + [(0, 0)] * (x.ndim - 2))

        attended, _ = linear_decode(
            query, fit(key), fit(value), mask=fit(seen), scale=scale, feature_map=feature_map, chunk=chunk
        )
    else:
        attended = _attend_to_all(query, key, value, seen, scale, feature_map)
    if query_seq_lengths is not None:
        attended = jnp.where((jnp.arange(length) < query_seq_lengths[:, None])[..., None, None], attended, 0)
    return attended


def _without(seen: Bool[Array, "B S"], x: Float[Array, "B S K H"]) -> Float[Array, "B S K H"]:
    """Keys or values with 0 for what is not seen: a feature that weighs nothing does not hide NaN."""
    return jnp.where(seen[..., None, None], x, 0)


def _attend_to_all(
    query: Array, key: Array, value: Array, seen: Bool[Array, "B S"], scale: float | None, feature_map: FeatureMap
) -> Float[Array, "B T N V"]:
    batch, length, heads, _ = query.shape
    key, value = (_without(seen, x) for x in (key, value))
    query_features, _ = _features(feature_map, query, scale)
    key_features, log_scales = _features(feature_map, key, scale)
    log_scales = jnp.where(seen[..., None], log_scales, -jnp.inf)
    largest = log_scales.max(1, keepdims=True, initial=jnp.finfo(log_scales.dtype).min)
    key_features *= jnp.exp(log_scales - largest)[..., None]
    # Heads before places, and the normaliser beside the matrix and not in it: each twice as fast on a CPU.
    grouped = query_features.reshape(batch, length, key.shape[2], -1, query_features.shape[-1]).transpose(0, 2, 3, 1, 4)
    key_features, values = key_features.swapaxes(1, 2), value.astype(key_features.dtype).swapaxes(1, 2)
    sums = jnp.einsum("bkgtm,bkmv->bkgtv", grouped, jnp.einsum("bksm,bksv->bkmv", key_features, values))
    weight = (grouped * key_features.sum(2)[:, :, None, None]).sum(-1, keepdims=True)
    attended = _quotient(sums, weight).transpose(0, 3, 1, 2, 4)
    return attended.reshape(batch, length, heads, -1).astype(value.dtype)


class RandomFeatureAttention(nn.Module):
    """FAVOR+, the attention of the Performer: an unbiased estimate of `exp(⟨q, k⟩/√H)` from M random features (Choromanski et al. 2021, section 2).

    An instance is an attention function: `MultiHeadAttention(heads, attention=RandomFeatureAttention(256))`. One instance in several layers has one projection for all.

    The projection is no parameter: it lives in the collection `random_features`, drawn at first from the rng `params`. Wherever that collection is mutable, every `redraw_every`-th call draws it anew from the rng `random_features` before it is used, and the other calls only count; where it is not, as in evaluation, it stays. The paper draws anew in training because one projection that is bad for the model stays bad (ibid., section 4.2).

    `features` is `H ln H` where left out, the number that the error bound asks for (ibid., theorem 4). `scale` is `1/√H` where left out, as in softmax attention. The other arguments are those of `linear_attention`.
    """

    features: int | None = None
    redraw_every: int | None = None
    orthogonal: bool = True
    eps: float = 1e-6
    chunk: int = 128

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        bias: None = None,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        *,
        scale: float | None = None,
        **options: Any,
    ) -> Float[Array, "B T N V"]:
        width = query.shape[-1]
        feature_map = self._feature_map(width)
        scale = width**-0.5 if scale is None else scale
        return linear_attention(query, key, value, bias, mask, scale=scale, feature_map=feature_map, chunk=self.chunk, **options)

    def decode(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K V"],
        state: LinearState | None = None,
        mask: Bool[Array, "#B T"] | None = None,
        *,
        scale: float | None = None,
    ) -> tuple[Float[Array, "B T N V"], LinearState]:
        """`linear_decode` with the projection as it is: a state means nothing to another one."""
        width = query.shape[-1]
        scale = width**-0.5 if scale is None else scale
        feature_map = self._feature_map(width, redraw=False)
        return linear_decode(query, key, value, state, mask, scale=scale, feature_map=feature_map, chunk=self.chunk)

    def count(self, width: int) -> int:
        """The number of random features for heads of that width."""
        return self.features or max(round(width * math.log(width)), 1)

    @nn.compact
    def _feature_map(self, width: int, *, redraw: bool = True) -> FeatureMap:
        def draw(key: Array) -> Float[Array, "M H"]:
            return random_projection(key, self.count(width), width, orthogonal=self.orthogonal)

        projection = self.variable("random_features", "projection", lambda: draw(self.make_rng("params")))
        calls = self.variable("random_features", "calls", lambda: jnp.zeros((), jnp.int32))
        if redraw and self.redraw_every and self.is_mutable_collection("random_features") and not self.is_initializing():
            calls.value += 1
            due, rng = calls.value % self.redraw_every == 0, self.make_rng("random_features")
            projection.value = jax.lax.cond(due, draw, lambda _: projection.value, rng)
        return functools.partial(positive_features, projection=projection.value, eps=self.eps)
