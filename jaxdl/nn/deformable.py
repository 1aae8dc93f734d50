"""Deformable convolution: each place of the kernel looks where the image itself says, at positions between the pixels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdl.errors import UserError
from jaxdl.nn.convolution import Conv, Padding, PerAxis, check_groups, contract, geometry, per_axis


def sample_bilinear(
    image: Float[Array, "H W C"], rows: Float[Array, "*shape"], columns: Float[Array, "*shape"]
) -> Float[Array, "*shape C"]:
    """`image` at real positions, pixel centres at whole numbers, as the weighted mean of the four around each (Dai et al. 2017, eq. 3 and 4).

    Around the image are zeros: it fades out over one pixel, and a position further out gives 0 with no gradient, whatever it is.
    """
    height, width, channels = image.shape
    # One pixel of zeros around; positions are moved by one with it.
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0))).reshape(-1, channels)

    def around(position: Array, length: int) -> tuple[Int[Array, "*shape"], Float[Array, "*shape"]]:
        """The pixel before the position, and how far on it is to the next."""
        # NaN is not outside: it stays NaN.
        position = jnp.where((position <= -1) | (position >= length), -1, position) + 1
        before = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, length)
        return before, position - before

    top, down = around(rows, height)
    left, right = around(columns, width)

    def corner(below: int, beside: int) -> Float[Array, "*shape C"]:
        weight = (down if below else 1 - down) * (right if beside else 1 - right)
        place = (top + below) * (width + 2) + left + beside
        return weight[..., None].astype(image.dtype) * padded.at[place].get(mode="promise_in_bounds")

    return corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1)


def deformable_convolve(
    x: Float[Array, "B H W C"],
    offsets: Float[Array, "B Y X offsets"],
    kernel: Float[Array, "h w I O"],
    modulation: Float[Array, "B Y X taps"] | None = None,
    *,
    stride: PerAxis = 1,
    padding: Padding = "SAME",
    dilation: PerAxis = 1,
    groups: int = 1,
) -> Float[Array, "B Y X O"]:
    """`y(p) = Σ_k w_k · m_k(p) · x(p · stride + k · dilation − padding + Δ_k(p))` (Dai et al. 2017, eq. 2; with `modulation` m, Zhu et al. 2019, eq. 1).

    `offsets` has `2 · h · w` channels for each offset group, in the order (group, row of the kernel, column, (y, x)) in pixels, down and right; `modulation` half as many. This is the order of `torchvision.ops.deform_conv2d`. An offset group moves a contiguous part of the channels of `x`; how many there are follows from the number of channels. Outside of `x` are zeros; see `sample_bilinear`.

    With offsets of 0 this is `convolve`. It keeps `h · w` times the input in memory. Raises `UserError` where the numbers of channels do not fit together, and for arrays of other than four axes.
    """
    if any(array.ndim != 4 for array in (x, offsets, kernel)):
        raise UserError(
            f"images `B H W C`, offsets `B Y X offsets` and a kernel `h w I O` have four axes, one image as a batch of one, and were given as {x.shape}, {offsets.shape}, {kernel.shape}"
        )
    window, (width, outputs) = kernel.shape[:2], kernel.shape[2:]
    channels, taps = x.shape[-1], window[0] * window[1]
    shape = geometry(x.shape[1:-1], window, stride, padding, dilation)
    parts = offsets.shape[-1] // (2 * taps)
    check_groups(channels, kernel, groups)
    if parts < 1 or offsets.shape[-1] != 2 * taps * parts or channels % parts:
        raise UserError(
            f"{offsets.shape[-1]} channels of offsets do not fit a kernel of {window} and {channels} channels: give {2 * taps} for each offset group, and a number of these that divides the channels"
        )
    if offsets.shape[1:3] != shape.out:
        raise UserError(f"offsets for {offsets.shape[1:3]} places do not fit the {shape.out} places of the output")
    if modulation is not None and modulation.shape != (*offsets.shape[:3], taps * parts):
        raise UserError(
            f"a modulation of shape {modulation.shape} does not fit {parts} offset groups: it needs {taps * parts} channels, half those of the offsets"
        )

    # Positions need float32: bfloat16 has 8 bits, so that from 256 on it cannot tell neighbours apart.
    wide = jnp.promote_types(offsets.dtype, jnp.float32)
    moved = offsets.astype(wide).reshape(len(x), *shape.out, parts, *window, 2)
    starts = [jnp.arange(out) * s - before for out, s, (before, _) in zip(shape.out, shape.stride, shape.padding)]
    steps = [jnp.arange(size) * d for size, d in zip(window, shape.dilation)]
    rows = moved[..., 0] + (starts[0][:, None, None, None, None] + steps[0][:, None])
    columns = moved[..., 1] + (starts[1][:, None, None, None] + steps[1])

    pieces = x.reshape(*x.shape[:3], parts, channels // parts)
    over_parts = jax.vmap(sample_bilinear, in_axes=(2, 2, 2), out_axes=4)
    patches = jax.vmap(over_parts)(pieces, rows, columns)  # B Y X h w parts C/parts
    if modulation is not None:
        weights = modulation.astype(x.dtype).reshape(len(x), *shape.out, parts, *window)
        patches = patches * jnp.moveaxis(weights, 3, -1)[..., None]
    patches = patches.reshape(len(x), *shape.out, taps, channels)
    return contract(patches, kernel.astype(x.dtype).reshape(taps, width, outputs), groups).astype(x.dtype)


class DeformableConv(nn.Module):
    """`deformable_convolve` whose offsets, and modulation with `modulated` (version 2), come from a convolution of the same input.

    That convolution, `offsets`, starts from 0: every place looks where an ordinary kernel does, and modulations are sigmoid(0) = 1/2. It learns with a tenth of the learning rate in Zhu et al. 2019, section 3.2: give the parameters under `offsets` their own in the optimizer. Its channels are the offsets, then the modulations, as in the authors' code.
    """

    features: int
    kernel_size: PerAxis = 3
    stride: PerAxis = 1
    padding: Padding = "SAME"
    dilation: PerAxis = 1
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = True
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Y X O"]:
        """Raises `UserError` for what `deformable_convolve` refuses."""
        window, channels = per_axis("kernel size", self.kernel_size, 2), x.shape[-1]
        if min(self.groups, self.offset_groups) < 1 or channels % self.groups or self.features % self.groups:
            raise UserError(
                f"{channels} channels and {self.features} features cannot be split into {self.groups} groups and {self.offset_groups} offset groups: choose divisors"
            )
        taps = window[0] * window[1] * self.offset_groups
        predicted = Conv(
            (3 if self.modulated else 2) * taps,
            window,
            self.stride,
            self.padding,
            self.dilation,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="offsets",
        )(x)
        modulation = jax.nn.sigmoid(predicted[..., 2 * taps :]) if self.modulated else None
        shape = (*window, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = deformable_convolve(
            x,
            predicted[..., : 2 * taps],
            kernel,
            modulation,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y if bias is None else y + bias
