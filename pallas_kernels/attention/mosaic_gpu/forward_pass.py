"""FlashAttention-3's forward pass (Shah et al. 2024, algorithm 2) for Hopper.

A block of the grid owns 128 queries of one head and is three warpgroups. The *producer* does nothing but ask the TMA unit for tiles of keys and values, which land in rings of slots in shared memory. Two *consumers*, with 64 queries each, keep the tensor cores and the units of exp2 busy at the same time, in two ways (sections 3.1 and 3.2 of the paper):

- within a warpgroup, the logits of the next tile and the output of the previous one are issued together; while the output is still being accumulated, the softmax of the logits is taken;
- between the warpgroups, they take turns in issuing products, so that one computes its softmax while the other one's products run.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic_gpu.dialect import CONSUMERS, ROWS, Dialect, Index, Ref, Ring, tile, zero
from pallas_kernels.attention.mosaic_gpu.scores import LN_2, Scores, band, columns_of, distances, rows_of


def forward_kernel(
    dialect: Dialect, scores: Scores, block: int, stages: int, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The output `B T N H` and the log-sum-exp `B N T'`, where T' is the next multiple of a block's queries.

    Tiles have `block` keys, and each ring has `stages` of them.
    """
    batches, queries, heads, width = query.shape
    group, dtype = heads // key.shape[2], query.dtype
    lines = pl.cdiv(queries, CONSUMERS * ROWS)
    segments = scores.extras.q_ids is not None

    def attention_forward(
        *refs: Ref, queries_at: Ref, q_ids_at: Ref, lse_at: Ref, queries_filled: Ref, turns: Ref, k_ring: Ref, v_ring: Ref
    ) -> None:
        q_hbm, k_hbm, v_hbm, *refs = refs
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        # The last queries first: under a causal mask they have the most to do, and what remains for the end is little.
        line = lines - 1 - lax.axis_index("line")
        here = scores.within(refs, batch)
        out_hbm, lse_hbm = refs
        keys, values = Ring(*k_ring, stages), Ring(*v_ring, stages)
        plan = here.visited_keys(line, CONSUMERS * ROWS, block)

        def produce() -> None:
            for consumer in range(CONSUMERS):
                rows = pl.ds((line * CONSUMERS + consumer) * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(q_hbm.at[batch, rows, head], queries_at.at[consumer], queries_filled)
                if segments:
                    plgpu.copy_gmem_to_smem(here.extras.q_ids.at[batch, rows], q_ids_at.at[consumer], queries_filled)
            key_head = lax.div(head, jnp.int32(group))

            def fill_keys(index: Index) -> None:
                rows = pl.ds(plan.tile(index) * block, block)
                ids = [here.extras.kv_ids.at[batch, rows]] if segments else []
                keys.fill(index, k_hbm.at[batch, rows, key_head], *ids)

            def fill_values(index: Index) -> None:
                values.fill(index, v_hbm.at[batch, pl.ds(plan.tile(index) * block, block), key_head])

            def step(index: Index, _: None) -> None:
                # In the order in which the consumers ask: values come one tile behind keys.
                fill_keys(index)
                fill_values(index - 1)

            fill_keys(jnp.int32(0))
            lax.fori_loop(1, plan.count, step, None)
            fill_values(plan.count - 1)
            keys.drain(plan.count)
            values.drain(plan.count)

        def consume(consumer: jax.Array) -> None:
            top = (line * CONSUMERS + consumer) * ROWS
            query = queries_at.at[consumer]
            mine, others = turns.at[consumer], turns.at[1 - consumer]

            @pl.when(consumer == 1)
            def _() -> None:
                plgpu.barrier_arrive(turns.at[0])

            def finish_logits(product: jax.Array, index: Index, ids: tuple[Ref, ...]) -> jax.Array:
                """The index-th tile's, and the end of the use of its keys."""

                def start() -> Index:
                    return plan.tile(index) * block

                def mask(logits: jax.Array) -> jax.Array:
                    logits = band(logits, *here.keys_of(here.indices(top, here.banded)), start())
                    for theirs in ids:
                        same = rows_of(q_ids_at.at[consumer][...], logits.shape) == columns_of(theirs[...], logits.shape)
                        logits = jnp.where(same, logits, -jnp.inf)
                        # TMA, which does not know of such reads, shall not write the next ones before they are done.
                        plgpu.commit_smem()
                    return logits

                logits, _ = here.logits(product, head, lambda: distances(top + here.offset, start(), product.shape))
                if here.hides_keys(block):
                    logits = lax.cond(plan.masked(index), mask, lambda logits: logits, logits)
                keys.free(index)
                return logits

            def softmax(logits: jax.Array, highest: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
                """Weights relative to the highest logit so far, and by how much that shrinks what came before."""
                new_highest = jnp.maximum(highest, logits.max(axis=1) * here.factor)
                # A row that has seen nothing yet stays at −∞, and −∞ − (−∞) would be NaN.
                shift = jnp.where(new_highest == -jnp.inf, 0.0, new_highest)
                shrink = jnp.exp2(highest - shift)
                weights = jnp.exp2(logits * here.factor - rows_of(shift, logits.shape))
                return weights.astype(dtype), new_highest, total * shrink + weights.sum(axis=1), shrink

            plgpu.barrier_wait(queries_filled)
            first_keys, *first_ids = keys.take(0)

            def first(product: Ref) -> jax.Array:
                plgpu.barrier_wait(mine)
                dialect.multiply(product, query, first_keys, transposed=True)
                plgpu.barrier_arrive(others)
                return dialect.result(product, later=0)

            highest, total = jnp.full((ROWS,), -jnp.inf, jnp.float32), jnp.zeros((ROWS,), jnp.float32)
            logits = finish_logits(dialect.zeros(first, (ROWS, block)), jnp.int32(0), tuple(first_ids))
            weights, highest, total, _ = softmax(logits, highest, total)

            def step(index: Index, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                """The logits of this tile, and the output of the one before."""

                def overlapped(out: Ref, weights: Ref, highest: Ref, total: Ref, shrink: Ref) -> None:
                    def issue(product: Ref) -> None:
                        plgpu.barrier_wait(mine)
                        dialect.multiply(product, queries_at.at[consumer + zero(index + line)], key_tile, transposed=True)
                        (value_tile,) = values.take(index - 1)
                        dialect.multiply(out, weights[...], value_tile)
                        plgpu.barrier_arrive(others)
                        # The first of the two products has ended, the second has not: the softmax runs beside it.
                        logits = finish_logits(dialect.result(product, later=1), index, tuple(ids))
                        weights[...], highest[...], total[...], shrink[...] = softmax(logits, highest[...], total[...])

                    dialect.zeros(issue, (ROWS, block))

                key_tile, *ids = keys.take(index)
                out, *state = carry
                out, *state, shrink = dialect.products(overlapped, (out,), (*state, state[-1]))
                values.free(index - 1)
                return out * rows_of(shrink, out.shape), *state

            carry = jnp.zeros((ROWS, width), jnp.float32), weights, highest, total
            out, weights, highest, total = lax.fori_loop(1, plan.count, step, carry)

            def last(out: Ref) -> None:
                plgpu.barrier_wait(mine)
                dialect.multiply(out, weights, value_tile)

                @pl.when(consumer == 0)
                def _() -> None:
                    plgpu.barrier_arrive(others)

            (value_tile,) = values.take(plan.count - 1)
            (out,) = dialect.products(last, (out,))
            values.free(plan.count - 1)
            if here.extras.sinks is not None:
                sink = here.extras.sinks[head]
                higher = jnp.maximum(highest, sink)
                shrink = jnp.exp2(highest - higher)
                out *= rows_of(shrink, out.shape)
                total, highest = total * shrink + jnp.exp2(sink - higher), higher
            out *= rows_of(jnp.where(total == 0, 0.0, 1 / total), out.shape)
            # The queries have been read for the last time: the output leaves through their place.
            query[...] = out.astype(dtype)
            lse_at.at[consumer][...] = highest * LN_2 + jnp.log(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, out_hbm.at[batch, pl.ds(top, ROWS), head])
            plgpu.copy_smem_to_gmem(lse_at.at[consumer], lse_hbm.at[batch, head, pl.ds(top, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        dialect.specialise(produce, consume)

    tiles, ids = tile(stages, block, width, dtype=dtype), plgpu.SMEM((stages, block), jnp.int32)
    scratch = {
        "queries_at": tile(CONSUMERS, ROWS, width, dtype=dtype),
        "q_ids_at": plgpu.SMEM((CONSUMERS, ROWS), jnp.int32) if segments else None,
        "lse_at": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        "queries_filled": plgpu.Barrier(num_arrivals=CONSUMERS * (1 + segments)),
        "turns": plgpu.Barrier(num_barriers=CONSUMERS),
        "k_ring": Ring.scratch(stages, tiles, *([ids] if segments else [])),
        "v_ring": Ring.scratch(stages, tiles),
    }
    out = query, jax.ShapeDtypeStruct((batches, heads, lines * CONSUMERS * ROWS), jnp.float32)
    grid = {"batch": batches, "head": heads, "line": lines}
    arrays = query, key, value, *(array for array in scores.extras if array is not None)
    return dialect.launch(attention_forward, out, scratch, grid)(*arrays)
