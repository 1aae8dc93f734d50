"""The cache of keys and values for decoding, and the states of linear attention."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int, PyTree

from jaxdl.errors import UserError
from jaxdl.nn.linear_attention import LinearState, RandomFeatureAttention, elu_features, linear_attention, linear_decode
from jaxdl.nn.masks import Window, causal_mask, padding_mask, token_positions, window_mask, window_sides


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, in `S` slots filled from the first; `valid` (`B S`) is true for slots that hold real tokens, not padding.

    `entries` is any pytree of arrays `B S ...`: keys and values `B S K H` in `MultiHeadAttention`, and instead of them a `LinearState`, the same for any number of slots, where attention is linear; a stack of layers has a tuple of these, or arrays with the layers on a leading axis. `next` is the first free slot, the same for all examples. All shapes are static, so that `jit` and `scan` can carry it.
    """

    entries: PyTree
    valid: PyTree
    next: PyTree

    @classmethod
    def empty(cls, entries: PyTree[Array]) -> "Cache":
        """An empty cache over arrays `B S ...` of zeros."""
        return cls(entries, jnp.zeros(jax.tree.leaves(entries)[0].shape[:2], bool), jnp.zeros((), jnp.int32))

    @property
    def slots(self) -> int:
        return self.valid.shape[1]

    def positions(self, valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
        """The positions of the next `T` tokens: the number of real tokens before each."""
        return self.valid.sum(1, dtype=jnp.int32)[:, None] + token_positions(valid)

    def slot_positions(self, valid: Bool[Array, "B T"]) -> Int[Array, "B S"]:
        """The positions of the tokens in the slots after `T` more are appended. With `positions`, it is what a relative bias needs: `alibi_bias(heads, cache.positions(valid), cache.slot_positions(valid))`."""
        return token_positions(self.replace(entries=()).advance(valid).valid)

    def append(self, entries: PyTree[Array], valid: Bool[Array, "B T"]) -> "Cache":
        """The cache with the entries of `T` more tokens, cast to its dtype.

        Raises `UserError` if they do not fit. Under `jit`, where the number of tokens before is not known, an overflow is written as NaN, which every later attention returns, so that it cannot go unnoticed.
        """

        def write(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.next, axis=1)

        return self._grown(valid, entries, write)

    def advance(self, valid: Bool[Array, "B T"]) -> "Cache":
        """The cache with `T` more tokens counted but no new entries, which a state updates itself. An overflow is treated as in `append`, and turns the existing entries into NaN."""
        return self._grown(valid, self.entries, lambda old, new: new)

    def _grown(self, valid: Bool[Array, "B T"], entries: PyTree[Array], write: Callable[[Array, Array], Array]) -> "Cache":
        length = valid.shape[1]
        end = self.next + length
        known = None if isinstance(end, jax.core.Tracer) else int(end)
        if length > self.slots or (known is not None and known > self.slots):
            taken = "" if known is None else f" after {known - length}"
            raise UserError(f"{length} tokens{taken} do not fit into a cache of {self.slots} slots: make one of more slots")

        def written(old: Array, new: Array) -> Array:
            return write(old, jnp.where(end > self.slots, jnp.nan, new).astype(old.dtype))

        seen = jax.lax.dynamic_update_slice_in_dim(self.valid, valid, self.next, axis=1)
        return Cache(jax.tree.map(written, self.entries, entries), seen, end)

    def mask(self, queries: int, window: Window | None = None, *, is_causal: bool = True) -> Bool[Array, "B 1 #T S"]:
        """The mask of the last `queries` tokens over the slots: real tokens up to each, within a window counted in real tokens; all real tokens with `is_causal=False`."""
        real = padding_mask(self.valid)
        if not is_causal:
            return real
        seen = causal_mask(self.next - queries + jnp.arange(queries), self.slots) & real
        if window is None:
            return seen
        positions = token_positions(self.valid)
        own = jax.lax.dynamic_slice_in_dim(positions, self.next - queries, queries, axis=1)
        return seen & window_mask(own, positions, left=window_sides(window)[0])


_OF_PLACES = (
    *("bias", "mask", "is_causal", "local_window_size", "query_seq_lengths", "key_value_seq_lengths"),
    *("q_offset", "q_segment_ids", "kv_segment_ids", "alibi_slopes", "block_mask"),
)
"""Arguments of attentions, `pallas_kernels`' among them, that count from the first query and key or are as many as these."""


def from_cache(attention: Callable[..., Array]) -> Callable[..., Array]:
    """The attention itself, if it means the same for queries that stand at the end of a cache. Raises `UserError` if it binds an argument that counts places: a window would begin at the first query that is decoded."""
    bound = attention.keywords if isinstance(attention, functools.partial) else {}
    wrong = [name for name in _OF_PLACES if bound.get(name) is not None and bound[name] is not False]
    if wrong:
        raise UserError(
            f"an attention that binds {' and '.join(wrong)} counts from the first query it is given, which in decoding is any token: "
            "leave it to the layer, which has `local_window_size=`, `is_causal=`, `mask=` and `bias=` of its own"
        )
    return attention


def state_decoder(attention: Callable[..., Array]) -> Callable[..., tuple[Array, LinearState]] | None:
    """The decoding function, like `linear_decode`, of an attention that keeps a state instead of keys; None for all others."""
    if isinstance(attention, RandomFeatureAttention):
        return attention.decode
    function, bound = (attention.func, attention.keywords) if isinstance(attention, functools.partial) else (attention, {})
    shared = {name: bound[name] for name in ("scale", "feature_map", "chunk") if name in bound}
    return functools.partial(linear_decode, **shared) if function is linear_attention else None


def empty_state(attention: Callable[..., Array], batch: int, heads: int, width: int, dtype: DTypeLike) -> LinearState:
    """The initial state for the function of `state_decoder`."""
    if isinstance(attention, RandomFeatureAttention):
        return LinearState.empty(batch, heads, attention.count(width), width, dtype)
    feature_map = attention.keywords.get("feature_map") if isinstance(attention, functools.partial) else None
    features, _ = jax.eval_shape(feature_map or elu_features, jax.ShapeDtypeStruct((1, width), dtype))
    return LinearState.empty(batch, heads, features.shape[-1], width, dtype)


def cache_dtype(given: DTypeLike | None, dtype: DTypeLike | None, param_dtype: DTypeLike) -> DTypeLike:
    """The dtype of cached keys and values: `given`, or that of the layer."""
    return given or dtype or jnp.promote_types(param_dtype, jnp.float32)
