"""FlashAttention-2's forward pass (Dao 2023, algorithm 1) for TPUs: a step of the grid is a tile of logits, and what a line of tiles adds up stays in the vector memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.masks import PARTIAL
from pallas_kernels.attention.mosaic_tpu.schedule import Schedule, Step
from pallas_kernels.attention.mosaic_tpu.scores import (
    LANES,
    LN_2,
    LOG2_E,
    Blocks,
    Ref,
    Scalars,
    Scores,
    Sides,
    Tile,
    flat,
    lane_sums,
    shaped_like,
    upright,
    widened,
)


def forward_kernel(
    scores: Scores,
    schedule: Schedule,
    scalars: Scalars,
    sides: Sides,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    **how: Any,
) -> tuple[jax.Array, jax.Array]:
    """From `B N T' H` and twice `B K S' H`, lengths multiples of the blocks, the output `B N T' H` and lse `B N 1 T'`. `how` goes to `pallas_call`."""
    batches, heads, queries, width = query.shape
    blocks = Blocks(schedule, scores, heads // key.shape[1])
    rows = scores.block_q
    # Finite, so that subtracting it never makes a NaN; the least, so that an additive mask of this value still counts as a logit.
    lowest = float(jnp.finfo(jnp.float32).min)

    def kernel(
        scalars: Scalars, sides: Sides, query: Ref, key: Ref, value: Ref,
        out: Ref, lse: Ref, accumulated_at: Ref, highest_at: Ref, total_at: Ref, row_ids: Ref | None = None,
    ) -> None:  # fmt: skip
        grid = tuple(pl.program_id(axis) for axis in range(3))
        step, head = blocks.step(grid, scalars), blocks.head(grid)
        tile = Tile(scores, step, scalars, sides, row_ids, grid[0], head)

        @pl.when(step.first)
        def _() -> None:
            accumulated_at[...] = jnp.zeros((rows, width), jnp.float32)
            if row_ids is not None:
                row_ids[...] = upright(sides.q_ids[...])
            highest, total = jnp.full((rows, LANES), lowest), jnp.zeros((rows, LANES))
            if scalars.sinks is not None:
                sink = jnp.full((rows, LANES), scalars.sinks[head] * LOG2_E)
                highest = jnp.maximum(sink, lowest)
                total = jnp.exp2(sink - highest) / LANES  # The lanes are summed up at the end.
            highest_at[...], total_at[...] = highest, total

        def visit(masked: bool) -> None:
            logits, _ = tile.logits(scores.dot(query[...], key[...], contract=(1, 1)))
            visible = tile.visible() if masked else None
            if visible is not None:
                logits = jnp.where(visible, logits, -jnp.inf)
            previous = highest_at[...]
            highest = jnp.maximum(previous, logits.max(axis=1, keepdims=True))
            weights = jnp.exp2(logits - widened(highest, logits.shape[1]))
            shrink = jnp.exp2(previous - highest)
            highest_at[...] = highest
            total_at[...] = shrink * total_at[...] + lane_sums(weights)
            update = scores.dot(weights.astype(value.dtype), value[...])
            accumulated_at[...] = widened(shrink, width) * accumulated_at[...] + update

        visit_by_state(schedule, step, visit)

        @pl.when(step.last)
        def _() -> None:
            total = jnp.broadcast_to(total_at[...].sum(axis=1, keepdims=True), (rows, LANES))
            shares = 1 / jnp.where(total == 0, 1, total)
            out[...] = (accumulated_at[...] * widened(shares, width)).astype(out.dtype)
            # Without any logit, `highest` is finite and the logarithm is −∞.
            lse[...] = flat(highest_at[...] * LN_2 + jnp.log(total))

    statistic = pltpu.VMEM((rows, LANES), jnp.float32)
    scratch = [pltpu.VMEM((rows, width), jnp.float32), statistic, statistic]
    if sides.q_ids is not None:
        scratch.append(pltpu.VMEM((rows, LANES), jnp.int32))
    return pl.pallas_call(
        kernel,
        out_shape=(
            shaped_like(query),
            shaped_like(query, batches, heads, 1, queries, dtype=jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batches, heads, schedule.count),
            in_specs=[blocks.of_sides(sides), blocks.of_queries(width), blocks.of_keys(width), blocks.of_keys(width)],
            out_specs=(blocks.of_queries(width), blocks.of_rows()),
            scratch_shapes=scratch,
        ),
        name="attention_forward",
        **how,
    )(scalars, sides, query, key, value)


def visit_by_state(schedule: Schedule, step: Step, visit: Callable[[bool], None]) -> None:
    """`visit(masked)` where the tile is not empty; a state that does not occur is not compiled."""
    for state in sorted(schedule.states):

        @pl.when(step.state == state)
        def _(masked: bool = state == PARTIAL) -> None:
            visit(masked)
