"""Normalisation of activations (batch, layer, instance, group, RMS) and of kernels (weight, spectral).

Features are the last axis. Statistics are in float32 (or wider). The biased variance is never left to cancellation: `E[x²] − E[x]²` is taken only where `|mean|` is at most a few deviations, and centred values elsewhere. The result has the dtype of the input, or of a module the `dtype` that it is given: rounded once, at the end.

| | `eps` here | torch | Flax |
|---|---|---|---|
| batch | 1e-5 | 1e-5 | 1e-5 |
| layer | 1e-6 | 1e-5 | 1e-6 |
| instance, group | 1e-5 | 1e-5 | 1e-6 |
| RMS | 1e-6 | that of the dtype, 1.2e-7 in float32 | 1e-6 |
| spectral | 1e-12 | 1e-12 | 1e-12 |
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxdl.errors import UserError, unknown


def _wide(x: Array, dtype: DTypeLike | None = None) -> Array:
    """In float32, or in float64 if it is that already or `dtype` asks for it."""
    return x.astype(jnp.promote_types(jnp.promote_types(x.dtype, dtype or x.dtype), jnp.float32))


_CANCELS_FROM = 16
"""How many times the variance the squared mean may be, in `E[x²] − E[x]²`: of float32's 24 bits the difference then keeps 20."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _moments(x: Array, mask: Array | None, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Mean and biased variance over the axes, which stay with length 1, and how many values they are of.

    Sum and sum of squares need one pass over the array. A second one, over centred values, is made only where the difference would cancel.
    """
    seen = x if mask is None else jnp.where(mask, x, 0)
    if mask is None:
        count = jnp.asarray(math.prod(x.shape[axis] for axis in axes), x.dtype)
    else:
        count = mask.sum(axes, keepdims=True, dtype=x.dtype)
    least = jnp.maximum(count, 1)
    mean = seen.sum(axes, keepdims=True) / least
    variance = jnp.square(seen).sum(axes, keepdims=True) / least - jnp.square(mean)

    def of_centred(seen: Array, mean: Array, variance: Array) -> Array:
        centred = seen - mean if mask is None else jnp.where(mask, seen - mean, 0)
        return jnp.square(centred).sum(axes, keepdims=True) / least

    cancels = (jnp.square(mean) - _CANCELS_FROM * variance).max() > 0
    return mean, jax.lax.cond(cancels, of_centred, lambda seen, mean, variance: variance, seen, mean, variance), count


@_moments.defjvp
def _moments_derivative(axes: tuple[int, ...], primals: tuple, tangents: tuple) -> tuple:
    """`∂mean = E[∂x]`, `∂variance = 2 E[(x − mean) ∂x]`, whichever way the variance was found."""
    x, mask = primals
    mean, variance, count = _moments(x, mask, axes)
    change = tangents[0] / jnp.maximum(count, 1)
    change = change if mask is None else jnp.where(mask, change, 0)
    centred = x - mean if mask is None else jnp.where(mask, x - mean, 0)
    changes = change.sum(axes, keepdims=True), 2 * (centred * change).sum(axes, keepdims=True), jnp.zeros_like(count)
    return (mean, variance, count), changes


@jax.custom_jvp
def _scaled(x: Array, mean: Array, factor: Array, bias: Array | float) -> Array:
    """`(x − mean) · factor + bias`, where all but `x` are the same for many values."""
    return (x - mean) * factor + bias


@_scaled.defjvp
def _scaled_derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """What mean and bias change is added up before it meets the array, so that its transpose sums the gradient once for both."""
    x, mean, factor, _ = primals
    d_x, d_mean, d_factor, d_bias = tangents
    return _scaled(*primals), d_x * factor + (x - mean) * d_factor + (d_bias - d_mean * factor)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _standardized(x: Array, eps: float) -> Array:
    """`(x − mean) / √(variance + eps)` over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


