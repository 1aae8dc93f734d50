"""Decoding: what attention remembers of the tokens before, and which forms of it can go on from there."""

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
    """What attention remembers of the tokens it has seen: `S` slots, filled from the first, of which `valid` (`B S`) says which hold real tokens and not padding.

    `entries` is any pytree of arrays `B S ...`: keys and values `B S K H` in `MultiHeadAttention`, and instead of them a `LinearState`, the same for any number of slots, where attention is linear; a stack of layers has a tuple of these, or arrays with the layers on a leading axis. `next` is the first free slot, the same for all examples. All shapes are static, so that `jit` and `scan` can carry it.
    """

    entries: PyTree
    valid: PyTree
    next: PyTree

    @classmethod
    def empty(cls, entries: PyTree[Array]) -> "Cache":
        """With no token, over arrays `B S ...` of zeros."""
        return cls(entries, jnp.zeros(jax.tree.leaves(entries)[0].shape[:2], bool), jnp.zeros((), jnp.int32))

    @property
    def slots(self) -> int:
        return self.valid.shape[1]

    def positions(self, valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
        """The positions of `T` more tokens: how many real ones came before, in the cache and among them."""
        return self.valid.sum(1, dtype=jnp.int32)[:, None] + token_positions(valid)

    def slot_positions(self, valid: Bool[Array, "B T"]) -> Int[Array, "B S"]:
        """The positions of what is in the slots once `T` more tokens are: with `positions`, what a bias of distances needs, `alibi_bias(heads, cache.positions(valid), cache.slot_positions(valid))`."""
        return token_positions(self.replace(entries=()).advance(valid).valid)

    def append(self, entries: PyTree[Array], valid: Bool[Array, "B T"]) -> "Cache":
        """With `T` more tokens, cast to the dtype of the cache.

        Raises `UserError` where they do not fit. Under `jit`, where the number of those before is not known, what does not fit is written as NaN, which comes out of every attention from then on: an overfull cache cannot pass for a good one.
        """

        def write(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.next, axis=1)

        return self._grown(valid, entries, write)

    def advance(self, valid: Bool[Array, "B T"]) -> "Cache":
        """With `T` more tokens, whose entries are yet to come: a state goes on from here. Where they do not fit, it is as with `append`, and the entries before are NaN."""
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
        """What the `queries` tokens appended last may look at: real tokens up to themselves, within a window of real tokens to the left; all real tokens where they are not `is_causal`."""
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
    """How an attention goes on that keeps a state and no keys, as `linear_decode`; None for all others."""
    if isinstance(attention, RandomFeatureAttention):
        return attention.decode
    function, bound = (attention.func, attention.keywords) if isinstance(attention, functools.partial) else (attention, {})
    shared = {name: bound[name] for name in ("scale", "feature_map", "chunk") if name in bound}
    return functools.partial(linear_decode, **shared) if function is linear_attention else None


def empty_state(attention: Callable[..., Array], batch: int, heads: int, width: int, dtype: DTypeLike) -> LinearState:
    """What `state_decoder` begins with."""
    if isinstance(attention, RandomFeatureAttention):
        return LinearState.empty(batch, heads, attention.count(width), width, dtype)
    feature_map = attention.keywords.get("feature_map") if isinstance(attention, functools.partial) else None
    features, _ = jax.eval_shape(feature_map or elu_features, jax.ShapeDtypeStruct((1, width), dtype))
    return LinearState.empty(batch, heads, features.shape[-1], width, dtype)


def cache_dtype(given: DTypeLike | None, dtype: DTypeLike | None, param_dtype: DTypeLike) -> DTypeLike:
    """That of the keys and values of a layer with these types, unless given."""
    return given or dtype or jnp.promote_types(param_dtype, jnp.float32)
