"""Exact attention in tiles of plain XLA: memory linear in length, empty tiles never touched. The default on CPUs, and wherever no kernel serves.

The forward pass is FlashAttention-2's algorithm 1 (Dao 2023), one row of tiles after another; the backward pass is its algorithm 2, one column of tiles after another. Heads that read the same key head are rows of the same tile, and a few *streams* (pairs of batch and key head) go through together, so that each product of matrices keeps all cores busy.

Letters, beside those of `problem`: G = N/K heads per key head, P streams that go together, tiles of bq × bk.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention.masks import FULL, tile_table
from pallas_kernels.attention.problem import Gradients, Operands, Spec
from pallas_kernels.attention.tiles import merge_batches, tile_states, visits

# Rows (counted over all heads that share keys) and columns of a tile. Of 128, 256, 512 and 1024 the fastest on two cores of an EPYC (Zen 5, 1 MiB of L2 each) at B1 N8 H64 float32, T from 2k to 8k: smaller tiles pay for each turn of the loop, larger ones leave the cache.
TILE = 512


def supports(spec: Spec, operands: Operands) -> str | None:
    """None: it serves everything."""
    return None


def forward(spec: Spec, operands: Operands, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """The output `B T N H` and lse `B N T`; see `problem`."""
    tiles = _Tiles(spec, operands, spec.block_sizes.query, spec.block_sizes.key)
    plan = _Plan(tiles.states)
    # Finite, so that subtracting it never makes a NaN; the least, so that an additive mask of this value still counts as a logit.
    lowest = jnp.finfo(tiles.dtype).min

    def group_of_streams(results: tuple[jax.Array, jax.Array], group: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        queries, keys, values = tiles.of_group(operands.query, operands.key, operands.value, group)

        def row(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            query = queries[i]

            def tile(j: jax.Array, carry: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
                accumulated, highest, total = carry
                key, value = _isolated(keys[j], values[j]) if masked else (keys[j], values[j])
                logits, _ = tiles.logits(group, i, j, query, key, masked)
                new_highest = jnp.maximum(highest, logits.max(-1))
                weights = jnp.exp(logits - new_highest[..., None])
                shrink = jnp.exp(highest - new_highest)
                total = shrink * total + weights.sum(-1)
                update = tiles.dot("pqk,pkh->pqh", weights.astype(value.dtype), value)
                return shrink[..., None] * accumulated + update, new_highest, total

            shape = query.shape[:-1]
            sinks = None if operands.sinks is None else tiles.sinks(group)
            highest = tiles.full(shape, lowest) if sinks is None else jnp.broadcast_to(jnp.maximum(sinks, lowest), shape)
            total = tiles.full(shape) if sinks is None else jnp.exp(sinks - highest)
            carry = tiles.full(query.shape), highest, total
            accumulated, highest, total = plan.visit(tiles.batch(group), i, tile, carry)
            nothing = total == 0
            out = accumulated / jnp.where(nothing, 1, total)[..., None]
            return out.astype(query.dtype), jnp.where(nothing, -jnp.inf, highest + jnp.log(total))[..., None]

        found = lax.map(row, _indices(tiles.rows))
        return tuple(tiles.put_queries(whole, part, group) for whole, part in zip(results, found)), None

    results = tiles.full(operands.query.shape, dtype=operands.query.dtype), tiles.full((*operands.query.shape[:3], 1))
    (out, lse), _ = lax.scan(group_of_streams, results, _indices(tiles.groups))
    return out, lse[..., 0].swapaxes(1, 2)


def backward(
    spec: Spec,
    operands: Operands,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None,
    *,
    interpret: bool = False,
) -> Gradients:
    """Gradients of the differentiable operands; see `problem`."""
    tiles = _Tiles(spec, operands, spec.block_sizes.query_backward, spec.block_sizes.key_backward)
    plan = _Plan(tiles.states.swapaxes(1, 2))
    dtype = tiles.dtype
    lse = _safe(lse)
    delta = (out.astype(dtype) * d_out.astype(dtype)).sum(-1)
    if d_lse is not None:
        delta -= d_lse.swapaxes(1, 2).astype(dtype)
    lse = lse.swapaxes(1, 2)

    def group_of_streams(carry: Any, group: jax.Array) -> tuple[Any, None]:
        results, extras = carry
        queries, keys, values = tiles.of_group(operands.query, operands.key, operands.value, group)
        d_outs, deltas, lses = (tiles.queries_of(x, group, fill) for x, fill in ((d_out, 0), (delta, 0), (lse, jnp.inf)))

        def column(carry: Any, j: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            def tile(i: jax.Array, carry: Any, masked: bool) -> Any:
                d_query, d_key, d_value, extras = carry
                query, key, value, d_out, lse = queries[i], keys[j], values[j], d_outs[i], lses[i]
                if masked:
                    lse = jnp.where(_finite(d_out), lse, jnp.nan)
                    query, key, value, d_out = map(_cleaned, (query, key, value, d_out))
                logits, slope = tiles.logits(group, i, j, query, key, masked)
                weights = tiles.weights(group, i, j, logits, lse, masked)
                d_value += tiles.dot("pqh,pqk->phk", d_out, weights.astype(d_out.dtype))
                d_logits = weights * (tiles.dot("pqh,pkh->pqk", d_out, value) - deltas[i][..., None])
                if masked:
                    d_logits = tiles.hide(group, i, j, d_logits)
                extras = tiles.add_extras(extras, group, i, j, d_logits)
                d_products = (d_logits * slope).astype(query.dtype)
                d_key += tiles.dot("pqh,pqk->phk", query, d_products)
                d_query = d_query.at[i].add(tiles.dot("pqk,pkh->pqh", d_products, key))
                return d_query, d_key, d_value, extras

            d_query, extras = carry
            zeros = tiles.full((tiles.streams, operands.key.shape[-1], tiles.bk))
            d_query, d_key, d_value, extras = plan.visit(tiles.batch(group), j, tile, (d_query, zeros, zeros, extras))
            return (d_query, extras), tuple(x.swapaxes(1, 2).astype(keys.dtype) for x in (d_key, d_value))

        (d_query, extras), (d_key, d_value) = lax.scan(column, (tiles.full(queries.shape), extras), _indices(tiles.columns))
        d_query = (d_query * tiles.early).astype(keys.dtype)
        puts = tiles.put_queries, tiles.put_keys, tiles.put_keys
        results = tuple(put(whole, part, group) for put, whole, part in zip(puts, results, (d_query, d_key, d_value)))
        return (results, extras), None

    results = tuple(tiles.full(x.shape, dtype=x.dtype) for x in operands[:3])
    (results, extras), _ = lax.scan(group_of_streams, (results, tiles.no_extras()), _indices(tiles.groups))
    return Gradients(*results, *tiles.join_extras(extras))


def tangents(
    spec: Spec, operands: Operands, out: jax.Array, lse: jax.Array, d_operands: Gradients
) -> tuple[jax.Array, jax.Array]:
    """Forward mode: how `out` and `lse` move with the differentiable operands, of which any may be None (it stands still).

    With `d_logit` the movement of a logit, `d_lse = Σ p · d_logit` (with that of the sink) and `d_out = Σ p · (d_logit · value + d_value) − d_lse · out`. A row that sees nothing stands still.
    """
    tiles = _Tiles(spec, operands, spec.block_sizes.query, spec.block_sizes.key)
    plan = _Plan(tiles.states)
    dtype = tiles.dtype
    lse = _safe(lse)
    lse_by_query = lse.swapaxes(1, 2)
    moving = d_operands._replace(bias=tiles.split_pairs(d_operands.bias))

    def group_of_streams(results: tuple[jax.Array, jax.Array], group: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        queries, keys, values = tiles.of_group(operands.query, operands.key, operands.value, group)
        lses = tiles.queries_of(lse_by_query, group, jnp.inf)
        d_queries, d_keys, d_values = tiles.of_group(moving.query, moving.key, moving.value, group)

        def row(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            query = queries[i]

            def tile(j: jax.Array, carry: tuple[jax.Array, jax.Array], masked: bool) -> tuple[jax.Array, jax.Array]:
                accumulated, d_lse = carry
                key, value = _isolated(keys[j], values[j]) if masked else (keys[j], values[j])
                logits, slope = tiles.logits(group, i, j, query, key, masked)
                weights = tiles.weights(group, i, j, logits, lses[i], masked)
                d_products = jnp.zeros_like(logits)
                if d_queries is not None:
                    d_products += tiles.dot("pqh,pkh->pqk", d_queries[i], key)
                if d_keys is not None:
                    d_products += tiles.dot("pqh,pkh->pqk", query, d_keys[j])
                d_value = None if d_values is None else d_values[j]
                if masked and d_value is not None:
                    d_products = jnp.where(_finite(d_value)[:, None], d_products, jnp.nan)
                    d_value = _cleaned(d_value)
                weighted = weights * tiles.add_tangents(moving, group, i, j, d_products * slope)
                if masked:
                    weighted = tiles.hide(group, i, j, weighted)
                accumulated += tiles.dot("pqk,pkh->pqh", weighted.astype(value.dtype), value)
                if d_value is not None:
                    accumulated += tiles.dot("pqk,pkh->pqh", weights.astype(value.dtype), d_value)
                return accumulated, d_lse + weighted.sum(-1)

            carry = tiles.full(query.shape), tiles.full(query.shape[:-1])
            accumulated, d_lse = plan.visit(tiles.batch(group), i, tile, carry)
            return accumulated, d_lse[..., None]

        found = lax.map(row, _indices(tiles.rows))
        return tuple(tiles.put_queries(whole, part, group) for whole, part in zip(results, found)), None

    results = tiles.full(operands.query.shape), tiles.full((*operands.query.shape[:3], 1))
    (accumulated, d_lse), _ = lax.scan(group_of_streams, results, _indices(tiles.groups))
    d_lse = d_lse[..., 0]
    if d_operands.sinks is not None:
        weight = jnp.exp(operands.sinks.astype(dtype)[:, None] - lse).swapaxes(1, 2)
        d_lse += weight * d_operands.sinks.astype(dtype)
    return (accumulated - d_lse[..., None] * out.astype(dtype)).astype(out.dtype), d_lse.swapaxes(1, 2)


class _Plan:
    """For each line of tiles, which to visit: the full ones, which need no mask, then the partial ones."""

    def __init__(self, states: jax.Array | np.ndarray) -> None:
        """From `B' lines tiles`, where B' is 1 if all groups of streams are alike."""
        self.order, self.full, self.stop = visits(states)

    def visit(self, batch: jax.Array, line: jax.Array, tile: Callable[..., Any], carry: Any) -> Any:
        """Folds `tile(index, carry, masked)` over the line."""
        index = 0 if len(self.order) == 1 else batch
        order, full, stop = (jnp.asarray(x)[index, line] for x in (self.order, self.full, self.stop))

        def loop(start: jax.Array | int, stop: jax.Array, carry: Any, masked: bool) -> Any:
            return lax.fori_loop(start, stop, lambda t, carry: tile(order[t], carry, masked), carry)

        known = isinstance(self.full, np.ndarray)
        if not (known and not self.full.any()):
            carry = loop(0, full, carry, False)
        if not (known and (self.full == self.stop).all()):
            carry = loop(full, stop, carry, True)
        return carry


