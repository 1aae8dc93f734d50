"""Which tiles of the logits an implementation has to visit at all, and which of those it has to mask."""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.masks import EMPTY, FULL, PARTIAL, tile_table
from pallas_kernels.attention.problem import Operands, Spec

Array = jax.Array | np.ndarray


def tile_states(spec: Spec, operands: Operands, block_q: int, block_kv: int) -> Array:
    """EMPTY, PARTIAL or FULL for each tile, `B' tiles-of-queries tiles-of-keys`, where B' is 1 if all batches are alike.

    An EMPTY tile has no visible pair, and in a FULL one every pair is visible, except that queries beyond T are not looked at. It is an array of numpy, known while tracing, unless an array among the operands hides something.
    """
    queries, keys = operands.query.shape[1], operands.key.shape[1]
    hiding = operands.mask, operands.q_segment_ids, operands.query_lengths, operands.key_value_lengths, operands.q_offset
    xp = np if all(array is None for array in hiding) else jnp
    top, left = np.arange(0, queries, block_q)[None, :, None], np.arange(0, keys, block_kv)[None, None]
    bottom, right = np.minimum(top + block_q, queries) - 1, np.minimum(left + block_kv, keys) - 1
    overhangs = left + block_kv > keys
    states = xp.asarray(np.broadcast_to(np.where(overhangs, PARTIAL, FULL), (1, top.shape[1], left.shape[2])))

    if spec.is_causal or spec.window is not None:
        offset = 0 if operands.q_offset is None else operands.q_offset[:, None, None]
        least, most = left - (bottom + offset), right - (top + offset)
        if spec.is_causal:
            states = xp.minimum(states, _state(xp, least > 0, most <= 0))
        if spec.window is not None:
            before, after = spec.window
            states = xp.minimum(states, _state(xp, (most < -before) | (least > after), (least >= -before) & (most <= after)))
    if spec.block_mask is not None:
        states = xp.minimum(states, tile_table(spec.block_mask, queries, keys, block_q, block_kv).states[None])
    if operands.query_lengths is not None:
        length = operands.query_lengths[:, None, None]
        states = xp.minimum(states, _state(xp, top >= length, bottom < length))
    if operands.key_value_lengths is not None:
        length = operands.key_value_lengths[:, None, None]
        states = xp.minimum(states, _state(xp, left >= length, right < length))
    if operands.q_segment_ids is not None:
        query_low, query_high = (x[:, :, None] for x in _extremes(operands.q_segment_ids, block_q))
        key_low, key_high = (x[:, None] for x in _extremes(operands.kv_segment_ids, block_kv))
        same = (query_low == query_high) & (key_low == key_high) & (query_low == key_low)
        states = xp.minimum(states, _state(xp, (query_high < key_low) | (query_low > key_high), same))
    if operands.mask is not None:
        states = xp.minimum(states, _mask_states(operands.mask, block_q, block_kv))
    return states


def _state(xp: types.ModuleType, empty: Array, full: Array) -> Array:
    return xp.where(empty, EMPTY, xp.where(full, FULL, PARTIAL))


def _extremes(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest id of each block of positions: `B L` becomes twice `B blocks`."""
    blocks = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge").reshape(len(ids), -1, block)
    return blocks.min(-1), blocks.max(-1)


def _mask_states(mask: jax.Array, block_q: int, block_kv: int) -> jax.Array:
    """Of an array `B|1 N|1 T|1 S|1`, over all its heads."""

    def blocks(x: jax.Array, axis: int, block: int) -> jax.Array:
        """Any and all, stacked along a new first axis, over blocks of an axis that is not broadcast."""
        if x.shape[axis] == 1:
            return x
        edges = [(0, 0)] * x.ndim
        edges[axis] = (0, -x.shape[axis] % block)
        x = jnp.pad(x, edges, mode="edge")
        x = x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
        return jnp.stack([x[0].any(axis), x[1].all(axis)])

    both = jnp.broadcast_to(mask, (2, *mask.shape))
    both = blocks(blocks(both, 3, block_q), 4, block_kv)
    return _state(jnp, ~both[0].any(1), both[1].all(1))


class Visits(NamedTuple):
    """For each line of tiles, which to visit: the full ones first, then the partial ones. Integers throughout."""

    order: Array
    """`B' lines tiles`: indices of tiles; those after `stop` are not to be visited."""
    masked_from: Array
    """`B' lines`: how many full tiles there are."""
    stop: Array
    """`B' lines`: how many full and partial tiles there are."""


def visits(states: Array) -> Visits:
    """The plan for `B' lines tiles` of states."""
    xp = np if isinstance(states, np.ndarray) else jnp
    order = xp.argsort(-states, axis=-1, stable=True)
    return Visits(order.astype(np.int32), (states == FULL).sum(-1), (states != EMPTY).sum(-1))


def merge_batches(states: Array, count: int) -> Array:
    """The states of tiles that `count` neighbouring batches visit together: EMPTY and FULL only where all of them are."""
    if len(states) == 1 or count == 1:
        return states
    grouped = states.reshape(-1, count, *states.shape[1:])
    return jnp.where((grouped == grouped[:, :1]).all(1), grouped[:, 0], PARTIAL)
