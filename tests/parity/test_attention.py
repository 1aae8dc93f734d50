"""Attention equals torch's, in value and gradient, for any shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profiles import few

torch = pytest.importorskip("torch")

from versus_torch import assert_same, normal, seeds, small

from jaxdl.nn import MultiHeadAttention, causal_mask, dot_product_attention, padding_mask
from jaxdl.weights import Table, convert, packed_attention

F = torch.nn.functional


@pytest.mark.parametrize("how", ["plain", "mask", "causal", "bias", "scale"])
@few(3)
@given(batch=small, queries=small, keys=small, groups=st.integers(1, 3), shared=st.integers(1, 3), width=small, seed=seeds)
def test_dot_product_attention_with_shared_keys(how, batch, queries, keys, groups, shared, width, seed):
    heads = groups * shared
    mask = np.random.default_rng(seed).random((batch, 1, queries, keys)) < 0.6
    mask[..., 0] = True  # Torch gives NaN, or the mean, to a query that sees nothing.
    ours, theirs = {
        "mask": (dict(mask=jnp.asarray(mask)), dict(attn_mask=torch.tensor(mask))),
        "causal": (dict(is_causal=True), dict(is_causal=True)),
        "scale": (dict(scale=0.7), dict(scale=0.7)),
    }.get(how, ({}, {}))

    def expected(query, key, value, *bias):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        options = dict(attn_mask=bias[0]) if bias else theirs
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options).transpose(1, 2)

    arrays = normal(seed, (batch, queries, heads, width), (batch, keys, groups, width), (batch, keys, groups, width))
    arrays += normal(seed + 1, (batch, heads, queries, keys)) if how == "bias" else []
    assert_same(lambda *arrays: dot_product_attention(*arrays, **ours), expected, *arrays)


def test_half_precision_is_as_near_to_the_truth_as_torchs():
    arrays = normal(0, (2, 33, 4, 16), (2, 33, 2, 16), (2, 33, 2, 16))

    def theirs(dtype):
        query, key, value = (torch.tensor(x, dtype=torch.bfloat16).to(dtype).transpose(1, 2) for x in arrays)
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).double().numpy()

    ours = np.float64(jax.jit(dot_product_attention)(*(jnp.asarray(x, jnp.bfloat16) for x in arrays)).astype(jnp.float32))
    truth = theirs(torch.float64)
    assert np.abs(ours - truth).mean() <= 1.2 * np.abs(theirs(torch.bfloat16) - truth).mean()


def linear(kernel, bias) -> dict:
    return {"kernel": kernel, "bias": bias}


@pytest.mark.parametrize("masking", ["none", "mask", "padding", "causal"])
@few(3)
@given(batch=small, queries=small, keys=small, heads=st.integers(1, 4), head=small, other=st.integers(1, 9), seed=seeds)
def test_multi_head_attention(masking, batch, queries, keys, heads, head, other, seed):
    width = heads * head
    keys = queries if masking == "causal" else keys
    random = np.random.default_rng(seed)
    mask = {
        "none": np.ones((1, 1, queries, keys), bool),
        "mask": random.random((batch, heads, queries, keys)) < 0.6,
        "padding": np.arange(keys) < random.integers(1, keys, size=(batch, 1, 1, 1), endpoint=True),
        "causal": np.tril(np.ones((1, 1, queries, keys), bool)),
    }[masking]
    mask[..., 0] = True  # Every query sees something.
    full = torch.tensor(~np.broadcast_to(mask, (batch, heads, queries, keys))).flatten(0, 1)
    arrays = normal(seed, (batch, queries, width), (batch, keys, other))
    arrays += normal(seed + 1, (width, width), (other, width), (other, width), (width, width), *[(width,)] * 4)

    def ours(x, y, q, k, v, o, *biases):
        names = ("query", "key", "value", "out")
        params = {name: linear(kernel, bias) for name, kernel, bias in zip(names, (q, k, v, o), biases, strict=True)}
        how = dict(is_causal=True) if masking == "causal" else dict(mask=None if masking == "none" else jnp.asarray(mask))
        return MultiHeadAttention(heads).apply({"params": params}, x, y, **how)

    def theirs(x, y, q, k, v, o, *biases):
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        packed = dict(use_separate_proj_weight=True, q_proj_weight=q.T, k_proj_weight=k.T, v_proj_weight=v.T, attn_mask=full)
        options = (width, heads, None, torch.cat(biases[:3]), None, None, False, 0.0, o.T, biases[3])
        return F.multi_head_attention_forward(x, y, y, *options, **packed)[0].transpose(0, 1)

    # The keys' bias moves all logits of a query alike: its gradient is zero but for what rounding leaves of larger numbers.
    assert_same(ours, theirs, *arrays, scale=4.0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_packed_module_and_its_opposite_masks(is_causal):
    """Torch keeps query, key and value in one matrix, and its `key_padding_mask` and `attn_mask` are true where nobody looks."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    torch.nn.init.normal_(layer.in_proj_bias)
    module, (x,) = MultiHeadAttention(3), normal(0, (2, 5, 12))
    valid = np.array([[True] * 5, [True, True, True, False, False]])

    y = torch.tensor(x)
    theirs_mask = ~torch.tensor(np.array(causal_mask(5)[0, 0])) if is_causal else None
    expected, _ = layer(y, y, y, key_padding_mask=~torch.tensor(valid), attn_mask=theirs_mask)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)

    table = Table(packed_attention("attention", "attention"))
    shapes = jax.eval_shape(lambda: {"attention": module.init(jax.random.key(0), jnp.asarray(x))["params"]})
    read = lambda tensors: convert({f"attention.{name}": tensor.numpy() for name, tensor in tensors.items()}, table, shapes)
    params = read(layer.state_dict())["attention"]

    def apply(params, mask):
        return module.apply({"params": params}, jnp.asarray(x), mask=padding_mask(jnp.asarray(mask)), is_causal=is_causal)

    got, pull = jax.vjp(lambda params: apply(params, valid), params)
    np.testing.assert_allclose(got, expected.detach(), atol=1e-5)
    assert not np.allclose(apply(params, ~valid), expected.detach(), atol=1e-2)
    (gradients,) = pull(jnp.asarray(cotangent.numpy()))
    # What maps weights maps gradients too. Ours of the key bias are zero but for rounding, as theirs.
    wanted = read({name: parameter.grad for name, parameter in layer.named_parameters()})["attention"]
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5), gradients, wanted)
