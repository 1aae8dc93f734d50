"""The normalisations equal torch's and HF's, in value, gradient and the statistics they keep."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from versus_torch import assert_same, normal, seeds, shapes, small

from jaxdl.nn import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    SpectralNorm,
    WeightNorm,
    normalization,
    weight_norm,
)

F = torch.nn.functional


@shapes
@given(batch=small, side=st.integers(2, 4), width=small, momentum=st.sampled_from([0.1, 0.5]), seed=seeds)
def test_batch_norm_and_what_it_remembers_of_three_steps(batch, side, width, momentum, seed):
    theirs = torch.nn.BatchNorm2d(width, momentum=momentum)
    ours = BatchNorm(momentum=momentum)
    scale, bias, *steps = normal(seed, (width,), (width,), *[(batch, side, side + 1, width)] * 4)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        theirs.bias.copy_(torch.tensor(bias))
    stats = ours.init(jax.random.key(0), jnp.asarray(steps[0]))["batch_stats"]
    step = jax.jit(lambda stats, x: ours.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]))
    for x in steps[:3]:
        x = 3 * x + 7
        y, updated = step(stats, x)
        stats = updated["batch_stats"]
        np.testing.assert_allclose(y, theirs(torch.tensor(x).movedim(-1, 1)).movedim(1, -1).detach(), atol=2e-5)
    np.testing.assert_allclose(stats["mean"], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["variance"], theirs.running_var, rtol=1e-5)
    theirs.eval()
    assert_same(
        lambda x: ours.apply({"params": params, "batch_stats": stats}, x),
        lambda x: theirs(x.movedim(-1, 1)).movedim(1, -1),
        steps[3],
        double=None,  # What was remembered was summed in float32.
    )


@shapes
@given(batch=st.integers(2, 5), length=st.integers(2, 5), width=small, seed=seeds)
def test_gradients_of_batch_norm_in_training(batch, length, width, seed):
    stats = {"mean": jnp.zeros(width), "variance": jnp.ones(width)}

    def ours(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])[0]

    def theirs(x, scale, bias):
        return F.batch_norm(x.mT, None, None, scale, bias, training=True).mT

    assert_same(ours, theirs, *normal(seed, (batch, length, width), (width,), (width,)))


@shapes
@given(batch=small, side=st.integers(2, 4), width=small, affine=st.booleans(), seed=seeds)
def test_instance_norm(batch, side, width, affine, seed):
    def ours(x, scale, bias):
        params = {"params": {"scale": scale, "bias": bias}} if affine else {}
        return InstanceNorm(affine).apply(params, x) + 0 * (scale + bias)

    def theirs(x, scale, bias):
        x = F.instance_norm(x.movedim(-1, 1), weight=scale if affine else None, bias=bias if affine else None)
        return x.movedim(1, -1) + 0 * (scale + bias)

    assert_same(ours, theirs, *normal(seed, (batch, side, side + 1, width), (width,), (width,)))


@shapes
@given(batch=small, side=st.integers(2, 4), groups=small, channels=small, seed=seeds)
def test_group_norm_has_contiguous_groups(batch, side, groups, channels, seed):
    width = groups * channels
    assert_same(
        lambda x, scale, bias: GroupNorm(groups).apply({"params": {"scale": scale, "bias": bias}}, x),
        lambda x, scale, bias: F.group_norm(x.movedim(-1, 1), groups, scale, bias).movedim(1, -1),
        *normal(seed, (batch, side, side + 1, width), (width,), (width,)),
    )


@shapes
@given(batch=small, length=small, width=st.integers(1, 33), eps=st.sampled_from([1e-6, 1e-5]), seed=seeds)
def test_rms_norm(batch, length, width, eps, seed):
    assert_same(
        lambda x, scale: RMSNorm(eps).apply({"params": {"scale": scale}}, x),
        lambda x, scale: F.rms_norm(x, (width,), scale, eps),
        *normal(seed, (batch, length, width), (width,)),
    )


@shapes
@given(batch=small, width=st.integers(1, 33), seed=seeds)
def test_rms_norm_with_offset_is_gemmas(batch, width, seed):
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    theirs, ours = gemma.GemmaRMSNorm(width), RMSNorm(offset=1.0)
    x, scale = normal(seed, (batch, width), (width,))
    np.testing.assert_array_equal(ours.init(jax.random.key(0), jnp.asarray(x))["params"]["scale"], theirs.weight.detach())
    assert_same(
        lambda x, scale: ours.apply({"params": {"scale": scale}}, x),
        lambda x, scale: torch.func.functional_call(theirs, {"weight": scale}, x),
        *(x, scale),
        double=None,  # Theirs is in float32 whatever it is given.
    )


def test_rms_norm_in_half_precision_is_gemmas():
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    theirs = gemma.GemmaRMSNorm(32)
    x, scale = normal(0, (4, 32), (32,))
    x = jnp.asarray(x, jnp.bfloat16)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        want = theirs(torch.tensor(np.float32(x)).bfloat16()).float()
    got = np.float32(RMSNorm(offset=1.0).apply({"params": {"scale": jnp.asarray(scale)}}, x))
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-6)


# Ours, torch's and Flax's, as the table at the head of the module has them; None is that of the dtype.
EPS = {
    "batch": (BatchNorm(), torch.nn.BatchNorm2d(4), linen.BatchNorm()),
    "layer": (LayerNorm(), torch.nn.LayerNorm(4), linen.LayerNorm()),
    "instance": (InstanceNorm(), torch.nn.InstanceNorm2d(4), linen.InstanceNorm()),
    "group": (GroupNorm(), torch.nn.GroupNorm(2, 4), linen.GroupNorm()),
    "RMS": (RMSNorm(), torch.nn.RMSNorm(4), linen.RMSNorm()),
}


def test_the_table_of_eps_is_what_the_libraries_have():
    table = re.findall(r"^\| ([\w, ]+) \| (\S+) \| (.+) \| (\S+) \|$", normalization.__doc__, re.MULTILINE)
    rows = {name: row for names, *row in table for name in names.split(", ")}
    assert set(rows) == {*EPS, "spectral"}
    for name, (ours, theirs, flax) in EPS.items():
        assert [ours.eps, flax.epsilon] == [float(rows[name][0]), float(rows[name][2])]
        if theirs.eps is None:
            assert rows[name][1] == f"that of the dtype, {torch.finfo(torch.float32).eps:.1e} in float32".replace("e-07", "e-7")
        else:
            assert theirs.eps == float(rows[name][1])
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(2, 2)).parametrizations.weight[0]
    flax = linen.SpectralNorm(linen.Dense(2)).epsilon
    assert [SpectralNorm().eps, layer.eps, flax] == [float(number) for number in rows["spectral"]]


@shapes
@given(kernel=st.sampled_from([(5, 3), (3, 3, 2, 4), (3, 1, 1)]), seed=seeds)
def test_weight_norm(kernel, seed):
    assert_same(
        weight_norm,
        lambda v, g: torch._weight_norm(v.movedim(-1, 0), g.reshape(-1, *[1] * (len(kernel) - 1)), 0).movedim(0, -1),
        *normal(seed, kernel, kernel[-1:]),
    )


def test_weight_norm_begins_with_no_change_as_torchs_does():
    (kernel,) = normal(0, (5, 3))
    layer = torch.nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(kernel.T))
    torch.nn.utils.parametrizations.weight_norm(layer)
    same, variables = WeightNorm().init_with_output(jax.random.key(0), jnp.asarray(kernel))
    magnitude = layer.parametrizations.weight.original0.detach().reshape(-1)
    np.testing.assert_allclose(same, kernel, rtol=1e-6)
    np.testing.assert_allclose(variables["params"]["magnitude"], magnitude, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (3, 3, 2, 5)])
def test_spectral_norm_over_three_steps(shape):
    (kernel,) = normal(1, shape)
    inputs = kernel.size // shape[-1]
    layer = torch.nn.Linear(inputs, shape[-1])
    matrix = torch.tensor(kernel.reshape(inputs, -1).T)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    torch.nn.utils.parametrizations.spectral_norm(layer)
    theirs = layer.parametrizations.weight[0]
    ours, stats = SpectralNorm(), {"vectors": (jnp.asarray(theirs._u.numpy().copy()), jnp.asarray(theirs._v.numpy().copy()))}
    step = jax.jit(lambda stats, w: ours.apply({"spectral_norm": stats}, w, train=True, mutable=["spectral_norm"]))
    for growth in (1.0, 1.5, 2.0):  # The kernel moves, as in training.
        moved = kernel * np.linspace(1, growth, shape[-1], dtype=np.float32)
        normalized, updated = step(stats, moved)
        stats = updated["spectral_norm"]
        want = theirs(torch.tensor(moved.reshape(inputs, -1).T))
        np.testing.assert_allclose(normalized.reshape(inputs, -1).T, want.detach(), atol=1e-6)
    theirs.eval()
    assert_same(
        lambda w: ours.apply({"spectral_norm": stats}, w),
        lambda w: theirs(w.reshape(inputs, -1).T).T.reshape(shape),
        kernel,
        double=None,  # The vectors were found in float32.
    )
