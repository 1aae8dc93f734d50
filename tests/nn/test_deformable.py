"""What holds for deformable convolutions without another library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.nn import DeformableConv, convolve, deformable_convolve, sample_bilinear


@pytest.fixture
def case():
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((2, 7, 6, 4), (3, 3, 4, 5))]


@pytest.mark.parametrize("stride, padding, dilation", [(1, "SAME", 1), (2, "SAME", 1), (1, 2, 2), (2, (0, (1, 2)), 1)])
def test_offsets_of_zero_are_a_convolution(case, stride, padding, dilation):
    x, kernel = case
    named = dict(stride=stride, padding=padding, dilation=dilation)
    want = convolve(x, kernel, **named)
    got = deformable_convolve(x, jnp.zeros((*want.shape[:3], 18)), kernel, **named)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("down, right", [(1, 0), (0, -2), (-3, 2)])
def test_whole_offsets_are_a_shifted_convolution(case, down, right):
    x, kernel = case
    offsets = jnp.broadcast_to(jnp.asarray([down, right] * 9, jnp.float32), (2, 7, 6, 18))
    padded = jnp.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    want = convolve(padded, kernel)[:, 4 + down : 11 + down, 4 + right : 10 + right]
    np.testing.assert_allclose(deformable_convolve(x, offsets, kernel), want, atol=1e-5)


def test_the_image_fades_to_zero_over_one_pixel_and_is_not_continued():
    image = jnp.ones((3, 4, 1))
    rows = jnp.asarray([0.0, -0.25, -1.0, -7.0, 2.0, 2.75, 3.0, np.nextafter(np.float32(3), 0), 1e9, -1e9])
    got = sample_bilinear(image, rows, jnp.ones(10))[:, 0]
    np.testing.assert_allclose(got, [1, 0.75, 0, 0, 1, 0.25, 0, 0, 0, 0], atol=1e-6)


def test_offsets_of_any_size_have_finite_gradients(case):
    x, kernel = case
    random = np.random.default_rng(1)
    for scale in (0.0, 1e4, 1e30):
        offsets = jnp.asarray(scale * random.standard_normal((2, 7, 6, 18)), jnp.float32)
        y, pull = jax.vjp(jax.jit(deformable_convolve), 1e4 * x, offsets, kernel)
        assert jnp.isfinite(y).all() and all(jnp.isfinite(part).all() for part in pull(jnp.ones_like(y)))


def test_nan_in_the_offsets_is_seen(case):
    x, kernel = case
    offsets = jnp.zeros((2, 7, 6, 18)).at[0, 3, 3, 4].set(jnp.nan)
    assert jnp.isnan(deformable_convolve(x, offsets, kernel)[0, 3, 3]).all()


def test_the_module_starts_as_half_a_convolution_and_version_one_as_a_whole(case):
    x, _ = case
    for modulated, part in ((True, 0.5), (False, 1.0)):
        module = DeformableConv(5, modulated=modulated, offset_groups=2)
        y, variables = module.init_with_output(jax.random.key(0), x)
        assert not variables["params"]["offsets"]["kernel"].any()
        np.testing.assert_allclose(y, part * convolve(x, variables["params"]["kernel"]), atol=1e-5)
        moved = jax.jit(jax.grad(lambda params: jnp.square(module.apply({"params": params}, x)).sum()))(variables["params"])
        assert jnp.abs(moved["offsets"]["kernel"]).max() > 1e-3  # It can leave the start.


def test_under_vmap_remat_and_in_bfloat16(case):
    x, kernel = case
    offsets = 0.7 * jnp.ones((2, 7, 6, 18))
    want = deformable_convolve(x, offsets, kernel)
    single = jax.vmap(lambda x, offsets: jax.checkpoint(deformable_convolve)(x[None], offsets[None], kernel)[0])
    np.testing.assert_allclose(single(x, offsets), want, atol=1e-5)
    rough = deformable_convolve(x.astype(jnp.bfloat16), offsets, kernel)
    assert rough.dtype == jnp.bfloat16 and jnp.abs(rough - want).max() < 0.03 * jnp.abs(want).max()


@pytest.mark.parametrize(
    "offsets, modulation, message",
    [((2, 7, 6, 20), None, "20 channels of offsets"), ((2, 6, 6, 18), None, "7, 6"), ((2, 7, 6, 18), (2, 7, 6, 18), "needs 9")],
)
def test_channels_that_do_not_fit_are_refused(case, offsets, modulation, message):
    x, kernel = case
    with pytest.raises(UserError, match=message):
        deformable_convolve(x, jnp.zeros(offsets), kernel, None if modulation is None else jnp.zeros(modulation))
