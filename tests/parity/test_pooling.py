"""Pooling equals torch's, ties included."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from versus_torch import assert_same, normal, seeds, shapes

from jaxdl.nn import average_pool, max_pool

F = torch.nn.functional
geometries = dict(window=st.integers(2, 4), stride=st.integers(1, 4), padding=st.integers(0, 1), seed=seeds)


@shapes
@given(**geometries, levels=st.sampled_from([2, 1000]))
def test_max_pool_and_which_of_equals_has_the_gradient(window, stride, padding, levels, seed):
    (x,) = normal(seed, (2, 9, 8, 3))
    x = np.round(x * levels) / levels  # With two levels nearly every window has a tie.
    assert_same(
        lambda x: max_pool(x, window, stride=stride, padding=padding),
        lambda x: F.max_pool2d(x.movedim(-1, 1), window, stride, padding).movedim(1, -1),
        x,
    )


@shapes
@given(**geometries, counted=st.booleans())
def test_average_pool(window, stride, padding, counted, seed):
    assert_same(
        lambda x: average_pool(x, window, stride=stride, padding=padding, count_padding=counted),
        lambda x: F.avg_pool2d(x.movedim(-1, 1), window, stride, padding, count_include_pad=counted).movedim(1, -1),
        *normal(seed, (2, 9, 8, 3)),
    )


def test_nan_is_the_largest():
    x = normal(0, (1, 4, 4, 2))[0]
    x[0, 1, 0, 0] = np.nan
    want = F.max_pool2d(torch.tensor(x).movedim(-1, 1), 2).movedim(1, -1)
    np.testing.assert_array_equal(max_pool(jnp.asarray(x), 2), want)


def test_signals():
    assert_same(lambda x: max_pool(x, 3, stride=2, padding=1), lambda x: F.max_pool1d(x.mT, 3, 2, 1).mT, *normal(0, (2, 7, 3)))
