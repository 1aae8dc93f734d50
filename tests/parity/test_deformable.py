"""Deformable convolution equals a gather written in torch, position by position, in value and in every gradient."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from hypothesis_profiles import few
from versus_torch import assert_same, normal, seeds, shapes

from jaxdl.nn import DeformableConv, deformable_convolve


def oracle(x, offsets, kernel, mask, stride, padding, dilation, groups):
    """NCHW, as `torchvision.ops.deform_conv2d`: a loop over taps, and four indexed reads for each."""
    outputs, width, kh, kw = kernel.shape
    batch, channels, height, long = x.shape
    rows, columns = offsets.shape[-2:]
    parts = offsets.shape[1] // (2 * kh * kw)
    offsets = offsets.reshape(batch, parts, kh, kw, 2, rows, columns)
    mask = mask.reshape(batch, parts, kh, kw, rows, columns)
    pieces = x.reshape(batch, parts, channels // parts, height, long)
    b = torch.arange(batch)[:, None, None, None]
    g = torch.arange(parts)[None, :, None, None]
    seen = []
    for i in range(kh):
        for j in range(kw):
            y = offsets[:, :, i, j, 0] + (torch.arange(rows) * stride - padding + i * dilation)[:, None]
            z = offsets[:, :, i, j, 1] + (torch.arange(columns) * stride - padding + j * dilation)
            total = 0
            for r in (y.detach().floor(), y.detach().floor() + 1):
                for c in (z.detach().floor(), z.detach().floor() + 1):
                    inside = (r >= 0) & (r < height) & (c >= 0) & (c < long)
                    value = pieces[b, g, :, r.clamp(0, height - 1).long(), c.clamp(0, long - 1).long()]
                    weight = (1 - (y - r).abs()) * (1 - (z - c).abs()) * inside * mask[:, :, i, j]
                    total = total + weight[..., None] * value
            seen.append(total.movedim(-1, 2).reshape(batch, channels, rows, columns))
    seen = torch.stack(seen, 2).reshape(batch, groups, width, kh * kw, rows, columns)
    split = kernel.reshape(groups, outputs // groups, width, kh * kw)
    return torch.einsum("bgitrc,goit->bgorc", seen, split).reshape(batch, outputs, rows, columns)


geometries = dict(
    stride=st.integers(1, 2), padding=st.integers(0, 2), dilation=st.integers(1, 2), groups=st.sampled_from([1, 2]), seed=seeds
)


def case(stride, padding, dilation, groups, parts, seed):
    rows, columns = ((n + 2 * padding - dilation * 2 - 1 - extra) // stride + 1 for n, extra in ((6, 0), (7, -dilation)))
    x, offsets, kernel, mask = normal(
        seed, (2, 6, 7, 4), (2, rows, columns, parts * 12), (3, 2, 4 // groups, 6), (2, rows, columns, parts * 6)
    )
    named = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)

    def theirs(x, offsets, kernel, mask):
        tensors = (x.movedim(-1, 1), offsets.movedim(-1, 1), kernel.permute(3, 2, 0, 1), mask.movedim(-1, 1))
        return oracle(*tensors, stride, padding, dilation, groups).movedim(1, -1)

    # Wide offsets: a third of the reads are outside of the image.
    return lambda *arrays: deformable_convolve(*arrays, **named), theirs, [x, 2 * offsets, kernel, mask]


@shapes
@given(parts=st.sampled_from([1, 2]), **geometries)
def test_values_and_the_gradients_of_input_offsets_kernel_and_modulation(parts, stride, padding, dilation, groups, seed):
    ours, theirs, arrays = case(stride, padding, dilation, groups, parts, seed)
    assert_same(ours, theirs, *arrays)


@few(2)
@given(modulated=st.booleans(), parts=st.sampled_from([1, 2]), **geometries)
def test_the_module_reads_offsets_and_modulations_from_one_convolution(modulated, parts, stride, padding, dilation, groups, seed):
    taps, channels = 6 * parts, (3 if modulated else 2) * 6 * parts
    module = DeformableConv(6, (3, 2), stride, padding, dilation, groups, parts, modulated)
    arrays = normal(seed, (2, 6, 7, 4), (3, 2, 4, channels), (channels,), (3, 2, 4 // groups, 6), (6,))

    def ours(x, predictor, predicted, kernel, bias):
        params = {"offsets": {"kernel": predictor, "bias": predicted}, "kernel": kernel, "bias": bias}
        return module.apply({"params": params}, x)

    def theirs(x, predictor, predicted, kernel, bias):
        x = x.movedim(-1, 1)
        found = torch.nn.functional.conv2d(x, predictor.permute(3, 2, 0, 1), predicted, stride, padding, dilation)
        offsets, mask = found.split([2 * taps, channels - 2 * taps], 1)
        mask = mask.sigmoid() if modulated else torch.ones_like(offsets[:, :taps])
        y = oracle(x, offsets, kernel.permute(3, 2, 0, 1), mask, stride, padding, dilation, groups)
        return y.movedim(1, -1) + bias

    # The predictor is small: offsets of about a pixel.
    x, predictor, *rest = arrays
    assert_same(ours, theirs, x, 0.2 * predictor, *rest)
