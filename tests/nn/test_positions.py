"""What holds for positions without another library."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.nn import (
    LearnedPositions,
    RelativePositionBias,
    alibi_bias,
    alibi_slopes,
    interpolate_positions,
    ntk_frequencies,
    relative_buckets,
    rope,
    rotary_frequencies,
    sinusoidal,
    sinusoidal_2d,
    yarn_frequencies,
    yarn_magnitude,
)


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def tolerance(request):
    """Of tables in jax's default precision."""
    with jax.enable_x64(request.param):
        yield 1e-12 if request.param else 1e-5


def test_sinusoidal_is_the_papers_double_loop(tolerance):
    table = np.asarray(sinusoidal(40, 10))
    for t in range(40):
        for i in range(5):
            angle = t / 10_000 ** (2 * i / 10)
            np.testing.assert_allclose(table[t, 2 * i : 2 * i + 2], [math.sin(angle), math.cos(angle)], atol=tolerance)


def test_slopes_and_frequencies_are_the_papers(tolerance):
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=tolerance)
    bias = [[-abs(i - j) / 4 for j in range(5)] for i in range(5)]
    np.testing.assert_allclose(alibi_bias(4, 5, 5)[0, 0], bias, rtol=tolerance)
    np.testing.assert_allclose(rotary_frequencies(6, 1000.0), [1, 0.1, 0.01], rtol=tolerance)
    np.testing.assert_allclose(ntk_frequencies(6, 8.0, 1000.0), [1, 0.1 / 8**0.5, 0.01 / 8], rtol=tolerance)
    # Turns within 100 positions: 15.9, 1.59 and 0.159; the ramp is from index 0 to 2.
    assert yarn_frequencies(6, 8.0, 100, 1000.0).dtype == jnp.asarray(0.0).dtype
    kept = 1 - np.asarray([0, 1, 2]) / 2
    np.testing.assert_allclose(
        yarn_frequencies(6, 8.0, 100, 1000.0), np.asarray([1, 0.1, 0.01]) * (kept + (1 - kept) / 8), rtol=tolerance
    )


@pytest.mark.parametrize("endpoint", [False, True])
def test_sinusoidal_2d_is_the_loop_over_places(endpoint, tolerance):
    table = np.asarray(sinusoidal_2d(3, 5, 12, endpoint=endpoint))
    for row in range(3):
        for column in range(5):
            angles = [[place / 10_000 ** (i / (2 if endpoint else 3)) for i in range(3)] for place in (column, row)]
            want = [f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis]
            np.testing.assert_allclose(table[row * 5 + column], want, atol=tolerance)


@pytest.mark.parametrize("new", [(2, 3), (5, 4), (7, 9)])
def test_interpolated_positions_are_the_loop_over_sixteen_neighbours(new):
    """Keys 1981, eq. 4 with a = −3/4, in both directions; beyond the border its nearest place is repeated. A first row, of a class token, stays."""

    def keys(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    old, table = (3, 4), np.random.default_rng(0).standard_normal((13, 2))
    found = np.asarray(interpolate_positions(jnp.asarray(table, jnp.float32), old, new))
    np.testing.assert_array_equal(found[0], np.float32(table[0]))
    for row in range(new[0]):
        for column in range(new[1]):
            y, x = (row + 0.5) * old[0] / new[0] - 0.5, (column + 0.5) * old[1] / new[1] - 0.5
            want = np.zeros(2)
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    place = min(max(i, 0), old[0] - 1) * old[1] + min(max(j, 0), old[1] - 1)
                    want += keys(y - i) * keys(x - j) * table[1 + place]
            np.testing.assert_allclose(found[1 + row * new[1] + column], want, atol=1e-5)


def test_positions_are_interpolated_from_a_grid_that_is_there():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((12, 5)), jnp.float32)
    np.testing.assert_allclose(interpolate_positions(table, (3, 4), (3, 4)), table, atol=1e-7)
    with pytest.raises(UserError, match="12 positions are fewer than the 4×4 places"):
        interpolate_positions(table, (4, 4), (5, 5))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_depends_on_the_difference_of_positions_alone(interleaved):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))

    @jax.jit
    def product(m, n):
        turned = (rope(x, p[None], interleaved=interleaved) for x, p in ((query, m), (key, n)))
        return jnp.vdot(*turned)

    with jax.default_matmul_precision("highest"):
        products = jax.vmap(product)(jnp.asarray([3, 13, 203]), jnp.asarray([1, 11, 201]))
    np.testing.assert_allclose(products, products[0], atol=1e-4)
    assert abs(products[0] - product(jnp.asarray(3), jnp.asarray(2))) > 1e-2


def test_the_two_orders_of_pairs_differ_by_a_permutation():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    order = np.arange(8).reshape(4, 2).T.reshape(-1)  # 0 2 4 6 1 3 5 7
    apart = rope(x[..., order], jnp.arange(5))
    np.testing.assert_allclose(apart, rope(x, jnp.arange(5), interleaved=True)[..., order], atol=1e-6)


def test_rope_in_bfloat16_still_tells_far_positions_apart():
    x = jax.random.normal(jax.random.key(0), (2, 1, 8))
    positions = jnp.asarray([10_000, 10_001])
    exact = rope(x, positions)
    rounded = rope(x.astype(jnp.bfloat16), positions)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(rounded), exact, atol=2**-6)


