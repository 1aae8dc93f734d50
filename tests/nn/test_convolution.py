"""What holds for convolutions and pooling without another library."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profiles import few

from jaxdl.errors import UserError
from jaxdl.nn import (
    Conv,
    ConvTranspose,
    MaskedConv,
    SeparableConv,
    average_pool,
    convolve,
    convolve_transposed,
    max_pool,
    raster_mask,
    unfold,
)

METHODS = ["fastest", "taps", "unfold", "lax"]
rng = np.random.default_rng(0)


def naive(x, kernel, stride, pads, dilation, groups):
    """A loop over every output and every place of the kernel, in float64."""
    x, kernel = np.float64(np.pad(x, ((0, 0), *pads, (0, 0)))), np.float64(kernel)
    kh, kw, width, outputs = kernel.shape
    rows, columns = ((n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[1:3], (kh, kw)))
    y = np.zeros((len(x), rows, columns, outputs))
    for b, r, c, o in np.ndindex(y.shape):
        first = o // (outputs // groups) * width
        for i, j, channel in np.ndindex(kh, kw, width):
            seen = x[b, r * stride + i * dilation, c * stride + j * dilation, first + channel]
            y[b, r, c, o] += seen * kernel[i, j, channel, o]
    return y


def random(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@few(4)
@given(
    height=st.integers(1, 6),
    size=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
@pytest.mark.parametrize("method", METHODS)
def test_every_way_is_the_loop_over_outputs(method, height, size, stride, dilation, groups):
    x, kernel = random(2, height, 5, 2 * groups), random(size, 2, 2, 4)
    pads = ((2, 1), (1, 2))
    got = (
        convolve(x, kernel, stride=stride, padding=pads, dilation=dilation, groups=groups, method=method)
        if (fits := height + 3 > dilation * (size - 1))
        else None
    )
    if fits:
        np.testing.assert_allclose(got, naive(x, kernel, stride, pads, dilation, groups), atol=1e-5)


@pytest.mark.parametrize("length, size, stride, dilation", [(8, 3, 2, 1), (7, 3, 2, 1), (5, 4, 1, 1), (9, 3, 4, 2), (4, 1, 3, 1)])
def test_same_padding_is_xlas(length, size, stride, dilation):
    x, kernel = random(1, length, 2), random(size, 2, 3)
    want = jax.lax.conv_general_dilated(
        x, kernel, (stride,), "SAME", rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )
    got = convolve(x, kernel, stride=stride, dilation=dilation, method="taps")
    assert got.shape == (1, -(-length // stride), 3)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.optimized
@pytest.mark.parametrize("width, size, groups", [(1, 3, 1), (1, 7, 1), (2, 1, 1), (3, 3, 1), (1, 3, 4), (2, 3, 2)])
def test_the_fastest_way_has_all_derivatives_forward_and_backward(width, size, groups):
    """In 64 bits, where what differs is the method: a penalty's gradient sums thousands of products of either sign."""

    def derivatives(method):
        def call(x, kernel):
            return convolve(x, kernel, stride=2, groups=groups, method=method)

        def penalty(x, kernel):  # A gradient of a gradient, as a gradient penalty has it.
            return jnp.square(jax.grad(lambda x: jnp.sin(call(x, kernel)).sum())(x)).sum()

        return jax.jit(
            lambda: (
                jax.jvp(call, (x, kernel), (dx, dkernel)),
                jax.jvp(lambda x: call(x, kernel), (x,), (dx,)),
                jax.grad(lambda kernel: jnp.sin(call(x, kernel)).sum())(kernel),
                jax.grad(penalty, (0, 1))(x, kernel),
            )
        )()

    with jax.enable_x64(True):
        shapes = 2 * [(2, 5, 6, width * groups), (size, size, width, 4)]
        x, kernel, dx, dkernel = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
        chex.assert_trees_all_close(derivatives("fastest"), derivatives("lax"), rtol=1e-10, atol=1e-10)


