"""The public function: jax.nn's conventions, the choice among implementations, and every way to differentiate."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import pallas_kernels
from pallas_kernels.attention import api, reference, xla_chunked
from pallas_kernels.attention.masks import Causal, Longformer, Segment
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


def dense(query: jax.Array, key: jax.Array, value: jax.Array, sinks: jax.Array, slopes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What jax.nn has not: causal, with sinks and ALiBi. The output and the log-sum-exp."""
    groups, (queries, keys) = query.shape[2] // key.shape[2], (query.shape[1], key.shape[1])
    key, value = (jnp.repeat(x, groups, 2) for x in (key, value))
    distance = jnp.arange(queries)[:, None] - jnp.arange(keys)
    logits = jnp.einsum("btnh,bsnh->btns", query, key) / query.shape[-1] ** 0.5 - (slopes[:, None] * jnp.abs(distance)[:, None])
    logits = jnp.where((distance >= 0)[:, None], logits, -jnp.inf)
    lse = jnp.logaddexp(jax.nn.logsumexp(logits, -1), sinks)
    return jnp.einsum("btns,bsnh->btnh", jnp.exp(logits - lse[..., None]), value), lse


def with_vectors(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
    *qkv, sinks, slopes = args
    return pallas_kernels.dot_product_attention(
        *qkv, is_causal=True, sinks=sinks, alibi_slopes=slopes, return_residual=True, block_sizes=BlockSizes(16, 16, 16, 16)
    )


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


SINKS, SLOPES = jnp.asarray([0.3, -1.0, 0.0, 2.0]), jnp.asarray([0.5, 0.25, 0.1, 0.0])
VECTORS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "the values": lambda f: f(*GIVEN[:3], SINKS, SLOPES),
    "jvp by sinks and slopes": lambda f: jax.jvp(
        lambda *vectors: f(*GIVEN[:3], *vectors), (SINKS, SLOPES), (SLOPES + 1, jnp.sin(SINKS))
    ),
    "the gradient of the log-sum-exp alone": lambda f: jax.grad(
        lambda *args: (f(*args)[1] * COTANGENT[..., 0]).sum(), (0, 1, 2, 3, 4)
    )(*GIVEN[:3], SINKS, SLOPES),
    "hessian": lambda f: jax.hessian(
        lambda vectors: (f(*GIVEN[:3], *vectors)[0] * COTANGENT).sum() + jnp.sin(f(*GIVEN[:3], *vectors)[1]).sum()
    )((SINKS, SLOPES)),
    "jacrev": lambda f: jax.jacrev(lambda *vectors: f(QUERY[:1, :5], KEY[:1], VALUE[:1], *vectors)[0][0, :, :, 0], (0, 1))(
        SINKS, SLOPES
    ),
    "vmap over sinks and slopes": lambda f: jax.vmap(
        jax.grad(lambda *vectors: (f(*GIVEN[:3], *vectors)[0] * COTANGENT).sum(), (0, 1)), (0, 0)
    )(jnp.stack([SINKS, SLOPES]), jnp.stack([SLOPES, SLOPES[::-1]])),
    "vmap over sinks": lambda f: jax.vmap(lambda sinks: f(*GIVEN[:3], sinks, SLOPES))(jnp.stack([SINKS, SINKS[::-1]])),
    "vmap over slopes": lambda f: jax.vmap(lambda slopes: f(*GIVEN[:3], SINKS, slopes))(jnp.stack([SLOPES, SINKS])),
}


@pytest.mark.parametrize("name", VECTORS)
def test_sinks_and_slopes_are_differentiated_and_mapped_like_anything_else(name: str) -> None:
    assert_close(VECTORS[name](with_vectors), VECTORS[name](dense), 1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 1, 50), (1, 4, 40, 1), (1, 1, 40, 50), (4, 1, 50), (40, 50), (50,), ()], ids=str)
