"""From products of queries and keys to logits, and which tiles of them a block visits: what both passes of the Mosaic GPU kernels share.

Logits count in powers of two throughout: exp2 is one instruction, exp is not, and the factor log2 e joins the scale for nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.mosaic_gpu.dialect import ROWS, Index, Ref

LOG2_E, LN_2 = math.log2(math.e), math.log(2)


class Extras(NamedTuple):
    """Small arrays beside queries, keys and values; None where the problem has no use for them."""

    limits: Any = None
    """`B 3` int32: q_offset, queries and keys of each batch."""
    sinks: Any = None
    """`N` float32, in powers of two."""
    slopes: Any = None
    """`N` float32: of ALiBi, in powers of two."""
    q_ids: Any = None
    """`B T'` int32: segments, up to the end of the last tile."""
    kv_ids: Any = None
    """`B S'` int32."""
    order: Any = None
    """`B lines tiles` int32, of `tiles.Visits`: segments differ from batch to batch."""
    counts: Any = None
    """`B lines 2` int32: its `masked_from` and `stop`."""

    def take(self, refs: list[Ref]) -> "Extras":
        """The same with references in the place of arrays: the first of `refs`, which are removed."""
        return Extras(*(None if array is None else refs.pop(0) for array in self))


class Span(NamedTuple):
    """The tiles from `begin` to `stop`, at least one; those from `full_begin` to `full_stop` need no mask. They are visited from the last to the first."""

    begin: Index
    stop: Index
    full_begin: Index
    full_stop: Index

    @property
    def count(self) -> Index:
        return self.stop - self.begin

    def tile(self, index: Index) -> Index:
        return self.stop - 1 - index

    def masked(self, index: Index) -> jax.Array:
        return (self.tile(index) < self.full_begin) | (self.tile(index) >= self.full_stop)


class Listed(NamedTuple):
    """Tiles in the order in which a list has them; from `masked_from` on they need a mask."""

    order: Ref
    masked_from: Index
    count: Index

    def tile(self, index: Index) -> Index:
        return self.order[index]

    def masked(self, index: Index) -> jax.Array:
        return index >= self.masked_from


@dataclasses.dataclass(frozen=True)
class Scores:
    """What lies between ⟨query, key⟩ and the softmax. Query i sees key j where `−left ≤ j − (i + offset) ≤ right` and `j < keys`, and their segments agree; a side that is None has no limit."""

    scale: float
    soft_cap: float | None
    left: int | None
    right: int | None
    queries: int
    keys: int
    extras: Extras
    """Arrays; references once `within` a kernel."""
    batch: Index = 0

    def within(self, refs: list[Ref], batch: Index) -> "Scores":
        """The same inside a kernel; takes its own from `refs`."""
        return dataclasses.replace(self, extras=self.extras.take(refs), batch=batch)

    @property
    def plain(self) -> bool:
        """Whether logits are nothing but scaled products."""
        return self.soft_cap is None and self.extras.slopes is None

    @property
    def factor(self) -> float:
        """From what `logits` gives to logits."""
        return self.scale * LOG2_E if self.plain else 1.0

    @property
    def offset(self) -> Index:
        return 0 if self.extras.limits is None else self.extras.limits[self.batch, 0]

    @property
    def lengths(self) -> tuple[Index, Index]:
        """The batch's queries and keys."""
        if self.extras.limits is None:
            return self.queries, self.keys
        return self.extras.limits[self.batch, 1], self.extras.limits[self.batch, 2]

    @property
    def banded(self) -> bool:
        return self.left is not None or self.right is not None

    def indices(self, top: Index, needed: bool) -> Index:
        """Of a consumer's rows. Not if nobody needs them: Mosaic finds no layout for a vector without a use."""
        return top + lax.iota(jnp.int32, ROWS) if needed else top

    def keys_of(self, i: Index) -> tuple[Index, Index]:
        """The first key that query i sees, and the one after the last."""
        keys = self.lengths[1]
        low = 0 if self.left is None else i + (self.offset - self.left)
        return low, keys if self.right is None else jnp.minimum(i + (self.offset + self.right + 1), keys)

    def queries_of(self, j: Index) -> tuple[Index, Index]:
        """The first query that sees key j, and the one after the last, for keys that are not hidden by a length. Queries behind the last one do no harm: they have no weights."""
        low = 0 if self.right is None else j - (self.offset + self.right)
        return low, 2**30 if self.left is None else j + (self.left + 1 - self.offset)

    def hides_keys(self, block: int) -> bool:
        """Whether a tile of `block` keys may need a mask where queries step through keys."""
        return self._hides or self.keys % block != 0

    @property
    def hides_queries(self) -> bool:
        """Whether a tile may need a mask where keys step through queries. What comes out for keys behind the last one is not stored."""
        return self._hides

    @property
    def _hides(self) -> bool:
        dynamic = self.extras.limits is not None or self.extras.order is not None
        return dynamic or self.banded

    def visited_keys(self, line: Index, rows: int, block: int) -> Span | Listed:
        """The tiles of `block` keys that the line-th `rows` queries see."""
        if self.extras.order is not None:
            return self._listed(line)
        first, last = self.keys_of(line * rows), self.keys_of(jnp.minimum((line + 1) * rows, self.lengths[0]) - 1)
        return _span((first[0], last[1]), (last[0], first[1]), block, self.keys)

    def visited_queries(self, line: Index, columns: int, block: int) -> Span | Listed:
        """The tiles of `block` queries that see the line-th `columns` keys."""
        if self.extras.order is not None:
            return self._listed(line)
        queries, keys = self.lengths
        (low, full_high), (full_low, high) = self.queries_of(line * columns), self.queries_of((line + 1) * columns - 1)
        if self.extras.limits is not None:
            full_high = jnp.where((line + 1) * columns <= keys, full_high, 0)
        return _span((low, jnp.minimum(high, queries)), (full_low, full_high), block, self.queries)

    def _listed(self, line: Index) -> Listed:
        counts = self.extras.counts.at[self.batch, line]
        # One tile even where nothing is visible; its mask hides all of it.
        return Listed(self.extras.order.at[self.batch, line], counts[0], jnp.maximum(counts[1], 1))

    def logits(self, product: jax.Array, head: Index, distance: Callable[[], jax.Array]) -> tuple[jax.Array, jax.Array | None]:
        """Logits divided by `factor`, and their derivative with respect to the product beyond the scale (None: 1). `distance()` is |position of the query − that of the key|."""
        if self.plain:
            return product, None
        logits, derivative = product * (self.scale * LOG2_E), None
        if self.soft_cap is not None:
            # tanh(x) = 1 − 2/(exp(2x) + 1): the instruction for tanh is right to 11 bits only.
            squashed = 1 - 2 / (jnp.exp2(logits * (2 / self.soft_cap)) + 1)
            logits, derivative = squashed * (self.soft_cap * LOG2_E), 1 - squashed * squashed
        if self.extras.slopes is not None:
            logits -= self.extras.slopes[head] * distance()
        return logits, derivative


