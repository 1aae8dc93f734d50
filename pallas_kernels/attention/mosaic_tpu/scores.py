"""From products of queries and keys to logits, and which pairs of a tile are visible: what the three TPU kernels share.

A tile of logits has queries as rows and keys as columns, or the other way round (`transposed`), which spares a kernel that sums over queries every transposition. The vector unit works on 8 × 128 numbers; a number that belongs to a row is kept 128 times, once for each lane, so that it meets a tile of logits without being moved across lanes.

Logits count in powers of two: the vector unit has exp2 and makes exp of it, and the factor log2 e joins the scale for nothing.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.masks import EMPTY
from pallas_kernels.attention.mosaic_tpu.schedule import Index, Schedule, Step
from pallas_kernels.attention.problem import Operands, Spec

LANES = 128
LOG2_E, LN_2 = math.log2(math.e), math.log(2)

Ref = Any
"""A place in memory; Pallas has no public type for what a kernel is given."""


class Scalars(NamedTuple):
    """What is in scalar memory before a kernel starts; None where the problem has no use for it."""

    words: Any
    """Of the `Schedule`."""
    pattern: Any = None
    """Of the `Schedule`."""
    q_offset: Any = None
    """`B` int32."""
    query_lengths: Any = None
    """`B` int32."""
    key_value_lengths: Any = None
    """`B` int32."""
    alibi_slopes: Any = None
    """`N` float32."""
    sinks: Any = None
    """`N` float32."""


class Sides(NamedTuple):
    """What comes in blocks beside queries, keys and values; None where the problem has no use for it."""

    q_ids: Any = None
    """`B 1 T'` int32: segments."""
    kv_ids: Any = None
    """`B 1 S'` int32."""
    patterns: Any = None
    """`P rows columns` int8, of the `Schedule`."""
    mask: Any = None
    """`B|1 N|1 T'|1 S'|1` int8."""
    bias: Any = None
    """`B|1 N|1 T'|1 S'|1`, any float."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What lies between ⟨query, key⟩ and the softmax, and is static."""

    scale: float
    soft_cap: float | None
    left: int | None
    """How far to the left of its position a query sees; None: without limit."""
    right: int | None
    keys: int
    """S: those behind are padding."""
    block_q: int
    block_kv: int
    transposed: bool
    precision: lax.Precision | None

    @staticmethod
    def of(spec: Spec, operands: Operands, block_q: int, block_kv: int, transposed: bool = False) -> "Scores":
        left, right = (None, None) if spec.window is None else spec.window
        if spec.is_causal:
            right = 0 if right is None else min(right, 0)
        precision = spec.precision
        if operands.query.dtype == jnp.bfloat16:
            precision = lax.Precision.DEFAULT  # One pass of the MXU is exact.
        elif precision == lax.Precision.HIGH:
            precision = lax.Precision.HIGHEST  # Mosaic has no product of three passes.
        keys = operands.key.shape[1]
        return Scores(spec.scale, spec.soft_cap, left, right, keys, block_q, block_kv, transposed, precision)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tile of logits."""
        return (self.block_kv, self.block_q) if self.transposed else (self.block_q, self.block_kv)

    def dot(self, a: jax.Array, b: jax.Array, *, contract: tuple[int, int] = (1, 0)) -> jax.Array:
        """The product of matrices over the given axes, summed up in float32."""
        dimensions = ((contract[:1], contract[1:]), ((), ()))
        return lax.dot_general(a, b, dimensions, precision=self.precision, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of logits inside a kernel."""

    scores: Scores
    step: Step
    scalars: Scalars
    """References, as are the two below."""
    sides: Sides
    row_ids: Ref | None
    """Segments of the rows, one in each lane: `rows 128`."""
    batch: Index
    head: Index

    def distance(self) -> jax.Array:
        """Position of the key minus that of the query."""
        query, key = self._starts
        offset = 0 if self.scalars.q_offset is None else self.scalars.q_offset[self.batch]
        return self._iota(1) - self._iota(0) + (key - query - offset)

    def visible(self) -> jax.Array | None:
        """Bool; None where nothing that is known of the problem hides a pair."""
        scores, scalars, sides = self.scores, self.scalars, self.sides
        query, key = self._starts
        conditions = []
        if scores.left is not None or scores.right is not None:
            distance = self.distance()
            conditions += [] if scores.left is None else [distance >= -scores.left]
            conditions += [] if scores.right is None else [distance <= scores.right]
        if scalars.key_value_lengths is not None:
            conditions.append(self._iota(1) < scalars.key_value_lengths[self.batch] - key)
        elif scores.keys % scores.block_kv:
            conditions.append(self._iota(1) < scores.keys - key)
        if scalars.query_lengths is not None:
            conditions.append(self._iota(0) < scalars.query_lengths[self.batch] - query)
        if self.row_ids is not None:
            columns = (sides.q_ids if scores.transposed else sides.kv_ids)[...]
            conditions.append(widened(self.row_ids[...], scores.shape[1]) == columns)
        if sides.patterns is not None:
            conditions.append(sides.patterns[...].astype(jnp.int32) != 0)
        if sides.mask is not None:
            conditions.append(jnp.broadcast_to(self._oriented(sides.mask[...].astype(jnp.int32)), scores.shape) != 0)
        visible = None
        for condition in conditions:
            visible = condition if visible is None else visible & condition
        return visible

    def logits(self, product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """In powers of two, and the derivative of what is capped with respect to the scaled product (None: 1)."""
        scale, soft_cap = self.scores.scale, self.scores.soft_cap
        derivative = None
        if soft_cap is None:
            logits = product * (scale * LOG2_E)
        else:
            squashed = jnp.tanh(product * (scale / soft_cap))
            logits, derivative = squashed * (soft_cap * LOG2_E), 1 - squashed * squashed
        if self.scalars.alibi_slopes is not None:
            logits -= (self.scalars.alibi_slopes[self.head] * LOG2_E) * jnp.abs(self.distance()).astype(jnp.float32)
        if self.sides.bias is not None:
            logits += self._oriented(self.sides.bias[...].astype(jnp.float32)) * LOG2_E
        return logits, derivative

    @property
    def _starts(self) -> tuple[Index, Index]:
        """Of the first query and of the first key."""
        line, tile = self.step.line, self.step.tile
        query, key = (tile, line) if self.scores.transposed else (line, tile)
        return query * self.scores.block_q, key * self.scores.block_kv

    def _iota(self, axis: int) -> jax.Array:
        """Indices of queries (0) or keys (1) within the tile."""
        return lax.broadcasted_iota(jnp.int32, self.scores.shape, axis ^ self.scores.transposed)

    def _oriented(self, pairs: jax.Array) -> jax.Array:
        """From queries × keys to the tile's order."""
        return pairs.T if self.scores.transposed else pairs


# Blocks of arrays. Grids are (batch, head, step) or, where heads that share keys are summed up, (batch, key head, step, head among these); index maps get the scalars at the end.


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which blocks a step needs."""

    schedule: Schedule
    scores: Scores
    group: int
    """Heads that share a key head."""

    def step(self, grid: tuple[Index, ...], scalars: Scalars) -> Step:
        return self.schedule.step(scalars.words, grid[0], grid[2])

    def head(self, grid: tuple[Index, ...], step: Step | None = None) -> Index:
        """Of the queries; with a `step` the one whose blocks it should fetch."""
        if len(grid) == 3:
            return grid[1]
        # An empty step names the blocks of the next that is not empty, which begins with the first head.
        return grid[1] * self.group + (grid[3] if step is None else jnp.where(step.state == EMPTY, 0, grid[3]))

    def of_queries(self, width: int) -> pl.BlockSpec:
        """Of `B N T' width`."""
        return self._heads(queries=True, block=lambda place: (place, 0), shape=(self.scores.block_q, width))

    def of_keys(self, width: int) -> pl.BlockSpec:
        """Of `B K S' width`."""
        return self._heads(queries=False, block=lambda place: (place, 0), shape=(self.scores.block_kv, width))

    def of_rows(self) -> pl.BlockSpec:
        """Of `B N 1 T'`: a number for each query."""
        return self._heads(queries=True, block=lambda place: (0, place), shape=(1, self.scores.block_q))

    def of_sides(self, sides: Sides) -> Sides:
        """A block spec in the place of each array."""
        specs = {}
        for name, queries, block in (("q_ids", True, self.scores.block_q), ("kv_ids", False, self.scores.block_kv)):
            if getattr(sides, name) is not None:
                specs[name] = self._ids(queries, block)
        if sides.patterns is not None:
            specs["patterns"] = pl.BlockSpec((None, *self.scores.shape), lambda *grid: (grid[-1].pattern[grid[2]], 0, 0))
        for name in ("mask", "bias"):
            if getattr(sides, name) is not None:
                specs[name] = self._pairs(getattr(sides, name).shape)
        return Sides(**specs)

    def _place(self, queries: bool, step: Step) -> Index:
        return step.tile if queries == self.scores.transposed else step.line

    def _heads(self, queries: bool, block: Any, shape: tuple[int, int]) -> pl.BlockSpec:
        def index(*grid: Any) -> tuple[Index, ...]:
            *grid, scalars = grid
            step = self.step(grid, scalars)
            of_query = self.head(grid, step)
            head = of_query if queries else grid[1] if len(grid) == 4 else lax.div(of_query, self.group)
            return grid[0], head, *block(self._place(queries, step))

        return pl.BlockSpec((None, None, *shape), index)

    def _ids(self, queries: bool, block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, block), lambda *grid: (grid[0], 0, self._place(queries, self.step(grid[:-1], grid[-1]))))

    def _pairs(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        def index(*grid: Any) -> tuple[Index, ...]:
            *grid, scalars = grid
            step = self.step(grid, scalars)
            whole = grid[0], self.head(grid, step), self._place(True, step), self._place(False, step)
            return tuple(0 if length == 1 else place for length, place in zip(shape, whole))

        blocks = self.scores.block_q, self.scores.block_kv
        return pl.BlockSpec((None, None, *(1 if n == 1 else block for n, block in zip(shape[2:], blocks))), index)


def shaped_like(x: jax.Array, *shape: int, dtype: jnp.dtype | None = None) -> jax.ShapeDtypeStruct:
    """Of a kernel's result. Within a `shard_map` it differs from device to device as the operand `x` does."""
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, manual_axis_type=jax.typeof(x).mat)


# Numbers that belong to rows: `rows 128`, the same in each lane.


def widened(x: jax.Array, width: int) -> jax.Array:
    """`rows 128` becomes `rows width`."""
    copies = pl.cdiv(width, LANES)
    x = jnp.concatenate([x] * copies, axis=1) if copies > 1 else x
    return x if width % LANES == 0 else x[:, :width]


def upright(x: jax.Array) -> jax.Array:
    """`1 rows` becomes `rows 128`."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def flat(x: jax.Array) -> jax.Array:
    """`rows 128` becomes `1 rows`."""
    return x.T[:1]


def lane_sums(x: jax.Array) -> jax.Array:
    """`rows width` becomes `rows 128`: sums of what is in the same lane, which the caller sums up once at the end. The width is a multiple of 128."""
    parts = [x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)]
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
