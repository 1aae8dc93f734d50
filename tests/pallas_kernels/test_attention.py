"""Every implementation against the definition in float64, over features, their pairs, lengths, dtypes and what may lie behind a mask."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.attention import api, reference
from pallas_kernels.attention.masks import BigBird, Causal, Longformer
from pallas_kernels.attention.problem import BlockSizes, Operands, Spec

SLOW = pytest.mark.slow  # Interpreters take seconds a case; the kernels' own tests run some of them each time.
IMPLEMENTATIONS = ["xla_chunked", pytest.param("mosaic_gpu", marks=SLOW), pytest.param("mosaic_tpu", marks=SLOW)]


def feature(name: str, batch: int, queries: int, keys: int, heads: int, seed: int = 1) -> dict[str, Any]:
    """The arguments of a feature by its name. Each one hides or moves something at the lengths of these tests."""
    random = np.random.default_rng(seed)

    def ids(length: int) -> jax.Array:
        """Three segments, out of order and with gaps."""
        return jnp.asarray(np.take([2, 0, 1, 2, 1], np.arange(length) * 5 // length)[None].repeat(batch, 0), jnp.int32)

    def lengths(longest: int) -> jax.Array:
        """The first example is whole, and the last one empty."""
        return jnp.asarray(np.linspace(longest, 0, batch).astype(np.int32))

    values: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": lambda: {},
        "causal": lambda: {"is_causal": True},
        "window": lambda: {"local_window_size": (9, 4)},
        "bias": lambda: {"bias": jnp.asarray(random.standard_normal((1, heads, queries, keys)), jnp.float32)},
        "mask": lambda: {"mask": jnp.asarray(random.random((batch, 1, queries, keys)) < 0.6)},
        "segments": lambda: {"q_segment_ids": ids(queries), "kv_segment_ids": ids(keys)},
        "lengths": lambda: {"query_seq_lengths": lengths(queries), "key_value_seq_lengths": lengths(keys)[::-1]},
        "soft cap": lambda: {"logits_soft_cap": 1.5},
        "sinks": lambda: {"sinks": jnp.asarray(random.standard_normal(heads), jnp.float32)},
        "ALiBi": lambda: {"alibi_slopes": jnp.asarray(2.0 ** -np.arange(1, heads + 1), jnp.float32)},
        "offset": lambda: {"q_offset": jnp.asarray(random.integers(-5, 9, batch), jnp.int32)},
        "block mask": lambda: {"block_mask": Longformer(8, (3, 30)) & Causal() | BigBird(32, block=4, random_blocks=1)},
    }
    return values[name]()


FEATURES = ["causal", "window", "bias", "mask", "segments", "lengths", "soft cap", "sinks", "ALiBi", "offset", "block mask"]
DIFFERENTIABLE = "bias", "alibi_slopes", "sinks"


def draw(
    batch: int, queries: int, keys: int, heads: int, key_heads: int, width: int, dtype: Any = "float32", seed: int = 0
) -> list[jax.Array]:
    """Query, key, value, and the cotangents of out and of lse."""
    random = np.random.default_rng(seed)
    shapes = (batch, queries, heads, width), *[(batch, keys, key_heads, width)] * 2, (batch, queries, heads, width)
    arrays = [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]
    return [*arrays, jnp.asarray(random.standard_normal((batch, queries, heads)), jnp.float32)]


def naive(spec: Spec, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The whole matrix of logits at once, with the dtypes of `jax.nn.dot_product_attention`: what anybody would write."""
    groups = operands.query.shape[2] // operands.key.shape[2]
    key, value = (jnp.repeat(x, groups, 2) for x in (operands.key, operands.value))
    logits = spec.scale * jnp.einsum("btnh,bsnh->bnts", operands.query, key, preferred_element_type=jnp.float32)
    if spec.soft_cap is not None:
        logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
    if operands.alibi_slopes is not None:
        logits -= operands.alibi_slopes[:, None, None] * jnp.asarray(reference._distances(operands), jnp.float32)
    if operands.bias is not None:
        logits += operands.bias
    visible = jnp.asarray(reference.visible(spec, operands))
    logits = jnp.where(visible, logits, -jnp.inf)
    if operands.sinks is not None:
        sinks = jnp.broadcast_to(operands.sinks[:, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, sinks], -1)
    some = jnp.isfinite(logits).any(-1, keepdims=True)
    logits = jnp.where(some, logits, 0)
    lse = jax.nn.logsumexp(logits, -1)
    weights = jnp.where(some, jnp.exp(logits - lse[..., None]), 0)[..., : key.shape[1]].astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value), jnp.where(some[..., 0], lse, -jnp.inf)


