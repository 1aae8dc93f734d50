"""Attention against loops in float64 and `jax.nn`, at its limits, and decoded token by token."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profiles import few

from jaxdl.errors import UserError
from jaxdl.nn import (
    MultiHeadAttention,
    RandomFeatureAttention,
    RelativePositionBias,
    alibi_bias,
    causal_mask,
    dot_product_attention,
    linear_attention,
    padding_mask,
    rope,
    sliding_window_attention,
)

examples = few(8)
small = st.integers(1, 5)


def normal(seed, *shapes, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def by_loops(query, key, value, bias, mask, scale):
    """One query of one head after the other, in float64; masks and biases have all axes."""
    query, key, value = (np.float64(x) for x in (query, key, value))
    batch, length, heads, _ = query.shape
    shared = heads // key.shape[2]
    out = np.zeros((batch, length, heads, value.shape[-1]))
    for b, t, n in np.ndindex(batch, length, heads):
        seen = [s for s in range(key.shape[1]) if mask[b, n, t, s]]
        if seen:
            logits = np.array([scale * query[b, t, n] @ key[b, s, n // shared] + bias[b, n, t, s] for s in seen])
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights / weights.sum() @ value[b, seen, n // shared]
    return out


@examples
@given(
    sizes=st.tuples(small, small, small),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    widths=st.tuples(small, small),
    scale=st.none() | st.floats(0.1, 2.0),
    per_head=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_attention_is_a_loop_over_heads_and_queries(sizes, groups, shared, widths, scale, per_head, seed):
    batch, queries, keys = sizes
    heads, (width, value_width) = groups * shared, widths
    shape = (batch, heads if per_head else 1, queries, keys)
    shapes = (batch, queries, heads, width), (batch, keys, groups, width), (batch, keys, groups, value_width), shape
    query, key, value, bias = normal(seed, *shapes)
    mask = np.random.default_rng(seed).random(shape) < 0.6  # Some queries see nothing.
    got = dot_product_attention(query, key, value, bias, jnp.asarray(mask), scale=scale)
    full = (batch, heads, queries, keys)
    wide = np.broadcast_to(bias, full), np.broadcast_to(mask, full), scale or width**-0.5
    np.testing.assert_allclose(got, by_loops(query, key, value, *wide), atol=1e-5)


HOW = {
    "plain": {},
    "causal": dict(is_causal=True),
    "window": dict(local_window_size=(2, 1)),
    "one number for both sides": dict(local_window_size=1, is_causal=True),
    "lengths": dict(query_seq_lengths=jnp.asarray([5, 2]), key_value_seq_lengths=jnp.asarray([3, 6])),
    "scale": dict(scale=0.3),
}


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-6)])
@pytest.mark.parametrize("how", HOW)
def test_it_takes_what_jax_nn_takes_and_gives_the_same(how, dtype, tolerance):
    arrays = normal(0, (2, 5, 6, 4), (2, 6, 2, 4), (2, 6, 2, 4), dtype=dtype)
    bias, cotangent = normal(1, (1, 6, 5, 6), (2, 5, 6, 4))
    mask = jnp.asarray(np.random.default_rng(2).random((2, 1, 5, 6)) < 0.7).at[..., 0].set(True).at[..., 1].set(True)

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention, *arrays):
        value, pull = jax.vjp(lambda *arrays: attention(*arrays, bias, mask, **HOW[how]), *arrays)
        seen = jnp.arange(5) < HOW[how].get("query_seq_lengths", jnp.asarray([5, 5]))[:, None]
        return value, pull(jnp.where(seen[..., None, None], cotangent, 0).astype(value.dtype))

    (ours, our_gradients), (theirs, their_gradients) = (
        run(dot_product_attention, *arrays),
        run(jax.nn.dot_product_attention, *arrays),
    )
    assert ours.dtype == dtype
    # Where a window hides all that a mask allows, `jax.nn` has the mean of all values.
    window = HOW[how].get("local_window_size")
    rows = slice(None) if window is None else slice(0, 2)
    np.testing.assert_allclose(np.float32(ours)[:, rows], np.float32(theirs)[:, rows], atol=tolerance, rtol=tolerance)
    if window is None:
        for ours, theirs in zip(our_gradients, their_gradients, strict=True):
            np.testing.assert_allclose(np.float32(ours), np.float32(theirs), atol=4 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_query_that_sees_nothing_gets_nothing_and_gives_no_gradient(dtype):
    query, key, value = normal(0, (2, 3, 4, 5), (2, 6, 2, 5), (2, 6, 2, 5), dtype=dtype)
    mask = jnp.ones((2, 1, 3, 6), bool).at[0, :, 1].set(False).at[1].set(False)
    out, pull = jax.vjp(jax.jit(lambda *arrays: dot_product_attention(*arrays, mask=mask)), query, key, value)
    assert not out[0, 1].any() and not out[1].any() and out[0, 0].all()
    gradients = pull(jnp.ones_like(out))
    assert not gradients[0][0, 1].any() and not any(gradient[1].any() for gradient in gradients)
    # The first example is as if its second query were not there.
    rest = jax.vjp(dot_product_attention, query[:1, ::2], key[:1], value[:1])[1](jnp.ones((1, 2, 4, 5), dtype))
    for gradient, want in zip(gradients[1:], rest[1:], strict=True):
        np.testing.assert_allclose(np.float32(gradient[:1]), np.float32(want), atol=1e-5 if dtype == jnp.float32 else 0.1)


def test_all_heads_that_share_a_key_are_neighbours():
    # Head 0 and 1 have the first key, 2 and 3 the second: repeated, not tiled.
    query, key, value = normal(0, (1, 3, 4, 5), (1, 3, 2, 5), (1, 3, 2, 5))
    repeated = dot_product_attention(query, key.repeat(2, axis=2), value.repeat(2, axis=2))
    np.testing.assert_allclose(dot_product_attention(query, key, value), repeated, atol=1e-6)


KINDS = {
    "MHA": dict(),
    "GQA": dict(num_kv_heads=2),
    "MQA": dict(num_kv_heads=1),
    "rotary": dict(num_kv_heads=2, rotary=rope, use_bias=False),
    "window": dict(rotary=rope, local_window_size=(2, 0)),
    "wide heads": dict(head_width=6, num_kv_heads=2),
    "linear": dict(attention=linear_attention, num_kv_heads=2, rotary=rope),
    "linear in chunks": dict(attention=functools.partial(linear_attention, chunk=2, scale=0.5)),
    "Performer": dict(attention=RandomFeatureAttention(6), num_kv_heads=2),
}
TABLE = {"params": {"table": jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)}}
T5 = RelativePositionBias(4, num_buckets=8, max_distance=6, bidirectional=False)
BIASES = {"ALiBi": functools.partial(alibi_bias, 4), "T5": functools.partial(T5.apply, TABLE)}
"""Of positions of queries and of keys."""


@pytest.mark.parametrize("kind", [*KINDS, *BIASES])
@pytest.mark.parametrize("sides", [("left", "right"), ("right", "left")])
def test_decoding_a_padded_prompt_and_then_token_by_token_is_the_whole_sequence(kind, sides):
    """Prompts of 4 and 2 tokens in one batch, both padded to 5; then 3 more tokens each."""
    module, biases = MultiHeadAttention(4, **KINDS.get(kind, {})), BIASES.get(kind)
    (x,) = normal(0, (2, 7, 16))
    params = module.init(jax.random.key(0), x)
    lengths = 4, 2
    prompt, valid, later = np.full((2, 5, 16), 1e3, np.float32), np.zeros((2, 5), bool), []
    for example, (length, side) in enumerate(zip(lengths, sides, strict=True)):
        place = slice(0, length) if side == "right" else slice(5 - length, 5)
        prompt[example, place], valid[example, place] = x[example, :length], True
        later.append(x[example, length : length + 3])

    @jax.jit
    def step(x, cache, valid):
        bias = biases and biases(cache.positions(valid), cache.slot_positions(valid))
        return module.apply(params, x, cache, valid=valid, bias=bias, method="decode")

    cache = module.empty_cache(2, 9, 16)
    out, cache = step(jnp.asarray(prompt), cache, jnp.asarray(valid))
    steps = []
    for token in range(3):
        y, cache = step(jnp.stack(later)[:, token : token + 1], cache, jnp.ones((2, 1), bool))
        steps.append(y)
    for example, length in enumerate(lengths):
        bias = biases and biases(length + 3, length + 3)
        whole = module.apply(params, x[example : example + 1, : length + 3], is_causal=True, bias=bias)[0]
        np.testing.assert_allclose(out[example][valid[example]], whole[:length], atol=2e-6)
        np.testing.assert_allclose(jnp.concatenate(steps, 1)[example], whole[length:], atol=2e-6)


def test_positions_may_be_given_and_only_their_differences_matter():
    module = MultiHeadAttention(2, rotary=rope)
    (x,) = normal(0, (1, 4, 8))
    params = module.init(jax.random.key(0), x)
    far = module.apply(params, x, positions=100 + jnp.arange(4)[None])
    np.testing.assert_allclose(far, module.apply(params, x), atol=1e-5)
    stretched = module.apply(params, x, positions=3 * jnp.arange(4)[None])
    assert not np.allclose(stretched, far, atol=1e-3)
    again, _ = module.apply(params, x, module.empty_cache(1, 4, 8), positions=3 * jnp.arange(4)[None], method="decode")
    np.testing.assert_allclose(again[:, -1], stretched[:, -1], atol=1e-6)


def test_a_memory_is_projected_once():
    module = MultiHeadAttention(4, num_kv_heads=2, rotary=rope, local_window_size=(1, 0))  # Both for self-attention alone.
    x, memory = normal(0, (2, 3, 16), (2, 5, 16))
    valid = jnp.asarray([[True] * 5, [False, True, True, False, False]])
    params = module.init(jax.random.key(0), x, memory)
    cache = module.apply(params, memory, valid, method="cache_memory")
    expected = module.apply(params, x, memory, mask=padding_mask(valid))
    for token in range(3):
        got = module.apply(params, x[:, token : token + 1], cache, method="cross_attend")
        np.testing.assert_allclose(got, expected[:, token : token + 1], atol=1e-6)
    short = module.apply(params, x[1:], memory[1:, 1:3])
    np.testing.assert_allclose(expected[1:], short, atol=1e-6)


def test_the_cache_is_smaller_by_the_number_of_heads_that_share_a_key():
    size = lambda module: sum(leaf.nbytes for leaf in jax.tree.leaves(module.empty_cache(2, 64, 32, jnp.bfloat16).entries))
    assert size(MultiHeadAttention(8)) == 2 * 2 * 64 * 32 * 2
    assert (
        size(MultiHeadAttention(8))
        == 4 * size(MultiHeadAttention(8, num_kv_heads=2))
        == 8 * size(MultiHeadAttention(8, num_kv_heads=1))
    )


def test_a_cache_in_half_precision_is_near():
    module = MultiHeadAttention(4, rotary=rope)
    (x,) = normal(0, (2, 6, 16))
    params = module.init(jax.random.key(0), x)
    out, cache = module.apply(params, x, module.empty_cache(2, 6, 16, jnp.bfloat16), method="decode")
    assert out.dtype == jnp.float32 and {leaf.dtype for leaf in cache.entries} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out, module.apply(params, x, is_causal=True), atol=0.03)


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        (dict(), "float32"),
        (dict(param_dtype="float64"), "float64"),
        (dict(param_dtype="bfloat16"), "float32"),
        (dict(dtype="bfloat16"), "bfloat16"),
    ],
)
def test_a_cache_has_the_dtype_of_the_keys(dtypes, expected):
    with jax.enable_x64(True):
        module = MultiHeadAttention(2, **dtypes)
        x = jnp.ones((1, 3, 8), jnp.float32)
        params = module.init(jax.random.key(0), x)
        assert {leaf.dtype for leaf in module.apply(params, x, method="cache_memory").entries} == {jnp.dtype(expected)}
        assert {leaf.dtype for leaf in module.empty_cache(1, 3, 8).entries} == {jnp.dtype(expected)}


def test_linear_attention_remembers_as_much_of_a_million_tokens_as_of_one():
    size = lambda attention, slots: sum(
        leaf.nbytes for leaf in jax.tree.leaves(MultiHeadAttention(4, attention=attention).empty_cache(1, slots, 16).entries)
    )
    assert size(linear_attention, 1) == size(linear_attention, 1_000_000) == 4 * (4 * 4 * 5 + 4)
    assert size(RandomFeatureAttention(6), 9) == 4 * (4 * 6 * 5 + 4)


def test_what_a_state_cannot_do_is_refused():
    module, x = MultiHeadAttention(2, attention=linear_attention), jnp.ones((1, 3, 8))
    params, cache = module.init(jax.random.key(0), x), module.empty_cache(1, 4, 8)
    for wrong in (dict(is_causal=False), dict(mask=causal_mask(3, 4)), dict(bias=jnp.zeros((1, 1, 3, 4)))):
        with pytest.raises(UserError, match="decodes from a state"):
            module.apply(params, x, cache, method="decode", **wrong)
    _, cache = module.apply(params, x, cache, method="decode")
    with pytest.raises(UserError, match="3 tokens after 3 do not fit"):
        module.apply(params, x, cache, method="decode")
    over, _ = jax.jit(functools.partial(module.apply, params, method="decode"))(x, cache)
    assert jnp.isnan(over).all()


@pytest.mark.parametrize(
    "bound", [dict(local_window_size=(3, 0)), dict(is_causal=True), dict(key_value_seq_lengths=jnp.asarray([4]))]
)
def test_an_attention_that_binds_places_is_not_decoded(bound):
    """A window that is bound would stand at the first query of each step: half of what it should see, and no error."""
    x, module = jnp.ones((1, 4, 8)), MultiHeadAttention(2, attention=functools.partial(sliding_window_attention, **bound))
    params = module.init(jax.random.key(0), x)
    with pytest.raises(UserError, match=f"binds {next(iter(bound))} counts from the first query"):
        module.apply(params, x, module.empty_cache(1, 6, 8), method="decode")
    memory = module.apply(params, x, method="cache_memory")
    with pytest.raises(UserError, match="leave it to the layer"):
        module.apply(params, x, memory, method="cross_attend")
    harmless = module.clone(
        attention=functools.partial(sliding_window_attention, scale=0.2, local_window_size=None, is_causal=False)
    )
    harmless.apply(params, x, module.empty_cache(1, 6, 8), method="decode")


def test_a_full_cache_refuses_more_or_says_so_by_nan():
    module = MultiHeadAttention(2)
    (x,) = normal(0, (1, 3, 8))
    params = module.init(jax.random.key(0), x)
    decode = functools.partial(module.apply, params, method="decode")
    with pytest.raises(UserError, match="3 tokens after 0 do not fit into a cache of 2 slots"):
        decode(x, module.empty_cache(1, 2, 8))
    with pytest.raises(UserError, match="3 tokens do not fit into a cache of 2 slots"):
        jax.jit(decode)(x, module.empty_cache(1, 2, 8))
    _, cache = decode(x, module.empty_cache(1, 4, 8))
    last, full = jax.jit(decode)(x[:, :1], cache)
    assert jnp.isfinite(last).all()
    with pytest.raises(UserError, match="1 tokens after 4 do not fit into a cache of 4 slots"):
        decode(x[:, :1], full)
    for _ in range(2):
        over, full = jax.jit(decode)(x[:, :1], full)
        assert jnp.isnan(over).all()


@pytest.mark.parametrize(
    "use_bias, expected",
    [(True, {"query", "key", "value", "out"}), (False, set()), (("query", "key", "value"), {"query", "key", "value"})],
)
def test_biases_are_where_they_are_wanted(use_bias, expected):
    params = MultiHeadAttention(2, use_bias=use_bias).init(jax.random.key(0), jnp.ones((1, 3, 8)))["params"]
    assert {name for name, part in params.items() if "bias" in part} == expected
    assert set(params) == {"query", "key", "value", "out"}


def test_the_projection_back_may_start_otherwise():
    module = MultiHeadAttention(2, out_init=jax.nn.initializers.zeros)
    out, params = module.init_with_output(jax.random.key(0), jnp.ones((1, 3, 8)))
    assert not out.any() and params["params"]["query"]["kernel"].any()


def test_what_does_not_fit_is_refused():
    x = jnp.ones((1, 3, 8))
    init = lambda module, *arrays, **how: module.init(jax.random.key(0), *arrays, **how)
    with pytest.raises(UserError, match="a width of 8 cannot be split into 3 heads"):
        init(MultiHeadAttention(3), x)
    with pytest.raises(UserError, match="4 query heads cannot share 3 key/value heads"):
        init(MultiHeadAttention(4, num_kv_heads=3), x)
    with pytest.raises(UserError, match="no projection 'querry': did you mean 'query'"):
        init(MultiHeadAttention(4, use_bias=("querry",)), x)
    plain = inspect.unwrap(dot_product_attention)  # Without the types, which refuse first.
    query, mask = jnp.ones((2, 3, 2, 4)), jnp.ones((2, 3, 3), bool)
    for wrong in (mask, mask[0]):
        with pytest.raises(UserError, match="a mask of shape .*: give four axes"):
            plain(query, query, query, mask=wrong)
        with pytest.raises(UserError, match="a bias of shape .*: give four axes"):
            plain(query, query, query, bias=wrong.astype(jnp.float32))
    with pytest.raises(UserError, match="`B T N H`"):
        plain(query[0], query[0], query[0])
    with pytest.raises(UserError, match="window of"):
        plain(query, query, query, local_window_size=(-1, 2))
    np.testing.assert_array_equal(
        plain(query, query, query, local_window_size=np.int64(1)), plain(query, query, query, local_window_size=1)
    )
    with pytest.raises(UserError, match="leave them out of cross-attention"):
        init(MultiHeadAttention(4), x, x, positions=jnp.arange(3)[None])
