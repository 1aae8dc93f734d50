"""What holds for the activations without another library."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.nn import GatedFeedForward, elu, gated_mlp_dim, gelu, gelu_tanh, glu, hard_sigmoid, hard_swish, leaky_relu, mish, silu

ALL = (elu, gelu, gelu_tanh, hard_sigmoid, hard_swish, leaky_relu, mish, silu)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_gradient_is_nan_however_far_out(dtype):
    far = jnp.asarray([0, 1e-30, 88.7, 1e4, 1e10, 1e20, 3e38], dtype)
    x = jnp.concatenate([far, -far])
    for activation in ALL:
        value, gradient = jax.jit(jax.vmap(jax.value_and_grad(jax.checkpoint(activation))))(x)
        assert np.isfinite(value).all() and np.isfinite(gradient).all(), activation


def test_gelu_in_bfloat16_is_right_to_its_last_digit():
    x = np.linspace(-4, 4, 257)  # Multiples of 1/32, which bfloat16 has.
    exact = [value * math.erfc(-value / math.sqrt(2)) / 2 for value in x]
    np.testing.assert_allclose(np.float64(gelu(jnp.bfloat16(x))), exact, rtol=2**-7)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    np.testing.assert_allclose(np.float64(gelu_tanh(jnp.bfloat16(x))), x / (1 + np.exp(-2 * inner)), rtol=2**-7)


def test_mish_is_x_tanh_of_softplus():
    x = np.linspace(-30, 30, 1001)
    np.testing.assert_allclose(mish(jnp.float32(x)), x * np.tanh(np.logaddexp(x, 0)), rtol=1e-5, atol=1e-6)


def test_an_odd_width_has_no_halves():
    with pytest.raises(UserError, match="7"):
        glu(jnp.ones((2, 7)))


def test_a_gated_block_of_two_thirds_has_as_many_parameters_as_a_plain_one():
    assert gated_mlp_dim(4 * 4096, multiple_of=256) == 11008  # Llama 7B
    params = GatedFeedForward(gated_mlp_dim(4 * 24)).init(jax.random.key(0), jnp.ones((1, 24)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2 * 24 * 4 * 24