class _Tiles:
    """The operands cut into tiles, and what a tile needs to know.

    Of each group of streams, an array of queries becomes `rows P G·bq …`, one of keys `columns P bk …`, so that what a step of the loop reads is contiguous: of one group at a time, as a copy of everything would be as large as the operands. What depends on a pair of query and key is worked out in five axes, `shape`.
    """

    def __init__(self, spec: Spec, operands: Operands, block_q: int | None, block_kv: int | None) -> None:
        self.spec, self.operands = spec, operands
        self.batches, self.queries, self.num_heads, self.width = operands.query.shape
        self.keys, self.key_heads = operands.key.shape[1:3]
        self.heads = self.num_heads // self.key_heads
        self.dtype = jnp.promote_types(operands.query.dtype, jnp.float32)
        # The scale costs nothing on queries, and a pass over each tile on logits. A power of two is exact in any dtype.
        folds = operands.query.dtype == self.dtype or math.frexp(spec.scale)[0] == 0.5
        self.early, self.late = (spec.scale, 1.0) if folds else (1.0, spec.scale)
        self.bq = block_q or _block(self.queries, max(TILE // self.heads, 32))
        self.bk = block_kv or _block(self.keys, TILE)
        self.together = self.batches, 1
        if not spec.whole_batch:
            self.together = _together(self.batches, self.key_heads, self.heads * self.bq * self.bk)
        self.streams = self.together[0] * self.together[1]
        self.groups = self.batches * self.key_heads // self.streams
        self.rows, self.columns = -(-self.queries // self.bq), -(-self.keys // self.bk)
        self.shape = *self.together, self.heads, self.bq, self.bk
        self.states = merge_batches(tile_states(spec, operands, self.bq, self.bk), self.together[0])
        self.mask, self.bias = self.split_pairs(operands.mask), self.split_pairs(operands.bias)
        self.query_segments = self.key_segments = None
        if operands.q_segment_ids is not None:
            self.query_segments = _pad(operands.q_segment_ids, 1, self.bq).reshape(self.batches, self.rows, self.bq)
            self.key_segments = _pad(operands.kv_segment_ids, 1, self.bk).reshape(self.batches, self.columns, self.bk)

    # From `B T N …`, `B S K …` and `B N T S` to tiles and back.

    def of_group(
        self, query: jax.Array | None, key: jax.Array | None, value: jax.Array | None, group: jax.Array
    ) -> tuple[jax.Array | None, ...]:
        """The tiles of the group, the queries scaled; None of what is None."""
        query = None if query is None else self.queries_of(query, group) * self.early
        return query, *(None if x is None else self.keys_of(x, group) for x in (key, value))

    def queries_of(self, x: jax.Array, group: jax.Array, fill: float = 0) -> jax.Array:
        """From `B T N …` the tiles `rows P G·bq …` of the group, with `fill` behind the last query."""
        x, rest = _pad(self.of_streams(x, group), 1, self.bq, fill), x.shape[3:]
        x = x.reshape(self.together[0], self.rows, self.bq, self.together[1], self.heads, *rest)
        x = x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))
        return x.reshape(self.rows, self.streams, self.heads * self.bq, *rest)

    def put_queries(self, whole: jax.Array, tiles: jax.Array, group: jax.Array) -> jax.Array:
        """`whole`, `B T N H`, with these `rows P G·bq H` in the place of the group."""
        x = tiles.reshape(self.rows, *self.together, self.heads, self.bq, whole.shape[3])
        x = x.transpose(1, 0, 4, 2, 3, 5).reshape(self.together[0], self.rows * self.bq, -1, whole.shape[3])
        return lax.dynamic_update_slice(whole, x[:, : self.queries], self.start_of(whole, group))

    def keys_of(self, x: jax.Array, group: jax.Array) -> jax.Array:
        """From `B S K H` the tiles `columns P bk H` of the group."""
        x = _pad(self.of_streams(x, group), 1, self.bk).reshape(
            self.together[0], self.columns, self.bk, self.together[1], self.width
        )
        return x.transpose(1, 0, 3, 2, 4).reshape(self.columns, self.streams, self.bk, self.width)

    def put_keys(self, whole: jax.Array, tiles: jax.Array, group: jax.Array) -> jax.Array:
        """`whole`, `B S K H`, with these `columns P bk H` in the place of the group."""
        x = tiles.reshape(self.columns, *self.together, self.bk, self.width)
        x = x.transpose(1, 0, 3, 2, 4).reshape(self.together[0], self.columns * self.bk, -1, self.width)
        return lax.dynamic_update_slice(whole, x[:, : self.keys], self.start_of(whole, group))

    def of_streams(self, x: jax.Array, group: jax.Array) -> jax.Array:
        """From `B T N …` or `B S K …` that of the streams of the group."""
        size = self.together[0], x.shape[1], x.shape[2] * self.together[1] // self.key_heads, *x.shape[3:]
        return lax.dynamic_slice(x, self.start_of(x, group), size)

    def start_of(self, x: jax.Array, group: jax.Array) -> list[jax.Array]:
        """Where that begins."""
        splits = self.key_heads // self.together[1]
        start = group // splits * self.together[0], 0, group % splits * (x.shape[2] // splits), *[0] * (x.ndim - 3)
        return [jnp.int32(each) for each in start]

    def split_pairs(self, x: jax.Array | None) -> jax.Array | None:
        """`B K G rows·bq columns·bk`, each 1 where it was."""
        if x is None:
            return None
        x = x.reshape(len(x), *((1, 1) if x.shape[1] == 1 else (self.key_heads, self.heads)), *x.shape[2:])
        return _pad(_pad(x, 3, self.bq if x.shape[3] > 1 else 1), 4, self.bk if x.shape[4] > 1 else 1)

    def corner(self, group: jax.Array, i: jax.Array, j: jax.Array, within: jax.Array) -> tuple[list[Any], list[int]]:
        """Where a tile starts in an array of pairs, and its shape: 0 and 1 along axes that are broadcast."""
        splits = self.key_heads // self.together[1]
        starts = group // splits * self.together[0], group % splits * self.together[1], 0, i * self.bq, j * self.bk
        broadcast = [length == 1 for length in within.shape]
        starts = [jnp.int32(0 if x else start) for x, start in zip(broadcast, starts)]
        return starts, [1 if x else n for x, n in zip(broadcast, self.shape)]

    def batch(self, group: jax.Array) -> jax.Array:
        """Which of the `B / batches that go together`."""
        return group // (self.key_heads // self.together[1])

    def of_batch(self, x: jax.Array, group: jax.Array) -> jax.Array:
        """From `B …` that of the batches of the group."""
        return lax.dynamic_slice_in_dim(x, self.batch(group) * self.together[0], self.together[0])

    def of_head(self, x: jax.Array, group: jax.Array) -> jax.Array:
        """From `N` that of the heads of the group, in five axes."""
        start = group % (self.key_heads // self.together[1]) * self.together[1] * self.heads
        x = lax.dynamic_slice_in_dim(x.astype(self.dtype), start, self.together[1] * self.heads)
        return x.reshape(1, self.together[1], self.heads, 1, 1)

    def sinks(self, group: jax.Array) -> jax.Array:
        """One for each row of a tile: `P G·bq`."""
        return jnp.broadcast_to(self.of_head(self.operands.sinks, group)[..., 0], self.shape[:-1]).reshape(self.streams, -1)

    # One tile.

    def full(self, shape: tuple[int, ...], value: float = 0, dtype: Any = None) -> jax.Array:
        """Where sums start. Like the queries, it may differ from device to device: within a `shard_map` a loop has to know that from the start."""
        return jnp.full_like(self.operands.query, value, dtype or self.dtype, shape=shape)

    def dot(self, subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, precision=self.spec.precision, preferred_element_type=self.dtype)

    def distances(self, group: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Position of the key minus that of the query."""
        rows, columns = i * self.bq + jnp.arange(self.bq), j * self.bk + jnp.arange(self.bk)
        distances = columns - rows[:, None]
        if self.operands.q_offset is None:
            return distances
        return distances - self.of_batch(self.operands.q_offset, group)[:, None, None, None, None]

    def visible(self, group: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Bool in five axes."""
        spec, operands = self.spec, self.operands
        rows, columns = (i * self.bq + jnp.arange(self.bq))[:, None], j * self.bk + jnp.arange(self.bk)
        visible = columns < self.keys
        if spec.is_causal:
            visible &= self.distances(group, i, j) <= 0
        if spec.window is not None:
            distances = self.distances(group, i, j)
            visible &= (distances >= -spec.window[0]) & (distances <= spec.window[1])
        if spec.block_mask is not None:
            table = tile_table(spec.block_mask, self.queries, self.keys, self.bq, self.bk)
            pattern = jnp.asarray(table.patterns)[jnp.asarray(table.indices)[i, j]]
            visible &= pattern | (jnp.asarray(table.states)[i, j] == FULL)
        if self.query_segments is not None and self.key_segments is not None:
            of_query, of_key = self.of_batch(self.query_segments, group)[:, i], self.of_batch(self.key_segments, group)[:, j]
            visible &= (of_query[:, :, None] == of_key[:, None])[:, None, None]
        for lengths, indices in ((operands.query_lengths, rows), (operands.key_value_lengths, columns)):
            if lengths is not None:
                visible &= indices < self.of_batch(lengths, group)[:, None, None, None, None]
        if self.mask is not None:
            visible &= lax.dynamic_slice(self.mask, *self.corner(group, i, j, self.mask))
        return jnp.broadcast_to(visible, self.shape)

    def logits(
        self, group: jax.Array, i: jax.Array, j: jax.Array, query: jax.Array, key: jax.Array, masked: bool
    ) -> tuple[jax.Array, jax.Array | float]:
        """`P G·bq bk`, −∞ where hidden, and their derivative by the product of query and key."""
        logits = self.dot("pqh,pkh->pqk", query, key)
        if self.late != 1:
            logits = logits * self.late
        slope: jax.Array | float = self.late
        if self.spec.soft_cap is not None:
            saturation = jnp.tanh(logits / self.spec.soft_cap)
            logits, slope = self.spec.soft_cap * saturation, self.late * (1 - saturation**2)
        flat, logits = logits.shape, logits.reshape(self.shape)
        if self.operands.alibi_slopes is not None:
            logits -= self.of_head(self.operands.alibi_slopes, group) * jnp.abs(self.distances(group, i, j))
        if self.bias is not None:
            logits += lax.dynamic_slice(self.bias, *self.corner(group, i, j, self.bias)).astype(self.dtype)
        if masked:
            logits = jnp.where(self.visible(group, i, j), logits, -jnp.inf)
        return logits.reshape(flat), slope

    def weights(self, group: jax.Array, i: jax.Array, j: jax.Array, logits: jax.Array, lse: jax.Array, masked: bool) -> jax.Array:
        """The probabilities of a tile, `P G·bq bk`."""
        weights = jnp.exp(logits - lse[..., None])
        # Where lse is NaN, a hidden pair has no weight all the same.
        return self.hide(group, i, j, weights) if masked else weights

    def hide(self, group: jax.Array, i: jax.Array, j: jax.Array, x: jax.Array) -> jax.Array:
        """Zeros in place of hidden pairs."""
        return jnp.where(self.visible(group, i, j), x.reshape(self.shape), 0).reshape(x.shape)

    # What is added to logits, and its derivatives.

    def no_extras(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Where the gradients of the bias and of the slopes are summed up."""
        wanted = self.bias is not None and self.spec.bias_gradient
        d_bias = self.full(self.bias.shape) if wanted else None
        return d_bias, None if self.operands.alibi_slopes is None else self.full((self.num_heads,))

    def add_extras(self, extras: Any, group: jax.Array, i: jax.Array, j: jax.Array, d_logits: jax.Array) -> Any:
        d_bias, d_slopes = extras
        d_logits = d_logits.reshape(self.shape)
        if d_bias is not None:
            start, shape = self.corner(group, i, j, d_bias)
            broadcast = [axis for axis, length in enumerate(d_bias.shape) if length == 1]
            tile = lax.dynamic_slice(d_bias, start, shape) + d_logits.sum(broadcast, keepdims=True)
            d_bias = lax.dynamic_update_slice(d_bias, tile, start)
        if d_slopes is not None:
            update = -(d_logits * jnp.abs(self.distances(group, i, j))).sum((0, 3, 4)).ravel()
            start = group % (self.key_heads // self.together[1]) * len(update)
            d_slopes = lax.dynamic_update_slice(d_slopes, lax.dynamic_slice(d_slopes, [start], update.shape) + update, [start])
        return d_bias, d_slopes

    def join_extras(self, extras: Any) -> tuple[jax.Array | None, jax.Array | None]:
        d_bias, d_slopes = extras
        if d_bias is not None:
            batches, _, _, queries, keys = d_bias.shape
            bias = self.operands.bias
            d_bias = d_bias.reshape(batches, -1, queries, keys)[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
        return d_bias, None if d_slopes is None else d_slopes.astype(self.operands.alibi_slopes.dtype)

    def add_tangents(self, moving: Gradients, group: jax.Array, i: jax.Array, j: jax.Array, d_logits: jax.Array) -> jax.Array:
        """`d_logits` with what the movements of bias (already split) and slopes add."""
        flat, d_logits = d_logits.shape, d_logits.reshape(self.shape)
        if moving.alibi_slopes is not None:
            d_logits -= self.of_head(moving.alibi_slopes, group) * jnp.abs(self.distances(group, i, j))
        if moving.bias is not None:
            d_logits += lax.dynamic_slice(moving.bias, *self.corner(group, i, j, moving.bias)).astype(self.dtype)
        return d_logits.reshape(flat)


# Numbers that are not finite. Zero times NaN is NaN, so in a tile that hides pairs, vectors that are not finite are replaced by zeros, and a NaN in the logit or in lse, which can be hidden, carries the news to those that see them.


def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all(-1)


def _cleaned(x: jax.Array) -> jax.Array:
    return jnp.where(_finite(x)[..., None], x, 0)


def _isolated(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """NaN in place of keys that are not finite or whose values are not, and zeros in place of such values."""
    return jnp.where((_finite(key) & _finite(value))[..., None], key, jnp.nan), _cleaned(value)


def _safe(lse: jax.Array) -> jax.Array:
    """What to subtract from logits: +∞ gives no weight to a row that sees nothing."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse)


# Sizes.


def _together(batches: int, key_heads: int, area: int) -> tuple[int, int]:
    """How many batches and how many key heads go together: as few as give each core a tile of `TILE²`, and all key heads where it takes several batches."""
    wanted = (os.cpu_count() or 1) * max(TILE * TILE // area, 1)
    if key_heads >= wanted:
        return 1, _least_divisor(key_heads, wanted)
    return _least_divisor(batches, -(-wanted // key_heads)), key_heads


def _least_divisor(number: int, least: int) -> int:
    return next((x for x in range(least, number) if number % x == 0), number)


def _block(length: int, most: int) -> int:
    """Blocks that divide the length as evenly as blocks of a multiple of 16 can."""
    count = -(-length // most)
    return length if count == 1 else -(-length // (16 * count)) * 16


def _indices(count: int) -> jax.Array:
    """In 32 bits with `jax_enable_x64` too."""
    return jnp.arange(count, dtype=jnp.int32)


def _pad(x: jax.Array, axis: int, block: int, fill: float = 0) -> jax.Array:
    edges = [(0, 0)] * x.ndim
    edges[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, edges, constant_values=fill)
