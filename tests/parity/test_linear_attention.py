"""Linear attention equals the formula in torch, and FAVOR+ with the same projection equals performer-pytorch."""

import functools

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from versus_torch import assert_same, normal, seeds, shapes

from jaxdl.nn import linear_attention, positive_features


@shapes
@given(batch=st.integers(1, 3), length=st.integers(1, 40), heads=st.integers(1, 3), causal=st.booleans(), seed=seeds)
def test_elu_plus_one_as_cumulative_sums(batch, length, heads, causal, seed):
    def theirs(query, key, value):
        # Eq. 9 to 12 of the paper: S and Z are sums over the keys up to the query's.
        query, key = (torch.nn.functional.elu(x) + 1 for x in (query, key))
        products = torch.einsum("bsnh,bsnv->bsnhv", key, value)
        states, normalizers = (x.cumsum(1) if causal else x.sum(1, keepdim=True).expand_as(x) for x in (products, key))
        return torch.einsum("btnh,btnhv->btnv", query, states) / torch.einsum("btnh,btnh->btn", query, normalizers)[..., None]

    arrays = normal(seed, (batch, length, heads, 4), (batch, length, heads, 4), (batch, length, heads, 3))
    assert_same(functools.partial(linear_attention, is_causal=causal, chunk=16), theirs, *arrays)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("features", [20, 64])
def test_favor_with_the_projection_of_performer_pytorch(monkeypatch, causal, features):
    performer = pytest.importorskip("performer_pytorch.performer_pytorch")
    # Their eps is relative to another number than ours, and changes what is estimated: without it both are the same.
    monkeypatch.setattr(performer, "softmax_kernel", functools.partial(performer.softmax_kernel, eps=0))
    torch.manual_seed(0)
    theirs = performer.FastAttention(16, nb_features=features, causal=causal)
    if causal:
        theirs.causal_linear_fn = functools.partial(performer.causal_linear_attention_noncuda, eps=0)
    projection = jnp.asarray(theirs.projection_matrix.numpy())
    feature_map = functools.partial(positive_features, projection=projection, eps=0.0)
    assert_same(
        functools.partial(linear_attention, is_causal=causal, feature_map=feature_map, scale=16**-0.5, chunk=8),
        # They have `B N T H`.
        lambda *arrays: theirs(*(x.transpose(1, 2) for x in arrays)).transpose(1, 2),
        *normal(0, (2, 30, 3, 16), (2, 30, 3, 16), (2, 30, 3, 16)),
    )
