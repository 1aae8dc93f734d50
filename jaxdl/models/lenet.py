"""A small convolutional network after LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition", section II-B)."""

import math
from collections.abc import Sequence

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdl.errors import UserError
from jaxdl.nn import Conv, max_pool
from jaxdl.nn.convolution import Method


class LeNet(nn.Module):
    """Convolutions with ReLU, each followed by a maximum over 2×2 pixels, then dense layers: images `B H W C` to logits.

    The order of LeNet-5, with what replaced its parts since: ReLU for tanh, the maximum for a weighted mean, softmax for distances to drawn templates; padding keeps the sides, so that images of 8 pixels can be read too. Of the paper's own sizes, `channels=(6, 16), hidden=(120, 84)`. `method` computes the convolutions (see `jaxdl.nn.convolve`): the result is the same up to rounding. Dropout is after each dense layer but the last.
    """

    channels: Sequence[int] = (16, 32)
    hidden: Sequence[int] = (128,)
    num_classes: int = 10
    kernel_size: int = 5
    dropout: float = 0.0
    method: Method = "fastest"
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        # He et al. 2015, eq. 10: ahead of a ReLU.
        options = dict(kernel_init=nn.initializers.he_normal(), dtype=self.dtype)
        self.convolutions = [Conv(width, self.kernel_size, method=self.method, **options) for width in self.channels]
        self.dense = [nn.Dense(width, **options) for width in self.hidden]
        self.head = nn.Dense(self.num_classes, dtype=self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def feature_maps(self, images: Float[Array, "B H W C"]) -> list[Float[Array, "B _ _ _"]]:
        """What each convolution sees in the images: its output after the ReLU, before the maximum. Raises `UserError` for images that are too small to be halved so often."""
        smallest = 2 ** len(self.channels)
        if min(images.shape[1:3]) < smallest:
            raise UserError(
                f"images of {images.shape[1]}×{images.shape[2]} cannot be halved {len(self.channels)} times: give at least {smallest}×{smallest}, or fewer channels"
            )
        maps, x = [], images
        for convolution in self.convolutions:
            maps.append(nn.relu(convolution(x)))
            x = max_pool(maps[-1], 2)
        return maps

    def __call__(self, images: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B classes"]:
        x = max_pool(self.feature_maps(images)[-1], 2) if self.channels else images
        x = x.reshape(len(x), math.prod(x.shape[1:]))
        for dense in self.dense:
            x = self.drop(nn.relu(dense(x)), deterministic=not train)
        return self.head(x)