def check(implementation: str, arrays: list[jax.Array], arguments: dict[str, Any], floor: float = 2e-6) -> None:
    """Output, log-sum-exp and all gradients are at most twice as far from the definition as the naive computation is, or within `floor` of the largest value."""
    *qkv, d_out, d_lse = arrays
    interpret = implementation in api.KERNELS
    reason = pallas_kernels.supports(implementation, *qkv, **arguments, return_residual=True)
    if reason is not None:
        pytest.skip(reason)
    moving = dict(zip(("query", "key", "value"), qkv)) | {name: arguments[name] for name in DIFFERENTIABLE if name in arguments}
    fixed = {name: x for name, x in arguments.items() if name not in moving}

    def ours(moving: dict[str, jax.Array]) -> Any:
        return pallas_kernels.dot_product_attention(
            **moving, **fixed, implementation=implementation, interpret=interpret, return_residual=True
        )

    @jax.jit
    def run(moving: dict[str, jax.Array], cotangents: Any) -> Any:
        results, pull = jax.vjp(ours, moving)
        return results, pull(cotangents)[0]

    (out, lse), gradients = run(moving, (d_out, d_lse))
    names = {"query_seq_lengths": "query_lengths", "key_value_seq_lengths": "key_value_lengths"}
    names |= {"local_window_size": "window", "logits_soft_cap": "soft_cap"}
    spec, operands = api._problem(*qkv, **{names.get(name, name): x for name, x in arguments.items() if name != "interpret"})
    wanted_out, wanted_lse = reference.forward(spec, operands)
    wanted = reference.backward(spec, operands, d_out, d_lse.swapaxes(1, 2))
    (naive_out, naive_lse), pull = jax.vjp(lambda moving: naive(spec, operands._replace(**moving)), moving)
    (naive_gradients,) = pull((d_out, d_lse.swapaxes(1, 2)))

    def compare(name: str, value: jax.Array, naive: jax.Array, want: np.ndarray) -> None:
        value, naive = (np.asarray(x).astype(np.float64) for x in (value, naive))
        np.testing.assert_array_equal(np.isneginf(value), np.isneginf(want), err_msg=name)
        value, naive, want = (np.where(np.isneginf(want), 0, x) for x in (value, naive, want))
        error, allowed = np.abs(value - want).max(), np.abs(naive - want).max()
        assert error <= max(2 * allowed, floor * max(1, np.abs(want).max())), (
            f"{name}: {error:.3g} where the naive error is {allowed:.3g}"
        )

    compare("out", out, naive_out, wanted_out)
    compare("lse", lse.swapaxes(1, 2), naive_lse, wanted_lse)
    assert out.dtype == qkv[0].dtype and lse.dtype == jnp.float32
    for name in moving:
        assert gradients[name].dtype == moving[name].dtype
        compare(f"gradient of {name}", gradients[name], naive_gradients[name], getattr(wanted, name))


BLOCKS = BlockSizes(16, 16, 16, 16)
"""So small that short sequences have full, partial and empty tiles. Kernels have least sizes of their own."""


def blocks(implementation: str) -> dict[str, Any]:
    return {"block_sizes": BLOCKS} if implementation == "xla_chunked" else {}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


