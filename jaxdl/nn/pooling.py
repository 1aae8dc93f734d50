"""Pooling over windows of signals, images and volumes, with the gradients that torch has.

A window is a box, so its largest value and its sum are found along one axis after the other. XLA's own `reduce_window` and its gradient, a scatter, are many times slower on a CPU.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdl.errors import UserError
from jaxdl.nn.convolution import Geometry, Padding, PerAxis, geometry, per_axis


def _windows(x: Array, axis: int, shape: Geometry) -> Array | None:
    """Windows that do not overlap, as an axis of their own after `axis`. The gradient of a strided slice, an interior padding, is slower."""
    size, stride, out = (entries[axis - 1] for entries in (shape.window, shape.stride, shape.out))
    if stride != size:
        return None
    whole = jax.lax.slice_in_dim(x, 0, out * size, axis=axis)
    return whole.reshape(*x.shape[:axis], out, size, *x.shape[axis + 1 :])


def _pieces(x: Array, axis: int, shape: Geometry) -> list[Array]:
    """For each place of a window along the axis, what all windows have there. `x` is padded already."""
    size, stride, out = (entries[axis - 1] for entries in (shape.window, shape.stride, shape.out))
    windows = _windows(x, axis, shape)
    if windows is None:
        return [jax.lax.slice_in_dim(x, i, i + (out - 1) * stride + 1, stride, axis) for i in range(size)]
    return [jax.lax.index_in_dim(windows, i, axis + 1, keepdims=False) for i in range(size)]


def _pad(x: Array, axis: int, shape: Geometry, value: float) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = shape.padding[axis - 1]
    return jnp.pad(x, widths, constant_values=value)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _largest(x: Array, axis: int, shape: Geometry) -> Array:
    """The largest value of each window along the axis."""
    return functools.reduce(jnp.maximum, _pieces(_pad(x, axis, shape, -jnp.inf), axis, shape))


@_largest.defjvp
def _largest_derivative(axis: int, shape: Geometry, primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
    """The change of the first of the largest: which one it is needs no gradient, so that the transpose is a choice, not a scatter."""
    (x,), (dx,) = primals, tangents
    first, *others = _pieces(_pad(x, axis, shape, -jnp.inf), axis, shape)
    value, place = first, jnp.zeros(first.shape, jnp.int32)
    for index, other in enumerate(others, 1):
        larger = (other > value) | jnp.isnan(other)
        value, place = jnp.where(larger, other, value), jnp.where(larger, index, place)
    dx = _pad(dx, axis, shape, 0.0)
    windows = _windows(dx, axis, shape)
    if windows is not None:
        places = jax.lax.broadcasted_iota(jnp.int32, windows.shape, axis + 1)
        return value, jnp.where(jnp.expand_dims(place, axis + 1) == places, windows, 0).sum(axis + 1)
    return value, sum(jnp.where(place == index, change, 0) for index, change in enumerate(_pieces(dx, axis, shape)))


def _shape(x: Array, window: PerAxis, stride: PerAxis | None, padding: Padding) -> Geometry:
    space = x.shape[1:-1]
    sizes = per_axis("window", window, len(space))
    shape = geometry(space, sizes, sizes if stride is None else stride, padding)
    if any(max(pair) >= size for pair, size in zip(shape.padding, sizes)):
        raise UserError(f"padding {padding} leaves nothing but padding in a window of {sizes}: pad less than the window")
    return shape


def _sums(x: Array, shape: Geometry) -> Array:
    """The sum of each window, with zeros for padding."""
    space = range(1, x.ndim - 1)
    if shape.stride == shape.window:
        # Windows that touch are axes of their own, and the gradient is a broadcast.
        for axis in space:
            x = _pad(x, axis, shape, 0.0)
        x = x[:, *(slice(out * size) for out, size in zip(shape.out, shape.window))]
        windows = x.reshape(len(x), *itertools.chain(*zip(shape.out, shape.window)), x.shape[-1])
        return windows.sum(tuple(2 * axis for axis in space))
    for axis in reversed(space):
        x = sum(_pieces(_pad(x, axis, shape, 0.0), axis, shape))
    return x


def max_pool(
    x: Float[Array, "B *space C"],
    window: PerAxis,
    *,
    stride: PerAxis | None = None,
    padding: Padding = "VALID",
) -> Float[Array, "B *out C"]:
    """The largest value of each window; the stride is the window unless given. Padding is −∞ and never the largest.

    Of several largest, the first in row-major order has the gradient, as torch and XLA have it; `max` of a reshaped array, which is often written, shares it among them. NaN is the largest of all. Paddings are those of `jaxdl.nn.convolution`. Raises `UserError` for what `geometry` refuses and for padding as wide as the window.
    """
    shape = _shape(x, window, stride, padding)
    # The last axis first: then the first of the largest rows has the first of its largest columns.
    for axis in reversed(range(1, x.ndim - 1)):
        x = _largest(x, axis, shape)
    return x


def average_pool(
    x: Float[Array, "B *space C"],
    window: PerAxis,
    *,
    stride: PerAxis | None = None,
    padding: Padding = "VALID",
    count_padding: bool = True,
) -> Float[Array, "B *out C"]:
    """The mean of each window; the stride is the window unless given.

    `count_padding` takes padding for zeros that count, as torch (`count_include_pad=True`) and Flax do; without it the mean is over what is there (TensorFlow's `SAME`). Summed in float32 or wider. Raises `UserError` for what `geometry` refuses and for padding as wide as the window.
    """
    shape = _shape(x, window, stride, padding)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = math.prod(shape.window) if count_padding else _sums(jnp.ones((1, *x.shape[1:-1], 1), wide.dtype), shape)
    return (_sums(wide, shape) / count).astype(x.dtype)
