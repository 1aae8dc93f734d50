"""Convolutions of signals, images and volumes: dense, dilated, grouped, depthwise, separable, transposed and masked.

Arrays are `B *space C` and kernels `*window I O`, for any number of spatial axes: an image is `B H W C`, its kernel HWIO. Like everyone's, these are cross-correlations: the kernel is not flipped. Groups are contiguous, both among the inputs and among the outputs; `I` is the number of inputs of one group.

Paddings, where `n` is the length, `k` the reach of the kernel `dilation · (size − 1) + 1`, and `s` the stride:

| `padding` | zeros before, after | length of the output |
|---|---|---|
| `"VALID"` | 0, 0 | `⌊(n − k) / s⌋ + 1` |
| `"SAME"` | `⌊t/2⌋, ⌈t/2⌉` with `t = max((⌈n/s⌉ − 1) · s + k − n, 0)` | `⌈n/s⌉` |
| `p` | `p, p` | `⌊(n + 2p − k) / s⌋ + 1` |
| `(p, (q, r))` | one entry for each spatial axis | |

The trap is `"SAME"` with a stride: for `n = 8`, `k = 3`, `s = 2` it pads `0, 1` and looks at places 0, 2, 4, 6 and what follows them; torch's `padding=1` pads `1, 1` and looks around them. Both give 4 values, and they are not the same ones: a network that was trained with one needs that one. They agree if `s = 1` and `k` is odd.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, SupportsIndex

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxdl.errors import UserError, unknown

PerAxis = SupportsIndex | Sequence[SupportsIndex]
"""One whole number for all spatial axes, or one for each; numpy's are numbers too."""

Padding = str | SupportsIndex | Sequence[SupportsIndex | tuple[SupportsIndex, SupportsIndex]]
"""`"SAME"`, `"VALID"`, one number for all sides, or for each spatial axis a number or a pair (before, after)."""


class Geometry(NamedTuple):
    """Where a kernel looks, one entry for each spatial axis."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """How many places the kernel spans, holes included."""
        return tuple(dilation * (size - 1) + 1 for size, dilation in zip(self.window, self.dilation))


def per_axis(name: str, value: PerAxis, rank: int, least: int = 1) -> tuple[int, ...]:
    """One number for each spatial axis. Raises `UserError` if there are more or fewer, or none at all, or one is below `least`."""
    if rank < 1:
        raise UserError("an array of two axes or fewer has no spatial axis: give `B *space C`, one image as a batch of one")
    values = tuple(map(operator.index, value if np.ndim(value) else (value,) * rank))
    if len(values) != rank or min(values) < least:
        raise UserError(f"{name} {value} does not fit {rank} spatial axes: give a number ≥ {least}, or one for each axis")
    return values


def check_groups(channels: int, kernel: Float[Array, "*window I O"], groups: int) -> None:
    """Raises `UserError` unless `groups` parts of the channels fit the kernel's inputs and its outputs can be split so."""
    width, outputs = kernel.shape[-2:]
    if groups < 1 or channels != groups * width or outputs % groups:
        raise UserError(
            f"{channels} channels in {groups} groups do not fit a kernel of {width} inputs and {outputs} outputs: the kernel needs channels / groups inputs, and groups must divide its outputs"
        )


