"""The pairwise sigmoid loss."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jaxtyping import Array, Float

from jaxdl.errors import UserError
from jaxdl.losses import sigmoid_loss


def embeddings(batch: int, width: int = 8) -> Float[Array, "2 B D"]:
    """Unit vectors of images and of texts."""
    both = np.random.default_rng(0).standard_normal((2, batch, width))
    return jnp.asarray(both / np.linalg.norm(both, axis=-1, keepdims=True), jnp.float32)


def double_loop(images, texts, log_temperature, bias) -> float:
    """The loss as the paper writes it, pair by pair, in double precision."""
    total = 0.0
    for i, image in enumerate(np.float64(images)):
        for j, text in enumerate(np.float64(texts)):
            label = 1 if i == j else -1
            logit = np.exp(log_temperature) * (image @ text) + bias
            total += np.log1p(np.exp(-label * logit))
    return total / len(images)


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
@pytest.mark.parametrize("log_temperature, bias", [(np.log(10), -10.0), (0.0, 0.0), (np.log(100), -2.71)])
def test_sigmoid_loss_equals_the_double_loop(batch, log_temperature, bias):
    images, texts = embeddings(batch)
    loss = sigmoid_loss(images, texts, jnp.float32(log_temperature), jnp.float32(bias))
    chex.assert_trees_all_close(loss, np.float32(double_loop(images, texts, log_temperature, bias)), rtol=1e-5)


class SigmoidLoss(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_it_is_the_same_compiled_or_not(self):
        images, texts = embeddings(5)
        loss = self.variant(sigmoid_loss)(images, texts, jnp.log(10.0), jnp.float32(-10))
        chex.assert_shape(loss, ())
        chex.assert_trees_all_close(loss, np.float32(double_loop(images, texts, np.log(10), -10)), rtol=1e-5)


def test_its_derivatives_are_those_of_finite_differences():
    with jax.enable_x64(True):
        images, texts = embeddings(4).astype(jnp.float64)
        check_grads(jax.jit(sigmoid_loss), (images, texts, jnp.log(10.0), jnp.float64(-3)), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("bias", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("log_temperature", [-20.0, np.log(10), np.log(1e4)])
def test_extremes_stay_finite(log_temperature, bias):
    images, texts = embeddings(4)
    arguments = (images, texts, jnp.float32(log_temperature), jnp.float32(bias))
    chex.assert_tree_all_finite(jax.value_and_grad(sigmoid_loss, argnums=(0, 1, 2, 3))(*arguments))


def test_the_paper_starts_where_the_many_negatives_weigh_little():
    """With b = −10 the loss begins near that of the positives alone, 10 each (section 3.2)."""
    images, texts = embeddings(256, width=64)
    assert sigmoid_loss(images, texts, jnp.log(10.0), jnp.float32(-10)) < 11
    assert sigmoid_loss(images, texts, jnp.log(10.0), jnp.float32(0)) > 100


def test_images_and_texts_change_places_freely():
    images, texts = embeddings(6)
    one, other = (sigmoid_loss(a, b, jnp.float32(2), jnp.float32(-5)) for a, b in ((images, texts), (texts, images)))
    chex.assert_trees_all_close(one, other, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
def test_chunks_give_the_same_loss_and_gradient(chunk_size):
    arguments = (*embeddings(16), jnp.log(10.0), jnp.float32(-3))
    whole, chunked = (
        jax.jit(jax.value_and_grad(functools.partial(sigmoid_loss, chunk_size=size), argnums=(0, 1, 2, 3)))(*arguments)
        for size in (None, chunk_size)
    )
    chex.assert_trees_all_close(chunked, whole, rtol=1e-6, atol=1e-6)


def test_chunks_bound_the_memory_of_a_large_batch():
    """Of forward and backward pass, as XLA plans it for a batch of 8,192; nothing is run."""
    batch, width = 8192, 64
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, width), (batch, width), (), ())]

    def temporary_bytes(chunk_size: int | None) -> int:
        loss = functools.partial(sigmoid_loss, chunk_size=chunk_size)
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(None) >= batch * batch * 4
    assert temporary_bytes(128) <= 0.05 * temporary_bytes(None)


def test_chunks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(UserError, match="16 texts cannot be cut into chunks of 5"):
        sigmoid_loss(*embeddings(16), jnp.log(10.0), jnp.float32(-3), chunk_size=5)
