"""Linear attention against its own quadratic form, and the estimate of the Performer against what it estimates."""

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
    MultiHeadAttention,
    RandomFeatureAttention,
    elu_features,
    linear_attention,
    linear_decode,
    positive_features,
    random_projection,
)

examples = few(3)
PROJECTION = random_projection(jax.random.key(7), 12, 4)
FAVOR = functools.partial(positive_features, projection=PROJECTION, eps=0.0)


def normal(seed, *shapes, dtype=np.float32):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def elu_plus_one(x):
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def exponentials(x):
    return jnp.exp(jnp.einsum("...h,mh->...m", x, PROJECTION) - (x * x).sum(-1, keepdims=True) / 2)


def quadratic(feature_map, query, key, value, allowed):
    """All pairs, with nothing done for stability."""
    repeats = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, repeats, axis=2), jnp.repeat(value, repeats, axis=2)
    weights = jnp.where(allowed, jnp.einsum("btnm,bsnm->bnts", feature_map(query), feature_map(key)), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnv->btnv", weights / jnp.where(total > 0, total, 1), value)


@pytest.mark.parametrize("maps", [(elu_features, elu_plus_one), (FAVOR, exponentials)], ids=["elu", "favor"])
@examples
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 11),
    keys=st.integers(1, 11),
    groups=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    chunk=st.integers(1, 12),
    causal=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_equals_its_quadratic_form_in_float64(maps, batch, queries, keys, groups, key_heads, chunk, causal, seed):
    ours, plain = maps
    with jax.enable_x64(True):
        shapes = (batch, queries, groups * key_heads, 4), (batch, keys, key_heads, 4), (batch, keys, key_heads, 3)
        arrays = normal(seed, *shapes, dtype=np.float64)
        mask = jnp.asarray(np.random.default_rng(seed).random((batch, 1, 1, keys)) < 0.7)
        allowed = mask & (jnp.tril(jnp.ones((queries, keys), bool)) if causal else True)
        form = functools.partial(linear_attention, mask=mask, is_causal=causal, feature_map=ours, chunk=chunk)
        out, pull = jax.vjp(jax.jit(form), *arrays)
        expected, expected_pull = jax.vjp(jax.jit(lambda *arrays: quadratic(plain, *arrays, allowed)), *arrays)
        np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-10)
        (cotangent,) = normal(1, out.shape, dtype=np.float64)
        for gradient, want in zip(pull(cotangent), expected_pull(cotangent)):
            np.testing.assert_allclose(gradient, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_float32_is_within_its_rounding_under_jit_vmap_and_remat(causal):
    arrays = normal(0, (3, 50, 4, 8), (3, 50, 2, 8), (3, 50, 2, 8))
    allowed = jnp.tril(jnp.ones((50, 50), bool)) if causal else True
    form = functools.partial(linear_attention, is_causal=causal, chunk=16)

    def one_by_one(*arrays):
        return jax.vmap(lambda *one: jax.checkpoint(form)(*(x[None] for x in one))[0])(*arrays)

    expected, expected_pull = jax.vjp(lambda *arrays: quadratic(elu_plus_one, *arrays, allowed), *arrays)
    (cotangent,) = normal(1, expected.shape)
    for transformed in (form, one_by_one):
        out, pull = jax.vjp(jax.jit(transformed), *arrays)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        for gradient, want in zip(pull(cotangent), expected_pull(cotangent)):
            np.testing.assert_allclose(gradient, want, atol=1e-5)


@pytest.mark.parametrize("feature_map", [elu_features, FAVOR], ids=["elu", "favor"])
@examples
@given(portions=st.lists(st.integers(1, 9), min_size=1, max_size=4), chunk=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_decoding_in_any_portions_is_the_causal_pass(feature_map, portions, chunk, seed):
    length = sum(portions)
    arrays = normal(seed, (2, length, 4, 4), (2, length, 2, 4), (2, length, 2, 3))

    @jax.jit
    def in_portions(*arrays):
        state, outs = None, []
        for start, portion in zip(np.cumsum([0, *portions]), portions):
            part = (x[:, start : start + portion] for x in arrays)
            out, state = linear_decode(*part, state, feature_map=feature_map, chunk=chunk)
            outs.append(out)
        return jnp.concatenate(outs, axis=1)

    whole = jax.jit(functools.partial(linear_attention, is_causal=True, feature_map=feature_map))(*arrays)
    np.testing.assert_allclose(in_portions(*arrays), whole, atol=1e-5)


def test_a_scan_can_carry_the_state_token_by_token():
    query, key, value = normal(0, (2, 20, 2, 4), (2, 20, 2, 4), (2, 20, 2, 4))
    first, state = linear_decode(query[:, :5], key[:, :5], value[:, :5])
    assert state.total.shape == (2, 2, 4, 5) and state.log_scale.shape == (2, 2)

    def step(state, token):
        out, state = linear_decode(*(x[:, None] for x in token), state)
        return state, out[:, 0]

    _, rest = jax.lax.scan(step, state, tuple(x[:, 5:].swapaxes(0, 1) for x in (query, key, value)))
    together = jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)
    np.testing.assert_allclose(together, linear_attention(query, key, value, is_causal=True), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_state_and_the_outputs_as_they_are(side):
    query, key, value = normal(0, (1, 7, 2, 4), (1, 7, 2, 4), (1, 7, 2, 4))
    expected, expected_state = linear_decode(query, key, value)
    width = (3, 0) if side == "left" else (0, 3)

    def padded(x):
        return jnp.pad(x, [(0, 0), width, (0, 0), (0, 0)], constant_values=1e4)

    real = jnp.pad(jnp.ones((1, 7), bool), [(0, 0), width])
    out, state = linear_decode(*map(padded, (query, key, value)), mask=real, chunk=4)
    np.testing.assert_allclose(np.asarray(out)[np.asarray(real)], expected[0], atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), state, expected_state)
    whole = linear_attention(*map(padded, (query, key, value)), mask=real[:, None, None], is_causal=True)
    np.testing.assert_allclose(np.asarray(whole)[np.asarray(real)], expected[0], atol=1e-6)


def test_lengths_are_masks_and_queries_beyond_theirs_are_zero():
    query, key, value = normal(0, (2, 6, 2, 4), (2, 8, 2, 4), (2, 8, 2, 4))
    lengths, query_lengths = jnp.asarray([8, 3]), jnp.asarray([2, 6])
    out = linear_attention(query, key, value, query_seq_lengths=query_lengths, key_value_seq_lengths=lengths)
    np.testing.assert_allclose(out[1], linear_attention(query[1:], key[1:, :3], value[1:, :3])[0], atol=1e-6)
    assert not out[0, 2:].any() and out[0, :2].all()


@pytest.mark.parametrize("feature_map", [elu_features, FAVOR], ids=["elu", "favor"])
def test_later_tokens_of_any_scale_change_no_bit_of_earlier_outputs(feature_map):
    query, key, value = normal(0, (1, 12, 2, 4), (1, 12, 2, 4), (1, 12, 2, 4))
    causal = jax.jit(functools.partial(linear_attention, is_causal=True, feature_map=feature_map, chunk=8))
    before = causal(query, key, value)
    for factor in (30.0, 1e4):
        after = causal(query, key.at[:, 6:].multiply(factor), value.at[:, 6:].multiply(factor))
        np.testing.assert_array_equal(before[:, :6], after[:, :6])


def test_a_scale_multiplies_the_product_of_query_and_key():
    query, key, value = normal(0, (1, 5, 1, 4), (1, 5, 1, 4), (1, 5, 1, 4))
    exact = jax.nn.dot_product_attention(query, key, value, scale=0.3)
    feature_map = functools.partial(positive_features, projection=random_projection(jax.random.key(0), 50_000, 4))
    estimate = linear_attention(query, key, value, scale=0.3, feature_map=feature_map)
    np.testing.assert_allclose(estimate, exact, atol=0.02)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "feature_map", [elu_features, functools.partial(positive_features, projection=PROJECTION)], ids=["elu", "favor"]
)
def test_extreme_inputs_have_finite_values_and_gradients(feature_map, dtype, causal):
    form = jax.jit(functools.partial(linear_attention, is_causal=causal, feature_map=feature_map, chunk=4))
    signs = jnp.sign(normal(0, (3, 1, 6, 2, 4))[0])
    for query, key, value in (1e4 * signs, 0 * signs, -1e4 * jnp.ones_like(signs), 1e-30 * signs, signs[:, :, :1]):
        arrays = [x.astype(dtype) for x in (query, key, value)]
        out, pull = jax.vjp(form, *arrays)
        assert out.dtype == dtype
        for x in (out, *pull(jnp.ones_like(out))):
            assert jnp.isfinite(x.astype(jnp.float32)).all()
        # A mean of values is no further out than the values.
        assert jnp.abs(out).max() <= 1.01 * jnp.abs(value).max()


