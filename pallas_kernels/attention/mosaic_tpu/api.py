"""What the kernels serve, with which tiles, and how the operands reach them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import CostEstimate
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.mosaic_tpu.backward_pass import key_value_gradient_kernel, query_gradient_kernel
from pallas_kernels.attention.mosaic_tpu.forward_pass import forward_kernel
from pallas_kernels.attention.mosaic_tpu.schedule import Schedule, refusal, schedule
from pallas_kernels.attention.mosaic_tpu.scores import LANES, LOG2_E, Scalars, Scores, Sides
from pallas_kernels.attention.problem import Gradients, Operands, Spec

Interpret = bool | pltpu.InterpretParams
"""True is Pallas's plain interpreter; parameters ask for that of TPUs, which also models memory and races."""

MEBI = 2**20


class Block(NamedTuple):
    """Queries and keys of a tile of logits: multiples of 128."""

    query: int
    key: int


class Tuning(NamedTuple):
    """The tiles of the kernels, and how much vector memory they may take."""

    forward: Block
    backward: Block


# Chosen by the compiler's word and by analysis, not by measurements. A step of the grid costs about 0.35 µs (jax's guide to Pallas on TPUs), in which a v6e could do 0.3 GFLOP (peaks here are those of `pltpu.get_tpu_info_for_chip`): a tile of 1024² has 0.5 at H = 128, so smaller ones would mostly wait. Each step reads keys and values of one tile, so a byte of bfloat16 serves `block.query` operations, and a v6e does 560 in the time in which it reads one (v5e 240, v5p 190, tpu7x 310). The backward pass holds twice as many tiles of logits at once. Twice the bytes, or twice the width, halve a side.
def _tuning(operands: Operands) -> Tuning:
    wide = operands.query.shape[-1] > 128 or operands.query.dtype == jnp.float32
    return Tuning(Block(1024, 1024), Block(512, 1024)) if not wide else Tuning(Block(512, 1024), Block(512, 512))


def _blocks(spec: Spec, operands: Operands) -> Tuning:
    """The tuned tiles, or those that are wished for, and no larger than the lengths need."""
    tuning, wishes = _tuning(operands), spec.block_sizes
    lengths = operands.query.shape[1], operands.key.shape[1]
    forward = (wishes.query, wishes.key), tuning.forward
    backward = (wishes.query_backward, wishes.key_backward), tuning.backward
    return Tuning(*(Block(*(w or _even(n, b) for w, n, b in zip(wish, lengths, block))) for wish, block in (forward, backward)))