class TestEveryImplementation:
    @pytest.mark.parametrize("name", ["plain", *FEATURES])
    def test_is_as_exact_as_the_naive_computation(self, implementation: str, name: str) -> None:
        check(implementation, draw(2, 40, 56, 4, 2, 16), feature(name, 2, 40, 56, 4) | blocks(implementation))

    @pytest.mark.parametrize("shift", range(len(FEATURES)))
    def test_features_combine(self, implementation: str, shift: int) -> None:
        """Five at a time. The squares modulo 11, shifted, are the blocks of a biplane: each pair of features is in exactly two."""
        chosen = [FEATURES[(square + shift) % 11] for square in (1, 3, 4, 5, 9)]
        arguments = functools.reduce(lambda a, b: a | feature(b, 2, 40, 56, 4), chosen, blocks(implementation))
        check(implementation, draw(2, 40, 56, 4, 2, 16), arguments)

    @SLOW
    @pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids=" and ".join)
    def test_pairs_of_features_combine(self, implementation: str, pair: tuple[str, str]) -> None:
        arguments = functools.reduce(lambda a, b: a | feature(b, 2, 40, 56, 4), pair, blocks(implementation))
        check(implementation, draw(2, 40, 56, 4, 2, 16), arguments)

    @pytest.mark.parametrize("lengths", [(1, 1), (1, 129), (17, 17), (127, 17), (129, 127)])
    def test_any_length_will_do(self, implementation: str, lengths: tuple[int, int]) -> None:
        check(implementation, draw(1, *lengths, 2, 2, 8), {"is_causal": True})

    @pytest.mark.parametrize("heads", [(3, 3), (6, 2), (5, 1)])
    def test_heads_share_keys(self, implementation: str, heads: tuple[int, int]) -> None:
        check(implementation, draw(2, 20, 30, *heads, 8), feature("ALiBi", 2, 20, 30, heads[0]) | blocks(implementation))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("name", ["causal", "soft cap", "sinks"])
    def test_half_precision(self, implementation: str, dtype: str, name: str) -> None:
        check(implementation, draw(1, 70, 70, 2, 1, 32, dtype), feature(name, 1, 70, 70, 2) | blocks(implementation), floor=1e-3)

    @pytest.mark.parametrize("width", [1, 80, 256])
    def test_any_width_will_do(self, implementation: str, width: int) -> None:
        check(implementation, draw(1, 24, 24, 2, 2, width), {"is_causal": True, "scale": 0.1} | blocks(implementation))

    def test_a_row_that_sees_nothing_gives_zero_and_no_gradient(self, implementation: str) -> None:
        query, key, value, d_out, d_lse = draw(1, 32, 32, 2, 2, 16)
        mask = np.ones((1, 1, 32, 32), bool)
        mask[:, :, [3, 17, 18]] = False
        arguments = {"mask": jnp.asarray(mask), "implementation": implementation, "interpret": implementation in api.KERNELS}
        reason = pallas_kernels.supports(implementation, query, key, value, mask=arguments["mask"])
        if reason is not None:
            pytest.skip(reason)
        attend = functools.partial(pallas_kernels.dot_product_attention, **arguments, return_residual=True)
        (out, lse), pull = jax.vjp(attend, query, key, value)
        hidden = [3, 17, 18]
        assert not out[:, hidden].any() and jnp.isneginf(lse[:, hidden]).all() and jnp.isfinite(lse).sum() == 2 * 29
        gradients = pull((d_out, d_lse))
        assert not gradients[0][:, hidden].any() and all(jnp.isfinite(x).all() for x in gradients)
        # Nor does what flows into such rows come out at keys and values.
        others = pull((d_out.at[:, hidden].set(100.0), d_lse.at[:, hidden].set(100.0)))
        for one, other in zip(gradients, others):
            np.testing.assert_array_equal(one, other)

    def test_what_lies_behind_lengths_may_be_anything(self, implementation: str) -> None:
        query, key, value, d_out, _ = draw(2, 24, 40, 2, 1, 16)
        lengths = {"query_seq_lengths": jnp.asarray([24, 10]), "key_value_seq_lengths": jnp.asarray([33, 40])}
        reason = pallas_kernels.supports(implementation, query, key, value, **lengths)
        if reason is not None:
            pytest.skip(reason)
        attend = functools.partial(
            pallas_kernels.dot_product_attention,
            **lengths,
            implementation=implementation,
            interpret=implementation in api.KERNELS,
        )
        out, pull = jax.vjp(attend, query, key, value)
        gradients = pull(d_out)
        spoiled = query.at[1, 10:].set(jnp.nan), key.at[0, 33:].set(jnp.inf), value.at[0, 33:].set(jnp.nan)
        spoiled_out, pull = jax.vjp(attend, *spoiled)
        np.testing.assert_array_equal(spoiled_out, out)
        for spoiled_gradient, gradient in zip(pull(d_out.at[1, 10:].set(jnp.nan)), gradients):
            np.testing.assert_array_equal(spoiled_gradient, gradient)

    def test_vmap_is_a_loop(self, implementation: str) -> None:
        query, key, value, d_out, _ = draw(3, 20, 24, 2, 1, 16)
        reason = pallas_kernels.supports(implementation, query, key, value, is_causal=True)
        if reason is not None:
            pytest.skip(reason)
        attend = functools.partial(
            pallas_kernels.dot_product_attention,
            is_causal=True,
            implementation=implementation,
            interpret=implementation in api.KERNELS,
        )

        def gradients(attend: Callable[..., jax.Array], *args: jax.Array) -> Any:
            out, pull = jax.vjp(attend, *args)
            return out, pull(d_out[:, None])

        mapped = gradients(jax.vmap(attend, (0, None, 0)), query[:, None], key[:1], value[:, None])
        looped = gradients(
            lambda q, k, v: jnp.stack([attend(q[i], k, v[i]) for i in range(3)]), query[:, None], key[:1], value[:, None]
        )
        for one, other in zip(jax.tree.leaves(mapped), jax.tree.leaves(looped)):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)

    def test_the_backward_pass_is_deterministic(self, implementation: str) -> None:
        query, key, value, d_out, _ = draw(1, 64, 64, 4, 2, 16)
        if pallas_kernels.supports(implementation, query, key, value) is not None:
            pytest.skip("cannot serve")
        attend = functools.partial(
            pallas_kernels.dot_product_attention, implementation=implementation, interpret=implementation in api.KERNELS
        )
        gradients = jax.jit(lambda *args: jax.vjp(attend, *args)[1](d_out))
        for one, other in zip(gradients(query, key, value), gradients(query, key, value)):
            np.testing.assert_array_equal(one, other)


