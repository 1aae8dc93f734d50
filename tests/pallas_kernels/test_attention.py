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
from pallas_kernels.attention import api, reference, xla_chunked
from pallas_kernels.attention.masks import BigBird, Causal, Local, Longformer
from pallas_kernels.attention.problem import BlockSizes, Operands, Spec

SLOW = pytest.mark.slow  # Interpreters take seconds a case; some of them are run each time, at the end of this file.
IMPLEMENTATIONS = ["xla_chunked", "xla", pytest.param("mosaic_gpu", marks=SLOW), pytest.param("mosaic_tpu", marks=SLOW)]
DTYPES = {"mosaic_gpu": "bfloat16"}
"""What an implementation computes in, where that is not float32."""
REFUSED = {
    "xla_chunked": set(),
    "xla": {"logits_soft_cap", "sinks"},
    "mosaic_gpu": {"bias", "mask", "block_mask", "float32"},
    "mosaic_tpu": {"bias", "float16"},
}
"""The arguments and dtypes of these tests that an implementation refuses; it has to serve all others."""


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


def attention(implementation: str, **arguments: Any) -> Callable[..., Any]:
    interpret = implementation in api.KERNELS
    return functools.partial(
        pallas_kernels.dot_product_attention, **arguments, implementation=implementation, interpret=interpret
    )


def problem(*qkv: jax.Array, **arguments: Any) -> tuple[Spec, Operands]:
    return api._problem(*qkv, **{api._RENAMED.get(name, name): x for name, x in arguments.items()})


def skip_what_is_refused(implementation: str, qkv: list[jax.Array], arguments: dict[str, Any]) -> None:
    reason = pallas_kernels.supports(implementation, *qkv, **arguments)
    # A block mask that is a band is one that no kernel refuses.
    given = {name for name, x in arguments.items() if not isinstance(x, Local)} | {qkv[0].dtype.name}
    expected = REFUSED[implementation] & given
    assert (reason is not None) == bool(expected), reason
    if reason is not None:
        pytest.skip(reason)


def check(implementation: str, arrays: list[jax.Array], arguments: dict[str, Any]) -> None:
    """Output, log-sum-exp and all gradients are at most twice as far from the definition as the naive computation is, or within `floor` of the largest value."""
    # jax's own backward pass in float32 is a little less exact than the naive one in some sums.
    floor = 1e-3 if arrays[0].dtype != jnp.float32 else 1e-5 if implementation == "xla" else 2e-6
    *qkv, d_out, d_lse = arrays
    residual = implementation != "xla"
    skip_what_is_refused(implementation, qkv, arguments)
    moving = dict(zip(("query", "key", "value"), qkv)) | {name: arguments[name] for name in DIFFERENTIABLE if name in arguments}
    fixed = {name: x for name, x in arguments.items() if name not in moving}

    attend = attention(implementation, return_residual=residual, **fixed)

    @jax.jit
    def run(moving: dict[str, jax.Array], cotangents: Any) -> Any:
        results, pull = jax.vjp(lambda moving: attend(**moving), moving)
        return results, pull(cotangents)[0]

    results, gradients = run(moving, (d_out, d_lse) if residual else d_out)
    out, lse = results if residual else (results, None)
    d_lse = d_lse.swapaxes(1, 2) if residual else jnp.zeros_like(d_lse.swapaxes(1, 2))
    spec, operands = problem(*qkv, **arguments)
    wanted_out, wanted_lse = reference.forward(spec, operands)
    wanted = reference.backward(spec, operands, d_out, d_lse)
    (naive_out, naive_lse), pull = jax.vjp(lambda moving: naive(spec, operands._replace(**moving)), moving)
    (naive_gradients,) = pull((d_out, d_lse))

    def compare(name: str, value: jax.Array, naive: jax.Array, want: np.ndarray) -> None:
        value, naive = (np.asarray(x).astype(np.float64) for x in (value, naive))
        np.testing.assert_array_equal(np.isneginf(value), np.isneginf(want), err_msg=name)
        value, naive, want = (np.where(np.isneginf(want), 0, x) for x in (value, naive, want))
        error, allowed = np.abs(value - want).max(), np.abs(naive - want).max()
        assert error <= max(2 * allowed, floor * max(1, np.abs(want).max())), (
            f"{name}: {error:.3g} where the naive error is {allowed:.3g}"
        )

    compare("out", out, naive_out, wanted_out)
    assert out.dtype == qkv[0].dtype
    if residual:
        compare("lse", lse.swapaxes(1, 2), naive_lse, wanted_lse)
        assert lse.dtype == jnp.float32
    for name in moving:
        assert gradients[name].dtype == moving[name].dtype
        compare(f"gradient of {name}", gradients[name], naive_gradients[name], getattr(wanted, name))


