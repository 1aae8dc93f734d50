"""The blocks of the sliding window against dense masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profiles import few

from jaxdl.errors import UserError
from jaxdl.nn import MultiHeadAttention, dot_product_attention, sliding_window_attention

examples = few(4)


def normal(seed, *shapes, dtype=np.float32):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def dense(query, key, value, bias, allowed, scale=None):
    """All pairs, and the formula of softmax without any shift."""
    repeats = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, repeats, axis=2), jnp.repeat(value, repeats, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = jnp.where(allowed, jnp.exp(logits + bias), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnv->btnv", weights / jnp.where(total > 0, total, 1), value)


def in_window(queries, keys, left, right):
    """By a double loop."""
    return np.asarray([[t - left <= s <= t + right for s in range(keys)] for t in range(queries)])


@examples
@given(
    queries=st.integers(1, 23),
    keys=st.integers(1, 23),
    heads=st.sampled_from([(1, 1), (4, 2), (2, 1)]),
    left=st.integers(0, 9),
    right=st.integers(0, 9),
    block=st.integers(1, 8),
    causal=st.booleans(),
    biases=st.sampled_from([(1, 1, 1, 1), (2, 4, 2, 2), (1, 4, 2, 2), (1, 1, 1, 2), (2, 4, 2, 1)]),
    masks=st.sampled_from([(1, 1, 1, 1), (2, 4, 2, 2), (2, 1, 1, 2), (1, 4, 1, 2)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_equals_the_dense_mask_in_float64(queries, keys, heads, left, right, block, causal, biases, masks, seed):
    def extents(pattern):
        """1 stays 1, and anything else becomes what it stands for."""
        return tuple(full if part > 1 else 1 for part, full in zip(pattern, (2, heads[0], queries, keys)))

    with jax.enable_x64(True):
        shapes = (2, queries, heads[0], 4), (2, keys, heads[1], 4), (2, keys, heads[1], 3), extents(biases)
        arrays = normal(seed, *shapes, dtype=np.float64)
        mask = jnp.asarray(np.random.default_rng(seed).random(extents(masks)) < 0.8)
        allowed = mask & in_window(queries, keys, left, right) & (np.tri(queries, keys, dtype=bool) if causal else True)
        window = dict(local_window_size=(left, right), is_causal=causal, block=block)
        out, pull = jax.vjp(jax.jit(lambda *arrays: sliding_window_attention(*arrays, mask, **window)), *arrays)
        expected, expected_pull = jax.vjp(jax.jit(lambda *arrays: dense(*arrays, allowed)), *arrays)
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-10)
        (cotangent,) = normal(1, out.shape, dtype=np.float64)
        for gradient, want in zip(pull(cotangent), expected_pull(cotangent)):
            np.testing.assert_allclose(gradient, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("implementation", ["blocks", "pallas"])
@pytest.mark.parametrize("window", [(3, 2), (0, 5), 4])
def test_it_equals_the_window_of_jax(window, implementation):
    arrays = normal(0, (2, 40, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8))
    lengths = jnp.asarray([40, 31], jnp.int32)
    options = dict(local_window_size=window, key_value_seq_lengths=lengths, query_seq_lengths=lengths, scale=0.2)
    ours, pull = jax.vjp(
        jax.jit(lambda *x: sliding_window_attention(*x, **options, block=8, implementation=implementation)), *arrays
    )
    theirs, their_pull = jax.vjp(jax.jit(lambda *x: jax.nn.dot_product_attention(*x, **options)), *arrays)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    (cotangent,) = normal(1, ours.shape)
    for gradient, want in zip(pull(cotangent), their_pull(cotangent)):
        np.testing.assert_allclose(gradient, want, atol=1e-5)


@pytest.mark.parametrize("implementation", ["blocks", "pallas"])
def test_a_soft_cap_is_that_of_plain_attention(implementation):
    arrays = normal(0, (2, 40, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8), (1, 4, 40, 40))
    options = dict(local_window_size=(5, 2), logits_soft_cap=0.7, is_causal=True)
    ours = lambda *x: sliding_window_attention(*x, **options, block=8, implementation=implementation)
    (one, pull), (other, other_pull) = (
        jax.vjp(jax.jit(form), *arrays) for form in (ours, functools.partial(dot_product_attention, **options))
    )
    np.testing.assert_allclose(one, other, atol=1e-5)
    for gradient, want in zip(pull(jnp.cos(one)), other_pull(jnp.cos(one)), strict=True):
        np.testing.assert_allclose(gradient, want, atol=1e-5)


@pytest.mark.parametrize("implementation", ["blocks", "pallas"])
def test_tiles_outside_of_the_window_are_not_even_read(implementation):
    """What is not a number comes out of every product it goes into, a product with a weight of 0 too: no weight hides it."""
    query, key, value = normal(0, (1, 96, 2, 4), (1, 96, 2, 4), (1, 96, 2, 4))
    form = jax.jit(functools.partial(sliding_window_attention, local_window_size=(5, 3), block=16, implementation=implementation))
    expected, spoiled = form(query, key, value), value.at[:, 48:].set(jnp.nan)
    np.testing.assert_array_equal(form(query, key, spoiled)[:, :32], expected[:, :32])
    plain = dot_product_attention(query, key, spoiled, local_window_size=(5, 3))
    np.testing.assert_allclose(plain[:, :32], expected[:, :32], atol=1e-6)
    assert jnp.isnan(plain[:, 48:]).all()
    gradient = jax.grad(lambda query: form(query, key, spoiled)[:, :32].sum())(query)
    assert jnp.isfinite(gradient[:, :32]).all()


@pytest.mark.parametrize("length", [63, 64, 65, 300])
def test_the_blocks_that_it_chooses_itself_are_right_at_their_edges(length):
    query, key, value = normal(length, (1, length, 1, 4), (1, length, 1, 4), (1, length, 1, 4))
    for left, right in ((63, 0), (64, 0), (20, 20), (130, 1)):
        out = sliding_window_attention(query, key, value, local_window_size=(left, right))
        expected = dense(query, key, value, 0.0, in_window(length, length, left, right))
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_vmap_and_remat_change_nothing():
    arrays = normal(0, (3, 20, 2, 4), (3, 20, 2, 4), (3, 20, 2, 4))
    form = functools.partial(sliding_window_attention, local_window_size=(4, 1), block=8)
    each = jax.vmap(lambda *one: jax.checkpoint(form)(*(x[None] for x in one))[0])
    (one, pull), (other, other_pull) = jax.vjp(jax.jit(form), *arrays), jax.vjp(jax.jit(each), *arrays)
    np.testing.assert_allclose(one, other, atol=1e-6)
    for gradient, want in zip(pull(jnp.cos(one)), other_pull(jnp.cos(one))):
        np.testing.assert_allclose(gradient, want, atol=1e-6)


def test_bfloat16_is_within_its_rounding():
    arrays = [x.astype(jnp.bfloat16) for x in normal(0, (1, 200, 2, 8), (1, 200, 1, 8), (1, 200, 1, 8))]
    out = sliding_window_attention(*arrays, local_window_size=(60, 5), block=32)
    exact = dense(*(x.astype(jnp.float32) for x in arrays), 0.0, in_window(200, 200, 60, 5))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)


def test_a_query_that_sees_no_key_gets_zero_and_gives_no_gradient():
    arrays = normal(0, (1, 12, 2, 4), (1, 12, 2, 4), (1, 12, 2, 4))
    mask = (jnp.arange(12) >= 7)[None, None, None]
    out, pull = jax.vjp(lambda *x: sliding_window_attention(*x, mask=mask, local_window_size=(2, 1), block=4), *arrays)
    gradients = pull(jnp.ones_like(out))
    assert not out[:, :6].any() and out[:, 6:].all()
    assert not gradients[0][:, :6].any() and not gradients[2][:, :7].any()
    assert all(jnp.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(gradient):
    def temporary_bytes(length):
        def loss(*arrays):
            return sliding_window_attention(*arrays, local_window_size=(63, 0)).sum()

        spec = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        function = jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else loss)
        return function.lower(spec, spec, spec).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(1024), temporary_bytes(4096)
    assert long < 4.2 * short
    # The logits of one head would be 64 MiB if they were dense.
    assert long < 16 * 2**20


def test_a_window_as_wide_as_the_sequence_is_plain_attention():
    query, key, value = normal(0, (1, 9, 2, 4), (1, 9, 2, 4), (1, 9, 2, 4))
    expected = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    for window in (None, (8, 0), (20, 20)):
        out = sliding_window_attention(query, key, value, is_causal=True, local_window_size=window)
        np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_drops_into_multi_head_attention_and_into_decoding(side):
    (x,) = normal(0, (2, 13, 8))
    module = MultiHeadAttention(2, attention=sliding_window_attention, local_window_size=(3, 0))
    variables = module.init(jax.random.key(0), x)
    whole = module.apply(variables, x, is_causal=True)
    pad = (2, 0) if side == "left" else (0, 2)
    prompt = jnp.pad(x[:, :6], [(0, 0), pad, (0, 0)])
    valid = jnp.pad(jnp.ones((2, 6), bool), [(0, 0), pad])
    out, cache = module.apply(variables, prompt, module.empty_cache(2, 20, 8), valid=valid, method="decode")
    np.testing.assert_allclose(np.asarray(out)[np.asarray(valid)].reshape(2, 6, 8), whole[:, :6], atol=1e-5)
    for t in range(6, 13):
        out, cache = module.apply(variables, x[:, t : t + 1], cache, method="decode")
        np.testing.assert_allclose(out[:, 0], whole[:, t], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(local_window_size=(-1, 2)), "window of .-1, 2. keys"),
        (dict(local_window_size=2, block=0), "blocks of 0 queries"),
        (dict(local_window_size=2, implementation="palas"), "did you mean 'pallas'"),
        (dict(local_window_size=1), "4 query heads cannot share 3 key/value heads"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    query, key = jnp.ones((1, 9, 4, 4)), jnp.ones((1, 9, 3, 4))
    function = getattr(
        sliding_window_attention, "__wrapped__", sliding_window_attention
    )  # Without the types, which refuse first.
    with pytest.raises(UserError, match=message):
        function(query, key, key, **options)
