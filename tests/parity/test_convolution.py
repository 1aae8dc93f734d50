"""The convolutions equal torch's, in value and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from hypothesis_profiles import few
from versus_torch import assert_same, normal, seeds, shapes, small

from jaxdl.nn import Conv, ConvTranspose, MaskedConv, SeparableConv, convolve, convolve_transposed, unfold

F = torch.nn.functional
METHODS = ["fastest", "taps", "unfold", "lax"]
NAMES = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def theirs(x, kernel, *arguments, **named):
    """Torch's convolution of channels-last arrays and HWIO kernels."""
    rank = x.ndim - 2
    call = NAMES[rank]
    return call(x.movedim(-1, 1), kernel.movedim(-1, 0).movedim(-1, 1), *arguments, **named).movedim(1, -1)


def theirs_transposed(x, kernel, stride, padding, output_padding, groups, dilation):
    *window, inputs, outputs = kernel.shape
    split = kernel.reshape(*window, inputs, groups, outputs // groups)
    weight = split.permute(3, 2, 4, 0, 1).reshape(groups * inputs, outputs // groups, *window)
    y = F.conv_transpose2d(x.movedim(-1, 1), weight, None, stride, padding, output_padding, groups, dilation)
    return y.movedim(1, -1)


@pytest.mark.parametrize("method", METHODS)
@shapes
@given(
    size=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 3]),
    width=st.sampled_from([1, 2]),
    seed=seeds,
)
def test_three_ways_over_stride_padding_dilation_and_groups(method, size, stride, padding, dilation, groups, width, seed):
    x, kernel = normal(seed, (2, 8, 9, groups * width), (size, size, width, groups * 2))
    assert_same(
        lambda x, kernel: convolve(x, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, method=method),
        lambda x, kernel: theirs(x, kernel, None, stride, padding, dilation, groups),
        x,
        kernel,
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_signals_and_volumes(rank):
    x, kernel = normal(rank, (2, *(6, 5, 7)[:rank], 3), (*(3, 2, 3)[:rank], 3, 4))
    assert_same(
        lambda x, kernel: convolve(x, kernel, stride=2, padding=1),
        lambda x, kernel: theirs(x, kernel, None, 2, 1),
        x,
        kernel,
    )


def test_patches_are_torchs_in_another_order():
    (x,) = normal(0, (2, 6, 5, 3))
    got = unfold(jnp.asarray(x), (3, 2), stride=2, padding=(1, (1, 1)))
    want = F.unfold(torch.tensor(x).movedim(-1, 1), (3, 2), 1, 1, 2).mT.reshape(*got.shape[:3], 3, 6)  # C · kh · kw
    np.testing.assert_array_equal(got.reshape(*got.shape[:3], 6, 3), want.mT)
    assert not np.array_equal(got, want.reshape(got.shape))


def test_same_padding_of_a_stride_is_not_torchs_padding():
    x, kernel = normal(0, (1, 8, 8, 2), (3, 3, 2, 4))
    ones = theirs(torch.tensor(x), torch.tensor(kernel), None, 2, 1)
    same = convolve(jnp.asarray(x), jnp.asarray(kernel), stride=2)
    assert same.shape == ones.shape and np.abs(np.asarray(same) - ones.numpy()).max() > 0.5
    shifted = theirs(F.pad(torch.tensor(x), (0, 0, 0, 1, 0, 1)), torch.tensor(kernel), None, 2)
    np.testing.assert_allclose(same, shifted, atol=1e-5)


@shapes
@given(
    size=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    more=st.integers(0, 2),
    dilation=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    seed=seeds,
)
def test_transposed_convolution(size, stride, padding, more, dilation, groups, seed):
    assume(more < max(stride, dilation) and 3 * stride - 2 * padding + dilation * (size - 1) + more >= 1)
    x, kernel = normal(seed, (2, 4, 5, groups * 2), (size, size, 2, groups * 3))
    assert_same(
        lambda x, kernel: convolve_transposed(
            x, kernel, stride=stride, padding=padding, output_padding=more, dilation=dilation, groups=groups
        ),
        lambda x, kernel: theirs_transposed(x, kernel, stride, padding, more, groups, dilation),
        x,
        kernel,
    )


def test_the_dcgan_kernel_of_four_is_same_and_torchs_padding_of_one():
    x, kernel = normal(0, (1, 4, 4, 3), (4, 4, 3, 2))
    same = convolve_transposed(jnp.asarray(x), jnp.asarray(kernel), stride=2)
    want = F.conv_transpose2d(torch.tensor(x).movedim(-1, 1), torch.tensor(kernel).permute(2, 3, 0, 1), None, 2, 1)
    np.testing.assert_allclose(same, want.movedim(1, -1), atol=1e-5)


@few(3)
@given(
    channels=small,
    multiplier=st.integers(1, 3),
    size=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    between=st.booleans(),
    seed=seeds,
)
def test_depthwise_separable(channels, multiplier, size, stride, dilation, between, seed):
    middle = channels * multiplier
    module = SeparableConv(5, size, stride, 2, dilation, multiplier, jax.nn.silu if between else None)

    def ours(x, depthwise, first, pointwise, last):
        # Without anything between, two biases in a row would be one.
        first = {"kernel": depthwise, "bias": first} if between else {"kernel": depthwise}
        return module.apply({"params": {"depthwise": first, "pointwise": {"kernel": pointwise, "bias": last}}}, x)

    def reference(x, depthwise, first, pointwise, last):
        y = theirs(x, depthwise, first if between else 0 * first, stride, 2, dilation, channels)
        return theirs(F.silu(y) if between else y, pointwise, last)

    kernels = (size, size, 1, middle), (middle,), (1, 1, middle, 5), (5,)
    assert_same(ours, reference, *normal(seed, (2, 6, 5, channels), *kernels))


@pytest.mark.parametrize("kind", ["A", "B"])
@few(2)
@given(colors=st.sampled_from([1, 3]), size=st.sampled_from([1, 3, 5]), stride=st.integers(1, 2), seed=seeds)
def test_masked_convolution(kind, colors, size, stride, seed):
    """PixelCNN's mask, place by place: all before the middle in raster order, and in the middle the colours before, or up to, one's own."""
    inputs, outputs = 2 * colors, 4 * colors
    mask = np.zeros((size, size, inputs, outputs), np.float32)
    for row, column, source, target in np.ndindex(mask.shape):
        place, middle = row * size + column, size * size // 2
        own, other = target * colors // outputs, source * colors // inputs
        mask[row, column, source, target] = place < middle or (
            place == middle and (other < own or (kind == "B" and other == own))
        )
    module = MaskedConv(outputs, size, stride, size // 2, kind=kind, colors=colors)
    assert_same(
        lambda x, kernel, bias: module.apply({"params": {"kernel": kernel, "bias": bias}}, x),
        lambda x, kernel, bias: theirs(x, kernel * torch.tensor(mask), bias, stride, size // 2),
        *normal(seed, (2, 6, 5, inputs), mask.shape, (outputs,)),
    )


@few(3)
@given(
    size=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    groups=st.sampled_from([1, 2]),
    use_bias=st.booleans(),
    seed=seeds,
)
def test_the_modules_add_their_biases(size, stride, padding, groups, use_bias, seed):
    x, kernel, bias = normal(seed, (2, 7, 6, groups * 2), (size, size, 2, groups * 3), (groups * 3,))
    options = dict(stride=stride, padding=padding, groups=groups, use_bias=use_bias)
    params = lambda kernel, bias: {"params": {"kernel": kernel, **({"bias": bias} if use_bias else {})}}
    for module, reference in (
        (Conv, lambda x, kernel: theirs(x, kernel, None, stride, padding, 1, groups)),
        (ConvTranspose, lambda x, kernel: theirs_transposed(x, kernel, stride, padding, 0, groups, 1)),
    ):
        assert_same(
            lambda x, kernel, bias: module(groups * 3, size, **options).apply(params(kernel, bias), x),
            lambda x, kernel, bias: reference(x, kernel) + (bias if use_bias else 0 * bias),
            *(x, kernel, bias),
        )
