"""From pictures to vectors and back."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdl.errors import UserError


def patchify(images: Float[Array, "B H W C"], patch: int) -> Float[Array, "B T P"]:
    """Cuts images into squares of `patch` pixels, row by row: `T = (H/patch)·(W/patch)`, `P = patch·patch·C` in the order (row, column, channel).

    Raises `UserError` if a side is no multiple of `patch`, and for a single image without a batch.
    """
    if images.ndim != 4:
        raise UserError(f"images are `B H W C`, one as a batch of one, and were given as {images.shape}")
    batch, height, width, channels = images.shape
    if height % patch or width % patch:
        raise UserError(f"images of {height}×{width} cannot be cut into patches of {patch}: resize them to a multiple of {patch}")
    grid = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Float[Array, "B T P"], patch: int, height: int, width: int) -> Float[Array, "B H W C"]:
    """The images of `height × width` pixels that `patchify` has cut: its inverse.

    Raises `UserError` if so many patches of so many values do not make images of that size.
    """
    batch, count, values = patches.shape
    rows, columns, channels = height // patch, width // patch, values // patch**2
    if (rows * patch, columns * patch, rows * columns, channels * patch**2) != (height, width, count, values):
        raise UserError(f"{count} patches of {values} values do not make images of {height}×{width} in patches of {patch}")
    grid = patches.reshape(batch, rows, columns, patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


class PatchEmbedding(nn.Module):
    """A linear map of each patch to `features`: the same as a convolution whose stride is its kernel size (Dosovitskiy et al. 2021)."""

    patch: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
        return nn.Dense(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name="projection")(
            patchify(images, self.patch)
        )
