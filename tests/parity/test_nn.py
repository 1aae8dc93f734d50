"""Layer normalisation and patches equal torch's, in value and gradient, for any shape."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from versus_torch import assert_same, normal, seeds, shapes, small

from jaxdl.errors import UserError
from jaxdl.nn import LayerNorm, PatchEmbedding, layer_norm, patchify, unpatchify

F = torch.nn.functional


def linear(kernel, bias) -> dict:
    return {"kernel": kernel, "bias": bias}


@shapes
@given(batch=small, length=small, width=st.integers(2, 33), eps=st.sampled_from([1e-6, 1e-5, 1e-2]), seed=seeds)
def test_layer_norm(batch, length, width, eps, seed):
    x, scale, bias = normal(seed, (batch, length, width), (width,), (width,))
    # A few features may be nearly equal, and then a division by √eps multiplies the rounding of what is divided.
    largest = np.abs(scale).max() / np.sqrt(x.var(-1).min() + eps)
    assert_same(
        lambda x, scale, bias: LayerNorm(eps).apply({"params": {"scale": scale, "bias": bias}}, x),
        lambda x, scale, bias: F.layer_norm(x, (width,), scale, bias, eps),
        *(x, scale, bias),
        scale=max(4.0, largest),
    )


def test_layer_norm_survives_a_mean_far_above_the_deviation():
    x = 1000 + jnp.linspace(-1, 1, 64)
    wide = np.float64(x)
    exact = (wide - wide.mean()) / wide.std()
    np.testing.assert_allclose(layer_norm(x, jnp.ones(64), jnp.zeros(64), eps=0.0), exact, atol=1e-4)


@shapes
@given(
    batch=small,
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    patch_size=small,
    channels=small,
    width=st.integers(1, 9),
    seed=seeds,
)
def test_patch_embedding_is_a_strided_convolution(batch, rows, columns, patch_size, channels, width, seed):
    arrays = normal(
        seed, (batch, rows * patch_size, columns * patch_size, channels), (patch_size * patch_size * channels, width), (width,)
    )

    def convolve(images, kernel, bias):
        kernel = kernel.reshape(patch_size, patch_size, channels, width).permute(3, 2, 0, 1)
        return F.conv2d(images.movedim(-1, 1), kernel, bias, stride=patch_size).flatten(2).mT

    def embed(images, kernel, bias):
        return PatchEmbedding(patch_size, width).apply({"params": {"projection": linear(kernel, bias)}}, images)

    assert_same(embed, convolve, *arrays)


@shapes
@given(batch=small, rows=small, columns=small, patch_size=st.integers(1, 4), channels=small, seed=seeds)
def test_unpatchify_is_torchs_fold_and_the_inverse_of_patchify(batch, rows, columns, patch_size, channels, seed):
    height, width = rows * patch_size, columns * patch_size

    def fold(patches):
        patches = patches.unflatten(-1, (patch_size * patch_size, channels)).mT.flatten(2).mT  # Torch has the channels first.
        return F.fold(patches, (height, width), patch_size, stride=patch_size).movedim(1, -1)

    (patches,) = normal(seed, (batch, rows * columns, patch_size * patch_size * channels))
    assert_same(lambda patches: unpatchify(patches, patch_size, height, width), fold, patches)
    images = unpatchify(jnp.asarray(patches), patch_size, height, width)
    np.testing.assert_array_equal(patchify(images, patch_size), patches)


@pytest.mark.parametrize("count, values, height", [(5, 12, 4), (4, 13, 4), (4, 12, 5)])
def test_patches_that_make_no_image_are_refused(count, values, height):
    with pytest.raises(UserError, match=f"{count} patches of {values} values do not make images of {height}×4 in patches of 2"):
        unpatchify(jnp.ones((1, count, values)), 2, height, 4)