def test_a_bias_that_is_broadcast_gets_the_sum_of_its_gradients(shape: tuple[int, ...]) -> None:
    """Shapes and missing axes are those of jax.nn."""
    bias = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    one, other = (jax.value_and_grad(loss(attend), (0, 3))(QUERY, KEY, VALUE, bias) for attend in (ours, jaxs))
    assert_close(one, other, 2e-5)


MAPPED: dict[str, Any] = {
    "mask": MASK,
    "mask of queries and keys": MASK[:1],
    "bias": BIAS,
    "query_seq_lengths": jnp.asarray([40, 7]),
    "key_value_seq_lengths": jnp.asarray([0, 33]),
    "q_offset": jnp.asarray([-4, 6]),
    "q_segment_ids": jnp.arange(80).reshape(2, 40) // 9,
    "kv_segment_ids": jnp.arange(100).reshape(2, 50) // 7,
}


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_over_anything_is_a_loop(name: str) -> None:
    """And so is one vmap within another."""
    arrays, values = jnp.stack([MAPPED[name], jnp.flip(MAPPED[name])]), jnp.stack([VALUE, -VALUE])
    ids = {"q_segment_ids", "kv_segment_ids"} if name.endswith("ids") else set()
    fixed = {other: MAPPED[other] for other in ids - {name}}

    @jax.jit
    def gradients(value: jax.Array, array: jax.Array) -> Any:
        given = {name.split()[0]: array} | fixed
        attend = lambda *qkv: pallas_kernels.dot_product_attention(*qkv, is_causal=True, **given, return_residual=True)
        results, pull = jax.vjp(attend, QUERY, KEY, value)
        return results, pull((COTANGENT, COTANGENT[..., 0]))

    mapped = jax.vmap(jax.vmap(gradients, (None, 0)), (0, None))(values, arrays)
    looped = [[gradients(value, array) for array in arrays] for value in values]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *(jax.tree.map(lambda *x: jnp.stack(x), *row) for row in looped)))


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


