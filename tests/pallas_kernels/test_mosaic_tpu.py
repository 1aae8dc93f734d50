"""The TPU kernels on the CPU: in Pallas's plain interpreter, and in that of TPUs, which poisons memory that nobody has written, raises on reads out of bounds, and watches for races."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels.attention import mosaic_tpu, reference
from pallas_kernels.attention.masks import EMPTY, FULL, PARTIAL, BigBird, Causal, Local, Longformer
from pallas_kernels.attention.mosaic_tpu.schedule import Step
from pallas_kernels.attention.problem import BlockSizes, Operands, Spec

interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")  # Its verdict is private.

SMALL = BlockSizes(128, 128, 128, 128)
"""The least there are, so that short sequences have several."""


def draw(
    batch: int, queries: int, keys: int, heads: int, key_heads: int, width: int, dtype: Any
) -> tuple[list[jax.Array], jax.Array]:
    """Query, key, value and the cotangent of out; and that of lse."""
    random = np.random.default_rng(0)
    shapes = (batch, queries, heads, width), *[(batch, keys, key_heads, width)] * 2, (batch, queries, heads, width)
    arrays = [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]
    return arrays, jnp.asarray(random.standard_normal((batch, heads, queries)), jnp.float32)


def naive(spec: Spec, operands: Operands, visible: jax.Array, distance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The whole matrix of logits, with weights of the values' dtype."""
    group = operands.query.shape[2] // operands.key.shape[2]
    key, value = (jnp.repeat(x, group, 2) for x in (operands.key, operands.value))
    logits = spec.scale * jnp.einsum("btnh,bsnh->bnts", operands.query, key, preferred_element_type=jnp.float32)
    if spec.soft_cap is not None:
        logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
    if operands.alibi_slopes is not None:
        logits -= operands.alibi_slopes[:, None, None] * distance
    logits = jnp.where(visible, logits, -1e30)
    sinks = jnp.full(len(logits[0]), -1e30) if operands.sinks is None else operands.sinks
    lse = jnp.logaddexp(jax.nn.logsumexp(logits, -1), sinks[:, None])
    weights = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value), lse


def run(spec: Spec, given: Operands, d_out: jax.Array, d_lse: jax.Array | None, interpret: Any = True) -> Any:
    assert mosaic_tpu.supports(spec, given) is None

    @jax.jit
    def both(given: Operands, d_out: jax.Array, d_lse: jax.Array | None) -> Any:
        out, lse = mosaic_tpu.forward(spec, given, interpret=interpret)
        return out, lse, mosaic_tpu.backward(spec, given, out, lse, d_out, d_lse, interpret=interpret)

    return jax.block_until_ready(both(given, d_out, d_lse))


def check(spec: Spec, arrays: list[jax.Array], d_lse: jax.Array, operands: dict[str, Any], interpret: Any = True) -> None:
    """Output, lse and gradients are at most twice as far from the definition in float64 as the naive computation is, or within 2e-6 of the largest value."""
    *qkv, d_out = arrays
    given = Operands(*qkv, **{name: jnp.asarray(x) for name, x in operands.items()})
    out, lse, gradients = run(spec, given, d_out, d_lse, interpret)
    wanted_out, wanted_lse = reference.forward(spec, given)
    wanted = reference.backward(spec, given, d_out, d_lse)
    visible, distance = jnp.asarray(reference.visible(spec, given)), jnp.asarray(reference._distances(given), jnp.float32)
    names = [name for name, gradient in zip(gradients._fields, gradients) if gradient is not None]
    moving = {name: getattr(given, name) for name in names}

    @jax.jit
    def naively(moving: dict[str, jax.Array], cotangents: Any) -> Any:
        results, pull = jax.vjp(lambda moving: naive(spec, given._replace(**moving), visible, distance), moving)
        return *results, pull(cotangents)[0]

    naive_out, naive_lse, naive_gradients = naively(moving, (d_out, jnp.where(np.isneginf(wanted_lse), 0, d_lse)))

    def compare(name: str, value: jax.Array, naive: jax.Array, want: np.ndarray) -> None:
        value, naive = (np.asarray(x, np.float64) for x in (value, naive))
        finite = np.isfinite(want)
        np.testing.assert_array_equal(value[~finite], want[~finite], err_msg=name)
        error, allowed = (np.abs(x[finite] - want[finite]).max(initial=0) for x in (value, naive))
        assert error <= max(2 * allowed, 2e-6 * max(1, np.abs(want[finite]).max(initial=0))), (name, error, allowed)

    compare("out", out, naive_out, wanted_out)
    compare("lse", lse, naive_lse, wanted_lse)
    for name in names:
        compare(name, getattr(gradients, name), naive_gradients[name], getattr(wanted, name))
        assert getattr(gradients, name).dtype == moving[name].dtype
    # What sees nothing, and what nothing sees, has no part in anything: not a tiny one either.
    seen = np.asarray(visible)
    blind, unseen = ~seen.any(3).swapaxes(1, 2), ~seen.any(2).swapaxes(1, 2).reshape(*given.key.shape[:3], -1).any(-1)
    for array, rows in (out, blind), (gradients.query, blind), (gradients.key, unseen), (gradients.value, unseen):
        assert not np.asarray(array)[rows].any()