@_standardized.defjvp
def _standardized_derivative(eps: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """`(∂x − E[∂x] − centred · E[centred ∂x] / (variance + eps)) / √(variance + eps)`. The barrier has XLA's CPU sum both means in loops of their own, and the gradient takes three quarters of the time."""
    (x,), (change,) = primals, tangents
    centred = x - x.mean(-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    means = change.mean(-1, keepdims=True), (centred * change).mean(-1, keepdims=True)
    shift, slope = jax.lax.optimization_barrier(means)
    return centred * factor, (change - shift - centred * (jnp.square(factor) * slope)) * factor


def layer_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, "D"], bias: Float[Array, "D"], eps: float = 1e-6
) -> Float[Array, "*batch D"]:
    """`(x − mean) / √(variance + eps) · scale + bias` over the last axis (Ba et al. 2016, eq. 4). Torch's default `eps` is 1e-5."""
    return (_standardized(_wide(x), eps) * scale + bias).astype(x.dtype)


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, "D"], eps: float = 1e-6, *, offset: float = 0.0
) -> Float[Array, "*batch D"]:
    """`x / √(mean(x²) + eps) · (offset + scale)` over the last axis (Zhang and Sennrich 2019, eq. 4).

    `offset` is 0 in the paper, Llama and torch, and 1 in Gemma, whose scale starts from 0 so that weight decay pulls towards the identity. Everything is in float32 and rounded once, as in Gemma; HF's Llama rounds before it multiplies by the scale, which differs by an ulp in bfloat16.
    """
    wide = _wide(x)
    normalized = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (normalized * (offset + scale)).astype(x.dtype)


def group_norm(
    x: Float[Array, "B *space D"],
    groups: int,
    scale: Float[Array, "D"] | float = 1.0,
    bias: Float[Array, "D"] | float = 0.0,
    eps: float = 1e-5,
) -> Float[Array, "B *space D"]:
    """Standardises each example over all places and the `D / groups` channels of a group (Wu and He 2018, eq. 7), then `· scale + bias`.

    Groups are contiguous: channels 0 … D/groups − 1 are the first. One group is layer normalisation over places and channels, `D` groups are `instance_norm`. Raises `UserError` if the groups do not divide the channels.
    """
    channels = x.shape[-1]
    if groups < 1 or channels % groups:
        raise UserError(f"{channels} channels cannot be split into {groups} groups: choose a divisor of {channels}")
    flat = _wide(x).reshape(len(x), -1, channels)
    mean, variance, _ = _moments(flat, None, (1,))
    mean, variance = (moment.reshape(len(x), groups, -1) for moment in (mean, variance))
    shared = mean.mean(-1, keepdims=True)
    # The variance of a group is the mean of its channels' variances, and the variance of their means.
    variance = (variance + jnp.square(mean - shared)).mean(-1, keepdims=True)

    def of_channels(values: Float[Array, "B groups 1"]) -> Float[Array, "B 1 D"]:
        return jnp.broadcast_to(values, mean.shape).reshape(len(x), 1, channels)

    normalized = _scaled(flat, of_channels(shared), of_channels(jax.lax.rsqrt(variance + eps)) * scale, bias)
    return normalized.reshape(x.shape).astype(x.dtype)


def instance_norm(
    x: Float[Array, "B *space D"],
    scale: Float[Array, "D"] | float = 1.0,
    bias: Float[Array, "D"] | float = 0.0,
    eps: float = 1e-5,
) -> Float[Array, "B *space D"]:
    """Standardises each channel of each example over its places (Ulyanov et al. 2016, eq. 4), then `· scale + bias`.

    A single place has no deviation and becomes `bias`; torch refuses it.
    """
    wide = _wide(x)
    mean, variance, _ = _moments(wide, None, tuple(range(1, x.ndim - 1)))
    return _scaled(wide, mean, jax.lax.rsqrt(variance + eps) * scale, bias).astype(x.dtype)


def batch_statistics(
    x: Float[Array, "*batch D"], mask: Bool[Array, "*batch"] | None = None, axis_name: str | Sequence[str] | None = None
) -> tuple[Float[Array, "D"], Float[Array, "D"], Float[Array, ""]]:
    """Mean, biased variance and their number of examples, over all axes but the last (Ioffe and Szegedy 2015, algorithm 1).

    Where the mask is false nothing is seen, not even NaN; with nothing left to see, both are 0. `axis_name` sums over a mapped axis (`pmap`, `shard_map`, `vmap`), weighted by each device's count. A `jit` over sharded arrays needs none: its mean is over the whole batch already.
    """
    axes = tuple(range(x.ndim - 1))
    mean, variance, count = _moments(_wide(x), None if mask is None else mask[..., None], axes)
    mean, variance, count = mean.reshape(-1), variance.reshape(-1), count.reshape(())
    if axis_name is None:
        return mean, variance, count
    # The variance of a whole is the mean of its parts' variances, and the variance of their means (Chan et al. 1983, eq. 2.1).
    total = jax.lax.psum(count, axis_name)
    share = count / jnp.maximum(total, 1)
    shared = jax.lax.psum(share * mean, axis_name)
    return shared, jax.lax.psum(share * (variance + jnp.square(mean - shared)), axis_name), total