HIDING = {
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 0)},
    "segments": {"q_segment_ids": jnp.arange(48)[None] // 10, "kv_segment_ids": jnp.arange(48)[None] // 10},
    "mask": {"mask": jnp.tril(jnp.ones((1, 1, 48, 48), bool))},
    "block mask": {"block_mask": Causal()},
}


@pytest.mark.parametrize("name", HIDING)
def test_a_nan_reaches_those_who_see_it_and_nobody_else(name: str) -> None:
    """In tiles of XLA that holds for every mask, in both directions: of one key, one value, one query and one cotangent."""
    query, key, value, d_out, _ = draw(1, 48, 48, 2, 2, 8)
    spec, operands = api._problem(
        query, key, value, **{{"local_window_size": "window"}.get(k, k): x for k, x in HIDING[name].items()}
    )
    visible = reference.visible(spec, operands)[0, 0]
    attend = jax.jit(functools.partial(pallas_kernels.dot_product_attention, **HIDING[name], block_sizes=BLOCKS))

    def not_finite(x: jax.Array) -> np.ndarray:
        return ~np.isfinite(np.asarray(x)).all((0, 2, 3))

    sees = visible[:, 21]
    for spoiled in (key.at[:, 21].set(jnp.nan), value), (key, value.at[:, 21, :, 3].set(jnp.inf)):
        out, pull = jax.vjp(attend, query, *spoiled)
        np.testing.assert_array_equal(not_finite(out), sees)
        d_query, d_key, d_value = pull(d_out)
        np.testing.assert_array_equal(not_finite(d_query), sees)
        np.testing.assert_array_equal(not_finite(d_key), visible[sees].any(0))
        # The gradient of values has no values in it, so it may stay finite.
        assert not (not_finite(d_value) & ~visible[sees].any(0)).any()
    for spoiled_query, spoiled_d_out in (query.at[:, 21].set(jnp.nan), d_out), (query, d_out.at[:, 21].set(jnp.nan)):
        d_query, d_key, d_value = jax.vjp(attend, spoiled_query, key, value)[1](spoiled_d_out)
        np.testing.assert_array_equal(not_finite(d_query), np.arange(48) == 21)
        for gradient in d_key, d_value:
            np.testing.assert_array_equal(not_finite(gradient), visible[21])