RANDOM = np.random.default_rng(1)
BATCHES = dict(q_offset=np.int32([-5, 130]), query_lengths=np.int32([100, 0]), key_value_lengths=np.int32([256, 77]))
# float32, in tiles of 128 × 128.
CASES = {
    "causal, heads that share keys, several tiles": (dict(is_causal=True), (1, 300, 300, 4, 2, 64), {}),
    "one query and one key of an odd width": (dict(), (2, 1, 1, 1, 1, 17), {}),
    "lengths between tiles, and a wide head": (dict(), (1, 127, 129, 1, 1, 200), {}),
    "lengths and an offset for each example, and rows that see nothing": (dict(is_causal=True), (2, 200, 256, 2, 1, 32), BATCHES),
    "packed documents, out of order": (
        dict(is_causal=True),
        (1, 300, 300, 2, 1, 64),
        {name: np.repeat(np.int32([5, -1, 5, 2]), 75)[None] for name in ("q_segment_ids", "kv_segment_ids")},
    ),
    "every feature that goes with a window": (
        dict(window=(90, 20), soft_cap=3.0),
        (2, 140, 150, 4, 2, 64),
        dict(
            alibi_slopes=np.float32([0.5, 0.01, 0, 0.1]),
            sinks=np.float32([0.3, 2, -3, 0]),
            q_offset=np.int32([30, -20]),
            q_segment_ids=np.int32(RANDOM.integers(0, 3, (2, 140))),
            kv_segment_ids=np.int32(RANDOM.integers(0, 3, (2, 150))),
        ),
    ),
    "a block mask of several patterns": (dict(block_mask=Longformer(40, (0, 200)) & Causal()), (1, 300, 300, 2, 1, 64), {}),
    "a mask for each head and pair": (dict(), (2, 130, 200, 2, 1, 32), dict(mask=RANDOM.random((2, 2, 130, 200)) < 0.02)),
}
SLOW_CASES = {
    "a window that leaves tiles out": (dict(window=(100, 10)), (1, 600, 600, 1, 1, 64), {}),
    "a window after the query": (dict(window=(0, 200)), (1, 300, 260, 1, 1, 128), {}),
    "17 queries": (dict(), (1, 17, 520, 4, 1, 128), {}),
    "sinks and rows that see nothing": (
        dict(is_causal=True),
        (2, 130, 260, 2, 1, 64),
        dict(sinks=np.float32([0.3, 2])) | BATCHES,
    ),
    "blocks of a block mask": (dict(block_mask=BigBird(10, 32, 1, 1)), (1, 320, 320, 2, 2, 64), {}),
    "a block mask with what hides dynamically": (dict(block_mask=Local(200, 50)), (2, 300, 300, 2, 1, 64), BATCHES),
    "a mask of keys": (dict(), (2, 130, 200, 2, 1, 32), dict(mask=RANDOM.random((2, 1, 1, 200)) < 0.5)),
    "a mask of queries for each head": (dict(), (2, 130, 200, 2, 1, 32), dict(mask=RANDOM.random((1, 2, 130, 1)) < 0.5)),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_is_as_exact_as_the_naive_computation(case: str) -> None:
    spec, sizes, operands = (CASES | SLOW_CASES)[case]
    check(Spec(sizes[-1] ** -0.5, block_sizes=SMALL, **spec), *draw(*sizes, jnp.float32), operands)


@pytest.mark.parametrize("sizes", [(1, 129, 257, 2, 1, 64), pytest.param((2, 500, 500, 2, 2, 128), marks=pytest.mark.slow)])
def test_so_it_is_in_bfloat16(sizes: tuple[int, ...]) -> None:
    check(Spec(sizes[-1] ** -0.5, is_causal=True, block_sizes=SMALL), *draw(*sizes, jnp.bfloat16), {})


@pytest.mark.parametrize(
    "case",
    [
        "lengths between tiles, and a wide head",
        "lengths and an offset for each example, and rows that see nothing",
        pytest.param("causal, heads that share keys, several tiles", marks=pytest.mark.slow),
        pytest.param("packed documents, out of order", marks=pytest.mark.slow),
        pytest.param("every feature that goes with a window", marks=pytest.mark.slow),
        pytest.param("a block mask of several patterns", marks=pytest.mark.slow),
        pytest.param("a mask for each head and pair", marks=pytest.mark.slow),
    ],
)
def test_reads_nothing_unwritten_or_out_of_bounds_and_has_no_race(case: str) -> None:
    spec, sizes, operands = CASES[case]
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    try:
        check(Spec(sizes[-1] ** -0.5, block_sizes=SMALL, **spec), *draw(*sizes, jnp.float32), operands, interpret)
        assert not interpreter.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_the_public_function_differentiates_it_and_repeats_itself_bit_by_bit() -> None:
    (query, key, value, d_out), _ = draw(1, 140, 140, 2, 1, 32, jnp.float32)

    @jax.jit
    def gradients(*qkv: jax.Array) -> Any:
        attend = lambda *qkv: pallas_kernels.flash_attention(*qkv, is_causal=True, implementation="mosaic_tpu", interpret=True)
        return jax.vjp(attend, *qkv)[1](d_out)

    once, again = gradients(query, key, value), gradients(query, key, value)
    wanted = reference.backward(Spec(32**-0.5, is_causal=True), Operands(query, key, value), d_out, None)
    for one, other, want in zip(once, again, wanted):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, want, atol=1e-5)


