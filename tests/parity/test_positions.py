"""Positions equal those of transformers: Llama's rotations and their scalings, GPT-J's, T5's buckets, BLOOM's and MPT's ALiBi, Swin's table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis_profiles import few
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.swin.modeling_swin import SwinRelativePositionBias
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.vit_mae import modeling_vit_mae as vit_mae
from versus_torch import assert_same, normal, seeds, shapes, small

from jaxdl.nn import (
    WindowPositionBias,
    alibi_bias,
    alibi_slopes,
    ntk_frequencies,
    relative_buckets,
    rope,
    rotary_frequencies,
    sinusoidal,
    sinusoidal_2d,
    yarn_frequencies,
    yarn_magnitude,
)

HEAD = 16
SCALINGS = {
    "default": (dict(rope_type="default"), lambda length: (rotary_frequencies(HEAD), 1.0)),
    "base": (dict(rope_type="default", rope_theta=5e5), lambda length: (rotary_frequencies(HEAD, 5e5), 1.0)),
    "linear": (dict(rope_type="linear", factor=4.0), lambda length: (rotary_frequencies(HEAD) / 4, 1.0)),
    "dynamic": (
        dict(rope_type="dynamic", factor=2.0),
        lambda length: (ntk_frequencies(HEAD, 2.0, length=length, original_length=64), 1.0),
    ),
    "yarn": (
        dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64),
        lambda length: (yarn_frequencies(HEAD, 8.0, 64), yarn_magnitude(8.0)),
    ),
    "yarn of gpt-oss": (
        dict(rope_type="yarn", factor=32.0, rope_theta=150000.0, original_max_position_embeddings=4096, truncate=False),
        lambda length: (yarn_frequencies(HEAD, 32.0, 4096, 150000.0, truncate=False), yarn_magnitude(32.0)),
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
@few(2)
@given(batch=small, length=st.sampled_from([1, 9, 63, 150]), heads=small, seed=seeds)
def test_rope_of_llama(name, batch, length, heads, seed):
    parameters, scaling = SCALINGS[name]
    parameters = {"rope_theta": 10_000.0, **parameters}
    config = llama.LlamaConfig(
        hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=64, rope_parameters=parameters
    )
    rotary = llama.LlamaRotaryEmbedding(config)
    positions = np.arange(length)[None]
    frequencies, magnitude = scaling(length)

    def theirs(x):
        cos, sin = rotary(x, torch.tensor(positions))
        return llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]

    # Their frequencies are rounded once more often, and position 150 multiplies that; they have no float64.
    ours = lambda x: rope(x, jnp.asarray(positions), frequencies, magnitude=magnitude)
    tolerance = 1e-5 if length < 64 else 5e-5
    assert_same(ours, theirs, *normal(seed, (batch, length, heads, HEAD)), tolerance=tolerance, double=None)
    np.testing.assert_allclose(frequencies, rotary.inv_freq, rtol=1e-6)


@shapes
@given(batch=small, length=small, heads=small, pairs=small, rest=st.integers(0, 4), seed=seeds)
def test_rope_of_gptj_turns_neighbours_and_leaves_the_rest(batch, length, heads, pairs, rest, seed):
    def theirs(x):
        sin, cos = gptj.create_sinusoidal_positions(length, 2 * pairs).chunk(2, dim=-1)
        turned = gptj.apply_rotary_pos_emb(x[..., : 2 * pairs], sin[None], cos[None])
        return torch.cat([turned, x[..., 2 * pairs :]], dim=-1)

    assert_same(
        lambda x: rope(x, jnp.arange(length), rotary_frequencies(2 * pairs), interleaved=True),
        theirs,
        *normal(seed, (batch, length, heads, 2 * pairs + rest)),
        double=None,  # Their tables are in float32.
    )


@few(3)
@given(length=small, heads=small, pairs=small, rest=st.integers(0, 3), interleaved=st.booleans(), seed=seeds)
def test_rope_is_a_multiplication_of_complex_numbers(length, heads, pairs, rest, interleaved, seed):
    """Eq. 34 of the paper: with the pairs for real and imaginary parts, to the last digits."""
    angles = torch.arange(length).double()[:, None, None] * 10_000.0 ** (-torch.arange(pairs).double() / pairs)

    def theirs(x):
        turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        halves = turned.unflatten(-1, (pairs, 2)) if interleaved else turned.unflatten(-1, (2, pairs)).mT
        product = torch.view_as_real(torch.view_as_complex(halves.contiguous()) * torch.polar(torch.ones_like(angles), angles))
        return torch.cat([(product if interleaved else product.mT).flatten(-2).to(x.dtype), rest], -1)

    ours = lambda x: rope(x, jnp.arange(length)[None], rotary_frequencies(2 * pairs), interleaved=interleaved)
    assert_same(ours, theirs, *normal(seed, (2, length, heads, 2 * pairs + rest)))


def test_sinusoidal_positions_side_by_side_are_gptjs():
    np.testing.assert_allclose(
        sinusoidal(50, 12, interleaved=False), gptj.create_sinusoidal_positions(50, 12), rtol=1e-5, atol=1e-5
    )


def test_two_axes_are_those_of_hfs_mae_with_the_halves_exchanged():
    build = next(getattr(vit_mae, name) for name in dir(vit_mae) if "2d" in name and "sin" in name)
    row, column = np.split(build(3, 5, 16).numpy(), 2, axis=-1)
    np.testing.assert_allclose(sinusoidal_2d(3, 5, 16), np.concatenate([column, row], axis=-1), atol=1e-6)


@pytest.mark.parametrize("num_heads", [1, 3, 8, 12, 71])
def test_alibi_of_bloom_and_mpt(num_heads):
    length = 7
    bloom = build_alibi_tensor(torch.ones(1, length), num_heads, torch.float32).reshape(num_heads, length)
    slopes, bias = alibi_slopes(num_heads), np.asarray(alibi_bias(num_heads, length, length))
    np.testing.assert_allclose(slopes, bloom[:, 1], rtol=1e-6)
    # Theirs is a row for all queries. Ours is that row for the last query, and differs by a constant in the seen part of the others.
    mpt = build_mpt_alibi_tensor(num_heads, length).reshape(num_heads, length)
    np.testing.assert_allclose(bias[0, :, -1], mpt, rtol=1e-6)
    for query in range(length):
        seen = bias[0, :, query, : query + 1] - mpt[:, : query + 1].numpy()
        np.testing.assert_allclose(seen, np.broadcast_to(seen[:, :1], seen.shape), atol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 20), (16, 100), (320, 800)])
def test_buckets_of_t5(num_buckets, max_distance, bidirectional):
    distances = np.arange(-1500, 1501)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distances), bidirectional, num_buckets, max_distance)
    ours = relative_buckets(jnp.asarray(distances), num_buckets, max_distance, bidirectional=bidirectional)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (4, 4)])
def test_bias_of_swin(window):
    height, width = window
    theirs = SwinRelativePositionBias(3, window)
    shape = ((2 * height - 1) * (2 * width - 1), 3)
    assert_same(
        lambda table: WindowPositionBias(3, window).apply({"params": {"table": table}}),
        lambda table: torch.func.functional_call(theirs, {"relative_position_bias_table": table}, ()),
        *normal(0, shape),
    )
    assert WindowPositionBias(3, window).init(jax.random.key(0))["params"]["table"].shape == shape
