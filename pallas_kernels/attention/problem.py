"""The attention that every implementation computes, written once: what is given, what is asked, and in which order.

Letters: B batch, T queries, S keys, N heads of the queries, K heads of keys and values (K divides N, and head n reads key head n // (N/K)), H width of a head. Indices are b, n, i (query) and j (key).

**Logits**, in float32 at least, in this order:

    position[b, i] = q_offset[b] + i                        (a key's position is its index j)
    logit = scale · ⟨query[b, i, n], key[b, j, n // (N/K)]⟩
    logit = soft_cap · tanh(logit / soft_cap)               (where soft_cap is given)
    logit = logit − alibi_slopes[n] · |position[b, i] − j|   (where slopes are given)
    logit = logit + bias[b, n, i, j]                        (where a bias is given)

The cap comes before ALiBi and bias, as in FlashAttention-2 (its ALiBi is added with the mask) and in HF's Gemma 2 (whose additive mask is added to capped logits): a bias of −1e9 that is meant as a mask would otherwise come out of the cap as −soft_cap, and hide nothing. tokamax caps after the bias. jax.nn has no cap. FlashAttention-3 has no bias.

**Visible** is the pair (b, n, i, j) for which all of these hold, as far as given:

    j ≤ position[b, i]                                      is_causal: aligned to the top left, as jax.nn's (torch's too), whatever T and S; q_offset = S − T aligns it to the bottom right, as FlashAttention does
    position[b, i] − left ≤ j ≤ position[b, i] + right      window = (left, right), both inclusive: jax.nn's local_window_size
    block_mask(i, j)                                        on indices: q_offset does not move it
    mask[b, n, i, j]
    q_segment_ids[b, i] == kv_segment_ids[b, j]             any integers, in any order
    i < query_lengths[b]   and   j < key_value_lengths[b]   on indices

**Softmax**: out[b, i, n] = Σ_j exp(logit − lse) · value[b, j, n // (N/K)] and lse[b, n, i] = log(Σ_j exp(logit) + exp(sinks[n])), over visible j. A sink is one more logit of the row, which no mask hides and which has no value (gpt-oss). Products of probabilities and values take the probabilities in the values' dtype and accumulate in float32.

**A row that sees nothing** gives out = 0 and lse = −∞ (with a sink: lse = sink), and no gradient flows through it or from it: never NaN.

**Not-a-number**: `api` has replaced, by zeros, queries behind `query_lengths` and keys and values behind `key_value_lengths`, and `differentiation` the cotangents of rows that see nothing, so an implementation never sees what is there. What lies beyond T and S in a tile that overhangs must be kept out by the implementation (zero times NaN is NaN). Whatever a *hidden* pair's logit is, it is replaced and not multiplied: a NaN there must not reach `lse`.

**Gradients**, given d_out and d_lse (None: the lse is not used), with p = exp(logit − lse) on visible pairs and 0 elsewhere:

    delta[b, n, i] = Σ_h out · d_out − d_lse
    d_logit = p · (⟨d_out[b, i, n], value[b, j, n // (N/K)]⟩ − delta)
    d_value = pᵀ d_out;   d_bias = d_logit, summed over the axes along which bias has length 1
    d_alibi_slopes[n] = −Σ d_logit · |position − j|;   d_sinks[n] = −Σ_{b,i} exp(sinks[n] − lse) · delta
    d_logit passes back through the cap: times 1 − (capped / soft_cap)², where capped is the logit before ALiBi and bias
    d_query = scale · d_logit · key;   d_key = scale · d_logitᵀ · query, summed over the heads that share it

The same inputs give the same bits every time: no atomic sums.
"""

import dataclasses
from typing import NamedTuple

import jax

from pallas_kernels.attention.masks import Mask


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows (queries) and columns (keys) of a tile. What is None is the implementation's to choose, by its own table."""

    query: int | None = None
    key: int | None = None
    query_backward: int | None = None
    key_backward: int | None = None
    key_stages: int | None = None
    """Of `mosaic_gpu` alone: how many tiles of keys, and of values, are under way in the forward pass."""
    query_backward_stages: int | None = None
    """Tiles of queries, for the gradients of keys and values."""
    key_backward_stages: int | None = None
    """Tiles of keys, for the gradient of the queries."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """All that is static. Hashable: it is a key of compilation caches."""

    scale: float
    is_causal: bool = False
    window: tuple[int, int] | None = None
    """How many positions to the left and to the right are visible; each at least 0."""
    soft_cap: float | None = None
    block_mask: Mask | None = None
    block_sizes: BlockSizes = BlockSizes()
    precision: jax.lax.Precision | None = None
    """Of the products of float32 operands; None is jax's default for the platform."""
    whole_batch: bool = False
    """Of tiles of XLA: all examples go through together, so that XLA can divide them over devices."""
    bias_gradient: bool = True
    """Without it `backward` gives None for `bias`, and needs no memory of its size."""


class Operands(NamedTuple):
    """All that is an array. Shapes and dtypes are checked: `api` has seen to it. Query, key and value have one dtype of float32, bfloat16, float16 (and float64 where jax has it on), H is at most 256."""

    query: jax.Array
    """`B T N H`"""
    key: jax.Array
    """`B S K H`"""
    value: jax.Array
    """`B S K H`"""
    bias: jax.Array | None = None
    """Four axes, each 1 or that of `B N T S`; any float dtype."""
    mask: jax.Array | None = None
    """Four axes, each 1 or that of `B N T S`; bool."""
    q_segment_ids: jax.Array | None = None
    """`B T` int32; given together with `kv_segment_ids` or not at all."""
    kv_segment_ids: jax.Array | None = None
    """`B S` int32."""
    query_lengths: jax.Array | None = None
    """`B` int32, from 0 to T."""
    key_value_lengths: jax.Array | None = None
    """`B` int32, from 0 to S."""
    alibi_slopes: jax.Array | None = None
    """`N` float32 (float64 for float64); positive slopes favour near keys."""
    sinks: jax.Array | None = None
    """`N` float32 (float64 for float64)."""
    q_offset: jax.Array | None = None
    """`B` int32; may be negative. None is 0."""


class Gradients(NamedTuple):
    """Of the differentiable operands: each of its operand's shape and dtype, None where the operand is None."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    sinks: jax.Array | None = None


# An implementation is a module of this package with three functions:
#
#   def supports(spec: Spec, operands: Operands) -> str | None:
#       """Why this implementation cannot serve, or None where it can. Looks at shapes and dtypes only (they may be `jax.ShapeDtypeStruct`), and at no device."""
#
#   def forward(spec: Spec, operands: Operands, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
#       """The output `B T N H` in the query's dtype, and lse `B N T` in float32 (float64 for float64)."""
#
#   def backward(spec, operands, out, lse, d_out, d_lse, *, interpret: bool = False) -> Gradients:
#       """d_out is `B T N H` in out's dtype, d_lse `B N T` in lse's or None; both are zero in rows that see nothing. The operands have no sinks: these are in lse, but in no tile, and `differentiation` has their gradient."""
#
# `interpret` runs the same kernel in its interpreter on the CPU. The functions need no rule for differentiation or vmap: `api` wraps them (vmap folds into B). They are called under jit.