def test_elsewhere_than_on_a_cpu_it_is_xlas():
    # Depthwise, where a CPU takes the sum over taps.
    call = jax.jit(lambda x, kernel: convolve(x, kernel, groups=4))
    traced = call.trace(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4)))
    for platform, found in (("cpu", False), ("cuda", True), ("tpu", True)):
        assert ("convolution" in traced.lower(lowering_platforms=(platform,)).as_text()) is found


@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, ((0, 2), 1)])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (3, 2)])
def test_transposed_is_the_transpose(padding, stride, dilation):
    kernel, y = random(3, 3, 4, 2), None
    x = random(2, 6 * stride, 6 * stride, 4)
    y = convolve(x, kernel, stride=stride, padding=padding, dilation=dilation)
    back = random(*y.shape)
    turned = kernel.swapaxes(-1, -2)
    plain = convolve_transposed(back, turned, stride=stride, padding=padding, dilation=dilation)
    more = tuple(n - m for n, m in zip(x.shape[1:3], plain.shape[1:3]))
    if padding != "SAME":
        plain = convolve_transposed(back, turned, stride=stride, padding=padding, dilation=dilation, output_padding=more)
    assert plain.shape == x.shape
    np.testing.assert_allclose((plain * x).sum(), (back * y).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size, stride", [(4, 2), (3, 2), (2, 3), (5, 1)])
def test_transposed_same_is_flaxs_with_its_kernel_transposed(size, stride):
    x, kernel = random(2, 4, 5, 3), random(size, size, 3, 2)
    want = jax.lax.conv_transpose(x, kernel.swapaxes(-1, -2), (stride, stride), "SAME", transpose_kernel=True)
    np.testing.assert_allclose(convolve_transposed(x, kernel, stride=stride), want, atol=1e-5)


@pytest.mark.parametrize("dilations, reach", [((1, 1, 1), 7), ((1, 2, 4), 15), ((2, 2, 2), 13)])
def test_the_receptive_field_of_dilated_layers(dilations, reach):
    # Yu and Koltun 2016: with 1, 2, 4 it grows exponentially and has no holes; with 2, 2, 2 every other place is one.
    def layers(x):
        for dilation in dilations:
            x = convolve(x, jnp.ones((3, 1, 1)), dilation=dilation)
        return x[0, 16, 0]

    seen = np.flatnonzero(jax.grad(layers)(jnp.ones((1, 33, 1)))[0, :, 0])
    assert seen[-1] - seen[0] + 1 == reach
    assert (np.diff(seen) == (2 if dilations == (2, 2, 2) else 1)).all()


def test_outputs_of_a_depthwise_convolution_are_channel_by_channel():
    x, kernel = random(1, 4, 4, 3), random(3, 3, 1, 6)
    y = convolve(x, kernel, groups=3)
    for channel, j in itertools.product(range(3), range(2)):
        alone = convolve(x[..., channel : channel + 1], kernel[..., channel * 2 + j : channel * 2 + j + 1])
        np.testing.assert_allclose(y[..., channel * 2 + j], alone[..., 0], atol=1e-5)


def jacobian(kinds, colors, features):
    layers = [MaskedConv(width, 3, kind=kind, colors=colors) for kind, width in zip(kinds, features)]
    x = random(1, 4, 5, colors)
    variables, y = [], x
    for layer in layers:
        y, found = layer.init_with_output(jax.random.key(len(variables)), y)
        variables.append(found)

    def network(x):
        for layer, found in zip(layers, variables):
            x = jnp.tanh(layer.apply(found, x))
        return x

    return np.asarray(jax.jit(jax.jacrev(network))(x)).reshape(20, features[-1], 20, colors)


@pytest.mark.parametrize("colors", [1, 3])
def test_a_masked_network_sees_only_what_comes_before(colors):
    found = jacobian("ABB", colors, (2 * colors, 2 * colors, colors))
    order = np.arange(20)[:, None] * colors + np.arange(colors)
    earlier = order[None, None] < order[..., None, None]
    assert not found[~np.broadcast_to(earlier, found.shape)].any()
    # It does see its left neighbour and, within the pixel, the colours before.
    assert found[7, :, 6, :].all() and (colors == 1 or (found[7, 1, 7, 0] and found[7, 2, 7, 1]))


def test_kind_b_adds_the_pixel_itself_and_nothing_else():
    a, b = (np.asarray(raster_mask((3, 5), 3, 6, kind, 3)) for kind in "AB")
    changed = np.argwhere(a != b)
    assert {tuple(place) for place in changed[:, :2]} == {(1, 2)}
    assert {(i, o) for i, o in changed[:, 2:]} == {(i, 2 * i + j) for i in range(3) for j in range(2)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_inputs_have_finite_values_and_gradients(dtype):
    kernels = [random(3, 3, 2, 4), random(1, 1, 2, 4), random(3, 3, 1, 4)]

    @jax.jit
    @jax.vmap
    def all_of(value):
        x = jnp.full((1, 3, 1, 2), value)
        calls = [
            lambda x: convolve(x, kernels[0]),
            lambda x: convolve(x, kernels[1]),
            lambda x: convolve(x, kernels[2], groups=2),
            lambda x: convolve_transposed(x, kernels[0], stride=2),
            lambda x: max_pool(x, (3, 1)),
            lambda x: average_pool(x, 3, stride=1, padding="SAME", count_padding=False),
        ]
        return [(y, pull(jnp.ones_like(y))[0]) for y, pull in (jax.vjp(call, x) for call in calls)]

    for y, gradient in all_of(jnp.asarray([0, 1e4, -1e4], dtype)):
        assert y.dtype == gradient.dtype == dtype and np.isfinite(y).all() and np.isfinite(gradient).all()


def test_modules_start_as_flaxs_and_run_under_remat_and_vmap():
    x = random(3, 8, 8, 4)
    theirs = linen.Conv(6, (3, 3), strides=2, feature_group_count=2)
    ours = Conv(6, 3, stride=2, groups=2)
    variables = theirs.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), variables)
    want = theirs.apply(variables, x)
    got = jax.vmap(lambda x: jax.checkpoint(ours.apply)(variables, x[None])[0])(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert Conv(6, 3, dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)[0].dtype == jnp.bfloat16
    assert ConvTranspose(2, 4, stride=2).init_with_output(jax.random.key(0), x)[0].shape == (3, 16, 16, 2)
    _, found = SeparableConv(6, 3, between=jax.nn.relu).init_with_output(jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) == 9 * 4 + 4 + 4 * 6 + 6


def test_numpys_integers_are_numbers_too():
    x, two, one = random(1, 6, 6, 2), np.int64(2), np.int32(1)
    kernel = random(2, 2, 2, 3)
    same = lambda got, want: np.testing.assert_array_equal(got, want)
    same(convolve(x, kernel, stride=two, padding=one), convolve(x, kernel, stride=2, padding=1))
    same(
        convolve(x, kernel, dilation=(one, two), padding=((one, 0), one)),
        convolve(x, kernel, dilation=(1, 2), padding=((1, 0), 1)),
    )
    same(convolve_transposed(x, kernel, stride=two), convolve_transposed(x, kernel, stride=2))
    same(max_pool(x, two, stride=one), max_pool(x, 2, stride=1))
    params = {"params": {"kernel": kernel, "bias": jnp.ones(3)}}
    same(Conv(3, two, two).apply(params, x), Conv(3, 2, 2).apply(params, x))


def test_a_kernel_longer_than_the_image_is_the_same_by_every_method():
    """Where "fastest" unfolds on a CPU, as XLA's own way would be slow."""
    x, kernel = random(2, 4, 9, 3), random(5, 5, 3, 2)
    for method in METHODS:
        module = Conv(2, 5, use_bias=False, method=method)
        y = module.apply({"params": {"kernel": kernel}}, x)
        np.testing.assert_allclose(y, naive(x, kernel, 1, ((2, 2), (2, 2)), 1, 1), atol=1e-4)


def test_modules_compute_by_the_method_they_are_given():
    operations = {}
    for method in METHODS:
        compute = lambda x, kernel: Conv(2, 3, use_bias=False, method=method).apply({"params": {"kernel": kernel}}, x)
        operations[method] = str(jax.make_jaxpr(compute)(random(2, 8, 8, 3), random(3, 3, 3, 2)))
    assert "conv_general_dilated" in operations["lax"] and "conv_general_dilated" not in operations["unfold"]
    assert operations["taps"].count("dot_general") == 9 and operations["unfold"].count("dot_general") == 1


def test_pooling_is_the_loop_over_windows():
    x = random(2, 7, 6, 3)
    found = [
        max_pool(x, (3, 2), stride=(2, 2), padding=(1, 0)),
        average_pool(x, 3, stride=2, padding="SAME", count_padding=False),
    ]
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=-np.inf)
    for r, c in np.ndindex(found[0].shape[1:3]):
        np.testing.assert_array_equal(found[0][:, r, c], padded[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 2].max((1, 2)))
    for r, c in np.ndindex(found[1].shape[1:3]):  # SAME pads 1, 1 rows and 0, 1 columns.
        window = np.asarray(x)[:, max(2 * r - 1, 0) : 2 * r + 2, 2 * c : 2 * c + 3]
        np.testing.assert_allclose(found[1][:, r, c], window.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: convolve(x, jnp.ones((3, 3, 2, 4)), groups=4), "8 channels in 4 groups|6 channels in 4 groups"),
        (lambda x: convolve(x, jnp.ones((3, 3, 3, 5)), groups=2), "must divide"),
        (lambda x: convolve(x, jnp.ones((3, 3, 6, 4)), padding="same"), "no padding 'same'"),
        (lambda x: convolve(x, jnp.ones((3, 3, 6, 4)), padding=-1), "padding -1"),
        (lambda x: convolve(x, jnp.ones((3, 3, 6, 4)), padding=(1, 1, 1)), "2 spatial axes"),
        (lambda x: convolve(x, jnp.ones((9, 9, 6, 4)), padding="VALID"), "does not fit into"),
        (lambda x: convolve(x, jnp.ones((3, 6, 4))), "1 spatial axes cannot slide over 2"),
        (lambda x: convolve(x, jnp.ones((3, 3, 6, 4)), stride=0), "stride 0"),
        (lambda x: convolve_transposed(x, jnp.ones((3, 3, 6, 4)), stride=2, padding=1, output_padding=2), "output_padding 2"),
        (lambda x: Conv(4, 3, groups=4).init(jax.random.key(0), x), "6 channels and 4 features"),
        (lambda x: MaskedConv(4, 4).init(jax.random.key(0), x), "has no middle"),
        (lambda x: MaskedConv(4, 3, colors=3).init(jax.random.key(0), x), "3 groups"),
        (
            lambda x: convolve_transposed(x, jnp.ones((3, 3, 6, 4)), stride=2, output_padding=1),
            "output_padding 1 with padding 'SAME'",
        ),
        (lambda x: Conv(4, 3).init(jax.random.key(0), x[0, 0]), "no spatial axis"),
        (lambda x: Conv(4, (3, 3)).init(jax.random.key(0), x[0]), "does not fit 1 spatial axes"),
        (lambda x: max_pool(x[0, 0], 2), "no spatial axis"),
        (lambda x: max_pool(x, 2, padding=2), "nothing but padding"),
        (lambda x: unfold(x, (3, 3, 3)), "kernel size"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(jnp.ones((1, 5, 5, 6)))
