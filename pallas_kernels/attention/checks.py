"""What the arguments of an attention must be, whichever implementation computes it. All that is asked for is known while tracing; every error is a `ValueError`."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)
FAR = 2**30
"""A window that reaches so far has no end: no array has as many positions, and they may be added without an overflow of int32."""


def check_dtypes(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, mask: jax.Array | None) -> None:
    """Query, key and value have one dtype of floats, a bias one of floats too, and a mask is bool."""
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in FLOATS:
        raise ValueError(
            f"query, key and value have one dtype of float32, bfloat16, float16: got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if bias is not None and not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"a bias is of floats, which are added to logits: got {bias.dtype}; a bool array is a mask")
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"a mask is bool, True where a query may look: got {mask.dtype}; what is added to logits is a bias")


def check_numbers(scale: object, soft_cap: object) -> None:
    """A scale is finite, a soft cap is finite and above 0, as far as they are known."""
    if scale is not None and not isinstance(scale, jax.core.Tracer) and not math.isfinite(scale):
        raise ValueError(f"a scale is a finite number, or None for 1/√H: got {scale}")
    if soft_cap is not None and not isinstance(soft_cap, jax.core.Tracer) and not 0 < soft_cap < math.inf:
        raise ValueError(f"logits_soft_cap is a positive number, or None for no cap: got {soft_cap}")


def window_sides(window: int | tuple[int, int]) -> tuple[int, int]:
    """How many positions to the left and to the right are seen, at most `FAR`."""
    try:
        left, right = (window, window) if np.ndim(window) == 0 else window
        sides = operator.index(left), operator.index(right)
    except (TypeError, ValueError):
        sides = -1, -1
    if min(sides) < 0:
        raise ValueError(f"a window of {window} keys to the left and right: give two whole numbers from 0 on, or one for both sides")
    return min(sides[0], FAR), min(sides[1], FAR)
