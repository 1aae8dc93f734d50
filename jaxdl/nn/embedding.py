"""Patches of images and ids of tokens, before they are embedded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxdl.errors import UserError


def known_tokens(tokens: Int[Array, "B T"], vocab_size: int, valid: Bool[Array, "B T"] | None = None) -> Int[Array, "B T"]:
    """Ids of the rows of a table: as they are, but 0 for padding, where `valid` is false: whatever id that has, it is not looked at.

    Raises `UserError` for an id that the table lacks, as far as ids are known: those under `jit` are not, and NaN comes of them.
    """
    if not isinstance(tokens, jax.core.Tracer) and not isinstance(valid, jax.core.Tracer):
        real = np.asarray(tokens) if valid is None else np.asarray(tokens)[np.asarray(valid)]
        if (beyond := real[(real < 0) | (real >= vocab_size)]).size:
            raise UserError(
                f"there is a token {beyond[0]}, and the model has those from 0 to {vocab_size - 1}: use the tokenizer of the model, and mask padding"
            )
    return tokens if valid is None else jnp.where(valid, tokens, 0)


def patchify(images: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B T P"]:
    """Cuts images into squares of `p = patch_size` pixels, row by row: `T = (H/p)·(W/p)`, `P = p·p·C` in the order (row, column, channel).

    Raises `UserError` if a side is no multiple of `patch_size`, and for a single image without a batch.
    """
    if images.ndim != 4:
        raise UserError(f"images are `B H W C`, one as a batch of one, and were given as {images.shape}")
    batch, height, width, channels = images.shape
    if height % patch_size or width % patch_size:
        raise UserError(
            f"images of {height}×{width} cannot be cut into patches of {patch_size}: resize them to a multiple of {patch_size}"
        )
    grid = images.reshape(batch, height // patch_size, patch_size, width // patch_size, patch_size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch_size * patch_size * channels)


def unpatchify(patches: Float[Array, "B T P"], patch_size: int, height: int, width: int) -> Float[Array, "B H W C"]:
    """Puts patches back together into images of `height × width` pixels, the inverse of `patchify`.

    Raises `UserError` if the number or the size of the patches does not fit.
    """
    batch, count, values = patches.shape
    rows, columns, channels = height // patch_size, width // patch_size, values // patch_size**2
    if (rows * patch_size, columns * patch_size, rows * columns, channels * patch_size**2) != (height, width, count, values):
        raise UserError(f"{count} patches of {values} values do not make images of {height}×{width} in patches of {patch_size}")
    grid = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


class PatchEmbedding(nn.Module):
    """A linear map of each patch to `features`: the same as a convolution whose stride is its kernel size (Dosovitskiy et al. 2021)."""

    patch_size: int
    features: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
        return nn.Dense(self.features, dtype=self.dtype, param_dtype=self.param_dtype, name="projection")(
            patchify(images, self.patch_size)
        )
