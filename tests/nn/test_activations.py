"""What holds for the activations without another library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.nn import GatedFeedForward, elu, gated_hidden, gelu, gelu_tanh, glu, hard_sigmoid, hard_swish, leaky_relu, mish, silu

ALL = (elu, gelu, gelu_tanh, hard_sigmoid, hard_swish, leaky_relu, mish, silu)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_gradient_is_nan_however_far_out(dtype):
    x = jnp.asarray([0, 1e-30, 88.7, 1e4, 1e10, -1e-30, -88.7, -1e4, -1e10], dtype)
    for activation in ALL:
        value, gradient = jax.jit(jax.vmap(jax.value_and_grad(jax.checkpoint(activation))))(x)
        assert np.isfinite(value).all() and np.isfinite(gradient).all(), activation


def test_gelu_keeps_its_digits_in_the_tail():
    x = jnp.asarray([-6.0, -8.0, -10.0])
    exact = [-5.919526e-09, -4.976885e-15, -7.619853e-23]  # x Φ(x), from scipy.stats.norm.
    np.testing.assert_allclose(gelu(x), exact, rtol=1e-4)


def test_mish_is_x_tanh_of_softplus():
    x = np.linspace(-30, 30, 1001)
    np.testing.assert_allclose(mish(jnp.float32(x)), x * np.tanh(np.logaddexp(x, 0)), rtol=1e-5, atol=1e-6)


def test_an_odd_width_has_no_halves():
    with pytest.raises(UserError, match="7"):
        glu(jnp.ones((2, 7)))


def test_a_gated_block_of_two_thirds_has_as_many_parameters_as_a_plain_one():
    assert gated_hidden(4 * 4096, multiple_of=256) == 11008  # Llama 7B
    params = GatedFeedForward(gated_hidden(4 * 24)).init(jax.random.key(0), jnp.ones((1, 24)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2 * 24 * 4 * 24