def batch_norm(
    x: Float[Array, "*batch D"],
    mean: Float[Array, "D"],
    variance: Float[Array, "D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"],
    eps: float = 1e-5,
) -> Float[Array, "*batch D"]:
    """`(x − mean) / √(variance + eps) · scale + bias` with the statistics of the batch or of a run (Ioffe and Szegedy 2015, eq. 1 and 2)."""
    return _scaled(_wide(x), mean, jax.lax.rsqrt(variance + eps) * scale, bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` with a learned scale (from 1) and bias (from 0). The output is in `dtype`, or that of the input."""

    eps: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return layer_norm(_wide(x, self.dtype), scale, bias, self.eps).astype(self.dtype or x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale that starts from `1 − offset`: the identity. Gemma has `offset=1`. The output is in `dtype`, or that of the input."""

    eps: float = 1e-6
    offset: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],), self.param_dtype)
        return rms_norm(_wide(x, self.dtype), scale, self.eps, offset=self.offset).astype(self.dtype or x.dtype)


class GroupNorm(nn.Module):
    """`group_norm` with a learned scale (from 1) and bias (from 0). The default of 32 groups is the paper's. The output is in `dtype`, or that of the input."""

    groups: int = 32
    eps: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *space D"]) -> Float[Array, "B *space D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return group_norm(_wide(x, self.dtype), self.groups, scale, bias, self.eps).astype(self.dtype or x.dtype)


class InstanceNorm(nn.Module):
    """`instance_norm`, by default with nothing learned, as in the paper, CycleGAN and torch; `affine` adds a scale (from 1) and a bias (from 0), which Flax has by default.

    The output is in `dtype`, or that of the input.
    """

    affine: bool = False
    eps: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *space D"]) -> Float[Array, "B *space D"]:
        scale, bias = 1.0, 0.0
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return instance_norm(_wide(x, self.dtype), scale, bias, self.eps).astype(self.dtype or x.dtype)


class BatchNorm(nn.Module):
    """`batch_norm` with a learned scale (from 1) and bias (from 0), and running statistics in the collection `batch_stats`.

    With `train` the statistics are those of the batch and the running ones move towards them (`batch_stats` must be mutable); without, the running ones are used. There are two conventions of moving:

    | `convention` | step | default `momentum` | variance that is kept |
    |---|---|---|---|
    | `"torch"` | `running += momentum · (batch − running)` | 0.1 | unbiased, `· n / (n − 1)` |
    | `"flax"` | `running = momentum · running + (1 − momentum) · batch` | 0.99 | biased |

    The default is torch's: most published results and weights were made with it, and its unbiased variance is the paper's (algorithm 2). Both normalise the batch itself by the biased variance. Flax's momentum of 0.99 has not forgotten its start before some 500 steps; torch's has after 50.

    `mask` is true where a position counts: padding is taken as zeros (even if it is NaN) and changes neither statistics nor gradients. A batch of nothing but padding moves nothing. `axis_name` shares statistics over a mapped axis; see `batch_statistics`. The output is in `dtype`, or that of the input. Raises `UserError` for another convention.
    """

    convention: Literal["torch", "flax"] = "torch"
    momentum: float | None = None
    eps: float = 1e-5
    axis_name: str | Sequence[str] | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch D"], *, mask: Bool[Array, "*batch"] | None = None, train: bool = False
    ) -> Float[Array, "*batch D"]:
        rates = {"torch": 0.1, "flax": 1 - 0.99}
        if self.convention not in rates:
            raise unknown("convention of batch statistics", self.convention, rates)
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, wide)
        running_variance = self.variable("batch_stats", "variance", jnp.ones, shape, wide)

        if not train:
            mean, variance = running_mean.value, running_variance.value
        else:
            # Initialisation may run outside of the mapped axis, where its name means nothing.
            mean, variance, count = batch_statistics(x, mask, None if self.is_initializing() else self.axis_name)
            if not self.is_initializing():
                rate = rates[self.convention]
                if self.momentum is not None:
                    rate = self.momentum if self.convention == "torch" else 1 - self.momentum
                rate = jnp.where(count > 0, rate, 0.0)
                kept = variance * count / jnp.maximum(count - 1, 1) if self.convention == "torch" else variance
                running_mean.value += (rate * (mean - running_mean.value)).astype(wide)
                running_variance.value += (rate * (kept - running_variance.value)).astype(wide)
        return batch_norm(_wide(x, self.dtype), mean, variance, scale, bias, self.eps).astype(self.dtype or x.dtype)


def weight_norm(
    direction: Float[Array, "*inputs outputs"], magnitude: Float[Array, "outputs"]
) -> Float[Array, "*inputs outputs"]:
    """`magnitude · direction / ‖direction‖`, a norm for each output of a kernel (Salimans and Kingma 2016, eq. 2).

    Kernels have their outputs last, so this is `torch.nn.utils.parametrizations.weight_norm` with its default `dim=0`. A direction of zeros gives zeros, where torch gives NaN.
    """
    square = jnp.square(_wide(direction)).sum(tuple(range(direction.ndim - 1)))
    return (direction * (magnitude * jax.lax.rsqrt(jnp.maximum(square, 1e-24)))).astype(direction.dtype)


class WeightNorm(nn.Module):
    """Turns a kernel into `weight_norm` of it with a learned magnitude that starts from the kernel's own norms: at first nothing changes.

    ```python
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (inputs, outputs))
    y = x @ WeightNorm(name="weight_norm")(kernel)
    ```
    """

    @nn.compact
    def __call__(self, kernel: Float[Array, "*inputs outputs"]) -> Float[Array, "*inputs outputs"]:
        axes = tuple(range(kernel.ndim - 1))
        return weight_norm(kernel, self.param("magnitude", lambda _: jnp.sqrt(jnp.square(_wide(kernel)).sum(axes))))


def power_iteration(
    matrix: Float[Array, "inputs outputs"],
    left: Float[Array, "outputs"],
    right: Float[Array, "inputs"],
    steps: int = 1,
    eps: float = 1e-12,
) -> tuple[Float[Array, "outputs"], Float[Array, "inputs"]]:
    """`steps` times `u ← W v / ‖W v‖`, `v ← Wᵀ u / ‖Wᵀ u‖` with `W = matrixᵀ` (Miyato et al. 2018, algorithm 1): towards the leading singular vectors."""

    def unit(x: Array) -> Array:
        return x / jnp.maximum(jnp.linalg.norm(x), eps)

    for _ in range(steps):
        left = unit(right @ matrix)
        right = unit(matrix @ left)
    return left, right


def spectral_norm(
    kernel: Float[Array, "*inputs outputs"], left: Float[Array, "outputs"], right: Float[Array, "flat"], eps: float = 1e-12
) -> Float[Array, "*inputs outputs"]:
    """`kernel / σ` with `σ = uᵀ W v`, where `u` and `v` are constants to the gradient and `W` is the kernel as a matrix (Miyato et al. 2018, eq. 8).

    A σ within `eps` of 0 counts as `eps`: a kernel of zeros stays one, where torch gives NaN.
    """
    matrix = _wide(kernel).reshape(-1, kernel.shape[-1])
    sigma = jax.lax.stop_gradient(right) @ matrix @ jax.lax.stop_gradient(left)
    return (kernel / jnp.where(jnp.abs(sigma) < eps, eps, sigma)).astype(kernel.dtype)


class SpectralNorm(nn.Module):
    """Turns a kernel into `spectral_norm` of it: its largest singular value becomes about 1.

    `u` and `v` live in the collection `spectral_norm`. They start with 15 steps of the power iteration, as in torch, and take `steps` more with every call with `train` (the collection must be mutable), none without. A convolution is judged by its kernel as a matrix of outputs by everything else, as in the paper: that is not the norm of the convolution itself.

    ```python
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (inputs, outputs))
    y = x @ SpectralNorm(name="spectral_norm")(kernel, train=train)
    ```
    """

    steps: int = 1
    eps: float = 1e-12

    @nn.compact
    def __call__(self, kernel: Float[Array, "*inputs outputs"], *, train: bool = False) -> Float[Array, "*inputs outputs"]:
        matrix = jax.lax.stop_gradient(_wide(kernel).reshape(-1, kernel.shape[-1]))

        def start() -> tuple[Array, Array]:
            one, other = jax.random.split(self.make_rng("params"))
            left, right = jax.random.normal(one, matrix.shape[1:]), jax.random.normal(other, matrix.shape[:1])
            return power_iteration(matrix, left, right, 15, self.eps)

        vectors = self.variable("spectral_norm", "vectors", start)
        if train and not self.is_initializing():
            vectors.value = power_iteration(matrix, *vectors.value, self.steps, self.eps)
        return spectral_norm(kernel, *vectors.value, self.eps)