def test_scalings_of_context():
    plain, ntk = rotary_frequencies(64), ntk_frequencies(64, 8.0)
    np.testing.assert_allclose([ntk[0], ntk[-1]], [plain[0], plain[-1] / 8], rtol=1e-6)
    np.testing.assert_allclose(ntk_frequencies(64, 8.0, length=100, original_length=4096), plain, rtol=1e-6)
    np.testing.assert_array_equal(ntk_frequencies(2, 8.0), jnp.ones(1))
    yarn = yarn_frequencies(64, 8.0, 4096)
    turns = plain * 4096 / (2 * math.pi)
    np.testing.assert_allclose(yarn[turns > 64], plain[turns > 64], rtol=1e-6)
    np.testing.assert_allclose(yarn[turns < 0.5], plain[turns < 0.5] / 8, rtol=1e-6)
    assert (jnp.diff(yarn) < 0).all() and yarn_magnitude(1.0) == 1


def test_what_cannot_be_turned_is_refused():
    x = jnp.ones((1, 2, 1, 6))
    for wrong in (
        lambda: rope(jnp.ones((1, 2, 1, 5)), jnp.arange(2)),
        lambda: rope(x, jnp.arange(2), rotary_frequencies(8)),
        lambda: sinusoidal_2d(2, 2, 6),
        lambda: ntk_frequencies(8, 2.0, length=9),
    ):
        with pytest.raises(UserError):
            wrong()


def test_biases_of_a_decoding_step_are_the_last_rows():
    np.testing.assert_array_equal(alibi_bias(6, 2, 9), alibi_bias(6, 9, 9)[:, :, -2:])
    module = RelativePositionBias(4, bidirectional=False)
    variables = {"params": {"table": jnp.arange(128.0).reshape(32, 4)}}
    np.testing.assert_array_equal(module.apply(variables, 2, 9), module.apply(variables, 9, 9)[:, :, -2:])


def test_buckets_of_a_decoder_look_back_only():
    buckets = relative_buckets(jnp.asarray([5, 0, -1, -15, -16, -127, -128, -(2**30)]), bidirectional=False)
    np.testing.assert_array_equal(buckets, [0, 0, 1, 15, 16, 31, 31, 31])


def test_relative_bias_is_an_attention_bias_with_a_gradient_for_each_used_bucket():
    module = RelativePositionBias(2, num_buckets=8, max_distance=6)
    variables = jax.jit(module.init, static_argnums=(1, 2))(jax.random.key(0), 4, 4)
    query = jnp.ones((1, 4, 2, 3))
    value = jax.random.normal(jax.random.key(1), query.shape)
    loss = lambda variables: jnp.square(
        jax.nn.dot_product_attention(query, query, value, bias=module.apply(variables, 4, 4))
    ).sum()
    gradient = jax.jit(jax.grad(loss))(variables)["params"]["table"]
    used = np.unique(relative_buckets(jnp.arange(-3, 4), 8, 6))
    assert jnp.isfinite(gradient).all() and set(np.flatnonzero(np.abs(gradient).sum(1))) == set(used)


def test_learned_positions_of_decoded_tokens_are_those_of_the_whole():
    x = jax.random.normal(jax.random.key(1), (2, 5, 4))
    module = LearnedPositions()
    whole, variables = module.init_with_output(jax.random.key(0), x)
    positions = jnp.asarray([[2, 3], [-1, 0]])  # The second example begins with padding.
    got = module.apply(variables, jnp.stack([x[0, 2:4], x[1, :2]]), positions)
    np.testing.assert_array_equal(got[0], whole[0, 2:4])
    table = variables["params"]["table"]
    np.testing.assert_array_equal(got[1], x[1, :2] + table[:1])
    assert jnp.isnan(module.apply(variables, x, positions=jnp.arange(5)[None] + 4)[:, 1:]).all()
    longer = LearnedPositions(7)
    variables = longer.init(jax.random.key(0), x)
    assert variables["params"]["table"].shape == (7, 4)
    np.testing.assert_array_equal(longer.apply(variables, x), longer.apply(variables, x, positions=jnp.arange(5)[None]))
    with pytest.raises(UserError, match="8 tokens are more than the 7 positions"):
        longer.apply(variables, jnp.ones((1, 8, 4)))


def test_biases_of_positions_are_those_of_numbers():
    module, variables = RelativePositionBias(2), {"params": {"table": jnp.arange(64.0).reshape(32, 2)}}
    for bias in (functools.partial(alibi_bias, 2), functools.partial(module.apply, variables)):
        whole = bias(9, 9)
        np.testing.assert_array_equal(bias(7 + jnp.arange(2), np.int64(9)), whole[:, :, 7:])
        each = bias(jnp.asarray([[4], [8]]), jnp.stack([jnp.arange(9), jnp.arange(9)[::-1]]))
        np.testing.assert_array_equal(each[0], whole[0, :, 4:5])
        np.testing.assert_array_equal(each[1], whole[0, :, 8:, ::-1])


def test_learned_positions_are_added():
    x = jnp.ones((2, 3, 4))
    y, variables = LearnedPositions().init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, x + variables["params"]["table"])
