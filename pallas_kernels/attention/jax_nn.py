"""jax's own two implementations, under this package's conventions: as references, and for who wants them by name.

They differentiate themselves. What they have no argument for (segments, offsets, block masks, ALiBi) becomes a dense mask or bias, so their memory is quadratic in length in any case.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.problem import Operands, Spec


def supports(spec: Spec, operands: Operands, implementation: Literal["xla", "cudnn"]) -> str | None:
    """Why jax's implementation cannot serve, by shapes and dtypes; cuDNN has limits of its own beyond these."""
    if spec.soft_cap is not None:
        return "jax.nn has no soft cap"
    if operands.sinks is not None:
        return "jax.nn has no sinks"
    if implementation == "cudnn":
        if operands.query.dtype not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN takes bfloat16 and float16, not {operands.query.dtype}"
        if operands.query.shape[-1] % 8:
            return f"cuDNN needs a head width that is a multiple of 8, not {operands.query.shape[-1]}"
    return None


def attention(spec: Spec, operands: Operands, implementation: Literal["xla", "cudnn"]) -> jax.Array:
    """The output `B T N H`; 0 for a row that sees nothing, as everywhere here (jax's is the mean of the values)."""
    visible = dense_mask(spec, operands)
    bias = dense_bias(operands)
    if visible is None:
        return jax.nn.dot_product_attention(
            operands.query, operands.key, operands.value, bias, scale=spec.scale, implementation=implementation
        )
    # An exact mask of cuDNN's own is faster than a dense one.
    dense = any(x is not None for x in (spec.block_mask, spec.window, operands.mask, operands.q_segment_ids, operands.q_offset))
    if implementation == "cudnn" and not dense:
        return jax.nn.dot_product_attention(
            operands.query,
            operands.key,
            operands.value,
            bias,
            scale=spec.scale,
            is_causal=spec.is_causal,
            query_seq_lengths=operands.query_lengths,
            key_value_seq_lengths=operands.key_value_lengths,
            implementation="cudnn",
        )
    out = jax.nn.dot_product_attention(
        operands.query, operands.key, operands.value, bias, visible, scale=spec.scale, implementation=implementation
    )
    return jnp.where(visible.any(-1).swapaxes(1, 2)[..., None], out, 0)


def dense_mask(spec: Spec, operands: Operands) -> jax.Array | None:
    """All that hides pairs as one bool array that broadcasts to `B N T S`; None where nothing does."""
    rows, columns = np.arange(operands.query.shape[1])[:, None], np.arange(operands.key.shape[1])
    distance = columns - rows - (0 if operands.q_offset is None else operands.q_offset[:, None, None, None])
    conditions = []
    if spec.is_causal:
        conditions.append(distance <= 0)
    if spec.window is not None:
        conditions.append((distance >= -spec.window[0]) & (distance <= spec.window[1]))
    if spec.block_mask is not None:
        conditions.append(spec.block_mask.dense(rows[:, 0], columns))
    if operands.mask is not None:
        conditions.append(operands.mask)
    if operands.q_segment_ids is not None and operands.kv_segment_ids is not None:
        conditions.append(operands.q_segment_ids[:, None, :, None] == operands.kv_segment_ids[:, None, None])
    if operands.query_lengths is not None:
        conditions.append(rows < operands.query_lengths[:, None, None, None])
    if operands.key_value_lengths is not None:
        conditions.append(columns < operands.key_value_lengths[:, None, None, None])
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return jnp.asarray(visible).reshape((1,) * (4 - visible.ndim) + visible.shape)


def dense_bias(operands: Operands) -> jax.Array | None:
    """Bias and ALiBi as one array that broadcasts to `B N T S`."""
    if operands.alibi_slopes is None:
        return operands.bias
    rows, columns = np.arange(operands.query.shape[1])[:, None], np.arange(operands.key.shape[1])
    distance = columns - rows - (0 if operands.q_offset is None else operands.q_offset[:, None, None, None])
    alibi = -operands.alibi_slopes[:, None, None] * jnp.abs(distance).reshape((-1, 1, len(rows), len(columns)))
    return alibi if operands.bias is None else alibi + operands.bias