BLOCKS = BlockSizes(16, 16, 16, 16)
"""So small that short sequences have full, partial and empty tiles. Kernels have least sizes of their own."""


def blocks(implementation: str) -> dict[str, Any]:
    return {"block_sizes": BLOCKS} if implementation == "xla_chunked" else {}


def own(implementation: str) -> str:
    return DTYPES.get(implementation, "float32")


def check_features(implementation: str, *names: str) -> None:
    # Of the interpreter for GPUs less is asked: it takes two seconds for each block of each kernel.
    heads, key_heads = (1, 1) if implementation == "mosaic_gpu" else (4, 2)
    arguments = functools.reduce(lambda a, b: a | feature(b, 2, 40, 56, heads), names, blocks(implementation))
    check(implementation, draw(2, 40, 56, heads, key_heads, 16, own(implementation)), arguments)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


class TestEveryImplementation:
    @pytest.mark.parametrize("name", ["plain", *FEATURES])
    def test_is_as_exact_as_the_naive_computation(self, implementation: str, name: str) -> None:
        check_features(implementation, name)

    @pytest.mark.parametrize("shift", range(len(FEATURES)))
    def test_features_combine(self, implementation: str, shift: int) -> None:
        """Five at a time. The squares modulo 11, shifted, are the blocks of a biplane: each pair of features is in exactly two."""
        chosen = [FEATURES[(square + shift) % 11] for square in (1, 3, 4, 5, 9)]
        check_features(implementation, *chosen)

    @SLOW
    @pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids=" and ".join)
    def test_pairs_of_features_combine(self, implementation: str, pair: tuple[str, str]) -> None:
        check_features(implementation, *pair)

    @pytest.mark.parametrize("lengths", [(1, 1), (1, 129), (17, 17), (127, 17), (129, 127)])
    def test_any_length_will_do(self, implementation: str, lengths: tuple[int, int]) -> None:
        check(implementation, draw(1, *lengths, 2, 2, 8, own(implementation)), {"is_causal": True})

    @pytest.mark.parametrize("heads", [(3, 3), (6, 2), (5, 1)])
    def test_heads_share_keys(self, implementation: str, heads: tuple[int, int]) -> None:
        arrays = draw(2, 20, 30, *heads, 8, own(implementation))
        check(implementation, arrays, feature("ALiBi", 2, 20, 30, heads[0]) | blocks(implementation))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("name", ["causal", "soft cap", "sinks"])
    def test_half_precision(self, implementation: str, dtype: str, name: str) -> None:
        if (implementation, dtype) == ("xla", "float16"):
            pytest.skip("jax.nn asks for products of float16 with sums in float32, which XLA does not have on a CPU")
        check(implementation, draw(1, 70, 70, 2, 1, 32, dtype), feature(name, 1, 70, 70, 2) | blocks(implementation))

    @pytest.mark.parametrize("width", [1, 80, 256])
    def test_any_width_will_do(self, implementation: str, width: int) -> None:
        arrays = draw(1, 24, 24, 2, 2, width, own(implementation))
        check(implementation, arrays, {"is_causal": True, "scale": 0.1} | blocks(implementation))

    @pytest.mark.parametrize("how", ["mask", "q_offset"])
    def test_a_row_that_sees_nothing_gives_zero_and_no_gradient(self, implementation: str, how: str) -> None:
        *qkv, d_out, d_lse = draw(1, 32, 32, 2, 2, 16, own(implementation))
        hidden = [3, 17, 18] if how == "mask" else [0, 1, 2]
        mask = np.ones((1, 1, 32, 32), bool)
        mask[:, :, hidden] = False
        arguments = {"mask": jnp.asarray(mask)} if how == "mask" else {"q_offset": jnp.asarray([-3]), "is_causal": True}
        skip_what_is_refused(implementation, qkv, arguments)
        residual = implementation != "xla"
        results, pull = jax.vjp(attention(implementation, return_residual=residual, **arguments), *qkv)
        assert not jax.tree.leaves(results)[0][:, hidden].any()
        if residual:
            assert jnp.isneginf(results[1][:, hidden]).all() and jnp.isfinite(results[1]).sum() == 2 * 29
        gradients = pull((d_out, d_lse) if residual else d_out)
        assert not gradients[0][:, hidden].any() and all(jnp.isfinite(x).all() for x in gradients)
        # Nor does what flows into such rows come out at keys and values: NaN, as a merge of two logarithms of zero has it.
        spoiled = d_out.at[:, hidden].set(jnp.nan), d_lse.at[:, hidden].set(jnp.nan)
        for one, other in zip(gradients, pull(spoiled if residual else spoiled[0])):
            np.testing.assert_array_equal(one, other)

    def test_what_lies_behind_lengths_may_be_anything(self, implementation: str) -> None:
        check_what_lies_behind(implementation, 24, 40)

    def test_vmap_is_a_loop(self, implementation: str) -> None:
        query, key, value, d_out, _ = draw(3, 20, 24, 2, 1, 16, own(implementation))
        attend = attention(implementation, is_causal=True)

        def gradients(attend: Callable[..., jax.Array], *args: jax.Array) -> Any:
            out, pull = jax.vjp(attend, *args)
            return out, pull(d_out[:, None])

        mapped = gradients(jax.vmap(attend, (0, None, 0)), query[:, None], key[:1], value[:, None])
        looped = gradients(
            lambda q, k, v: jnp.stack([attend(q[i], k, v[i]) for i in range(3)]), query[:, None], key[:1], value[:, None]
        )
        # The key that all share has a sum of three gradients, each of which is rounded to its dtype.
        rounding = 2 * float(jnp.finfo(key.dtype).eps)
        for name, one, other in zip(
            ("out", "query", "key", "value"), jax.tree.leaves(mapped), jax.tree.leaves(looped), strict=True
        ):
            one, other = (np.asarray(x, np.float32) for x in (one, other))
            atol = max(rounding * np.abs(other).max(), 1e-6) if name == "key" else 1e-6
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=atol, err_msg=name)

    def test_the_backward_pass_is_deterministic(self, implementation: str) -> None:
        *qkv, d_out, _ = draw(1, 64, 64, 4, 2, 16, own(implementation))
        gradients = jax.jit(lambda *qkv: jax.vjp(attention(implementation), *qkv)[1](d_out))
        for one, other in zip(gradients(*qkv), gradients(*qkv)):
            np.testing.assert_array_equal(one, other)