def test_no_copy_is_made_of_all_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of queries, keys and values of all 16 heads would be three times as large as one of these."""
    monkeypatch.setattr(xla_chunked.os, "cpu_count", lambda: 2)
    shape = jax.ShapeDtypeStruct((1, 2048, 16, 64), jnp.float32)
    # The scale is that of no other test, so that nothing is taken from a cache.
    attend = functools.partial(pallas_kernels.dot_product_attention, implementation="xla_chunked", scale=0.31)
    memory = jax.jit(attend).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes


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


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_vectors_may_have_any_float_and_their_gradients_have_it_too(name: str) -> None:
    """By the choice among platforms, whose branches have to agree on dtypes."""
    attend = lambda vector: (pallas_kernels.dot_product_attention(QUERY, KEY, VALUE, **{name: vector}) * COTANGENT).sum()
    wanted = jax.grad(attend)(SLOPES)
    for dtype in (jnp.bfloat16, jnp.float16):
        gradient = jax.grad(attend)(SLOPES.astype(dtype))
        assert gradient.dtype == dtype
        np.testing.assert_allclose(np.asarray(gradient, np.float32), wanted, rtol=2e-2, atol=1e-2)


def test_a_scale_may_be_learned() -> None:
    one, other = (
        jax.grad(lambda scale: (attend(QUERY, KEY, VALUE, scale=scale) * COTANGENT).sum())(0.3)
        for attend in (pallas_kernels.dot_product_attention, jax.nn.dot_product_attention)
    )
    np.testing.assert_allclose(one, other, rtol=1e-4)


WIDE = {
    "hidden by everything that is an array": dict(
        is_causal=True, local_window_size=(30, 3), query_seq_lengths=[40, 9], key_value_seq_lengths=[50, 20], q_offset=[3, -2],
        q_segment_ids=np.arange(80).reshape(2, 40) // 30, kv_segment_ids=np.arange(100).reshape(2, 50) // 40,
    ),
    "a bias and a mask": dict(bias=np.asarray(BIAS), mask=np.asarray(MASK)),
    "a block mask, vectors and a cap": dict(
        block_mask=Longformer(8, (3,)) & Causal(), sinks=np.asarray(SINKS), alibi_slopes=np.asarray(SLOPES), logits_soft_cap=2.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", WIDE)
def test_numbers_may_have_64_bits(name: str, dtype: str) -> None:
    """With jax's x64 integers and constants are wide, where nobody asks for the dtype, in kernels too; float64, which these have not, is exact to 1e-10."""
    with jax.enable_x64(True):
        query, key, value, d_out = (jnp.asarray(np.asarray(x, np.float64), dtype) for x in (QUERY, KEY, VALUE, COTANGENT))
        given = {k: jnp.asarray(x) if isinstance(x, list | np.ndarray) else x for k, x in WIDE[name].items()}
        assert not any(x.dtype == jnp.int32 for x in jax.tree.leaves(given) if hasattr(x, "dtype"))
        moving = {"query": query, "key": key, "value": value}
        moving |= {k: given.pop(k).astype("float64") for k in ("bias", "sinks", "alibi_slopes") if k in given}
        attend = lambda moving: pallas_kernels.dot_product_attention(
            **moving, **given, return_residual=True, block_sizes=BlockSizes(16, 16, 16, 16) if dtype == "float64" else None
        )
        (out, lse), pull = jax.vjp(attend, moving)
        d_lse = jnp.asarray(COTANGENT[..., 0], lse.dtype)
        (gradients,) = pull((d_out, d_lse))
        assert lse.dtype == ("float64" if dtype == "float64" else "float32") and out.dtype == dtype
        assert {k: x.dtype for k, x in gradients.items()} == {k: x.dtype for k, x in moving.items()}
        spec, operands = api._problem(**moving, **{api._RENAMED.get(k, k): x for k, x in given.items()})
    tolerance = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1}[dtype]
    wanted_out, wanted_lse = reference.forward(spec, operands)
    wanted = reference.backward(spec, operands, d_out, np.asarray(d_lse).swapaxes(1, 2))
    for value, want in [
        (out, wanted_out),
        (lse, wanted_lse.swapaxes(1, 2)),
        *((x, getattr(wanted, k)) for k, x in gradients.items()),
    ]:
        np.testing.assert_allclose(np.asarray(value, np.float64), want, rtol=tolerance, atol=tolerance)


def test_without_keys_the_log_sum_exp_has_its_dtype_too() -> None:
    with jax.enable_x64(True):
        for dtype, wide in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
            query, nothing = jnp.ones((1, 3, 2, 8), dtype), jnp.ones((1, 0, 2, 8), dtype)
            _, lse = pallas_kernels.dot_product_attention(query, nothing, nothing, return_residual=True)
            assert lse.dtype == wide


def test_the_kernel_of_a_platform_is_in_programs_for_it_and_in_no_others() -> None:
    shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    check = export.DisabledSafetyCheck.custom_call("tpu_custom_call")

    def calls(platform: str) -> int:
        step = jax.jit(
            lambda *qkv: jax.vjp(functools.partial(pallas_kernels.dot_product_attention, is_causal=True), *qkv)[1](qkv[0])
        )
        return (
            export.export(step, platforms=[platform], disabled_checks=[check])(*[shape] * 3)
            .mlir_module()
            .count("@tpu_custom_call")
        )

    assert calls("tpu") == 3 and calls("cpu") == calls("cuda") == 0


