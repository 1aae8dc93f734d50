"""What all implementations of softmax attention hold to alike: ours, that in a window, and those of `pallas_kernels`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config

import pallas_kernels
from jaxdl.nn import dot_product_attention, linear_attention, sliding_window_attention


@pytest.fixture
def untyped(monkeypatch):
    """As outside of tests, where types are not checked before values are."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


WIDE = 64  # Positions: more than a tile of some.
IMPLEMENTATIONS = {
    "plain": dot_product_attention,
    "window": functools.partial(sliding_window_attention, block=8),
    "window, pallas": functools.partial(sliding_window_attention, implementation="pallas"),
    "flash": pallas_kernels.dot_product_attention,
    "chunked": functools.partial(pallas_kernels.dot_product_attention, implementation="xla_chunked"),
}
everywhere = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def operands(dtype=jnp.float32, length=WIDE):
    random = np.random.default_rng(0)
    shapes = (2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def oracle(query, key, value, allowed):
    """In float64, pair by pair; what is not allowed is never touched."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape[:3] + value.shape[3:])
    allowed = np.broadcast_to(allowed, (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
    for b, head, t in np.ndindex(allowed.shape[:3]):
        seen = np.flatnonzero(allowed[b, head, t])
        if len(seen):
            kv = head // (query.shape[2] // key.shape[2])
            logits = key[b, seen, kv] @ query[b, t, head] / np.sqrt(query.shape[3])
            weights = np.exp(logits - logits.max())
            out[b, t, head] = weights @ value[b, seen, kv] / weights.sum()
    return out


REAL = np.arange(WIDE) < np.array([WIDE, WIDE - 20])[:, None]
TRIANGLE = np.tri(WIDE, dtype=bool)[None, None]
NEAR = np.abs(np.arange(WIDE) - np.arange(WIDE)[:, None]) <= 9
HIDING = {
    "padding": (dict(mask=REAL[:, None, None]), REAL[:, None, None]),
    "lengths": (dict(key_value_seq_lengths=jnp.asarray(REAL.sum(1))), REAL[:, None, None]),
    "a whole mask": (dict(mask=REAL[:, None, None] & np.ones((2, 4, WIDE, 1), bool)), REAL[:, None, None]),
    "a triangle": (dict(mask=TRIANGLE & REAL[:, None, None]), TRIANGLE & REAL[:, None, None]),
    "padding and order": (dict(mask=REAL[:, None, None], is_causal=True), TRIANGLE & REAL[:, None, None]),
    "padding and a window": (dict(mask=REAL[:, None, None], local_window_size=(9, 9)), NEAR & REAL[:, None, None]),
}


@everywhere
@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("filler", [np.nan, np.inf, 1e30])
def test_what_is_hidden_may_hold_anything(name, hiding, filler):
    query, key, value = operands()
    options, allowed = HIDING[hiding]
    options = {each: jnp.asarray(x) if isinstance(x, np.ndarray) else x for each, x in options.items()}
    real = jnp.asarray(REAL)[..., None, None]
    filled = [jnp.where(real, x, filler) for x in (key, value)]
    call = functools.partial(IMPLEMENTATIONS[name], **options)
    np.testing.assert_allclose(call(query, *filled), oracle(query, key, value, allowed), atol=2e-6)
    gradients = jax.grad(lambda *given: jnp.square(call(*given)).sum(), argnums=(0, 1, 2))
    clean = gradients(query, *(jnp.where(real, x, 0) for x in (key, value)))
    chex.assert_trees_all_close(gradients(query, *filled), clean, atol=1e-5)


@everywhere
def test_who_sees_what_is_not_finite_gets_it(name):
    query, key, value = operands()
    out = IMPLEMENTATIONS[name](query, key, value.at[0, 40, 1].set(jnp.nan), is_causal=True)
    spoiled = np.zeros(out.shape[:3], bool)
    spoiled[0, 40:, 2:] = True
    np.testing.assert_array_equal(np.isnan(out).any(-1), spoiled)


@everywhere
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float16, 3e-3), (jnp.bfloat16, 3e-2), (jnp.float32, 1e-6)])
def test_every_float_is_computed(name, dtype, tolerance):
    given = operands(dtype)
    out = jax.jit(functools.partial(IMPLEMENTATIONS[name], is_causal=True))(*given)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(np.float32), oracle(*given, TRIANGLE), atol=tolerance)
    slopes = jax.grad(lambda *x: IMPLEMENTATIONS[name](*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(*given)
    assert all(slope.dtype == dtype and bool(jnp.isfinite(slope).all()) for slope in slopes)


REFUSED = {
    "an additive mask": dict(mask=jnp.where(TRIANGLE, 0.0, -jnp.inf)),
    "a mask of integers": dict(mask=TRIANGLE.astype(np.int32)),
    "a bool as bias": dict(bias=jnp.asarray(TRIANGLE)),
    "integers as bias": dict(bias=jnp.zeros((1, 1, WIDE, WIDE), jnp.int32)),
    "a soft cap of 0": dict(logits_soft_cap=0.0),
    "a soft cap below 0": dict(logits_soft_cap=-3.0),
    "a soft cap that is NaN": dict(logits_soft_cap=float("nan")),
    "a scale that is NaN": dict(scale=float("nan")),
    "an endless scale": dict(scale=float("inf")),
    "a window below 0": dict(local_window_size=-1),
    "a window with a side below 0": dict(local_window_size=(3, -1)),
    "a window of halves": dict(local_window_size=2.5),
    "a window of three": dict(local_window_size=(1, 2, 3)),
    "a mask for other keys": dict(mask=jnp.ones((1, 1, WIDE, WIDE - 1), bool)),
}


@everywhere
@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_meant_is_refused(name, wrong, untyped):
    options = {each: jnp.asarray(x) if isinstance(x, np.ndarray) else x for each, x in REFUSED[wrong].items()}
    with pytest.raises(ValueError, match="got|give"):
        IMPLEMENTATIONS[name](*operands(), **options)


@everywhere
def test_operands_that_do_not_fit_together_are_refused(name, untyped):
    query, key, value = operands()
    for wrong in (
        [x.astype(jnp.int32) for x in (query, key, value)],
        (query, key.astype(jnp.bfloat16), value),
        (query, key[..., :4], value),
        (query, key[:, :-1], value),
        (query, key[:1], value[:1]),
        (query[:, :, :3], key, value),
    ):
        with pytest.raises(ValueError):
            IMPLEMENTATIONS[name](*wrong)


@everywhere
@pytest.mark.parametrize("window", [2**31, (2**40, 2**31 - 1), np.int64(2**31)])
def test_a_window_may_be_as_wide_as_one_likes(name, window):
    given = operands()
    np.testing.assert_allclose(IMPLEMENTATIONS[name](*given, local_window_size=window), oracle(*given, True), atol=2e-6)


@everywhere
def test_who_sees_nothing_gets_0(name):
    query, key, value = operands()
    mask = jnp.ones((1, 1, WIDE, WIDE), bool).at[:, :, 5].set(False)
    out = IMPLEMENTATIONS[name](query, key, value, mask=mask)
    assert (np.asarray(out[:, 5]) == 0).all() and np.isfinite(out).all()
    no_keys = IMPLEMENTATIONS[name](query, key[:, :0], value[:, :0])
    assert no_keys.shape == query.shape and (np.asarray(no_keys) == 0).all()
    assert IMPLEMENTATIONS[name](query[:, :0], key, value).shape == (2, 0, 4, 8)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("filler", [np.nan, np.inf])
def test_linear_attention_does_not_look_behind_its_mask_either(is_causal, filler):
    query, key, value = operands()
    real = jnp.asarray(REAL)
    call = functools.partial(linear_attention, mask=real[:, None, None], is_causal=is_causal)
    filled, clean = ([jnp.where(real[..., None, None], x, other) for x in (key, value)] for other in (filler, 0))
    np.testing.assert_array_equal(call(query, *filled), call(query, *clean))
    gradients = jax.grad(lambda *given: jnp.square(call(*given)).sum(), argnums=(0, 1, 2))
    chex.assert_trees_all_close(gradients(query, *filled), gradients(query, *clean))
