"""The two decoding forms of latent attention equal the pass over the whole, whatever the padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profiles import few

from jaxdl.errors import UserError
from jaxdl.nn import (
    LatentAttention,
    TransformerBlock,
    linear_attention,
    rope,
    sliding_window_attention,
    window_mask,
    yarn_frequencies,
)

examples = few(3)
SIZES = dict(key_width=8, rotary_width=4, value_width=6, kv_rank=10)
WIDTHS = dict(num_heads=3, **SIZES)


def normal(seed, shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def started(module, x, seed=0):
    """Parameters away from their start: scales of 1 could be left out unnoticed."""
    params = module.init(jax.random.key(seed), x)["params"]
    return {"params": jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape, p.dtype), params)}


@functools.partial(jax.jit, static_argnames=("module", "absorbed"))
def decode(module, variables, x, cache, valid=None, absorbed=None):
    return module.apply(variables, x, cache, valid=valid, absorbed=absorbed, method="decode")


def by_loops(params, x, heads, key_width, turns, value_width, rank, query_rank, eps=1e-6):
    """One query, one head and one key at a time in float64; the pairs of a rotation are complex numbers."""
    p = jax.tree.map(np.float64, params)
    norm = lambda x, scale: x / np.sqrt(np.mean(x * x) + eps) * scale
    turn = lambda x, t: (x[::2] + 1j * x[1::2]) * np.exp(1j * t * 10_000.0 ** (-np.arange(0, turns, 2) / turns))
    out = np.zeros(x.shape)
    for b, sequence in enumerate(np.float64(x)):
        for t, token in enumerate(sequence):
            latent = token if query_rank is None else norm(token @ p["query_down"], p["query_norm"])
            queries = (latent @ p["query" if query_rank is None else "query_up"]).reshape(heads, -1)
            values = []
            for n, query in enumerate(queries):
                logits, seen = [], []
                for s in range(t + 1):
                    down = sequence[s] @ p["kv_down"]
                    up = (norm(down[:rank], p["kv_norm"]) @ p["kv_up"]).reshape(heads, -1)[n]
                    turned = np.real(np.vdot(turn(query[key_width:], t), turn(down[rank:], s)))
                    logits.append((query[:key_width] @ up[:key_width] + turned) / np.sqrt(key_width + turns))
                    seen.append(up[key_width:])
                weights = np.exp(logits)
                values.append(weights @ np.asarray(seen) / weights.sum())
            out[b, t] = np.concatenate(values) @ p["out"]
    return out


@examples
@given(
    heads=st.integers(1, 3),
    key_width=st.integers(1, 5),
    turns=st.sampled_from([2, 4]),
    value_width=st.integers(1, 5),
    rank=st.integers(1, 6),
    query_rank=st.sampled_from([None, 1, 5]),
    seed=st.integers(0, 2**16),
)
def test_it_equals_the_loops_over_queries_heads_and_keys(heads, key_width, turns, value_width, rank, query_rank, seed):
    with jax.enable_x64(True):
        module = LatentAttention(heads, key_width, turns, value_width, rank, query_rank, param_dtype=jnp.float64)
        x = normal(seed, (2, 4, 7), np.float64)
        variables = started(module, x, seed)
        out = jax.jit(functools.partial(module.apply, is_causal=True))(variables, x)
        expected = by_loops(variables["params"], x, heads, key_width, turns, value_width, rank, query_rank)
        # Frequencies are kept in float32.
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("query_rank, window", [(None, None), (12, None), (None, (2, 0))])
@pytest.mark.parametrize("absorbed", [None, False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_equals_the_whole_step_by_step(query_rank, window, absorbed, side):
    module = LatentAttention(**WIDTHS, query_rank=query_rank, local_window_size=window)
    x = normal(0, (2, 9, 20))
    variables = started(module, x)
    lengths = (5, 3)  # Of the prompts, which are padded to 6.
    prompt, valid = np.full((2, 6, 20), 1e3, np.float32), np.zeros((2, 6), bool)
    for b, length in enumerate(lengths):
        place = slice(6 - length, 6) if side == "left" else slice(0, length)
        prompt[b, place], valid[b, place] = x[b, :length], True
    whole = module.apply(variables, x, is_causal=True)

    out, cache = decode(module, variables, jnp.asarray(prompt), module.empty_cache(2, 12, 20), jnp.asarray(valid), absorbed)
    assert cache.entries.shape == (2, 12, 10 + 4)
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(np.asarray(out)[b, valid[b]], whole[b, :length], atol=2e-5)
    for step in range(4):
        token = jnp.stack([x[b, length + step] for b, length in enumerate(lengths)])[:, None]
        out, cache = decode(module, variables, token, cache, absorbed=absorbed)
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(out[b, 0], whole[b, length + step], atol=2e-5)


def test_both_forms_have_the_same_gradients_in_float64():
    with jax.enable_x64(True):
        module = LatentAttention(**WIDTHS, query_rank=12, param_dtype=jnp.float64)
        x = normal(0, (2, 5, 20), np.float64)
        variables = started(module, x)

        def whole(variables, x):
            return module.apply(variables, x, is_causal=True)

        def cached(variables, x, absorbed):
            cache = module.empty_cache(2, 5, 20, jnp.float64)
            return module.apply(variables, x, cache, absorbed=absorbed, method="decode")[0]

        expected, expected_pull = jax.vjp(jax.jit(whole), variables, x)
        for absorbed in (False, True):
            out, pull = jax.vjp(jax.jit(functools.partial(cached, absorbed=absorbed)), variables, x)
            np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-12)
            one, other = pull(jnp.cos(out)), expected_pull(jnp.cos(out))
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10), one, other)


def test_vmap_and_remat_change_nothing():
    module = LatentAttention(**WIDTHS, query_rank=12)
    x = normal(0, (3, 5, 20))
    variables = started(module, x)

    def plain(x):
        return module.apply(variables, x, is_causal=True)

    each = jax.vmap(lambda one: jax.checkpoint(plain)(one[None])[0])
    (one, pull), (other, other_pull) = jax.vjp(jax.jit(plain), x), jax.vjp(jax.jit(each), x)
    np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(pull(one)[0], other_pull(one)[0], atol=1e-4)


def test_logits_depend_on_distances_alone():
    module = LatentAttention(**WIDTHS, query_rank=None)
    x = normal(0, (2, 6, 20))
    variables = started(module, x)
    out = module.apply(variables, x, is_causal=True)
    moved = module.apply(variables, x, is_causal=True, positions=jnp.asarray([[100], [7]]) + jnp.arange(6))
    np.testing.assert_allclose(out, moved, atol=1e-4)
    reversed_ = module.apply(variables, x, is_causal=True, positions=jnp.arange(6)[None, ::-1])
    assert np.abs(out - reversed_).max() > 1e-2


@pytest.mark.parametrize("absorbed", [False, True])
def test_a_token_that_sees_nothing_gets_zero(absorbed):
    module = LatentAttention(**WIDTHS, query_rank=None)
    x = normal(0, (2, 4, 20))
    variables = started(module, x)
    hidden = jnp.asarray([[0, 0, 0, 0], [0, 1, 1, 1]], bool)
    out = module.apply(variables, x, mask=hidden[:, None, None], is_causal=True)
    cached, _ = decode(module, variables, x, module.empty_cache(2, 4, 20), hidden, absorbed)
    for y in (out, cached):
        assert not y[0].any() and not y[1, 0].any() and y[1, 1:].all()


def test_the_cache_is_overfull_with_one_token_too_many():
    module = LatentAttention(**WIDTHS, query_rank=None)
    x = normal(0, (1, 4, 20))
    variables = started(module, x)
    _, cache = module.apply(variables, x, module.empty_cache(1, 5, 20), method="decode")
    with pytest.raises(UserError, match="do not fit"):
        module.apply(variables, x, cache, method="decode")


def test_a_window_is_the_mask_of_one():
    x = normal(0, (2, 9, 20))
    windowed = LatentAttention(**WIDTHS, query_rank=None, local_window_size=(2, 1))
    variables = started(windowed, x)
    plain = functools.partial(windowed.clone(local_window_size=None).apply, variables, x)
    np.testing.assert_allclose(windowed.apply(variables, x), plain(mask=window_mask(9, left=2, right=1)), atol=1e-6)


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_a_prefix_is_read_both_ways_whole_or_first(window):
    """The mask is written pair by pair; in decoding the prefix comes first, and is not causal."""
    module = LatentAttention(**WIDTHS, query_rank=None, local_window_size=window)
    x = normal(0, (2, 8, 20))
    variables = started(module, x)
    whole = module.apply(variables, x, prefix=jnp.asarray([4, 4]), is_causal=True)
    near = 9 if window is None else window[0]
    seen = [[(key < 4 and query < 4) or query - near <= key <= query for key in range(8)] for query in range(8)]
    free = module.clone(local_window_size=None)
    np.testing.assert_allclose(whole, free.apply(variables, x, mask=jnp.asarray(seen)[None, None]), atol=1e-6)
    first, cache = module.apply(variables, x[:, :4], module.empty_cache(2, 8, 20), is_causal=False, method="decode")
    rest, _ = module.apply(variables, x[:, 4:], cache, method="decode")
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), whole, atol=1e-5)


def test_a_block_of_it_takes_a_prefix():
    block = TransformerBlock(3, 8, attention_layer=functools.partial(LatentAttention, **SIZES, query_rank=None), is_causal=True)
    x = normal(0, (2, 6, 20))
    variables = started(block, x)
    whole = block.apply(variables, x, prefix=jnp.asarray([3, 3]))
    first, cache = block.apply(variables, x[:, :3], block.empty_cache(2, 6, 20), is_causal=False, method="decode")
    rest, _ = block.apply(variables, x[:, 3:], cache, method="decode")
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), whole, atol=1e-5)


@pytest.mark.parametrize(
    "attention, message",
    [
        (functools.partial(sliding_window_attention, local_window_size=(3, 0)), "binds local_window_size"),
        (linear_attention, "a linear attention looks at none"),
    ],
)
def test_an_attention_that_cannot_look_at_a_cache_is_refused(attention, message):
    module = LatentAttention(**WIDTHS, query_rank=None)
    x = normal(0, (1, 4, 20))
    variables = started(module, x)
    with pytest.raises(UserError, match=message):
        module.clone(attention=attention).apply(variables, x, module.empty_cache(1, 4, 20), method="decode")


def test_bfloat16_is_within_its_rounding_in_both_forms():
    module = LatentAttention(**WIDTHS, query_rank=12)
    half = module.clone(dtype=jnp.bfloat16)
    x = normal(0, (2, 6, 20))
    variables = module.init(jax.random.key(0), x)
    expected = module.apply(variables, x, is_causal=True)
    cache = half.empty_cache(2, 6, 20)
    assert cache.entries.dtype == jnp.bfloat16
    for absorbed in (False, True):
        out, _ = decode(half, variables, x, cache, absorbed=absorbed)
        np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=3e-2)


def test_another_attention_drops_in():
    frequencies = yarn_frequencies(4, 4.0, 16)
    rotary = functools.partial(rope, frequencies=frequencies, magnitude=1.1)
    window = functools.partial(sliding_window_attention, local_window_size=(2, 0), block=2)
    x = normal(0, (2, 9, 20))
    blocks = LatentAttention(**WIDTHS, query_rank=None, attention=window, rotary=rotary, scale=0.5)
    plain = LatentAttention(**WIDTHS, query_rank=None, rotary=rotary, scale=0.5)
    variables = started(plain, x)
    band = jnp.asarray(np.tri(9, 9, dtype=bool) & ~np.tri(9, 9, -3, dtype=bool))
    expected = plain.apply(variables, x, mask=band[None, None])
    np.testing.assert_allclose(blocks.apply(variables, x, is_causal=True), expected, atol=1e-5)
