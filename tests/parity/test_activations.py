"""The activations equal torch's, in value and gradient, at their kinks and far out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from hypothesis_profiles import few
from versus_torch import assert_same, normal, seeds, shapes, small

from jaxdl.nn import (
    GatedFeedForward,
    PReLU,
    elu,
    gelu,
    gelu_tanh,
    glu,
    hard_sigmoid,
    hard_swish,
    leaky_relu,
    mish,
    prelu,
    silu,
)

F = torch.nn.functional
PAIRS = {
    "leaky_relu": (leaky_relu, F.leaky_relu),
    "leaky_relu .2": (functools.partial(leaky_relu, slope=0.2), functools.partial(F.leaky_relu, negative_slope=0.2)),
    "elu": (elu, F.elu),
    "elu 1.5": (functools.partial(elu, alpha=1.5), functools.partial(F.elu, alpha=1.5)),
    "gelu": (gelu, F.gelu),
    "gelu_tanh": (gelu_tanh, functools.partial(F.gelu, approximate="tanh")),
    "silu": (silu, F.silu),
    "quick gelu": (functools.partial(silu, beta=1.702), lambda x: x * torch.sigmoid(1.702 * x)),
    "mish": (mish, F.mish),
    "hard_sigmoid": (hard_sigmoid, F.hardsigmoid),
    "hard_swish": (hard_swish, F.hardswish),
}
POINTS = np.float32([*np.linspace(-12, 12, 97), -30, 30, -100, 100, -1e4, 1e4])  # −3, 0 and 3 are among them.


@pytest.mark.optimized
@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_from_kink_to_extreme(name):
    ours, theirs = PAIRS[name]
    double = 1e-7 if name == "hard_sigmoid" else 1e-10  # Torch's gradient of it has the 1/6 of float32.
    # Both tanh-GELUs are up to 3e-6 from the truth around −5.
    assert_same(ours, theirs, POINTS, tolerance=3e-6, double=double, scale=1)


@pytest.mark.parametrize("name", PAIRS)
def test_in_bfloat16_every_value_is_within_two_roundings_of_float32(name):
    ours, theirs = PAIRS[name]
    x = jnp.asarray(POINTS, jnp.bfloat16)
    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(ours)))(x)
    exact = torch.tensor(np.float32(x), requires_grad=True)
    want = theirs(exact)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    assert value.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(value), want.detach().numpy(), rtol=2**-6, atol=2**-8)
    np.testing.assert_allclose(np.float32(gradient), slope.numpy(), rtol=2**-6, atol=2**-5)


@shapes
@given(batch=small, width=small, per_channel=st.booleans(), seed=seeds)
def test_prelu(batch, width, per_channel, seed):
    x, slope = normal(seed, (batch, width), (width,) if per_channel else ())
    x[0, 0] = 0
    module = PReLU(per_channel)
    assert_same(
        lambda x, slope: module.apply({"params": {"slope": slope}}, x),
        lambda x, slope: F.prelu(x, slope.reshape(-1)),
        x,
        np.asarray(slope),
    )
    start = module.init(jax.random.key(0), jnp.asarray(x))["params"]["slope"]
    np.testing.assert_array_equal(start.reshape(-1), torch.nn.PReLU(width if per_channel else 1).weight.detach())


def test_prelu_in_bfloat16_stays_so():
    assert prelu(jnp.ones(3, jnp.bfloat16), jnp.asarray(0.25)).dtype == jnp.bfloat16


@shapes
@given(batch=small, half=small, seed=seeds)
def test_glu_takes_the_value_first_and_the_gate_second(batch, half, seed):
    assert_same(glu, F.glu, *normal(seed, (batch, 2 * half)))


def test_the_two_gelus_are_two_functions():
    """As far apart as the docstring says, and each with its own name in each library: `jax.nn` has the approximation by default, torch the exact one."""
    x = jnp.linspace(-5, 5, 100_001)
    assert np.abs(gelu(x) - gelu_tanh(x)).max() == pytest.approx(4.7e-4, abs=0.05e-4)
    np.testing.assert_allclose(gelu_tanh(x), jax.nn.gelu(x), atol=2e-6)
    np.testing.assert_allclose(gelu(x), F.gelu(torch.tensor(np.array(x))), atol=2e-6)


ACTIVATIONS = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh, "gelu": gelu, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}


@pytest.mark.parametrize("name", ACTIVATIONS)
@few(2)
@given(batch=small, width=small, hidden=small, seed=seeds)
def test_gated_feed_forward_is_llamas_and_gemmas(name, batch, width, hidden, seed):
    llama, activation = pytest.importorskip("transformers.models.llama.modeling_llama"), ACTIVATIONS[name]
    mlp = llama.LlamaMLP(
        llama.LlamaConfig(hidden_size=width, num_attention_heads=1, head_dim=2, intermediate_size=hidden, hidden_act=name)
    )

    def theirs(x, gate, up, down):
        weights = {"gate_proj.weight": gate.T, "up_proj.weight": up.T, "down_proj.weight": down.T}
        return torch.func.functional_call(mlp, weights, x)

    def ours(x, *kernels):
        params = {name: {"kernel": kernel} for name, kernel in zip(("gate", "expand", "contract"), kernels)}
        return GatedFeedForward(hidden, activation).apply({"params": params}, x)

    assert_same(ours, theirs, *normal(seed, (batch, width), (width, hidden), (width, hidden), (hidden, width)))