def test_features_that_all_underflow_keep_their_proportions():
    key = jnp.asarray([-200.0, -201.0, -203.0])[None, :, None, None]
    value = jnp.asarray([1.0, 10.0, 100.0])[None, :, None, None]
    weights = np.exp([0.0, -1.0, -3.0])
    expected = weights @ [1, 10, 100] / weights.sum()
    np.testing.assert_allclose(linear_attention(key, key, value)[0, :, 0, 0], expected, rtol=1e-4)
    np.testing.assert_allclose(linear_attention(key, key, value, is_causal=True)[0, -1, 0, 0], expected, rtol=1e-4)


def test_a_query_that_sees_no_key_gets_zero_and_gives_no_gradient():
    arrays = normal(0, (2, 6, 2, 4), (2, 6, 2, 4), (2, 6, 2, 4))
    mask = jnp.asarray([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1]], bool)[:, None, None]
    for causal, blind in ((False, 0), (True, 2)):
        form = functools.partial(linear_attention, mask=mask, is_causal=causal, chunk=4)
        out, pull = jax.vjp(form, *arrays)
        gradients = pull(jnp.ones_like(out))
        assert not out[0].any() and not out[1, :blind].any() and out[1, blind:].any()
        assert not any(x[0].any() for x in gradients) and not gradients[0][1, :blind].any()
        assert not gradients[2][1, :2].any() and all(jnp.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_not_a_number_is_not_taken_for_unseen(causal):
    x = jnp.ones((1, 3, 1, 2))
    assert jnp.isnan(linear_attention(x, x.at[0, 0].set(jnp.nan), x, is_causal=causal)).all()


def test_sums_over_bfloat16_are_in_float32():
    # 1 + 2⁻⁸ is 1 in bfloat16: summed there, 3000 equal values would stop growing at 256.
    ones = jnp.ones((1, 3000, 1, 1), jnp.bfloat16)
    for causal in (False, True):
        np.testing.assert_array_equal(linear_attention(ones, ones, ones, is_causal=causal), ones)
    _, state = linear_decode(ones, ones, ones)
    assert state.total.dtype == jnp.float32
    np.testing.assert_allclose(state.total * jnp.exp(state.log_scale[..., None, None]), 3000 * 2, rtol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_causal_memory_grows_with_the_length_and_not_with_its_square(gradient):
    def temporary_bytes(length):
        def loss(*arrays):
            return linear_attention(*arrays, is_causal=True, chunk=64).sum()

        spec = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        function = jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else loss)
        return function.lower(spec, spec, spec).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(1024), temporary_bytes(4096)
    assert long < 4.2 * short
    # All pairs of one head would be 64 MiB, and a state for every token 4096 · 2 · 32 · 33 · 4 bytes, 33 MiB.
    assert long < 12 * 2**20


@pytest.mark.parametrize(
    "wrong",
    [
        dict(bias=jnp.zeros((1, 1, 3, 3))),
        dict(local_window_size=2),
        dict(mask=jnp.ones((1, 1, 3, 3), bool)),
        dict(mask=jnp.ones((1, 2, 1, 3), bool)),
    ],
)
def test_what_is_no_product_of_features_is_refused(wrong):
    x = jnp.ones((1, 3, 2, 4))
    function = getattr(linear_attention, "__wrapped__", linear_attention)  # Without the types, which refuse first.
    with pytest.raises(UserError, match="linear attention cannot take"):
        function(x, x, x, **wrong)


def test_heads_must_be_shared_evenly():
    with pytest.raises(UserError, match="3 query heads cannot share 2 key heads"):
        linear_attention(jnp.ones((1, 3, 3, 4)), jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2, 4)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def relative_errors(seed, features, orthogonal):
    """Of 400 estimates of `exp(⟨x, y⟩)` for each of 20 pairs, and `‖x + y‖²`, which is about 1: the variance grows with its exponential."""
    x, y = (0.25 * vector for vector in normal(0, (20, 8), (20, 8)))

    def estimate(key):
        projection = random_projection(key, features, 8, orthogonal=orthogonal)
        (one, one_scale), (other, other_scale) = (positive_features(z, projection, 0.0) for z in (x, y))
        return (one * other).mean(-1) * jnp.exp(one_scale + other_scale)

    estimates = jax.vmap(estimate)(jax.random.split(jax.random.key(seed), 400))
    return estimates / jnp.exp((x * y).sum(-1)) - 1, jnp.square(x + y).sum(-1)


def test_the_error_of_the_kernel_falls_as_one_over_the_root_of_the_features():
    counts = [8, 32, 128]
    for seed in range(3):
        errors = [np.sqrt(np.square(relative_errors(seed, count, True)[0]).mean()) for count in counts]
        assert -0.6 < np.polyfit(np.log(counts), np.log(errors), 1)[0] < -0.4


def test_the_estimate_has_no_bias_and_independent_rows_the_variance_of_the_paper():
    errors, square = relative_errors(5, 32, False)
    assert abs(errors.mean()) < 5 * float(errors.std()) / errors.size**0.5
    # Lemma 2: (exp(‖x + y‖²) − 1) / M, relative to the square of the kernel.
    np.testing.assert_allclose(jnp.square(errors).mean(), (jnp.expm1(square) / 32).mean(), rtol=0.15)


def test_orthogonal_features_have_less_variance_than_independent_ones():
    for seed in range(3):
        orthogonal, independent = (relative_errors(seed, 8, which)[0].var() for which in (True, False))
        assert orthogonal < 0.9 * independent


def test_rows_of_a_projection_are_orthogonal_in_blocks_with_the_norms_of_normal_vectors():
    rows = random_projection(jax.random.key(0), 20, 8)
    assert rows.shape == (20, 8)
    products = np.asarray(rows @ rows.T)
    for block in (slice(0, 8), slice(8, 16), slice(16, 20)):
        np.testing.assert_allclose(products[block, block], np.diag(np.diag(products[block, block])), atol=1e-4)
    assert np.abs(products[:8, 8:16]).max() > 0.1
    squares = np.square(random_projection(jax.random.key(1), 8000, 8)).sum(-1)
    # χ²(8) has mean 8 and variance 16; these bounds are five deviations of their estimates.
    assert abs(squares.mean() - 8) < 5 * (16 / 8000) ** 0.5
    assert abs(squares.var() - 16) < 5 * (2 * 16**2 * (1 + 6 / 8) / 8000) ** 0.5 * 2


def test_the_projection_is_drawn_anew_where_it_may_change_and_only_when_due():
    module = RandomFeatureAttention(6, redraw_every=2)
    query, key, value = normal(0, (1, 5, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4))
    variables = module.init(jax.random.key(0), query, key, value)
    assert "params" not in variables and variables["random_features"]["calls"] == 0
    first = variables["random_features"]["projection"]

    train = jax.jit(
        lambda variables, seed: module.apply(
            variables, query, key, value, mutable=["random_features"], rngs={"random_features": jax.random.key(seed)}
        )
    )
    seen = []
    for seed in range(4):
        _, variables = train(variables, seed)
        seen.append(variables["random_features"]["projection"])
    np.testing.assert_array_equal(seen[0], first)
    assert (seen[1] != first).any() and (seen[3] != seen[1]).any()
    np.testing.assert_array_equal(seen[2], seen[1])

    still = module.apply(variables, query, key, value)  # Neither mutable nor with an rng.
    by_hand = functools.partial(positive_features, projection=seen[-1])
    np.testing.assert_allclose(still, linear_attention(query, key, value, scale=0.5, feature_map=by_hand), atol=1e-6)
    whole = module.apply(variables, query, key, value, is_causal=True)
    start, state = module.apply(variables, query[:, :3], key[:, :3], value[:, :3], method="decode")
    rest, _ = module.apply(variables, query[:, 3:], key[:, 3:], value[:, 3:], state, method="decode")
    np.testing.assert_allclose(jnp.concatenate([start, rest], axis=1), whole, atol=1e-5)


@pytest.mark.parametrize("attention", [linear_attention, RandomFeatureAttention(), RandomFeatureAttention(8, orthogonal=False)])
def test_it_drops_into_multi_head_attention(attention):
    (x,) = normal(0, (2, 9, 8))
    module = MultiHeadAttention(2, attention=attention)
    mask = (jnp.arange(9) < jnp.asarray([9, 4])[:, None])[:, None, None]
    variables = module.init(jax.random.key(0), x)
    out = jax.jit(lambda x: module.apply(variables, x, mask=mask, is_causal=True))(x)
    same = module.apply(variables, x[1:, :4], is_causal=True)
    np.testing.assert_allclose(out[1, :4], same[0], atol=1e-5)