def steps(spec: Spec, operands: Operands, transposed: bool = False) -> tuple[mosaic_tpu.schedule.Schedule, Step]:
    plan = mosaic_tpu.schedule.schedule(spec, operands, 128, 128, transposed)
    return plan, Step.unpack(np.asarray(plan.words).reshape(-1, plan.count))


def operands_of(length: int, batch: int = 1, **arrays: Any) -> Operands:
    x = jax.ShapeDtypeStruct((batch, length, 1, 64), jnp.float32)
    return Operands(x, x, x, **arrays)


def test_only_tiles_that_a_static_mask_leaves_are_steps() -> None:
    plan, step = steps(Spec(1.0, is_causal=True), operands_of(1024))
    assert plan.count == 8 * 9 // 2 and (step.state == FULL).sum() == 8 * 7 // 2 and (step.tile <= step.line).all()
    assert plan.count == len({*zip(step.line[0].tolist(), step.tile[0].tolist())})
    plan, step = steps(Spec(1.0, window=(127, 0)), operands_of(8192), transposed=True)
    assert plan.count == 64 + 63 and (step.state == PARTIAL).all() and (step.tile >= step.line).all()
    for array in step.first, step.last:
        assert array.sum() == 64


def test_a_line_that_sees_nothing_still_has_a_step() -> None:
    _, step = steps(Spec(1.0, block_mask=Local(None, 0) & Causal()), operands_of(300))
    assert set(step.line[0]) == {0, 1, 2}
    keys = jax.ShapeDtypeStruct((1, 600, 1, 64), jnp.float32)
    queries = operands_of(300)
    _, step = steps(Spec(1.0, is_causal=True), queries._replace(key=keys, value=keys), transposed=True)
    empty = step.state[0] == EMPTY
    assert set(step.line[0]) == set(range(5)) and set(step.line[0][empty]) == {3, 4}


def test_steps_that_turn_out_empty_name_the_tile_that_comes_next() -> None:
    ids = jnp.asarray(np.repeat(np.arange(4), 256)[None], jnp.int32)
    plan, step = steps(Spec(1.0, is_causal=True), operands_of(1024, q_segment_ids=ids, kv_segment_ids=ids))
    assert plan.count == 36 and (step.state != EMPTY).sum() == 4 * 3
    changes = (np.diff(step.tile[0]) != 0).sum() + 1
    visited = step.tile[0][step.state[0] != EMPTY]
    assert changes == (np.diff(visited) != 0).sum() + 1


def test_a_list_too_long_for_each_batch_is_shared_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_tpu.schedule, "MOST_WORDS", 10)
    lengths = jnp.asarray([100, 300], jnp.int32)
    arrays, d_lse = draw(2, 384, 384, 1, 1, 8, jnp.float32)
    given = operands_of(384, 2, key_value_lengths=lengths)
    assert steps(Spec(1.0), given)[0].alike
    check(Spec(0.2, block_sizes=SMALL), arrays, d_lse, dict(key_value_lengths=lengths))


@pytest.mark.parametrize(
    "changes, spec, reason",
    [
        (dict(dtype="float16"), {}, "bfloat16 and float32, and the operands are float16"),
        (dict(bias=True), {}, "no bias"),
        (dict(length=0), {}, "empty"),
        ({}, dict(block_sizes=BlockSizes(key=100)), "multiples of 128 queries and keys, and block_sizes.key is 100"),
        (dict(length=2**20), dict(block_sizes=BlockSizes(1024, 1024)), "lists have up to 200000 words"),
        (dict(length=2**21), dict(block_sizes=BlockSizes(128, 1024)), "16384 × 2048: give larger block_sizes"),
    ],
)
def test_says_what_it_cannot_serve(changes: dict[str, Any], spec: dict[str, Any], reason: str) -> None:
    x = jax.ShapeDtypeStruct((1, changes.get("length", 128), 1, 64), changes.get("dtype", "bfloat16"))
    bias = jax.ShapeDtypeStruct((1, 1, 1, 128), "float32") if "bias" in changes else None
    assert reason in mosaic_tpu.supports(Spec(1.0, **spec), Operands(x, x, x, bias))