def geometry(
    space: Sequence[int],
    window: Sequence[int],
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
) -> Geometry:
    """The places that a kernel of size `window` visits in an array of lengths `space`; see the table above.

    Raises `UserError` for a padding that is none of those in the table, and where the kernel is longer than the padded array.
    """
    rank = len(space)
    if len(window) != rank:
        raise UserError(f"a kernel of {len(window)} spatial axes cannot slide over {rank}: give a size for each of them")
    stride, dilation = per_axis("stride", stride, rank), per_axis("dilation", dilation, rank)
    shape = Geometry(per_axis("kernel size", tuple(window), rank), stride, (), dilation, ())
    if padding == "SAME":
        needed = [max((-(-n // s) - 1) * s + reach - n, 0) for n, s, reach in zip(space, stride, shape.reach)]
        pairs = [(total // 2, total - total // 2) for total in needed]
    elif padding == "VALID":
        pairs = [(0, 0)] * rank
    elif isinstance(padding, str):
        raise unknown("padding", padding, ("SAME", "VALID"))
    else:
        entries = list(padding) if isinstance(padding, Sequence) else [padding] * rank
        pairs = [tuple(map(operator.index, entry if isinstance(entry, Sequence) else (entry, entry))) for entry in entries]
        if len(pairs) != rank or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
            raise UserError(
                f"padding {padding} does not fit {rank} spatial axes: give 'SAME', 'VALID', p ≥ 0, or p or (p, q) for each"
            )
    out = [(n + sum(pair) - reach) // s + 1 for n, pair, reach, s in zip(space, pairs, shape.reach, stride)]
    if min(out) < 1:
        raise UserError(
            f"a kernel that spans {shape.reach} does not fit into {tuple(space)} padded by {pairs}: pad more or take a smaller one"
        )
    return shape._replace(padding=tuple(pairs), out=tuple(out))


def _views(x: Float[Array, "B *space C"], shape: Geometry) -> list[Float[Array, "B *out C"]]:
    """For each place of the kernel, row by row, what it sees while it slides: a strided piece of the padded array."""
    x = jnp.pad(x, ((0, 0), *shape.padding, (0, 0)))
    steps = [range(0, size * dilation, dilation) for size, dilation in zip(shape.window, shape.dilation)]

    def view(start: tuple[int, ...]) -> Array:
        stops = [first + (length - 1) * s + 1 for first, length, s in zip(start, shape.out, shape.stride)]
        return jax.lax.slice(x, (0, *start, 0), (len(x), *stops, x.shape[-1]), (1, *shape.stride, 1))

    return [view(start) for start in itertools.product(*steps)]


def unfold(
    x: Float[Array, "B *space C"],
    window: PerAxis,
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
) -> Float[Array, "B *out P"]:
    """What the kernel sees at each place it visits, as vectors of `P = window · C` numbers: "im2col" (Chellapilla et al. 2006).

    The order is (row, column, channel), that of a kernel flattened. `torch.nn.functional.unfold` and `jax.lax.conv_general_dilated_patches` have (channel, row, column): a matrix made for theirs gives nonsense with ours, and no error.
    """
    space = x.shape[1:-1]
    return jnp.concatenate(_views(x, geometry(space, per_axis("kernel size", window, len(space)), stride, padding, dilation)), -1)


def contract(patches: Float[Array, "B *out P I"], kernel: Float[Array, "P J O"], groups: int) -> Float[Array, "B *out O"]:
    """Sums over the `P` places that are seen and the channels of a group, in float32 or wider; `I = groups · J`."""
    width, outputs = kernel.shape[1:]
    wide = jnp.promote_types(patches.dtype, jnp.float32)
    if groups == 1:
        # Rows below one another: the gradient of the kernel then sums over one axis, for which XLA's CPU copies nothing.
        rows = patches.reshape(-1, patches.shape[-2] * width)
        product = jnp.matmul(rows, kernel.reshape(-1, outputs), preferred_element_type=wide)
        return product.reshape(*patches.shape[:-2], outputs)
    if width == 1:
        # A multiplication, which XLA fuses; as `groups` matrix products with a side of 1 it would be many times slower.
        factors = kernel.reshape(-1, groups, outputs // groups).astype(wide)
        products = patches[..., None].astype(wide) * factors
        return products.sum(-3).reshape(*patches.shape[:-2], outputs)
    split = patches.reshape(*patches.shape[:-1], groups, width)
    factors = kernel.reshape(-1, width, groups, outputs // groups)
    out = jnp.einsum("...pgi,pigo->...go", split, factors, preferred_element_type=wide)
    return out.reshape(*patches.shape[:-2], outputs)


def _by_taps(x: Array, kernel: Array, shape: Geometry, groups: int) -> Array:
    """A loop over the places of the kernel: each multiplies what it sees, and all is summed."""
    taps = kernel.reshape(-1, 1, *kernel.shape[-2:])
    views = (view[..., None, :] for view in _views(x, shape))
    return sum(contract(view, tap, groups) for view, tap in zip(views, taps)).astype(x.dtype)


def _by_unfolding(x: Array, kernel: Array, shape: Geometry, groups: int) -> Array:
    """One matrix product with everything that the kernel sees."""
    patches = jnp.stack(_views(x, shape), -2)
    return contract(patches, kernel.reshape(-1, *kernel.shape[-2:]), groups).astype(x.dtype)


def _by_lax(x: Array, kernel: Array, shape: Geometry, groups: int, spread: Sequence[int] | None = None) -> Array:
    """XLA's own, which is the vendor's on GPU and TPU. `spread` puts zeros between the inputs."""
    space = "DHW"[-len(shape.window) :] if len(shape.window) <= 3 else "abcdefgh"[: len(shape.window)]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        shape.stride,
        shape.padding,
        lhs_dilation=spread,
        rhs_dilation=shape.dilation,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=groups,
    )


def _by_groups(x: Array, kernel: Array, shape: Geometry, groups: int) -> Array:
    """XLA's own for each group."""
    parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1))
    return jnp.concatenate([_by_lax(part, own, shape, 1) for part, own in parts], axis=-1)


def _way(space: Sequence[int], shape: Geometry, kernel: Array, groups: int) -> Callable[..., Array]:
    """What a CPU is fastest with: the sum over taps for kernels of one place, which is a matrix product, and for depthwise ones; a convolution for each group, since XLA leaves several to a plain loop, three times slower, as it does, twenty times slower, with a kernel longer than the image, for which unfolding is the way.

    For images of one channel the taps win when timed alone, but XLA merges them into the pooling that follows and computes each many times over.
    """
    depthwise = groups > 1 and kernel.shape[-2] == 1
    if math.prod(shape.window) == 1 or depthwise:
        return _by_taps
    if groups > 1:
        return _by_groups
    return _by_unfolding if any(reach > length for reach, length in zip(shape.reach, space)) else _by_lax


def _on_cpu(method: Callable[..., Array], x: Array, kernel: Array, shape: Geometry, groups: int) -> Array:
    """By `method` when compiled for a CPU, by XLA's convolution when for anything else."""
    if method is _by_lax:
        return _by_lax(x, kernel, shape, groups)

    ways = [functools.partial(way, shape=shape, groups=groups) for way in (method, _by_lax)]
    return jax.lax.platform_dependent(x, kernel, cpu=ways[0], default=ways[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _fastest(x: Array, kernel: Array, shape: Geometry, groups: int) -> Array:
    """XLA's convolution, but for the cases in which a CPU has something many times faster.

    A convolution is linear in each of its arguments, so the derivative by either is a convolution that may be computed in another way, and its transpose, which is what training needs, is that of the chosen way.
    """
    return _on_cpu(_way(x.shape[1:-1], shape, kernel, groups), x, kernel, shape, groups)


@functools.partial(_fastest.defjvp, symbolic_zeros=True)
def _fastest_derivative(shape: Geometry, groups: int, primals: Sequence, tangents: Sequence) -> tuple:
    x, kernel = primals
    dx, dkernel = tangents
    value = _fastest(x, kernel, shape, groups)
    way = _way(x.shape[1:-1], shape, kernel, groups)
    change = jnp.zeros_like(value)
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        change += _on_cpu(way, dx, kernel, shape, groups)
    if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
        # A long kernel's gradient has short windows.
        change += _on_cpu(_by_lax if way is _by_unfolding else way, x, dkernel, shape, groups)
    return value, change


Method = Literal["fastest", "taps", "unfold", "lax"]
_METHODS = {"fastest": _fastest, "taps": _by_taps, "unfold": _by_unfolding, "lax": _by_lax}


def convolve(
    x: Float[Array, "B *space C"],
    kernel: Float[Array, "*window I O"],
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
    method: Method = "fastest",
) -> Float[Array, "B *out O"]:
    """`y[p, o] = Σ_{k, i} x[p · stride + k · dilation − padding, i] · kernel[k, i, o]`, with zeros outside of `x` (Goodfellow et al. 2016, eq. 9.6).

    The same in three ways, equal in values and gradients up to rounding: `"taps"` loops over the places of the kernel, `"unfold"` makes one matrix product of all that it sees (memory for as many copies of `x` as the kernel has places), `"lax"` calls XLA. `"fastest"` is `"lax"`, but on a CPU `"taps"` for kernels of one place and depthwise ones, `"lax"` group by group where there are groups, and `"unfold"` for kernels longer than the image.

    The output is in the dtype of `x`. With `groups`, outputs `g · O/groups …` see inputs `g · I …` alone; with `groups = C` this is a depthwise convolution and output `c · O/C + j` is the j-th of channel c. Raises `UserError` if `C ≠ groups · I` or the groups do not divide `O`, and for what `geometry` refuses.
    """
    check_groups(x.shape[-1], kernel, groups)
    if method not in _METHODS:
        raise unknown("method of convolution", method, _METHODS)
    shape = geometry(x.shape[1:-1], kernel.shape[:-2], stride, padding, dilation)
    return _METHODS[method](x, kernel.astype(x.dtype), shape, groups)


def _by_spreading(x: Array, kernel: Array, shape: Geometry, groups: int) -> Array:
    """A convolution with the flipped kernel of inputs that have `stride − 1` zeros between them, which libraries skip."""
    flipped = jnp.flip(kernel, tuple(range(kernel.ndim - 2)))
    dense = shape._replace(stride=(1,) * len(shape.stride))
    return _by_lax(x, flipped, dense, groups, spread=shape.stride)


def _phase(offset: int, size: int, stride: int, dilation: int) -> tuple[slice, int, int]:
    """Of the places of a kernel, those that land on outputs `stride · m + r`, where `offset = r + padding`.

    Also the `shift` of the inputs `m + shift − t · dilation` that they come from, `t` counting these places, and that dilation. `k · dilation ≡ offset (mod stride)` has solutions `stride / gcd` apart, or none.
    """
    common = math.gcd(stride, dilation)
    step = stride // common
    first = next((k for k in range(min(step, size)) if (offset - k * dilation) % stride == 0), size)
    return slice(first, size, step), (offset - first * dilation) // stride, dilation // common


def _by_phases(x: Array, kernel: Array, shape: Geometry, groups: int) -> Array:
    """Outputs that are a stride apart see the same places of the kernel: a small convolution for each such phase, interleaved (Shi et al. 2016, section 3.2).

    No zero is multiplied, where XLA's CPU multiplies all of them.
    """
    lengths = [-(-length // s) for length, s in zip(shape.out, shape.stride)]
    phases = []
    for starts in itertools.product(*map(range, shape.stride)):
        taps, pads, holes = [], [], []
        for r, size, s, d, n, reach, (before, _), m in zip(
            starts, shape.window, shape.stride, shape.dilation, x.shape[1:-1], shape.reach, shape.padding, lengths
        ):
            places, shift, hole = _phase(r + reach - 1 - before, size, s, d)
            span = (len(range(size)[places]) - 1) * hole
            taps, holes = [*taps, places], [*holes, hole]
            pads.append((span - shift, m - n + shift))
        part = jnp.flip(kernel[tuple(taps)], tuple(range(len(taps))))
        if part.size == 0:
            phases.append(jnp.zeros((len(x), *lengths, kernel.shape[-1]), x.dtype))
            continue
        # A negative padding cuts inputs off that no output sees.
        config = [(0, 0, 0), *((before, after, 0) for before, after in pads), (0, 0, 0)]
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
        phases.append(convolve(padded, part, padding="VALID", dilation=holes, groups=groups))
    rank = len(lengths)
    grid = jnp.stack(phases).reshape(*shape.stride, len(x), *lengths, kernel.shape[-1])
    order = [rank, *(axis for place in range(rank) for axis in (rank + 1 + place, place)), 2 * rank + 1]
    whole = grid.transpose(order).reshape(len(x), *(m * s for m, s in zip(lengths, shape.stride)), kernel.shape[-1])
    return whole[(slice(None), *map(slice, shape.out))]


def convolve_transposed(
    x: Float[Array, "B *space C"],
    kernel: Float[Array, "*window I O"],
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    output_padding: PerAxis = 0,
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Float[Array, "B *out O"]:
    """Each input adds the kernel, times itself, at `p · stride + k · dilation − padding`: the transpose of `convolve` as a linear map (Dumoulin and Visin 2016, section 4).

    `padding` is that of the convolution that this transposes, so more of it makes the output shorter: `(n − 1) · s + k − before − after + output_padding` long. `"SAME"` gives `n · s`, `"VALID"` is 0. The lengths that a stride above 1 maps to the same `n` are told apart by `output_padding`; `"SAME"` means the length `n · s` and has none.

    | | kernel | flipped |
    |---|---|---|
    | here | `k… I O`, from `C` to `O` | no: place `k` of the kernel lands at offset `k` |
    | `torch.nn.ConvTranspose2d` | `I O k k`: ours is its `weight.permute(2, 3, 0, 1)` | no |
    | `jax.lax.conv_transpose`, `flax.linen.ConvTranspose` | `k k I O` | yes, unless `transpose_kernel=True`, which also exchanges I and O |

    With groups, torch has `(groups · I, O/groups)` where we have `(I, O)`: output `g · O/groups + o` from input `g · I + i`. Raises `UserError` as `convolve` does, for `output_padding` with `"SAME"`, and unless it is less than the stride or the dilation.
    """
    check_groups(x.shape[-1], kernel, groups)
    space, window = x.shape[1:-1], kernel.shape[:-2]
    strides, dilations = per_axis("stride", stride, len(space)), per_axis("dilation", dilation, len(space))
    extra = per_axis("output_padding", output_padding, len(space), least=0)
    if any(more >= max(pair) for more, *pair in zip(extra, strides, dilations)) and any(extra):
        raise UserError(f"output_padding {output_padding} must be less than the stride {stride} or the dilation {dilation}")
    if padding == "SAME" and any(extra):
        raise UserError(
            f"output_padding {output_padding} with padding 'SAME', which makes n · stride of n: pad by numbers instead"
        )
    if padding == "SAME":
        whole = geometry([n * s for n, s in zip(space, strides)], window, strides, "SAME", dilations)
        extra = tuple(max(s - reach, 0) for s, reach in zip(strides, whole.reach))
    else:
        roomy = [n + reach for n, reach in zip(space, per_axis("kernel size", window, len(space)))]
        whole = geometry([n * d for n, d in zip(roomy, dilations)], window, strides, padding, dilations)
    pairs = tuple(
        (reach - 1 - before, reach - 1 - after + more) for reach, (before, after), more in zip(whole.reach, whole.padding, extra)
    )
    out = [(n - 1) * s + sum(pair) - reach + 2 for n, s, pair, reach in zip(space, strides, pairs, whole.reach)]
    if min(out) < 1:
        raise UserError(
            f"padding {padding} leaves nothing of the {tuple(space)} inputs: a transposed convolution is cut by its padding"
        )
    spread = Geometry(whole.window, strides, pairs, whole.dilation, tuple(out))
    ways = [functools.partial(way, shape=spread, groups=groups) for way in (_by_phases, _by_spreading)]
    return jax.lax.platform_dependent(x, kernel.astype(x.dtype), cpu=ways[0], default=ways[1])


def raster_mask(
    window: Sequence[int], inputs: int, outputs: int, kind: Literal["A", "B"], groups: int = 1
) -> Bool[Array, "*window I O"]:
    """True where a kernel may be other than 0 so that a pixel depends on those before it, row by row (van den Oord et al. 2016, section 3.4).

    In the middle of the kernel, where a pixel sees itself, the channels are in `groups` contiguous parts, red, green, blue. Kind A, for the first layer, lets a part see the parts before it; B, for all others, itself too. With one group A hides the pixel and B shows it. Raises `UserError` for a kernel without a middle and for groups that do not divide the channels.
    """
    if kind not in ("A", "B"):
        raise unknown("kind of mask", kind, ("A", "B"))
    if any(size % 2 == 0 for size in window):
        raise UserError(f"a kernel of {tuple(window)} has no middle: give odd sizes")
    if groups < 1 or inputs % groups or outputs % groups:
        raise UserError(
            f"{inputs} and {outputs} channels cannot both be split into {groups} groups: choose multiples of {groups}"
        )
    source, target = (np.arange(count) * groups // count for count in (inputs, outputs))
    before = source[:, None] < target if kind == "A" else source[:, None] <= target
    places = math.prod(window)
    mask = np.zeros((places, inputs, outputs), bool)
    mask[: places // 2] = True
    mask[places // 2] = before
    return jnp.asarray(mask.reshape(*window, inputs, outputs))


def _sizes(kernel_size: PerAxis, x: Array) -> tuple[int, ...]:
    return per_axis("kernel size", kernel_size, x.ndim - 2)


class Conv(nn.Module):
    """`convolve` with a learned kernel and bias, after which there are `features` channels.

    The kernel starts from a normal distribution of variance `1 / fan_in`, cut at two deviations, and the bias from 0, as in Flax; ahead of a ReLU, `variance_scaling(2.0, "fan_in", "truncated_normal")` keeps the variance (He et al. 2015). Torch's default is uniform in `±1/√fan_in` for both, of a third of the variance. `fan_in` is the kernel's places times its inputs `C / groups`.

    `method` is that of `convolve`. The output is in `dtype`, or that of input and parameters together.
    """

    features: int
    kernel_size: PerAxis
    stride: PerAxis = 1
    padding: Padding = "SAME"
    dilation: PerAxis = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    method: Method = "fastest"

    @nn.compact
    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *out O"]:
        """Raises `UserError` for what `convolve` refuses."""
        channels = x.shape[-1]
        if self.groups < 1 or channels % self.groups or self.features % self.groups:
            raise UserError(
                f"{channels} channels and {self.features} features cannot be split into {self.groups} groups: choose a divisor of both"
            )
        shape = (*_sizes(self.kernel_size, x), channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, self.mask(kernel), bias, dtype=self.dtype)
        where = dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
        y = convolve(x, kernel, **where, method=self.method)
        return y if bias is None else y + bias

    def mask(self, kernel: Float[Array, "*window I O"]) -> Float[Array, "*window I O"]:
        """What of the kernel is used: all of it."""
        return kernel


class MaskedConv(Conv):
    """A `Conv` of PixelCNN: its kernel is times `raster_mask`. Kind A in the first layer, B in all others; `colors` is 3 where an image has red, green and blue."""

    kind: Literal["A", "B"] = "B"
    colors: int = 1

    def mask(self, kernel: Float[Array, "*window I O"]) -> Float[Array, "*window I O"]:
        """The kernel, with zeros where it would look ahead. Raises `UserError` for what `raster_mask` refuses, and for groups."""
        if self.groups != 1:
            raise UserError(f"a masked convolution has no {self.groups} groups of its own: say how many `colors` there are")
        return jnp.where(raster_mask(kernel.shape[:-2], *kernel.shape[-2:], self.kind, self.colors), kernel, 0)


class SeparableConv(nn.Module):
    """A convolution of each channel by itself, `multiplier` times, then one of a single place that mixes them (Chollet 2017, MobileNet: Howard et al. 2017, section 3.1).

    Of the two orders in the literature this is the one that both papers' code has: depthwise first. `between` comes after it: nothing in Xception, whose figure 10 finds that best. MobileNet has batch normalisation and ReLU there: write it as `Conv(C, 3, groups=C)` and `Conv(features, 1)`.
    """

    features: int
    kernel_size: PerAxis
    stride: PerAxis = 1
    padding: Padding = "SAME"
    dilation: PerAxis = 1
    multiplier: int = 1
    between: Callable[[Array], Array] | None = None
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *out O"]:
        channels = x.shape[-1]
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = Conv(
            channels * self.multiplier,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            groups=channels,
            # Two biases in a row are one.
            use_bias=self.use_bias and self.between is not None,
            **types,
            name="depthwise",
        )(x)
        y = y if self.between is None else self.between(y)
        return Conv(self.features, 1, use_bias=self.use_bias, **types, name="pointwise")(y)


class ConvTranspose(nn.Module):
    """`convolve_transposed` with a learned kernel and bias, after which there are `features` channels. It starts as `Conv` does.

    Torch, whose kernel has the outputs second, takes them for the inputs: its default has the deviation `1/√(3 · places · features)`.
    """

    features: int
    kernel_size: PerAxis
    stride: PerAxis = 1
    padding: Padding = "SAME"
    output_padding: PerAxis = 0
    dilation: PerAxis = 1
    groups: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *out O"]:
        """Raises `UserError` for what `convolve_transposed` refuses."""
        shape = (*_sizes(self.kernel_size, x), max(x.shape[-1] // max(self.groups, 1), 1), self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolve_transposed(
            x,
            kernel,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y if bias is None else y + bias
