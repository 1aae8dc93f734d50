"""FlashAttention-2's backward pass (Dao 2023, algorithm 2) for TPUs, as two kernels that both take the weights anew from the queries, the keys and the log-sum-exp.

One has lines of queries and sums up their gradients along the keys; the other has lines of keys, and tiles of logits that are transposed. That is seven products where one kernel would do with five, but nobody adds to another's sum: the same inputs give the same bits.

In both kernels `lse` is in powers of two and +∞ where a query sees nothing or is padding: its weights are then 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mosaic_tpu.forward_pass import visit_by_state
from pallas_kernels.attention.mosaic_tpu.schedule import Schedule
from pallas_kernels.attention.mosaic_tpu.scores import (
    LANES,
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


def query_gradient_kernel(
    scores: Scores,
    schedule: Schedule,
    scalars: Scalars,
    sides: Sides,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    **how: Any,
) -> list[jax.Array]:
    """The gradient of the queries `B N T' H`; with ALiBi also Σ_j d_logit · |distance|, `B N 1 T'`. `lse` and `delta` are `B N 1 T'`."""
    batches, heads, _, width = query.shape
    blocks = Blocks(schedule, scores, heads // key.shape[1])
    rows = scores.block_q
    slanted = scalars.alibi_slopes is not None

    def kernel(
        scalars: Scalars, sides: Sides, query: Ref, key: Ref, value: Ref, d_out: Ref, lse: Ref, delta: Ref,
        outs: list[Ref], d_query_at: Ref, lse_at: Ref, delta_at: Ref, slopes_at: Ref | None, row_ids: Ref | None,
    ) -> None:  # fmt: skip
        grid = tuple(pl.program_id(axis) for axis in range(3))
        step = blocks.step(grid, scalars)
        tile = Tile(scores, step, scalars, sides, row_ids, grid[0], blocks.head(grid))

        @pl.when(step.first)
        def _() -> None:
            d_query_at[...] = jnp.zeros((rows, width), jnp.float32)
            lse_at[...], delta_at[...] = upright(lse[...]), upright(delta[...])
            if slopes_at is not None:
                slopes_at[...] = jnp.zeros((rows, LANES), jnp.float32)
            if row_ids is not None:
                row_ids[...] = upright(sides.q_ids[...])

        def visit(masked: bool) -> None:
            logits, derivative = tile.logits(scores.dot(query[...], key[...], contract=(1, 1)))
            weights = jnp.exp2(logits - widened(lse_at[...], logits.shape[1]))
            d_weights = scores.dot(d_out[...], value[...], contract=(1, 1))
            d_logits = weights * (d_weights - widened(delta_at[...], logits.shape[1]))
            visible = tile.visible() if masked else None
            if visible is not None:
                d_logits = jnp.where(visible, d_logits, 0)
            if slopes_at is not None:
                slopes_at[...] += lane_sums(d_logits * jnp.abs(tile.distance()).astype(jnp.float32))
            d_product = d_logits if derivative is None else d_logits * derivative
            d_query_at[...] += scores.dot(d_product.astype(key.dtype), key[...])

        visit_by_state(schedule, step, visit)

        @pl.when(step.last)
        def _() -> None:
            outs[0][...] = (d_query_at[...] * scores.scale).astype(outs[0].dtype)
            if slopes_at is not None:
                sums = slopes_at[...].sum(axis=1, keepdims=True)
                outs[1][...] = flat(jnp.broadcast_to(sums, (rows, LANES)))

    statistic = pltpu.VMEM((rows, LANES), jnp.float32)
    shapes, specs = [shaped_like(query)], [blocks.of_queries(width)]
    if slanted:
        shapes.append(shaped_like(lse))
        specs.append(blocks.of_rows())
    ids = None if sides.q_ids is None else pltpu.VMEM((rows, LANES), jnp.int32)
    return pl.pallas_call(
        lambda *refs: kernel(*refs[:8], refs[8 : 8 + len(specs)], *refs[8 + len(specs) :]),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batches, heads, schedule.count),
            in_specs=[
                blocks.of_sides(sides),
                *(blocks.of_queries(width), blocks.of_keys(width), blocks.of_keys(width), blocks.of_queries(width)),
                *(blocks.of_rows(), blocks.of_rows()),
            ],
            out_specs=specs,
            scratch_shapes=[
                pltpu.VMEM((rows, width), jnp.float32), statistic, statistic, statistic if slanted else None, ids,
            ],
        ),
        name="attention_query_gradient",
        **how,
    )(scalars, sides, query, key, value, d_out, lse, delta)  # fmt: skip


def key_value_gradient_kernel(
    scores: Scores,
    schedule: Schedule,
    scalars: Scalars,
    sides: Sides,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    **how: Any,
) -> list[jax.Array]:
    """The gradients of keys and values, `B K S' H` each. The scores and the schedule are transposed."""
    batches, key_heads, _, width = key.shape
    group = query.shape[1] // key_heads
    blocks = Blocks(schedule, scores, group)
    rows = scores.block_kv

    def kernel(
        scalars: Scalars, sides: Sides, query: Ref, key: Ref, value: Ref, d_out: Ref, lse: Ref, delta: Ref,
        d_key: Ref, d_value: Ref, d_key_at: Ref, d_value_at: Ref, row_ids: Ref | None,
    ) -> None:  # fmt: skip
        grid = tuple(pl.program_id(axis) for axis in range(4))
        step = blocks.step(grid, scalars)
        tile = Tile(scores, step, scalars, sides, row_ids, grid[0], blocks.head(grid))

        @pl.when(step.first & (grid[3] == 0))
        def _() -> None:
            d_key_at[...] = d_value_at[...] = jnp.zeros((rows, width), jnp.float32)
            if row_ids is not None:
                row_ids[...] = upright(sides.kv_ids[...])

        def visit(masked: bool) -> None:
            logits, derivative = tile.logits(scores.dot(key[...], query[...], contract=(1, 1)))
            weights = jnp.exp2(logits - lse[...])
            d_weights = scores.dot(value[...], d_out[...], contract=(1, 1))
            d_logits = weights * (d_weights - delta[...])
            visible = tile.visible() if masked else None
            if visible is not None:
                weights, d_logits = jnp.where(visible, weights, 0), jnp.where(visible, d_logits, 0)
            d_product = d_logits if derivative is None else d_logits * derivative
            d_value_at[...] += scores.dot(weights.astype(d_out.dtype), d_out[...])
            d_key_at[...] += scores.dot(d_product.astype(query.dtype), query[...])

        visit_by_state(schedule, step, visit)

        @pl.when(step.last & (grid[3] == group - 1))
        def _() -> None:
            d_key[...] = (d_key_at[...] * scores.scale).astype(d_key.dtype)
            d_value[...] = d_value_at[...].astype(d_value.dtype)

    sums = pltpu.VMEM((rows, width), jnp.float32)
    return pl.pallas_call(
        kernel,
        out_shape=[shaped_like(key)] * 2,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batches, key_heads, schedule.count, group),
            in_specs=[
                blocks.of_sides(sides),
                *(blocks.of_queries(width), blocks.of_keys(width), blocks.of_keys(width), blocks.of_queries(width)),
                *(blocks.of_rows(), blocks.of_rows()),
            ],
            out_specs=[blocks.of_keys(width)] * 2,
            scratch_shapes=[sums, sums, None if sides.q_ids is None else pltpu.VMEM((rows, LANES), jnp.int32)],
        ),
        name="attention_key_value_gradient",
        **how,
    )(scalars, sides, query, key, value, d_out, lse, delta)