def rows_of(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value for each row, along the row."""
    return lax.broadcast_in_dim(values, shape, [0])


def columns_of(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value for each column, along the column."""
    return lax.broadcast_in_dim(values, shape, [1])


def distances(row: Index, column: Index, shape: tuple[int, int]) -> jax.Array:
    """|row index − column index| as float32, for a tile whose first row and column have these indices."""
    rows = (lax.iota(jnp.int32, shape[0]) + (row - column)).astype(jnp.float32)
    return jnp.abs(rows_of(rows, shape) - lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.float32))


def band(logits: jax.Array, low: Index | jax.Array, high: Index | jax.Array, start: Index) -> jax.Array:
    """−∞ outside of columns `low` to `high`, given for each row or for all, where the first column is `start`."""
    columns = lax.broadcasted_iota(jnp.int32, logits.shape, 1)

    def limit(bound: Index | jax.Array) -> jax.Array:
        bound = jnp.asarray(bound - start, jnp.int32)
        return rows_of(bound, logits.shape) if bound.ndim else jnp.broadcast_to(bound, logits.shape)

    visible = columns < limit(high)
    if not (isinstance(low, int) and low == 0):
        visible &= columns >= limit(low)
    return jnp.where(visible, logits, -jnp.inf)


def _span(some: tuple[Index, Index], all_: tuple[Index, Index], block: int, length: int) -> Span:
    """From the indices that are visible to some and to all, to tiles of `block`."""

    def floor(index: Index) -> jax.Array:
        return lax.div(jnp.maximum(jnp.int32(index), 0), jnp.int32(block))

    total = -(-length // block)
    begin = jnp.minimum(floor(some[0]), total - 1)
    # Where nothing is visible, one tile is visited all the same, and its mask hides all of it: no loop is ever empty.
    stop = jnp.minimum(jnp.maximum(floor(some[1] + (block - 1)), begin + 1), total)
    return Span(begin, stop, floor(all_[0] + (block - 1)), floor(all_[1]))
