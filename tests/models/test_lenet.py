"""The small convolutional network: the same by every method, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.models.lenet import LeNet


def images(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def test_every_method_gives_the_same_loss_and_gradients():
    """On images of 8 pixels the second kernel is longer than what it slides over."""
    x, labels = images(3, 8, 8, 1), jnp.arange(3)
    params = LeNet((4, 6), (5,)).init(jax.random.key(0), x)["params"]

    def found(method: str):
        module = LeNet((4, 6), (5,), method=method)
        return jax.jit(jax.value_and_grad(lambda params: cross_entropy(module.apply({"params": params}, x), labels)))(params)

    expected = found("lax")
    for method in ("fastest", "taps", "unfold"):
        for a, b in zip(jax.tree.leaves(found(method)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_it_has_the_parameters_of_lenet_5():
    """LeCun et al. 1998, section II-B, counts 156 in C1, 10,164 in F6; C3 is full here, and F6's 84 end in 10 dense outputs."""
    params = LeNet((6, 16), (120, 84)).init(jax.random.key(0), images(1, 28, 28, 1))["params"]
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}
    assert counts == {
        "convolutions_0": 156,
        "convolutions_1": 16 * (6 * 25 + 1),
        "dense_0": 120 * (7 * 7 * 16 + 1),
        "dense_1": 10_164,
        "head": 850,
    }


def test_feature_maps_are_what_each_convolution_sees():
    x = images(2, 8, 12, 3)
    module = LeNet((4, 6))
    params = module.init(jax.random.key(0), x)
    first, second = module.apply(params, x, method="feature_maps")
    assert first.shape == (2, 8, 12, 4) and second.shape == (2, 4, 6, 6) and (first >= 0).all() and (second >= 0).all()


def test_a_moved_picture_moves_its_feature_maps():
    x = np.zeros((1, 16, 16, 1), np.float32)
    x[0, 5:8, 5:8] = np.random.default_rng(0).standard_normal((3, 3, 1))
    module = LeNet((4,), kernel_size=3)
    params = module.init(jax.random.key(0), jnp.asarray(x))
    (here,), (there,) = (
        module.apply(params, jnp.asarray(np.roll(x, shift, (1, 2))), method="feature_maps") for shift in ((0, 0), (3, 4))
    )
    np.testing.assert_allclose(np.roll(here, (3, 4), (1, 2)), there, atol=1e-6)


def test_images_that_cannot_be_halved_so_often_are_refused():
    with pytest.raises(UserError, match="3×9 cannot be halved 2 times: give at least 4×4"):
        LeNet((4, 4)).init(jax.random.key(0), images(1, 3, 9, 1))
