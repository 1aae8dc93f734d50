"""The pairwise sigmoid loss, and the softmax loss in which all pairs compete."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jaxtyping import Array, Float

from jaxdl.errors import UserError
from jaxdl.losses import sigmoid_loss, softmax_loss
from jaxdl.training import Layout

DEVICES = 8
LOSSES = {"sigmoid": lambda i, t, s, **how: sigmoid_loss(i, t, s, jnp.float32(-3), **how), "softmax": softmax_loss}


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


def both_ways(images, texts, scale) -> float:
    """The softmax loss as the paper's figure 3 has it, row by row and column by column, in double precision."""
    images, texts = np.float64(images), np.float64(texts)
    total = 0.0
    for asked, answers in ((images, texts), (texts, images)):
        for index, vector in enumerate(asked):
            logits = scale * answers @ vector
            total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[index]
    return total / (2 * len(images))


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
@pytest.mark.parametrize("scale", [1 / 0.07, 1.0, 100.0])
def test_softmax_loss_equals_what_is_written_row_by_row_and_column_by_column(batch, scale):
    images, texts = embeddings(batch)
    loss = softmax_loss(images, texts, jnp.float32(np.log(scale)))
    chex.assert_trees_all_close(loss, np.float32(both_ways(images, texts, scale)), rtol=1e-5, atol=1e-6)


def test_softmax_loss_of_a_guess_is_the_logarithm_of_the_batch():
    same = jnp.tile(embeddings(1)[0], (16, 1))
    np.testing.assert_allclose(softmax_loss(same, same, jnp.float32(3)), np.log(16), rtol=1e-6)


def test_the_derivatives_of_softmax_loss_are_those_of_finite_differences():
    with jax.enable_x64(True):
        images, texts = embeddings(4).astype(jnp.float64)
        check_grads(jax.jit(softmax_loss), (images, texts, jnp.log(1 / 0.07)), order=2, modes=("fwd", "rev"))


def test_similarities_are_scaled_by_no_more_than_a_hundred_and_up_to_there_the_temperature_learns():
    images, texts = embeddings(8)
    value_and_slope = jax.jit(jax.value_and_grad(softmax_loss, argnums=2))
    at, slope = value_and_slope(images, texts, jnp.float32(np.log(100)))
    np.testing.assert_allclose(at, both_ways(images, texts, 100.0), rtol=1e-5)
    assert slope != 0
    beyond, slope = value_and_slope(images, texts, jnp.float32(np.log(100) + 1))
    assert (beyond, slope) == (at, 0)
    wider = softmax_loss(images, texts, jnp.float32(np.log(200)), largest_scale=1000)
    np.testing.assert_allclose(wider, both_ways(images, texts, 200.0), rtol=1e-5)


@pytest.mark.parametrize("log_temperature", [-20.0, 0.0, 20.0])
def test_extreme_temperatures_leave_softmax_loss_finite(log_temperature):
    images, texts = embeddings(4)
    value_and_gradient = jax.value_and_grad(softmax_loss, argnums=(0, 1, 2))
    chex.assert_tree_all_finite(value_and_gradient(images, texts, jnp.float32(log_temperature)))


def test_softmax_loss_changes_with_the_partners_and_not_with_their_order():
    images, texts = embeddings(6)
    order = jnp.asarray([3, 1, 5, 0, 2, 4])
    one, other, wrong = (
        softmax_loss(images[a], texts[b], jnp.float32(2)) for a, b in ((slice(None),) * 2, (order, order), (order, slice(None)))
    )
    chex.assert_trees_all_close(one, other, rtol=1e-6)
    assert abs(one - wrong) > 0.1


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
def test_chunks_give_the_same_loss_and_gradient(name, chunk_size):
    arguments = (*embeddings(16), jnp.log(10.0))
    whole, chunked = (
        jax.jit(jax.value_and_grad(functools.partial(LOSSES[name], chunk_size=size), argnums=(0, 1, 2)))(*arguments)
        for size in (None, chunk_size)
    )
    chex.assert_trees_all_close(chunked, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_bound_the_memory_of_a_large_batch(name):
    """Of forward and backward pass, as XLA plans it for a batch of 8,192; nothing is run."""
    batch, width = 8192, 64
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((batch, width), (batch, width), ())]

    def temporary_bytes(chunk_size: int | None) -> int:
        loss = functools.partial(LOSSES[name], chunk_size=chunk_size)
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(None) >= batch * batch * 4
    assert temporary_bytes(128) <= 0.05 * temporary_bytes(None)


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_that_do_not_divide_the_batch_are_refused(name):
    with pytest.raises(UserError, match="16 texts cannot be cut into chunks of 5"):
        LOSSES[name](*embeddings(16), jnp.log(10.0), chunk_size=5)


@pytest.mark.eight_devices
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_softmax_loss_over_devices_is_that_of_the_whole_batch(strategy, chunk_size):
    images, texts = embeddings(16)
    arguments = images, texts, jnp.float32(2)
    expected, wanted = jax.value_and_grad(softmax_loss, argnums=(0, 1, 2))(*arguments)
    spread = Layout(strategy).shard_objective(functools.partial(softmax_loss, chunk_size=chunk_size))
    if strategy == "jit":
        value, gradients = jax.jit(jax.value_and_grad(spread, argnums=(0, 1, 2)))(*arguments)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    else:  # Each device has its own loss; the mean over the devices is what a step descends.
        rows = [x.reshape(DEVICES, -1, x.shape[-1]) for x in (images, texts)]
        each = jax.pmap(jax.value_and_grad(spread, argnums=(0, 1, 2)), axis_name=Layout("pmap").axis_name, in_axes=(0, 0, None))
        values, gradients = each(*rows, arguments[2])
        np.testing.assert_allclose(values.mean(), expected, rtol=1e-6)
        gradients = (*(g.reshape(images.shape) / DEVICES for g in gradients[:2]), gradients[2].mean())
    chex.assert_trees_all_close(gradients, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.optimized
@pytest.mark.eight_devices
def test_several_devices_share_the_matrix_of_all_pairs():
    """Each has the logits of its own rows; with chunks, of some of them at a time."""
    size, layout = 2048, Layout("jit")
    arguments = jnp.zeros((size, 8)), jnp.zeros((size, 8)), jnp.zeros(())
    placed = [jax.device_put(x, layout.batch_sharding if x.ndim else layout.replicated) for x in arguments]

    def temporary_bytes(loss, arguments) -> int:
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    shared = temporary_bytes(layout.shard_objective(softmax_loss), placed)
    assert shared < 0.3 * temporary_bytes(softmax_loss, arguments)
    assert temporary_bytes(layout.shard_objective(functools.partial(softmax_loss, chunk_size=64)), placed) < 0.2 * shared