def products(jaxpr: Any) -> list[Any]:
    """The precision of every product of matrices in a program, and in what it calls."""
    found = []
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            found += products(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize(
    "implementation, asked, given",
    [("xla_chunked", "high", "HIGH"), ("mosaic_tpu", "high", "HIGHEST"), ("mosaic_tpu", "highest", "HIGHEST")],
)
def test_every_product_has_the_precision_that_was_asked_for(implementation: str, asked: str, given: str) -> None:
    """Of three passes a TPU kernel has none, so it takes six."""
    attend = functools.partial(
        pallas_kernels.dot_product_attention,
        precision=asked,
        implementation=implementation,
        interpret=implementation != "xla_chunked",
    )
    found = products(jax.make_jaxpr(lambda *qkv: jax.vjp(attend, *qkv)[1](qkv[0]))(QUERY, QUERY, QUERY))
    # Two of the forward pass and five of the backward pass, or seven in two kernels; ⟨out, d_out⟩ is none of them.
    precisely = [x for x in found if x is not None]
    assert (
        len(precisely) >= 7 and all(set(x) == {jax.lax.Precision[given]} for x in precisely) and len(found) - len(precisely) <= 1
    )


SHAPE = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)


def test_supports_says_why_not_and_looks_at_shapes_only() -> None:
    assert pallas_kernels.supports("xla_chunked", SHAPE, SHAPE, SHAPE, is_causal=True) is None
    assert "soft cap" in pallas_kernels.supports("xla", SHAPE, SHAPE, SHAPE, logits_soft_cap=30.0)
    assert "float32" in pallas_kernels.supports("cudnn", QUERY, KEY, VALUE)
    assert pallas_kernels.supports("cudnn", SHAPE, SHAPE, SHAPE, is_causal=True) is None
    odd = jax.ShapeDtypeStruct((2, 64, 4, 60), jnp.bfloat16)
    assert "multiple of 8, not 60" in pallas_kernels.supports("cudnn", odd, odd, odd)
    assert "no sinks" in pallas_kernels.supports("cudnn", SHAPE, SHAPE, SHAPE, sinks=SINKS)
    assert "log-sum-exp" in pallas_kernels.supports("xla", SHAPE, SHAPE, SHAPE, return_residual=True)


def test_supports_takes_what_the_function_takes_and_nothing_else() -> None:
    numbers = dict(scale=np.float32(0.1), local_window_size=np.int64(4), logits_soft_cap=np.float64(3), q_offset=np.int64(0))
    assert pallas_kernels.supports("mosaic_tpu", SHAPE, SHAPE, SHAPE, **numbers, interpret=True) is None
    assert pallas_kernels.supports("mosaic_tpu", SHAPE, SHAPE, SHAPE, **numbers, block_mask=Causal()) is None
    with pytest.raises(TypeError, match="local_window"):
        pallas_kernels.supports("mosaic_tpu", SHAPE, SHAPE, SHAPE, local_window=4)


def test_widths_up_to_256_have_kernels() -> None:
    for width, reason in ((256, None), (257, "kernels take heads of up to 256, not 257")):
        shape = jax.ShapeDtypeStruct((2, 64, 4, width), jnp.bfloat16)
        for kernel in ("mosaic_gpu", "mosaic_tpu"):
            assert pallas_kernels.supports(kernel, shape, shape, shape) == reason


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
        (dict(local_window_size=(-1, 0)), "from 0 on"),
        (dict(logits_soft_cap=0.0), "positive"),
        (dict(block_sizes=BlockSizes(16, 0)), "1 or more"),
        (dict(block_sizes=BlockSizes(key_backward=-16)), "key_backward=-16"),
        (dict(mask=jnp.ones((1, 1, 1, 40, 50), bool)), r"each axis 1 or whole: got \(1, 1, 1, 40, 50\)"),
        (dict(sinks=jnp.zeros(3)), r"sinks is floating of shape \(4,\)"),
        (dict(alibi_slopes=jnp.zeros(4, int)), "alibi_slopes is floating"),
        (dict(query_seq_lengths=jnp.zeros(2)), "query_seq_lengths is integer"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pallas_kernels.dot_product_attention(**{"query": QUERY, "key": KEY, "value": VALUE, **arguments})