def check_what_lies_behind(implementation: str, queries: int, keys: int) -> None:
    """NaN and ∞ behind the lengths change nothing, and lengths beyond the end are the end."""
    *qkv, d_out, d_lse = draw(2, queries, keys, 1, 1, 16, own(implementation))
    some, most = queries // 2, keys - 7
    lengths = {"query_seq_lengths": jnp.asarray([queries + 5, some]), "key_value_seq_lengths": jnp.asarray([most, keys + 9])}
    residual = implementation != "xla"
    attend = attention(implementation, return_residual=residual, **lengths)

    @jax.jit
    def run(query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, d_lse: jax.Array) -> Any:
        results, pull = jax.vjp(attend, query, key, value)
        return results, pull((d_out, d_lse) if residual else d_out)

    query, key, value = qkv
    spoiled = query.at[1, some:].set(jnp.nan), key.at[0, most:].set(jnp.inf), value.at[0, most:].set(jnp.nan)
    values = jax.tree.leaves(run(*spoiled, *(x.at[1, some:].set(jnp.nan) for x in (d_out, d_lse))))
    spec, operands = problem(*qkv, **lengths)
    out, lse = reference.forward(spec, operands)
    gradients = reference.backward(spec, operands, d_out, d_lse.swapaxes(1, 2) if residual else None)
    wanted = [out, lse.swapaxes(1, 2), *gradients] if residual else [out, *gradients]
    for value, want in zip(values, (want for want in wanted if want is not None), strict=True):
        tolerance = 1e-5 if qkv[0].dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(
            np.asarray(value, np.float64), want, atol=tolerance * max(1, np.abs(want[np.isfinite(want)]).max())
        )


# Sizes (B, T, S, N, K, H) and features, as small as they can be.
KERNEL_CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "documents that lie in other tiles of another example": (
        (2, 60, 140, 1, 1, 32),
        {
            "q_segment_ids": jnp.asarray([[0] * 60, [0] * 30 + [1] * 30]),
            "kv_segment_ids": jnp.asarray([[0] * 128 + [1] * 12, [2] * 128 + [0] * 8 + [1] * 4]),
            "sinks": jnp.asarray([0.4]),
        },
    ),
    "a window that ends at shifted positions": (
        (1, 70, 140, 1, 1, 64),
        {
            "local_window_size": (40, 9),
            "is_causal": True,
            "q_offset": jnp.asarray([57]),
            "alibi_slopes": jnp.asarray([0.1]),
            "logits_soft_cap": 2.0,
        },
    ),
    "a window within a band": ((1, 140, 70, 1, 1, 64), {"block_mask": Local(9, 40), "local_window_size": (30, 20)}),
}


