"""FlashAttention-2's backward pass (Dao 2023, algorithm 2) for Hopper, as two kernels that both take the weights anew from the queries, the keys and the log-sum-exp.

One goes through the keys for a block of queries and sums up their gradients; the other goes through the queries for a block of keys. That is seven products where one kernel would do with five, but nobody adds to another's sum: the same inputs give the same bits. Blocks and warpgroups are those of the forward pass. Here the consumers take no turns; while one of them computes weights, the products of the other one run.

In both kernels `lse` is in powers of two and +∞ where a query sees nothing: its weights are then 0, and so are those of the queries behind the end of the array.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic_gpu.dialect import (
    CONSUMERS,
    FEWER_REGISTERS,
    REGISTERS,
    ROWS,
    Dialect,
    Index,
    Ref,
    Ring,
    tile,
    zero,
)
from pallas_kernels.attention.mosaic_gpu.scores import Scores, band, columns_of, distances, rows_of
from pallas_kernels.attention.mosaic_gpu.tiles import rows_of_keys


def _recompute(
    dialect: Dialect,
    shape: tuple[int, int],
    of_logits: tuple[Ref, Ref],
    of_d_weights: tuple[Ref, Ref],
    weigh: Callable[[jax.Array], tuple[jax.Array, jax.Array | None]],
    differentiate: Callable[[jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, ...]],
    *,
    at_once: bool,
) -> tuple[jax.Array, ...]:
    """What `differentiate(d_weights, *weigh(product))` gives for a tile of this shape, of which both arguments are products a bᵀ of the pairs.

    `at_once` has the second product under way while the first becomes weights, which takes registers for both; else one comes after the other.
    """

    def both(product: Ref, d_weights: Ref) -> tuple[jax.Array, ...]:
        dialect.multiply(product, *of_logits, transposed=True)
        dialect.multiply(d_weights, *of_d_weights, transposed=True)
        weighed = weigh(dialect.result(product, later=1))
        return differentiate(dialect.result(d_weights, later=0), *weighed)

    if at_once:
        return dialect.zeros(both, shape, shape)

    def first(product: Ref) -> tuple[jax.Array, jax.Array | None]:
        dialect.multiply(product, *of_logits, transposed=True)
        return weigh(dialect.result(product, later=0))

    weighed = dialect.zeros(first, shape)

    def second(d_weights: Ref) -> tuple[jax.Array, ...]:
        dialect.multiply(d_weights, *of_d_weights, transposed=True)
        return differentiate(dialect.result(d_weights, later=0), *weighed)

    return dialect.zeros(second, shape)


def query_gradient_kernel(
    dialect: Dialect,
    scores: Scores,
    block: int,
    stages: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, ...]:
    """The gradient of the queries. `lse` and `delta` are `B N T'`, with T' a multiple of 128.

    With ALiBi also two `B N T'`, of which `first + ⟨out, d_out⟩ · second` is Σ_j d_logit · |distance|. As it stands, that sum would take the rounding of `out`, which is in `delta`, times the distance; the first of the two has Σ_j weight · d_weight in the place of ⟨out, d_out⟩, which is the same without rounding.
    """
    batches, queries, heads, width = query.shape
    group, dtype = heads // key.shape[2], query.dtype
    segments, slanted = scores.extras.q_ids is not None, scores.extras.slopes is not None
    # A soft cap and ALiBi compute with every logit, for which wide heads leave too few registers.
    at_once = scores.plain or width <= 64

    def attention_query_gradient(
        *refs: Ref, queries_at: Ref, rows_at: Ref, q_ids_at: Ref, queries_filled: Ref, k_ring: Ref, v_ring: Ref
    ) -> None:
        q_hbm, k_hbm, v_hbm, d_out_hbm, lse_hbm, delta_hbm, *refs = refs
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        line = pl.cdiv(queries, CONSUMERS * ROWS) - 1 - lax.axis_index("line")
        here = scores.within(refs, batch)
        dq_hbm, *slope_hbm = refs
        keys, values = Ring(*k_ring, stages), Ring(*v_ring, stages)
        plan = here.visited_keys(line, CONSUMERS * ROWS, block)

        def produce() -> None:
            for consumer in range(CONSUMERS):
                rows = pl.ds((line * CONSUMERS + consumer) * ROWS, ROWS)
                sources = q_hbm.at[batch, rows, head], d_out_hbm.at[batch, rows, head]
                targets = queries_at.at[0, consumer], queries_at.at[1, consumer]
                sources += lse_hbm.at[batch, head, rows], delta_hbm.at[batch, head, rows]
                targets += rows_at.at[0, consumer], rows_at.at[1, consumer]
                if segments:
                    sources, targets = (*sources, here.extras.q_ids.at[batch, rows]), (*targets, q_ids_at.at[consumer])
                for source, target in zip(sources, targets):
                    plgpu.copy_gmem_to_smem(source, target, queries_filled)

            def step(index: Index, _: None) -> None:
                rows = pl.ds(plan.tile(index) * block, block)
                place = batch, rows, lax.div(head, jnp.int32(group))
                keys.fill(index, k_hbm.at[place], *([here.extras.kv_ids.at[batch, rows]] if segments else []))
                values.fill(index, v_hbm.at[place])

            lax.fori_loop(0, plan.count, step, None)
            keys.drain(plan.count)
            values.drain(plan.count)

        def consume(consumer: jax.Array) -> None:
            top = (line * CONSUMERS + consumer) * ROWS
            shape = ROWS, block
            plgpu.barrier_wait(queries_filled)
            query = queries_at.at[0, consumer]
            lse, delta = rows_at.at[0, consumer][...], rows_at.at[1, consumer][...]

            def step(index: Index, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                key_tile, *ids = keys.take(index)
                (value_tile,) = values.take(index)
                start = plan.tile(index) * block

                def distance() -> jax.Array:
                    return distances(top + here.offset, start, shape)

                def mask(logits: jax.Array) -> jax.Array:
                    logits = band(logits, *here.keys_of(here.indices(top, here.banded)), start)
                    for theirs in ids:
                        same = rows_of(q_ids_at.at[consumer][...], shape) == columns_of(theirs[...], shape)
                        logits = jnp.where(same, logits, -jnp.inf)
                        plgpu.commit_smem()
                    return logits

                def weigh(product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
                    logits, derivative = here.logits(product, head, distance)
                    if here.hides_keys(block):
                        logits = lax.cond(plan.masked(index), mask, lambda logits: logits, logits)
                    return jnp.exp2(logits * here.factor - rows_of(lse, shape)), derivative

                def differentiate(
                    d_weights: jax.Array, weights: jax.Array, derivative: jax.Array | None
                ) -> tuple[jax.Array, ...]:
                    d_logits = weights * (d_weights - rows_of(delta, shape))
                    factors = [(d_logits, distance()), (weights, distance()), (weights, d_weights)] if slanted else []
                    sums = [(one * other).sum(axis=1) for one, other in factors]
                    return d_logits if derivative is None else d_logits * derivative, *sums

                place = consumer + zero(index + line)
                pairs = (queries_at.at[0, place], key_tile), (queries_at.at[1, place], value_tile)
                d_product, *sums = _recompute(dialect, shape, *pairs, weigh, differentiate, at_once=at_once)
                values.free(index)

                def accumulate(d_query: Ref) -> None:
                    dialect.multiply(d_query, d_product.astype(dtype), key_tile)

                d_query, *totals = carry
                (d_query,) = dialect.products(accumulate, (d_query,))
                keys.free(index)
                return d_query, *(total + each for total, each in zip(totals, sums))

            zeros = jnp.zeros((ROWS, width), jnp.float32), *[jnp.zeros((ROWS,), jnp.float32)] * (3 * slanted)
            d_query, *totals = lax.fori_loop(0, plan.count, step, zeros)
            query[...] = (d_query * here.scale).astype(dtype)
            if slanted:
                change, mean_distance, out_product = totals
                rows_at.at[0, consumer][...] = change - out_product * mean_distance
                rows_at.at[1, consumer][...] = mean_distance
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, dq_hbm.at[batch, pl.ds(top, ROWS), head])
            for which, each in enumerate(slope_hbm):
                plgpu.copy_smem_to_gmem(rows_at.at[which, consumer], each.at[batch, head, pl.ds(top, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        dialect.specialise(produce, consume, REGISTERS if at_once else FEWER_REGISTERS)

    tiles, ids = tile(stages, block, width, dtype=dtype), plgpu.SMEM((stages, block), jnp.int32)
    scratch = {
        "queries_at": tile(2, CONSUMERS, ROWS, width, dtype=dtype),
        "rows_at": plgpu.SMEM((2, CONSUMERS, ROWS), jnp.float32),
        "q_ids_at": plgpu.SMEM((CONSUMERS, ROWS), jnp.int32) if segments else None,
        "queries_filled": plgpu.Barrier(num_arrivals=CONSUMERS * (4 + segments)),
        "k_ring": Ring.scratch(stages, tiles, *([ids] if segments else [])),
        "v_ring": Ring.scratch(stages, tiles),
    }
    grid = {"batch": batches, "head": heads, "line": pl.cdiv(queries, CONSUMERS * ROWS)}
    arrays = query, key, value, d_out, lse, delta, *(array for array in scores.extras if array is not None)
    return dialect.launch(attention_query_gradient, (query, lse, lse) if slanted else (query,), scratch, grid)(*arrays)


def key_value_gradient_kernel(
    dialect: Dialect,
    scores: Scores,
    block: int,
    stages: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values, summed over the heads that share them. `lse` and `delta` are `B N T'`, with T' a multiple of 128.

    Everything is transposed: rows are keys, columns are queries. Where the registers suffice, each consumer has 64 keys of its own. Else both have the same 64 keys and compute the same weights, and each sums up its half of the columns.
    """
    batches, _, key_heads, width = key.shape
    group, dtype = query.shape[2] // key_heads, query.dtype
    own = rows_of_keys(width, scores.plain) // ROWS
    panel = width * own // CONSUMERS
    segments = scores.extras.q_ids is not None

    def attention_key_value_gradient(
        *refs: Ref, keys_at: Ref, kv_ids_at: Ref, keys_filled: Ref, meeting: Ref, q_ring: Ref, d_out_ring: Ref
    ) -> None:
        q_hbm, k_hbm, v_hbm, d_out_hbm, lse_hbm, delta_hbm, *refs = refs
        batch, key_head, line = (lax.axis_index(axis) for axis in ("batch", "head", "line"))
        here = scores.within(refs, batch)
        dk_hbm, dv_hbm = refs
        queries, d_outs = Ring(*q_ring, stages), Ring(*d_out_ring, stages)
        plan = here.visited_queries(line, own * ROWS, block)
        # All the heads that share this one, one after another.
        count = plan.count * group

        def split(index: Index) -> tuple[Index, Index]:
            """The head, and the index within the plan."""
            if group == 1:
                return key_head, index
            return key_head * group + lax.div(index, plan.count), lax.rem(index, plan.count)

        def produce() -> None:
            for which in range(own):
                rows = pl.ds((line * own + which) * ROWS, ROWS)
                for kind, source in enumerate((k_hbm, v_hbm)):
                    plgpu.copy_gmem_to_smem(source.at[batch, rows, key_head], keys_at.at[kind, which], keys_filled)
                if segments:
                    plgpu.copy_gmem_to_smem(here.extras.kv_ids.at[batch, rows], kv_ids_at.at[which], keys_filled)

            def step(index: Index, _: None) -> None:
                head, within = split(index)
                rows = pl.ds(plan.tile(within) * block, block)
                ids = [here.extras.q_ids.at[batch, rows]] if segments else []
                queries.fill(index, q_hbm.at[batch, rows, head], lse_hbm.at[batch, head, rows], *ids)
                d_outs.fill(index, d_out_hbm.at[batch, rows, head], delta_hbm.at[batch, head, rows])

            lax.fori_loop(0, count, step, None)
            queries.drain(count)
            d_outs.drain(count)

        def consume(consumer: jax.Array) -> None:
            # Its rows of keys, and its columns of their gradients.
            which = consumer if own > 1 else 0
            columns = slice(None) if own > 1 else pl.ds(consumer * panel, panel)
            top = (line * own + which) * ROWS
            key, value = keys_at.at[0, which], keys_at.at[1, which]
            shape = ROWS, block

            def step(index: Index, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                query_tile, lse, *ids = queries.take(index)
                d_out_tile, delta = d_outs.take(index)
                head, within = split(index)
                start = plan.tile(within) * block

                def mask(logits: jax.Array) -> jax.Array:
                    j = here.indices(top, here.banded or here.extras.limits is not None)
                    low, high = here.queries_of(j)
                    if here.extras.limits is not None:
                        high = jnp.where(j < here.lengths[1], high, 0)
                    logits = band(logits, low, high, start)
                    for theirs in ids:
                        same = rows_of(kv_ids_at.at[which][...], shape) == columns_of(theirs[...], shape)
                        logits = jnp.where(same, logits, -jnp.inf)
                    return logits

                def weigh(product: jax.Array) -> tuple[jax.Array, jax.Array | None]:
                    logits, derivative = here.logits(product, head, lambda: distances(top - here.offset, start, shape))
                    if here.hides_queries:
                        logits = lax.cond(plan.masked(within), mask, lambda logits: logits, logits)
                    return jnp.exp2(logits * here.factor - columns_of(lse[...], shape)), derivative

                def differentiate(
                    d_weights: jax.Array, weights: jax.Array, derivative: jax.Array | None
                ) -> tuple[jax.Array, ...]:
                    d_product = weights * (d_weights - columns_of(delta[...], shape))
                    d_product = d_product if derivative is None else d_product * derivative
                    return weights.astype(dtype), d_product.astype(dtype)

                place = which + zero(index + line)
                pairs = (keys_at.at[0, place], query_tile), (keys_at.at[1, place], d_out_tile)
                weights, d_product = _recompute(dialect, shape, *pairs, weigh, differentiate, at_once=own > 1)

                def accumulate(d_key: Ref, d_value: Ref) -> None:
                    dialect.multiply(d_value, weights, d_out_tile.at[:, columns])
                    dialect.multiply(d_key, d_product, query_tile.at[:, columns])

                carry = dialect.products(accumulate, carry)
                # The vectors were not read by wgmma: TMA shall not write the next ones before that is done.
                plgpu.commit_smem()
                d_outs.free(index)
                queries.free(index)
                return carry

            plgpu.barrier_wait(keys_filled)
            zeros = jnp.zeros((ROWS, panel), jnp.float32)
            d_key, d_value = lax.fori_loop(0, count, step, (zeros, zeros))

            def meet() -> None:
                plgpu.barrier_arrive(meeting)
                plgpu.barrier_wait(meeting)

            gradients = (key, d_key * here.scale, dk_hbm), (value, d_value, dv_hbm)
            rows = pl.ds(top, ROWS)
            if own == 1:
                # Both consumers read all of the keys and values, whose places are to be written now.
                meet()
            for place, gradient, _ in gradients:
                place.at[:, columns][...] = gradient.astype(dtype)
            plgpu.commit_smem()
            if own == 1:
                # TMA stores whole tiles only: each consumer one, when both have written their halves.
                meet()
            for kind, (place, _, target) in enumerate(gradients):

                @pl.when(consumer == kind if own == 1 else True)
                def _(place: Ref = place, target: Ref = target) -> None:
                    plgpu.copy_smem_to_gmem(place, target.at[batch, rows, key_head])

            plgpu.wait_smem_to_gmem(0)

        dialect.specialise(produce, consume)

    tiles, vector, ids = (
        tile(stages, block, width, dtype=dtype),
        plgpu.SMEM((stages, block), jnp.float32),
        plgpu.SMEM((stages, block), jnp.int32),
    )
    scratch = {
        "keys_at": tile(2, own, ROWS, width, dtype=dtype),
        "kv_ids_at": plgpu.SMEM((own, ROWS), jnp.int32) if segments else None,
        "keys_filled": plgpu.Barrier(num_arrivals=own * (2 + segments)),
        "meeting": plgpu.Barrier(num_arrivals=CONSUMERS),
        "q_ring": Ring.scratch(stages, tiles, vector, *([ids] if segments else [])),
        "d_out_ring": Ring.scratch(stages, tiles, vector),
    }
    # Of the keys that there are: the interpreter gets as many more as fill a block of the other kernels, which is two of this one's.
    grid = {"batch": batches, "head": key_heads, "line": pl.cdiv(scores.keys, own * ROWS)}
    arrays = query, key, value, d_out, lse, delta, *(array for array in scores.extras if array is not None)
    return dialect.launch(attention_key_value_gradient, (key, value), scratch, grid)(*arrays)
