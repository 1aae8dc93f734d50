"""Softmax attention within a sliding window, in time and memory that grow with the length and not with its square (Beltagy et al. 2020, section 3.1)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

import pallas_kernels
from jaxdl.errors import UserError, unknown
from jaxdl.nn.attention import check_operands, dot_product_attention, finite
from jaxdl.nn.masks import Window, length_mask, window_sides
from pallas_kernels.attention.problem import BlockSizes

_IMPLEMENTATIONS = ("blocks", "pallas")


def sliding_window_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: Window | None = None,
    logits_soft_cap: float | None = None,
    block: int | None = None,
    implementation: Literal["blocks", "pallas"] = "blocks",
) -> Float[Array, "B T N V"]:
    """The same function as `dot_product_attention`, without computing the logits that `local_window_size` hides.

    Queries are taken block by block, each with the keys of its own and the neighbouring blocks that its window `(left, right)` reaches: O(T · (left + right + block)) time. Only one block's logits exist at a time, also backwards, where they are computed again: memory is O(T · (left + right + block) / block). `block` is chosen by the window unless given. Without a window, or with one that is no shorter than the keys, it is `dot_product_attention` itself. With `implementation="pallas"` the tiles of `pallas_kernels.dot_product_attention` do it all, which has the kernel of the platform and takes values as wide as the keys only; its tiles, of `block × block` if that is given, are skipped where the window has nothing of them.

    A bias or mask with both T and S is as large as T × S to begin with; of it, what lies in the window is read. A query that may look nowhere gets 0. Raises `UserError` if K does not divide N, for a negative window, a block below 1 and another implementation.
    """
    options = dict(scale=scale, query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths)
    options |= dict(logits_soft_cap=logits_soft_cap)
    queries, keys = query.shape[1], key.shape[1]
    window = None if local_window_size is None else window_sides(local_window_size)
    if implementation not in _IMPLEMENTATIONS:
        raise unknown("implementation of a sliding window", implementation, _IMPLEMENTATIONS)
    if block is not None and block < 1:
        raise UserError(f"blocks of {block} queries: give a number from 1 on")
    check_operands(query, key, value, bias, mask, scale=scale, soft_cap=logits_soft_cap)
    if implementation == "pallas":
        options |= dict(is_causal=is_causal, local_window_size=window, block_sizes=BlockSizes(block, block, block, block))
        return pallas_kernels.dot_product_attention(query, key, value, bias, mask, **options)
    if window is None or sum(window) + 1 >= keys:
        return dot_product_attention(query, key, value, bias, mask, is_causal=is_causal, local_window_size=window, **options)

    (batch, _, heads, width), groups = query.shape, key.shape[2]
    key, value, broken = finite(key, value)
    left, right = (window[0], 0) if is_causal else window
    # Measured on a CPU: small blocks waste less beside the window, large ones repeat fewer keys and are faster to multiply.
    size = min(block or 64 * min(max(round((left + right) / 128), 1), 4), queries)
    blocks, before, after = -(-queries // size), -(-left // size), -(-right // size)
    span = (before + 1 + after) * size
    # Of each block: where its queries stand and where its keys, some of them before the first or after the last.
    rows = size * jnp.arange(blocks)[:, None] + jnp.arange(size)
    columns = size * (jnp.arange(blocks)[:, None] - before) + jnp.arange(span)

    def own(x: Float[Array, "B T N H"]) -> Float[Array, "blocks B K G block H"]:
        x = jnp.pad(x, [(0, 0), (0, blocks * size - queries), (0, 0), (0, 0)])
        return x.reshape(batch, blocks, size, groups, heads // groups, -1).transpose(1, 0, 3, 4, 2, 5)

    def near(x: Shaped[Array, "B S K H"]) -> Shaped[Array, "blocks B K span H"]:
        end = (blocks + after) * size
        x = jnp.pad(x[:, :end], [(0, 0), (before * size, max(end - keys, 0)), (0, 0), (0, 0)])
        x = x.reshape(batch, -1, size, *x.shape[2:])
        # Shifted copies and no gather, whose gradient would be a scatter.
        x = jnp.concatenate([x[:, shift : shift + blocks] for shift in range(before + 1 + after)], axis=2)
        return x.transpose(1, 0, 3, 2, 4)

    def band(x: Array) -> Array:
        """What a bias or mask has for each block: `blocks B K G block span`, with 1 where it has 1."""
        if x.shape[2] > 1:
            x = jnp.take(x, rows.clip(0, queries - 1), axis=2)
        else:
            x = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], blocks, *x.shape[2:]))
        if x.shape[4] > 1:
            x = jnp.take_along_axis(x, columns.clip(0, keys - 1)[None, None, :, None], axis=4)
        x = jnp.moveaxis(x, 2, 0)
        return x[:, :, :, None] if x.shape[2] == 1 else x.reshape(blocks, len(x[0]), groups, heads // groups, *x.shape[3:])

    wide = jnp.promote_types(query.dtype, jnp.float32)
    scale = width**-0.5 if scale is None else scale

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(one: dict[str, Array]) -> Float[Array, "B K G block V"]:
        distance = one["columns"] - one["rows"][:, None]
        allowed = (distance >= -left) & (distance <= right) & (one["columns"] >= 0) & (one["columns"] < keys)
        logits = scale * jnp.einsum("bkgth,bksh->bkgts", one["query"], one["key"], preferred_element_type=wide)
        if logits_soft_cap is not None:
            logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
        if "bias" in one:
            logits += one["bias"]
        for name in one.keys() & {"mask", "lengths"}:
            allowed = allowed & one[name]
        logits = jnp.where(allowed, logits, jnp.finfo(wide).min)
        weights = jnp.where(allowed, jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))), 0)
        total = weights.sum(-1, keepdims=True)
        sums = jnp.einsum("bkgts,bksv->bkgtv", weights.astype(value.dtype), one["value"], preferred_element_type=wide)
        spoiled = (allowed & one["broken"][:, :, None, None]).any(-1, keepdims=True)
        return jnp.where(spoiled, jnp.nan, sums / jnp.where(total > 0, total, 1)).astype(value.dtype)

    each = dict(rows=rows, columns=columns, query=own(query), key=near(key), value=near(value))
    each["broken"] = near(broken[..., None])[..., 0]
    if bias is not None:
        each["bias"] = band(bias)
    if mask is not None:
        each["mask"] = band(mask)
    if key_value_seq_lengths is not None:
        each["lengths"] = band(length_mask(key_value_seq_lengths, keys))
    attended = jax.lax.map(attend, each).transpose(1, 0, 4, 2, 3, 5).reshape(batch, blocks * size, heads, -1)[:, :queries]
    if query_seq_lengths is not None:
        attended = jnp.where((jnp.arange(queries) < query_seq_lengths[:, None])[..., None, None], attended, 0)
    return attended