@pytest.mark.parametrize("kernel", api.KERNELS)
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_a_kernel_is_as_exact_as_the_naive_computation(kernel: str, case: str) -> None:
    """In its own dtype: what the slow tests above run at length."""
    sizes, arguments = KERNEL_CASES[case]
    check(kernel, draw(*sizes, own(kernel)), arguments)


@pytest.mark.parametrize("kernel", api.KERNELS)
def test_nor_does_a_kernel_see_what_lies_behind_lengths(kernel: str) -> None:
    check_what_lies_behind(kernel, 60, 70)


@pytest.mark.parametrize(
    "together, sizes, names",
    [
        *[((1, 1), (2, 4, 2), (name,)) for name in ("plain", *FEATURES)],
        *[
            ((1, 2), (2, 4, 4), names)
            for names in (("bias", "ALiBi", "sinks", "mask"), ("segments", "lengths", "offset", "causal"))
        ],
        *[
            ((2, 2), (4, 4, 2), names)
            for names in (("bias", "ALiBi", "sinks", "mask"), ("segments", "lengths", "offset", "causal"))
        ],
    ],
    ids=str,
)
def test_streams_go_through_in_groups(
    together: tuple[int, int], sizes: tuple[int, int, int], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short sequences are one group of streams. Here there are several: pairs of batch and key head alone, some heads of a batch, and some batches."""
    monkeypatch.setattr(xla_chunked, "_together", lambda *_: together)
    batch, heads, key_heads = sizes
    assert batch * key_heads > together[0] * together[1]
    # The scale is that of no other test, so that nothing is taken from a cache.
    arguments = functools.reduce(lambda a, b: a | feature(b, batch, 40, 56, heads), names, {"scale": 0.27})
    check("xla_chunked", draw(batch, 40, 56, heads, key_heads, 16), arguments | blocks("xla_chunked"))


def test_a_group_of_streams_is_one_tile_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_chunked.os, "cpu_count", lambda: 4)
    area = xla_chunked.TILE**2
    assert xla_chunked._together(3, 8, area) == (1, 4)  # Of 3 · 8 streams.
    assert xla_chunked._together(6, 2, area) == (2, 2)
    assert xla_chunked._together(6, 1, area // 4) == (6, 1)
    assert xla_chunked._together(2, 6, 4 * area) == (1, 6)


HIDING = {
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 0)},
    "segments": {"q_segment_ids": jnp.arange(48)[None] // 10, "kv_segment_ids": jnp.arange(48)[None] // 10},
    "mask": {"mask": jnp.tril(jnp.ones((1, 1, 48, 48), bool))},
    "block mask": {"block_mask": Causal()},
    "lengths": {"query_seq_lengths": jnp.asarray([20]), "key_value_seq_lengths": jnp.asarray([20])},
}


def not_finite(x: jax.Array) -> np.ndarray:
    """Which positions of `1 L N H`."""
    return ~np.isfinite(np.asarray(x)).all((0, 2, 3))


@pytest.mark.parametrize("name", HIDING)
def test_a_nan_reaches_those_who_see_it_and_nobody_else(name: str) -> None:
    """In tiles of XLA that holds for every mask, in both directions: of one key, one value, one query and one cotangent."""
    query, key, value, d_out, _ = draw(1, 48, 48, 2, 2, 8)
    spec, operands = problem(query, key, value, **HIDING[name])
    visible = reference.visible(spec, operands)[0, 0]
    attend = jax.jit(functools.partial(pallas_kernels.dot_product_attention, **HIDING[name], block_sizes=BLOCKS))

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
        np.testing.assert_array_equal(not_finite(d_query), (np.arange(48) == 21) & visible[21].any())
        for gradient in d_key, d_value:
            np.testing.assert_array_equal(not_finite(gradient), visible[21])


@pytest.mark.parametrize("name", HIDING)
def test_nor_does_a_nan_among_tangents(name: str) -> None:
    query, key, value, *_ = draw(1, 48, 48, 2, 2, 8)
    visible = reference.visible(*problem(query, key, value, **HIDING[name]))[0, 0]
    attend = functools.partial(pallas_kernels.dot_product_attention, **HIDING[name], block_sizes=BLOCKS)
    tangent = jax.jit(lambda *moving: jax.jvp(attend, (query, key, value), moving)[1])
    spoiled = [x.at[:, 21].set(jnp.nan) for x in (query, key, value)]
    np.testing.assert_array_equal(not_finite(tangent(spoiled[0], key, value)), (np.arange(48) == 21) & visible[21].any())
    for moving in (query, spoiled[1], value), (query, key, spoiled[2]):
        np.testing.assert_array_equal(not_finite(tangent(*moving)), visible[:, 21])
