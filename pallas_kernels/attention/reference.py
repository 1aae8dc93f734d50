"""The definition of `problem`, executable: dense, in float64, in numpy. Slow, and what every implementation is measured against."""

import numpy as np

from pallas_kernels.attention.problem import Gradients, Operands, Spec


def visible(spec: Spec, operands: Operands) -> np.ndarray:
    """Bool `B N T S`."""
    batch, queries, heads, _ = operands.query.shape
    rows, columns = np.arange(queries)[:, None], np.arange(operands.key.shape[1])
    result = np.ones((batch, heads, queries, len(columns)), bool)
    position = _positions(operands)
    if spec.is_causal:
        result &= columns <= position
    if spec.window is not None:
        result &= (position - spec.window[0] <= columns) & (columns <= position + spec.window[1])
    if spec.block_mask is not None:
        result &= spec.block_mask.dense(rows[:, 0], columns)
    if operands.mask is not None:
        result &= np.asarray(operands.mask)
    if operands.q_segment_ids is not None:
        result &= (np.asarray(operands.q_segment_ids)[:, :, None] == np.asarray(operands.kv_segment_ids)[:, None])[:, None]
    if operands.query_lengths is not None:
        result &= rows < np.asarray(operands.query_lengths)[:, None, None, None]
    if operands.key_value_lengths is not None:
        result &= columns < np.asarray(operands.key_value_lengths)[:, None, None, None]
    return result


def forward(spec: Spec, operands: Operands) -> tuple[np.ndarray, np.ndarray]:
    """`B T N H` and `B N T`."""
    probabilities, lse, _ = _probabilities(spec, operands)
    return np.einsum("bnts,bsnh->btnh", probabilities, _repeated(operands.value, operands)), lse


def backward(spec: Spec, operands: Operands, d_out: np.ndarray, d_lse: np.ndarray | None) -> Gradients:
    """Of the loss whose derivatives by out and lse are given."""
    probabilities, lse, capped = _probabilities(spec, operands)
    query, key, value = _wide(operands.query), _repeated(operands.key, operands), _repeated(operands.value, operands)
    d_out = _wide(d_out)
    d_probabilities = np.einsum("btnh,bsnh->bnts", d_out, value)
    delta = (probabilities * d_probabilities).sum(-1) - (0 if d_lse is None else _wide(d_lse))
    d_logits = probabilities * (d_probabilities - delta[..., None])
    d_bias = d_slopes = d_sinks = None
    if operands.bias is not None:
        broadcast = tuple(axis for axis, length in enumerate(operands.bias.shape) if length == 1)
        d_bias = d_logits.sum(broadcast, keepdims=True)
    if operands.alibi_slopes is not None:
        d_slopes = -(d_logits * _distances(operands)).sum((0, 2, 3))
    if operands.sinks is not None:
        weight = np.where(np.isneginf(lse), 0, np.exp(_wide(operands.sinks)[:, None] - lse))
        d_sinks = -(weight * delta).sum((0, 2))
    if spec.soft_cap is not None:
        d_logits = d_logits * (1 - (capped / spec.soft_cap) ** 2)
    d_query = spec.scale * np.einsum("bnts,bsnh->btnh", d_logits, key)
    d_key = spec.scale * np.einsum("bnts,btnh->bsnh", d_logits, query)
    d_value = np.einsum("bnts,btnh->bsnh", probabilities, d_out)
    shared = (*operands.key.shape[:3], -1, operands.key.shape[3])
    return Gradients(d_query, d_key.reshape(shared).sum(3), d_value.reshape(shared).sum(3), d_bias, d_slopes, d_sinks)


def _probabilities(spec: Spec, operands: Operands) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`B N T S`, lse `B N T`, and the logits before ALiBi and bias."""
    logits = spec.scale * np.einsum("btnh,bsnh->bnts", _wide(operands.query), _repeated(operands.key, operands))
    if spec.soft_cap is not None:
        logits = spec.soft_cap * np.tanh(logits / spec.soft_cap)
    capped = logits
    if operands.alibi_slopes is not None:
        logits = logits - _wide(operands.alibi_slopes)[:, None, None] * _distances(operands)
    if operands.bias is not None:
        logits = logits + _wide(operands.bias)
    logits = np.where(visible(spec, operands), logits, -np.inf)
    sinks = np.full(logits.shape[1], -np.inf) if operands.sinks is None else _wide(operands.sinks)
    highest = np.maximum(logits.max(-1), sinks[:, None])
    shift = np.where(np.isneginf(highest), 0, highest)
    total = np.exp(logits - shift[..., None]).sum(-1) + np.exp(sinks[:, None] - shift)
    with np.errstate(divide="ignore"):  # The logarithm of 0 is −∞, which is meant.
        lse = shift + np.log(total)
    return np.exp(logits - np.where(np.isneginf(lse), 0, lse)[..., None]), lse, capped


def _positions(operands: Operands) -> np.ndarray:
    """`B 1 T 1`, or `1 1 T 1`."""
    offset = np.zeros(1, int) if operands.q_offset is None else np.asarray(operands.q_offset)
    return offset[:, None, None, None] + np.arange(operands.query.shape[1])[:, None]


def _distances(operands: Operands) -> np.ndarray:
    return np.abs(_positions(operands) - np.arange(operands.key.shape[1]))


def _wide(x: object) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _repeated(x: object, operands: Operands) -> np.ndarray:
    """Keys or values, once for each head that reads them."""
    return np.repeat(_wide(x), operands.query.shape[2] // operands.key.shape[2], axis=2)
