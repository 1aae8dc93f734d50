"""The public function: jax.nn's conventions, the choice among implementations, and every way to differentiate."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.attention.masks import Causal, Segment
from pallas_kernels.attention.problem import BlockSizes

RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE, BIAS = (
    jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)
    for shape in ((2, 40, 4, 16), (2, 50, 2, 16), (2, 50, 2, 16), (1, 4, 40, 50))
)
MASK = jnp.asarray(RANDOM.random((2, 1, 40, 50)) < 0.9)
MOVEMENT = tuple(jnp.asarray(RANDOM.standard_normal(x.shape), jnp.float32) for x in (QUERY, KEY, VALUE, BIAS))
COTANGENT = jnp.asarray(RANDOM.standard_normal(QUERY.shape), jnp.float32)
ALL = dict(scale=0.3, is_causal=True, local_window_size=(30, 3))


def ours(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    return pallas_kernels.dot_product_attention(query, key, value, bias, MASK, **ALL, block_sizes=BlockSizes(16, 16, 16, 16))


def jaxs(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, bias, MASK, **ALL)


def loss(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *args: (attend(*args) * COTANGENT).sum()


def assert_close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


GIVEN = QUERY, KEY, VALUE, BIAS
TRANSFORMATIONS: dict[str, Callable[[Callable[..., jax.Array]], Any]] = {
    "the value": lambda f: f(*GIVEN),
    "grad": lambda f: jax.grad(loss(f), (0, 1, 2, 3))(*GIVEN),
    "grad of a checkpoint": lambda f: jax.grad(loss(jax.checkpoint(f)), (0, 2))(*GIVEN),
    "jvp": lambda f: jax.jit(functools.partial(jax.jvp, f))(GIVEN, MOVEMENT),
    "jvp by one argument": lambda f: jax.jvp(lambda value: f(QUERY, KEY, value, BIAS), (VALUE,), MOVEMENT[2:3]),
    "linearize": lambda f: jax.linearize(f, *GIVEN)[1](*MOVEMENT),
    "jvp of grad": lambda f: jax.jvp(jax.grad(loss(f), (0, 1, 2, 3)), GIVEN, MOVEMENT),
    "grad of jvp": lambda f: jax.grad(lambda t: jax.jvp(loss(f), GIVEN, (t, *MOVEMENT[1:]))[1])(QUERY),
    "vmap of grad": lambda f: jax.vmap(jax.grad(loss(f), (0, 1, 3)), (0, None, 0, None))(
        jnp.stack([QUERY, 2 * QUERY]), KEY, jnp.stack([VALUE, VALUE[::-1]]), BIAS
    ),
    "grad of vmap": lambda f: jax.grad(
        lambda q, b: (jax.vmap(f, (0, None, None, None))(q, KEY, VALUE, b) * COTANGENT).sum(), (0, 1)
    )(jnp.stack([QUERY, 2 * QUERY]), BIAS),
    "jvp of vmap": lambda f: jax.jvp(
        lambda q: jax.vmap(f, (0, None, None, None))(q, KEY, VALUE, BIAS),
        (jnp.stack([QUERY, -QUERY]),),
        (jnp.stack([COTANGENT] * 2),),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations_commute_with_jax_nn(name: str) -> None:
    assert_close(TRANSFORMATIONS[name](ours), TRANSFORMATIONS[name](jaxs), 2e-5)


def test_the_log_sum_exp_has_a_gradient_and_merges_halves() -> None:
    """Attention over keys in two halves, merged by their log-sum-exps, is attention over all, and so is its gradient: what ring attention needs."""

    def merged(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        halves = [
            pallas_kernels.dot_product_attention(query, key[:, part], value[:, part], return_residual=True)
            for part in (slice(0, 20), slice(20, None))
        ]
        total = jnp.logaddexp(halves[0][1], halves[1][1])
        return sum(out * jnp.exp(lse - total)[..., None] for out, lse in halves)

    whole = jax.nn.dot_product_attention
    assert_close(jax.grad(loss(merged), (0, 1, 2))(*GIVEN[:3]), jax.grad(loss(whole), (0, 1, 2))(*GIVEN[:3]))


def test_pieces_of_a_sequence_by_their_offsets_make_the_whole() -> None:
    slopes = jnp.asarray([0.5, 0.25, 0.1, 0.0])
    attend = functools.partial(
        pallas_kernels.dot_product_attention, is_causal=True, local_window_size=(12, 0), alibi_slopes=slopes
    )
    whole = attend(QUERY, KEY, VALUE)
    pieces = [jax.jit(attend)(QUERY[:, start : start + 10], KEY, VALUE, q_offset=start) for start in range(0, 40, 10)]
    assert_close(jnp.concatenate(pieces, 1), whole)


def test_a_static_mask_is_the_dense_one_and_segments_are_separate_sequences() -> None:
    ids = (1,) * 15 + (0,) * 25
    key, value = KEY[:, :40], VALUE[:, :40]
    static = pallas_kernels.dot_product_attention(QUERY, key, value, block_mask=Segment(ids) & Causal())
    dynamic = pallas_kernels.dot_product_attention(QUERY, key, value, is_causal=True, q_segment_ids=jnp.asarray([ids, ids]))
    parts = [
        jax.nn.dot_product_attention(QUERY[:, a:b], key[:, a:b], value[:, a:b], is_causal=True) for a, b in ((0, 15), (15, 40))
    ]
    assert_close(static, jnp.concatenate(parts, 1))
    assert_close(dynamic, static)


@pytest.mark.parametrize("implementation", [None, "xla_chunked", "xla"])
def test_a_batch_may_be_left_out(implementation: str | None) -> None:
    out = pallas_kernels.dot_product_attention(QUERY[0], KEY[0], VALUE[0], is_causal=True, implementation=implementation)
    assert_close(out, jax.nn.dot_product_attention(QUERY[0], KEY[0], VALUE[0], is_causal=True))


def test_jaxs_own_implementation_has_the_conventions_of_this_one() -> None:
    arguments = dict(
        is_causal=True, q_offset=-3, alibi_slopes=jnp.asarray([0.5, 0.25, 0.1, 0.0]), key_value_seq_lengths=jnp.asarray([0, 50])
    )
    assert_close(
        *(
            pallas_kernels.dot_product_attention(QUERY, KEY, VALUE, **arguments, implementation=name)
            for name in ("xla", "xla_chunked")
        )
    )


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    def temporaries(length: int, attend: Callable[..., jax.Array]) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        gradients = jax.jit(lambda q, k, v, d: jax.vjp(attend, q, k, v)[1](d))
        return gradients.lower(shape, shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    attend = functools.partial(pallas_kernels.dot_product_attention, is_causal=True)
    short, long = temporaries(4096, attend), temporaries(16384, attend)
    assert long < 4.2 * short
    assert short < 0.08 * temporaries(4096, functools.partial(jax.nn.dot_product_attention, is_causal=True))


def test_empty_tiles_are_not_computed() -> None:
    """Keys in tiles that nobody sees may be NaN even where nothing says so, since nobody looks."""
    key = KEY.at[:, 32:].set(jnp.nan)
    attend = functools.partial(pallas_kernels.dot_product_attention, block_sizes=BlockSizes(16, 16))
    hidden = jnp.broadcast_to(jnp.arange(50) < 32, (1, 1, 40, 50))
    assert jnp.isfinite(attend(QUERY, key, VALUE, mask=hidden)).all()
    assert jnp.isnan(attend(QUERY, key, VALUE)).all()


def test_without_keys_there_is_nothing_to_see() -> None:
    out, lse = pallas_kernels.dot_product_attention(QUERY, KEY[:, :0], VALUE[:, :0], return_residual=True)
    assert out.shape == QUERY.shape and not out.any() and jnp.isneginf(lse).all() and lse.shape == QUERY.shape[:3]


SHAPE = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)


def test_supports_says_why_not_and_looks_at_shapes_only() -> None:
    assert pallas_kernels.supports("xla_chunked", SHAPE, SHAPE, SHAPE, is_causal=True) is None
    assert "soft cap" in pallas_kernels.supports("xla", SHAPE, SHAPE, SHAPE, logits_soft_cap=30.0)
    assert "float32" in pallas_kernels.supports("cudnn", QUERY, KEY, VALUE)
    assert "log-sum-exp" in pallas_kernels.supports("xla", SHAPE, SHAPE, SHAPE, return_residual=True)
    wide = jax.ShapeDtypeStruct((2, 64, 4, 257), jnp.bfloat16)
    for kernel in ("mosaic_gpu", "mosaic_tpu"):
        assert "256" in pallas_kernels.supports(kernel, wide, wide, wide)


def test_a_kernel_that_is_demanded_refuses_a_platform_that_it_is_not_for() -> None:
    with pytest.raises(NotImplementedError, match="no attention kernel for this platform"):
        pallas_kernels.flash_attention(QUERY, KEY, VALUE)
    with pytest.raises(NotImplementedError, match="log-sum-exp"):
        pallas_kernels.dot_product_attention(QUERY, KEY, VALUE, implementation="xla", return_residual=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(implementation="triton"), "mosaic_gpu, mosaic_tpu, xla_chunked, cudnn, xla"),
        (dict(interpret=True), "name one of mosaic_gpu, mosaic_tpu"),
        (dict(key=KEY[:, :5]), r"got query \(2, 40, 4, 16\), key \(2, 5, 2, 16\)"),
        (dict(query=QUERY[:, :, :3]), "3 query heads cannot share 2 key heads"),
        (dict(query=QUERY.astype(jnp.bfloat16)), "got bfloat16, float32, float32"),
        (dict(mask=jnp.ones((1, 1, 40, 50))), "a mask is bool"),
        (dict(bias=MASK), "a bool array is a mask"),
        (dict(bias=jnp.zeros((1, 3, 40, 50))), r"broadcasts to `B N T S` = \(2, 4, 40, 50\)"),
        (dict(q_segment_ids=jnp.zeros((2, 40), int)), "come together"),
        (dict(q_segment_ids=jnp.zeros((2, 9), int), kv_segment_ids=jnp.zeros((2, 50), int)), r"q_segment_ids is integer of shape \(2, 40\)"),
        (dict(local_window_size=(-1, 0)), "0 or more"),
        (dict(logits_soft_cap=0.0), "positive"),
        (dict(sinks=jnp.zeros(3)), r"sinks is floating of shape \(4,\)"),
        (dict(alibi_slopes=jnp.zeros(4, int)), "alibi_slopes is floating"),
        (dict(query_seq_lengths=jnp.zeros(2)), "query_seq_lengths is integer"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pallas_kernels.dot_product_attention(**{"query": QUERY, "key": KEY, "value": VALUE, **arguments})
