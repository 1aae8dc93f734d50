"""Attention masks: boolean, true where a query may attend to a key, broadcasting to `B N T S`.

Queries and keys are given by their number, and then stand at 0, 1, 2 …, or by their positions, the same for all examples or not. Masks combine by `&` and `|`: `causal_mask(T) & segment_mask(documents)`. Beware of torch: in `key_padding_mask` and a boolean `attn_mask` of `torch.nn.MultiheadAttention` and `torch.nn.Transformer` true means "ignore", so exchange with `~`; `scaled_dot_product_attention` has true as here.
"""

import operator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxdl.errors import UserError
from pallas_kernels.attention import checks

Count = int | np.integer

Places = Count | Int[Array, "_"] | Int[Array, "#B _"]
"""Of queries or keys: how many there are, at 0, 1, 2 …, or their positions."""

Window = Count | tuple[Count, Count]
"""How many keys to the left and to the right of itself a query sees; one number is for both sides."""


def places(given: Places) -> Int[Array, "#B _"]:
    """Positions from a number of tokens or from the positions themselves."""
    return jnp.atleast_2d(given if jnp.ndim(given) else jnp.arange(operator.index(given)))


def window_sides(window: Window) -> tuple[int, int]:
    """Left and right, at most 2³⁰. Raises `UserError` for a side below 0 and what is no whole number."""
    try:
        return checks.window_sides(window)
    except ValueError as error:
        raise UserError(str(error)) from None


def window_mask(
    queries: Places, keys: Places | None = None, *, left: Count | None = None, right: Count | None = None
) -> Bool[Array, "#B 1 T S"]:
    """Keys from `left` before the query to `right` after it, both included; without a bound where `None` (Beltagy et al. 2020, section 3.1, has both at w/2). A bound below 0 leaves the query itself out: `right=-1` shows what came before it.

    `local_window_size=(left, right)` of an attention is the same for whole sequences. Mistral's window of W counts the query itself: `left=W − 1, right=0`.
    """
    query = places(queries)[:, None, :, None]
    key = places(queries if keys is None else keys)[:, None, None, :]
    mask = jnp.ones(jnp.broadcast_shapes(query.shape, key.shape), bool)
    if left is not None:
        mask &= key >= query - min(max(operator.index(left), -checks.FAR), checks.FAR)
    if right is not None:
        mask &= key <= query + min(max(operator.index(right), -checks.FAR), checks.FAR)
    return mask


def causal_mask(queries: Places, keys: Places | None = None) -> Bool[Array, "#B 1 T S"]:
    """Keys up to the query itself (Vaswani et al. 2017, section 3.2.3).

    Two lengths are aligned at their starts, as `is_causal` is in torch and `jax.nn`. Queries that come after n cached keys are `causal_mask(n + jnp.arange(T), S)`.
    """
    return window_mask(queries, keys, right=0)


def padding_mask(valid: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Keys that are real tokens. `valid` is HF's `attention_mask`, and the opposite of torch's `key_padding_mask`."""
    return valid[:, None, None, :]


def length_mask(lengths: Int[Array, "B"], keys: Count) -> Bool[Array, "B 1 1 S"]:
    """The first `lengths` of the keys: padding is at the end."""
    return padding_mask(jnp.arange(keys) < lengths[:, None])


def segment_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"] | None = None) -> Bool[Array, "B 1 T S"]:
    """Keys of the query's own document, where several are packed into a row (Krell et al. 2021, section 3.2.2): equal numbers belong together."""
    keys = queries if keys is None else keys
    return queries[:, None, :, None] == keys[:, None, None, :]


def prefix_mask(lengths: Int[Array, "B"], queries: Count, keys: Count | None = None) -> Bool[Array, "B 1 T S"]:
    """Bidirectional over a prefix of `lengths` tokens, causal after it (Raffel et al. 2020, section 3.2.1)."""
    return causal_mask(queries, keys) | length_mask(lengths, queries if keys is None else keys)


def token_positions(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of each token among the real ones, wherever the padding is; padding has that of the token before it, −1 at the start."""
    return jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