def _even(length: int, most: int) -> int:
    """The block with which as few as possible cover the length as evenly as they can."""
    count = -(-length // most)
    return -(-length // (count * LANES)) * LANES


def supports(spec: Spec, operands: Operands) -> str | None:
    """Why the kernels cannot serve, or None."""
    if operands.query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"a TPU multiplies bfloat16 and float32, and the operands are {operands.query.dtype}"
    if min(operands.query.size, operands.key.size) == 0:
        return "an operand is empty"
    if operands.bias is not None:
        return "it has no bias (alibi_slopes it has)"
    for name in ("query", "key", "query_backward", "key_backward"):
        block = getattr(spec.block_sizes, name)
        if block is not None and (block <= 0 or block % LANES):
            return f"its tiles have multiples of {LANES} queries and keys, and block_sizes.{name} is {block}"
    blocks = _blocks(spec, operands)
    return refusal(spec, operands, *blocks.forward) or refusal(spec, operands, *blocks.backward)


def forward(spec: Spec, operands: Operands, *, interpret: Interpret = False) -> tuple[jax.Array, jax.Array]:
    """The output `B T N H` and lse `B N T`; see `problem`."""
    block = _blocks(spec, operands).forward
    query, key, value = _tiled(operands, block)
    call = _calls(spec, operands, block, interpret)
    out, lse = call(forward_kernel, 2, False)(query, key, value)
    return _cut(out, operands.query), lse[:, :, 0, : operands.query.shape[1]]


def backward(
    spec: Spec,
    operands: Operands,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None,
    *,
    interpret: Interpret = False,
) -> Gradients:
    """See `problem`."""
    block = _blocks(spec, operands).backward
    delta = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32)
    delta = delta if d_lse is None else delta - d_lse
    # +∞ makes the weights of queries that see nothing 0.
    lse = jnp.where(lse > -jnp.inf, lse * LOG2_E, jnp.inf)
    rows = _padded(lse, 2, block.query, jnp.inf), _padded(delta, 2, block.query)
    arrays = *_tiled(operands, block), _padded(d_out.swapaxes(1, 2), 2, block.query), *(x[:, :, None] for x in rows)
    call = _calls(spec, operands, block, interpret)
    d_query, *slopes = call(query_gradient_kernel, 3, False)(*arrays)
    d_key, d_value = call(key_value_gradient_kernel, 4, True)(*arrays)
    return Gradients(
        _cut(d_query, operands.query),
        _cut(d_key, operands.key),
        _cut(d_value, operands.value),
        alibi_slopes=-slopes[0].sum((0, 2, 3)) if slopes else None,
    )


def _tiled(operands: Operands, block: Block) -> tuple[jax.Array, ...]:
    """Queries, keys and values as `B N T' H`: a block of one head then lies together. A head need not be 128 wide; the lanes beyond it are padding in any memory of a TPU."""
    pairs = (operands.query, block.query), (operands.key, block.key), (operands.value, block.key)
    return tuple(_padded(x.swapaxes(1, 2), 2, length) for x, length in pairs)


def _padded(x: jax.Array, axis: int, block: int, fill: float = 0) -> jax.Array:
    """Up to a multiple of the block: what lies beyond the end of an array may be NaN."""
    edges = [(0, 0)] * x.ndim
    edges[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, edges, constant_values=fill)


def _cut(x: jax.Array, like: jax.Array) -> jax.Array:
    return x[:, :, : like.shape[1]].swapaxes(1, 2)


def _calls(spec: Spec, operands: Operands, block: Block, interpret: Interpret) -> Callable[..., Any]:
    """`call(kernel, products, transposed)` is the kernel with all but its arrays; so many products has a tile."""

    def call(kernel: Callable[..., Any], products: int, transposed: bool) -> Callable[..., Any]:
        plan = schedule(spec, operands, *block, transposed)
        scores = Scores.of(spec, operands, *block, transposed)
        how = {"compiler_params": _compiler_params(operands, block, products), "interpret": interpret}
        how["cost_estimate"] = _cost(operands, block, plan, products)
        scalars, sides = _beside(operands, block, plan)
        return lambda *arrays: kernel(scores, plan, scalars, sides, *arrays, **how)

    return call


def _beside(operands: Operands, block: Block, plan: Schedule) -> tuple[Scalars, Sides]:
    """What goes into the kernels beside queries, keys and values."""
    scalars = Scalars(
        jnp.asarray(plan.words),
        None if plan.pattern is None else jnp.asarray(plan.pattern),
        operands.q_offset,
        operands.query_lengths,
        operands.key_value_lengths,
        operands.alibi_slopes,
        operands.sinks,
    )
    ids = [operands.q_segment_ids, operands.kv_segment_ids]
    if ids[0] is not None:
        ids = [_padded(x, 1, length)[:, None] for x, length in zip(ids, block)]
    mask = operands.mask
    if mask is not None:
        mask = mask.astype(jnp.int8)
        for axis, length in zip((2, 3), block):
            mask = mask if mask.shape[axis] == 1 else _padded(mask, axis, length)
    patterns = None if plan.patterns is None else jnp.asarray(plan.patterns, jnp.int8)
    return scalars, Sides(*ids, patterns, mask)


def _compiler_params(operands: Operands, block: Block, products: int) -> pltpu.CompilerParams:
    """Vector memory for two sets of blocks, the sums, and as many tiles of logits as there are products and one more."""
    width = -(-operands.query.shape[-1] // LANES) * LANES
    lines = (block.query + block.key) * width
    tiles = (products + 2) * block.query * block.key * 4
    needed = 2 * 3 * lines * operands.query.dtype.itemsize + 4 * 4 * lines + tiles
    axes = ("parallel", "parallel", "arbitrary", "arbitrary")[: 4 if products == 4 else 3]
    return pltpu.CompilerParams(dimension_semantics=axes, vmem_limit_bytes=max(needed, 16 * MEBI))


def _cost(operands: Operands, block: Block, plan: Schedule, products: int) -> CostEstimate:
    """For XLA's scheduler: as if every step of the list were visited."""
    batch, _, heads, width = operands.query.shape
    tiles = batch * heads * plan.count
    pairs = tiles * block.query * block.key
    moved = tiles * 2 * block.key * width * operands.query.dtype.itemsize
    return CostEstimate(flops=2 * products * pairs * width, transcendentals=pairs, bytes_accessed=moved)
