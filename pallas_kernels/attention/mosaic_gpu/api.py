"""What the kernels serve, and how the operands reach them."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.masks import And, Local, Mask
from pallas_kernels.attention.mosaic_gpu.backward_pass import key_value_gradient_kernel, query_gradient_kernel
from pallas_kernels.attention.mosaic_gpu.dialect import Dialect
from pallas_kernels.attention.mosaic_gpu.forward_pass import forward_kernel
from pallas_kernels.attention.mosaic_gpu.scores import LOG2_E, Extras, Scores
from pallas_kernels.attention.mosaic_gpu.tiles import BLOCK, kernel_width, refusal, rows_of_keys, tuning
from pallas_kernels.attention.problem import Gradients, Operands, Spec
from pallas_kernels.attention.tiles import tile_states, visits


def _sides(mask: Mask | None) -> tuple[int | None, int | None] | None:
    """The reach to the left and to the right of a mask that is a band, None for others."""
    match mask:
        case None:
            return None, None
        case Local(left, right):
            return left, right
        case And(first, second):
            sides = _sides(first), _sides(second)
            return None if None in sides else (_least(sides[0][0], sides[1][0]), _least(sides[0][1], sides[1][1]))
    return None


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def supports(spec: Spec, operands: Operands) -> str | None:
    """Why the kernels cannot serve, or None."""
    query = operands.query
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 and float16, and the operands are {query.dtype}"
    if min(query.size, operands.key.size) == 0:
        return "an operand is empty"
    if max(query.shape[0], query.shape[2]) > 65535:
        return f"a grid on the GPU has at most 65535 batches and heads, and these are {query.shape[0]} and {query.shape[2]}"
    if operands.bias is not None:
        return "it has no bias (alibi_slopes it has)"
    if operands.mask is not None:
        return "it has no mask that is an array; lengths, segments, causal masks and windows it has"
    if _sides(spec.block_mask) is None:
        return f"of block masks it has bands only (Causal, Local and what & makes of these), not {spec.block_mask}"
    if spec.block_mask is not None and operands.q_offset is not None:
        return "a block mask counts indices, and q_offset moves positions: it takes one of the two"
    if spec.scale <= 0:
        return f"the scale has to be positive, and is {spec.scale}"
    if (spec.soft_cap is not None or operands.alibi_slopes is not None) and query.shape[-1] > 128:
        return f"a soft cap or ALiBi leaves too few registers for heads wider than 128, and these are {query.shape[-1]}"
    return refusal(spec, operands)


def forward(spec: Spec, operands: Operands, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """The output `B T N H` and lse `B N T`; see `problem`."""
    tiles = tuning(spec, operands).forward
    scores = _scores(spec, operands, BLOCK, tiles.rows)
    arrays = (_pad(x, interpret) for x in operands[:3])
    out, lse = forward_kernel(Dialect(interpret), scores, *tiles, *arrays)
    out, lse = _cut(out, operands.query), lse[..., : operands.query.shape[1]]
    if operands.query_lengths is not None:
        live = _live(operands)
        out = jnp.where(live[:, :, None, None], out, 0)
        lse = jnp.where(live[:, None], lse, -jnp.inf if operands.sinks is None else operands.sinks[:, None])
    return out, lse


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
    """See `problem`."""
    chosen, dialect = tuning(spec, operands), Dialect(interpret)
    out_product = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32)
    delta = out_product if d_lse is None else out_product - d_lse
    live = lse > -jnp.inf
    if operands.query_lengths is not None:
        live &= _live(operands)[:, None]
    # With +∞ the weights of queries that see nothing are 0.
    rows = jnp.where(live, lse * LOG2_E, jnp.inf), delta
    overhang = [(0, 0), (0, 0), (0, -lse.shape[-1] % BLOCK)]
    rows = (jnp.pad(x, overhang, constant_values=fill) for x, fill in zip(rows, (jnp.inf, 0)))
    arrays = *(_pad(x, interpret) for x in (*operands[:3], d_out)), *rows

    tiles = chosen.query_gradient
    scores = _scores(spec, operands, BLOCK, tiles.rows)
    d_query, *slopes = query_gradient_kernel(dialect, scores, *tiles, *arrays)
    tiles = chosen.key_value_gradient
    scores = _scores(
        spec, operands, tiles.rows, rows_of_keys(kernel_width(operands.key.shape[-1]), scores.plain), keys_first=True
    )
    d_key, d_value = key_value_gradient_kernel(dialect, scores, *tiles, *arrays)
    d_slopes = None
    if slopes:
        first, second = (x[..., : lse.shape[-1]] for x in slopes)
        d_slopes = -(first + out_product * second).sum((0, 2))
    return Gradients(
        _cut(d_query, operands.query),
        _cut(d_key, operands.key),
        _cut(d_value, operands.value),
        alibi_slopes=d_slopes,
    )


def _live(operands: Operands) -> jax.Array:
    """`B T`: is there such a query?"""
    return jnp.arange(operands.query.shape[1]) < operands.query_lengths[:, None]


def _pad(x: jax.Array, interpret: bool) -> jax.Array:
    """Heads as wide as the kernel's. Beyond the end of an array TMA reads zeros and writes nothing, but it wants lengths that are multiples of the 8 rows of a swizzled tile. The interpreter gets full tiles, with those zeros."""
    overhang = -x.shape[1] % (BLOCK if interpret else 8)
    return jnp.pad(x, [(0, 0), (0, overhang), (0, 0), (0, kernel_width(x.shape[-1]) - x.shape[-1])])


def _cut(x: jax.Array, like: jax.Array) -> jax.Array:
    return x[:, : like.shape[1], :, : like.shape[3]]


def _scores(spec: Spec, operands: Operands, queries: int, keys: int, *, keys_first: bool = False) -> Scores:
    """What the kernels have to know. With segments that is also which tiles of `queries × keys` each line of tiles visits; a line is one of keys where these are first."""
    left, right = _sides(spec.block_mask)
    if spec.window is not None:
        left, right = _least(left, spec.window[0]), _least(right, spec.window[1])
    if spec.is_causal:
        right = _least(right, 0)
    batches, rows, columns = *operands.query.shape[:2], operands.key.shape[1]

    limits = order = counts = q_ids = kv_ids = None
    given = operands.q_offset, operands.query_lengths, operands.key_value_lengths
    # Wide heads need them all the same: where the compiler knows how many tiles there are, it sees through `dialect.zero`.
    if any(array is not None for array in given) or kernel_width(operands.query.shape[-1]) > 128:
        filled = (jnp.full((batches,), default) if x is None else x for x, default in zip(given, (0, rows, columns)))
        limits = jnp.stack([x.astype(jnp.int32) for x in filled], axis=1)
    if operands.q_segment_ids is not None:
        states = tile_states(spec, operands, queries, keys)
        plan = visits(states.swapaxes(1, 2) if keys_first else states)
        order = jnp.asarray(plan.order, jnp.int32)
        counts = jnp.stack([plan.masked_from, plan.stop], axis=-1).astype(jnp.int32)
        ids = operands.q_segment_ids, operands.kv_segment_ids
        q_ids, kv_ids = (jnp.pad(x.astype(jnp.int32), ((0, 0), (0, -x.shape[1] % BLOCK))) for x in ids)
    sinks, slopes = (None if x is None else x * LOG2_E for x in (operands.sinks, operands.alibi_slopes))
    extras = Extras(limits, sinks, slopes, q_ids, kv_ids, order, counts)
    return Scores(spec.scale, spec.soft_cap, left, right, rows, columns, extras)
