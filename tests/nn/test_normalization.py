"""What holds for the normalisations without another library."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxdl.errors import UserError
from jaxdl.nn import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    SpectralNorm,
    batch_norm,
    batch_statistics,
    group_norm,
    instance_norm,
    spectral_norm,
    weight_norm,
)


@functools.partial(jax.jit, static_argnums=0)
def train(module, variables, x, mask=None):
    return module.apply(variables, x, mask=mask, train=True, mutable=["batch_stats"])


@pytest.fixture
def batch():
    return jnp.asarray(5 + 2 * np.random.default_rng(0).standard_normal((4, 6, 3)), jnp.float32)


def test_flax_convention_is_that_of_flax(batch):
    ours, theirs = BatchNorm("flax"), nn.BatchNorm(use_running_average=False, use_fast_variance=False)
    one, other = ours.init(jax.random.key(0), batch), theirs.init(jax.random.key(0), batch)
    for _ in range(2):
        x, updated = train(ours, one, batch)
        y, updated_other = theirs.apply(other, batch, mutable=["batch_stats"])
        one, other = {**one, **updated}, {**other, **updated_other}
        np.testing.assert_allclose(x, y, atol=1e-5)
    np.testing.assert_allclose(one["batch_stats"]["mean"], other["batch_stats"]["mean"], rtol=1e-5)
    np.testing.assert_allclose(one["batch_stats"]["variance"], other["batch_stats"]["var"], rtol=1e-5)


def test_the_conventions_differ_by_the_unbiased_variance(batch):
    after_flax, after_torch = (
        train(module, module.init(jax.random.key(0), batch), batch)[1]["batch_stats"]
        for module in (BatchNorm("flax", momentum=0.0), BatchNorm("torch", momentum=1.0))
    )
    np.testing.assert_allclose(after_flax["mean"], after_torch["mean"])
    np.testing.assert_allclose(after_torch["variance"] / after_flax["variance"], 24 / 23, rtol=1e-6)


def test_padding_is_as_good_as_absent(batch):
    mask = np.arange(6) < np.asarray([6, 3, 1, 4])[:, None]
    dirty, present = np.where(mask[..., None], batch, np.nan), np.asarray(batch)[mask]
    module = BatchNorm()
    variables = module.init(jax.random.key(0), batch)
    y, updated = train(module, variables, dirty, mask)
    only, updated_only = train(module, variables, present)
    np.testing.assert_allclose(np.asarray(y)[mask], only, atol=1e-5)
    for masked, compact in zip(jax.tree.leaves(updated), jax.tree.leaves(updated_only), strict=True):
        np.testing.assert_allclose(masked, compact, rtol=1e-5)

    def loss(x):
        return jnp.where(mask[..., None], jnp.sin(train(module, variables, x, mask)[0]), 0).sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(dirty))
    compact = jax.jit(jax.grad(lambda x: jnp.sin(train(module, variables, x)[0]).sum()))(present)
    np.testing.assert_allclose(gradient[mask], compact, atol=1e-5)
    assert not gradient[~mask].any()


def test_a_batch_of_padding_moves_nothing(batch):
    module = BatchNorm()
    variables = module.init(jax.random.key(0), batch)
    y, updated = train(module, variables, batch, np.zeros((4, 6), bool))
    assert jnp.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_shared_over_a_mapped_axis(batch, masked):
    # One device may see more than another: the mean is weighted by what each has seen.
    mask = jnp.arange(6) < jnp.asarray([6, 5, 1, 0])[:, None] if masked else None
    shared, whole = BatchNorm(axis_name="devices"), BatchNorm()
    variables = whole.init(jax.random.key(0), batch)

    @jax.jit
    def on_devices(x):
        split = x.reshape(2, 2, 6, 3), None if mask is None else mask.reshape(2, 2, 6)
        y, updated = jax.vmap(lambda x, mask: train(shared, variables, x, mask), axis_name="devices")(*split)
        return y.reshape(x.shape), jax.tree.map(lambda leaf: leaf[0], updated)

    (y, updated), (expected, whole_updated) = on_devices(batch), train(whole, variables, batch, mask)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updated, whole_updated)
    one = jax.jit(jax.grad(lambda x: jnp.sin(on_devices(x)[0]).sum()))(batch)
    other = jax.jit(jax.grad(lambda x: jnp.sin(train(whole, variables, x, mask)[0]).sum()))(batch)
    np.testing.assert_allclose(one, other, atol=1e-5)
    shared.init(jax.random.key(0), batch, train=True)  # Outside of the axis.


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm, functools.partial(GroupNorm, 2), InstanceNorm, BatchNorm])
def test_a_wider_output_is_rounded_once(norm, batch):
    x = jnp.tile(batch, (1, 1, 2)).astype(jnp.bfloat16)
    variables = norm().init(jax.random.key(0), x)
    np.testing.assert_array_equal(norm(dtype=jnp.float32).apply(variables, x), norm().apply(variables, x.astype(jnp.float32)))


def test_a_mean_far_above_the_deviation_survives():
    x = (1000 + jnp.linspace(-1, 1, 64)).reshape(1, 64, 1)
    wide = np.float64(x)
    exact = (wide - wide.mean()) / wide.std()
    y, _ = train(BatchNorm(eps=0.0), BatchNorm().init(jax.random.key(0), x), x)
    np.testing.assert_allclose(y, exact, atol=1e-4)
    np.testing.assert_allclose(instance_norm(x, eps=0.0), exact, atol=1e-4)


@pytest.mark.parametrize("offset", [0, 3, 100])
@pytest.mark.optimized
def test_the_gradient_is_the_papers_wherever_the_mean_lies(offset):
    """One pass or two over the values, the gradient is `(g − E[g] − y E[g y]) / deviation`."""
    random = np.random.default_rng(0)
    x, g = (offset + random.standard_normal((1, 8, 8, 1))).astype(np.float32), random.standard_normal((1, 8, 8, 1), np.float32)
    wide = np.float64(x)
    y = (wide - wide.mean()) / wide.std()
    exact = (g - g.mean() - y * (g * y).mean()) / wide.std()
    for norm in (
        lambda x: instance_norm(x, eps=0.0),
        lambda x: batch_norm(x, *batch_statistics(x)[:2], jnp.ones(1), jnp.zeros(1), 0.0),
    ):
        value, pull = jax.vjp(jax.jit(norm), jnp.asarray(x))
        np.testing.assert_allclose(value, y, atol=3e-7 * max(offset, 10))
        np.testing.assert_allclose(pull(jnp.asarray(g))[0], exact, atol=3e-7 * max(offset, 10))
        check_grads(jax.jit(norm), (jnp.asarray(x - offset),), 2, atol=0.05, rtol=0.05, eps=1e-2)


def test_groups_must_divide_the_channels():
    with pytest.raises(UserError, match="6 channels .* 4 groups"):
        group_norm(jnp.ones((1, 2, 6)), 4)


@pytest.mark.parametrize("shape", [(8, 5), (3, 3, 4, 6)])
def test_spectral_norm_brings_the_largest_singular_value_to_one(shape):
    module = SpectralNorm()
    kernel = 3 * jax.random.normal(jax.random.key(1), shape)
    variables = module.init(jax.random.key(0), kernel)
    step = jax.jit(lambda variables: module.apply(variables, kernel, train=True, mutable=["spectral_norm"]))
    for _ in range(20):
        normalized, variables = step(variables)
    largest = np.linalg.svd(np.asarray(normalized).reshape(-1, shape[-1]), compute_uv=False)[0]
    assert 1 - 1e-2 <= largest <= 1 + 1e-2
    frozen = module.apply(variables, kernel, train=False)  # Not mutable: a change would be an error.
    np.testing.assert_allclose(frozen, normalized, rtol=1e-6)


def test_kernels_of_zeros_stay_zeros_with_finite_gradients():
    kernel = jnp.zeros((4, 3))
    for norm in (
        lambda kernel: weight_norm(kernel, jnp.ones(3)),
        lambda kernel: spectral_norm(kernel, jnp.zeros(3), jnp.zeros(4)),
        lambda kernel: SpectralNorm().init_with_output(jax.random.key(0), kernel, train=True)[0],
    ):
        y, pull = jax.vjp(jax.jit(norm), kernel)
        assert not np.any(y) and np.isfinite(pull(jnp.ones_like(y))[0]).all()
