"""The building blocks equal torch's, in value and gradient, for any shape."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from versus_torch import assert_same, normal, seeds, shapes, small

from jaxdl.nn import (
    AttentionPooling,
    EncoderBlock,
    FeedForward,
    LayerNorm,
    MultiHeadAttention,
    PatchEmbedding,
    layer_norm,
)

F = torch.nn.functional


def linear(kernel, bias) -> dict:
    return {"kernel": kernel, "bias": bias}


@shapes
@given(batch=small, length=small, width=st.integers(2, 33), eps=st.sampled_from([1e-6, 1e-5, 1e-2]), seed=seeds)
def test_layer_norm(batch, length, width, eps, seed):
    arrays = normal(seed, (batch, length, width), (width,), (width,))
    assert_same(
        lambda x, scale, bias: LayerNorm(eps).apply({"params": {"scale": scale, "bias": bias}}, x),
        lambda x, scale, bias: F.layer_norm(x, (width,), scale, bias, eps),
        *arrays,
        tolerance=1e-4,  # Two features may be nearly equal, and then a division by √eps multiplies the rounding.
    )


def test_layer_norm_survives_a_mean_far_above_the_deviation():
    x = 1000 + jnp.linspace(-1, 1, 64)
    wide = np.float64(x)
    exact = (wide - wide.mean()) / wide.std()
    np.testing.assert_allclose(layer_norm(x, jnp.ones(64), jnp.zeros(64), eps=0.0), exact, atol=1e-4)


@shapes
@given(batch=small, length=small, width=st.integers(1, 16), hidden=st.integers(1, 40), seed=seeds)
def test_feed_forward(batch, length, width, hidden, seed):
    arrays = normal(seed, (batch, length, width), (width, hidden), (hidden,), (hidden, width), (width,))
    assert_same(
        lambda x, w, b, v, c: FeedForward(hidden).apply({"params": {"expand": linear(w, b), "contract": linear(v, c)}}, x),
        lambda x, w, b, v, c: F.gelu(x @ w + b, approximate="tanh") @ v + c,
        *arrays,
        tolerance=1e-4,
    )


@shapes
@given(
    batch=small,
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    patch=small,
    channels=small,
    width=st.integers(1, 9),
    seed=seeds,
)
def test_patch_embedding_is_a_strided_convolution(batch, rows, columns, patch, channels, width, seed):
    arrays = normal(seed, (batch, rows * patch, columns * patch, channels), (patch * patch * channels, width), (width,))

    def convolve(images, kernel, bias):
        kernel = kernel.reshape(patch, patch, channels, width).permute(3, 2, 0, 1)
        return F.conv2d(images.movedim(-1, 1), kernel, bias, stride=patch).flatten(2).mT

    def embed(images, kernel, bias):
        return PatchEmbedding(patch, width).apply({"params": {"projection": linear(kernel, bias)}}, images)

    assert_same(embed, convolve, *arrays, tolerance=1e-4)


@pytest.mark.parametrize("masking", ["none", "mask", "padding", "causal"])
@settings(shapes, max_examples=3)
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

    assert_same(ours, theirs, *arrays, tolerance=1e-4)


def packed(layer) -> dict:
    """The parameters of a `torch.nn.MultiheadAttention` as ours."""
    parts = zip(("query", "key", "value"), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    rows = {name: linear(jnp.asarray(weight.T), jnp.asarray(bias)) for name, weight, bias in parts}
    return {**rows, "out": of(layer.out_proj)}


def of(layer) -> dict:
    """The parameters of a linear map or a normalisation as ours."""
    name, weight = ("kernel", layer.weight.T) if isinstance(layer, torch.nn.Linear) else ("scale", layer.weight)
    return {name: jnp.asarray(weight), "bias": jnp.asarray(layer.bias)}


def shaken(layer):
    """With no parameter left at zero or one."""
    for parameter in layer.parameters():
        parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
    return layer.eval()


@shapes
@given(batch=small, length=small, heads=st.integers(1, 3), head=st.integers(2, 5), hidden=st.integers(1, 20), seed=seeds)
def test_encoder_block_is_torchs_pre_norm_layer(batch, length, heads, head, hidden, seed):
    torch.manual_seed(seed)
    activation = torch.nn.GELU(approximate="tanh")
    options = dict(dropout=0.0, activation=activation, layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    layer = shaken(torch.nn.TransformerEncoderLayer(heads * head, heads, hidden, **options))
    params = {"attention_norm": of(layer.norm1), "attention": packed(layer.self_attn)}
    params |= {"feed_forward_norm": of(layer.norm2), "feed_forward": {"expand": of(layer.linear1), "contract": of(layer.linear2)}}
    (x,) = normal(seed, (batch, length, heads * head))
    assert_same(lambda x: EncoderBlock(heads, hidden).apply({"params": params}, x), layer, x, tolerance=1e-4)


@shapes
@given(batch=small, length=small, heads=st.integers(1, 3), head=st.integers(2, 5), hidden=st.integers(1, 20), seed=seeds)
def test_attention_pooling_is_torchs_attention_of_a_probe(batch, length, heads, head, hidden, seed):
    torch.manual_seed(seed)
    width = heads * head
    attention = shaken(torch.nn.MultiheadAttention(width, heads, batch_first=True))
    norm, expand, contract = (
        shaken(torch.nn.LayerNorm(width, eps=1e-6)),
        shaken(torch.nn.Linear(width, hidden)),
        shaken(torch.nn.Linear(hidden, width)),
    )
    feed_forward = {"expand": of(expand), "contract": of(contract)}
    params = {"attention": packed(attention), "norm": of(norm), "feed_forward": feed_forward}
    x, probe = normal(seed, (batch, length, width), (1, 1, width))

    def theirs(x, probe):
        y = attention(probe.expand(len(x), 1, width), x, x, need_weights=False)[0][:, 0]
        return y + contract(F.gelu(expand(norm(y)), approximate="tanh"))

    def ours(x, probe):
        return AttentionPooling(heads, hidden).apply({"params": {**params, "probe": probe}}, x)

    assert_same(ours, theirs, x, probe, tolerance=1e-4)
