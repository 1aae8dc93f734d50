"""The Hopper kernels in jax's interpreter for Mosaic GPU, which runs their threads, barriers and copies on the CPU and watches for races."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dot_product_attention
from pallas_kernels.attention import mosaic_gpu, reference
from pallas_kernels.attention.masks import BigBird, Causal, Local
from pallas_kernels.attention.problem import BlockSizes, Operands, Spec

interpreter = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")  # Its verdict is private.


@pytest.fixture(autouse=True)
def fresh_interpreter() -> Any:
    yield
    interpreter.reset_gpu_interpret_mode_state()


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


def check(spec: Spec, arrays: list[jax.Array], d_lse: jax.Array, **operands: Any) -> None:
    """Output, lse and gradients are at most twice as far from the definition in float64 as the naive computation is, and there is no race."""
    *qkv, d_out = arrays
    given = Operands(*qkv, **{name: jnp.asarray(x) for name, x in operands.items()})
    assert mosaic_gpu.supports(spec, given) is None

    @jax.jit
    def run(given: Operands, d_out: jax.Array, d_lse: jax.Array) -> Any:
        out, lse = mosaic_gpu.forward(spec, given, interpret=True)
        return out, lse, mosaic_gpu.backward(spec, given, out, lse, d_out, d_lse, interpret=True)

    out, lse, gradients = jax.block_until_ready(run(given, d_out, d_lse))
    assert not interpreter.get_races().races_found
    wanted_out, wanted_lse = reference.forward(spec, given)
    wanted = reference.backward(spec, given, d_out, d_lse)
    visible, distance = jnp.asarray(reference.visible(spec, given)), jnp.asarray(reference._distances(given), jnp.float32)
    names = [name for name, gradient in zip(gradients._fields, gradients) if gradient is not None]
    moving = {name: getattr(given, name) for name in names}
    (naive_out, naive_lse), pull = jax.vjp(lambda moving: naive(spec, given._replace(**moving), visible, distance), moving)
    (naive_gradients,) = pull((d_out, jnp.where(np.isneginf(wanted_lse), 0, d_lse)))

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


def documents(*lengths: int) -> np.ndarray:
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None]


SLOW = pytest.mark.slow
CASES = {
    "whole tiles": (dict(), (1, 128, 256, 1, 1, 64), {}),
    "lengths between tiles": (dict(is_causal=True), (1, 129, 200, 1, 1, 128), {}),
    "one query of an odd width": (dict(), (2, 1, 17, 1, 1, 40), {}),
    "a wide head": (dict(is_causal=True), (1, 127, 130, 1, 1, 256), {}),
    "lengths and an offset for each example, and rows that see nothing": (
        dict(is_causal=True),
        (2, 200, 256, 1, 1, 64),
        dict(q_offset=np.int32([-5, 130]), query_lengths=np.int32([100, 200]), key_value_lengths=np.int32([256, 77])),
    ),
    "packed documents": (
        dict(is_causal=True),
        (1, 384, 384, 1, 1, 64),
        dict(q_segment_ids=documents(100, 28, 200, 56), kv_segment_ids=documents(100, 28, 200, 56)),
    ),
}
SLOW_CASES = {
    "causal, heads that share keys, several tiles": (dict(is_causal=True), (1, 256, 256, 2, 1, 64), {}),
    "every feature that goes with a window": (
        dict(window=(90, 20), soft_cap=3.0),
        (1, 140, 150, 2, 1, 64),
        dict(
            alibi_slopes=np.float32([0.5, 0.01]),
            sinks=np.float32([0.3, 2]),
            q_segment_ids=np.int32(np.arange(140) % 3)[None],
            kv_segment_ids=np.int32(np.arange(150) % 2)[None],
        ),
    ),
    "a window": (dict(window=(40, 10)), (1, 300, 300, 1, 1, 64), {}),
    "a window after the query": (dict(window=(0, 200)), (1, 300, 260, 1, 1, 128), {}),
    "a soft cap": (dict(soft_cap=5.0), (1, 200, 128, 1, 1, 128), {}),
    "ALiBi": (dict(is_causal=True), (1, 200, 200, 2, 2, 128), dict(alibi_slopes=np.float32([0.5, 0.1]))),
    "sinks and rows that see nothing": (
        dict(is_causal=True),
        (2, 130, 130, 2, 1, 64),
        dict(sinks=np.float32([0.3, 2]), q_offset=np.int32([-9, 0]), query_lengths=np.int32([130, 7])),
    ),
    "a band as a block mask": (dict(block_mask=Causal() & Local(70, 5)), (1, 256, 256, 1, 1, 64), {}),
    "a wide head with segments": (
        dict(),
        (1, 130, 130, 2, 1, 256),
        dict(q_segment_ids=np.int32(np.arange(130) % 3)[None], kv_segment_ids=np.int32(np.arange(130) % 4)[None]),
    ),
    "no keys at all for one example": (dict(), (2, 64, 64, 1, 1, 64), dict(key_value_lengths=np.int32([0, 64]))),
    "many keys, few queries": (dict(), (1, 17, 520, 4, 1, 128), {}),
}


@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        *(pytest.param(name, marks=SLOW) for name in SLOW_CASES),
    ],
)
def test_is_as_exact_as_the_naive_computation_and_free_of_races(case: str) -> None:
    spec, sizes, operands = (CASES | SLOW_CASES)[case]
    check(Spec(sizes[-1] ** -0.5, **spec), *draw(*sizes, jnp.bfloat16), **operands)


def test_multiplies_float16_and_heads_share_keys() -> None:
    check(Spec(0.1, is_causal=True), *draw(1, 70, 70, 2, 1, 64, jnp.float16))


@pytest.mark.parametrize(
    "sizes",
    [
        BlockSizes(key=64, key_stages=1, key_backward=64, key_backward_stages=1, query_backward=128, query_backward_stages=1),
        pytest.param(BlockSizes(128, 128, 64, 128, key_stages=3, query_backward_stages=5, key_backward_stages=2), marks=SLOW),
    ],
)
def test_tiles_that_the_caller_gives_compute_what_the_tables_do(sizes: BlockSizes) -> None:
    (*qkv, d_out), _ = draw(1, 130, 130, 1, 1, 64, jnp.bfloat16)

    def run(sizes: BlockSizes) -> list[jax.Array]:
        attend = functools.partial(
            dot_product_attention, is_causal=True, implementation="mosaic_gpu", interpret=True, block_sizes=sizes
        )
        out, pull = jax.vjp(attend, *qkv)
        return [out, *pull(d_out)]

    given, default = run(sizes), run(BlockSizes())
    assert not interpreter.get_races().races_found
    for one, other in zip(given, default):
        # In bfloat16 sums in another order differ in the last bit.
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=2**-7, atol=2**-8)


def test_every_entry_of_the_table_of_tiles_is_one_that_the_kernels_take() -> None:
    extras = {
        "plain": {},
        "segments": {"q_segment_ids": struct(2, 8, dtype=jnp.int32), "kv_segment_ids": struct(2, 8, dtype=jnp.int32)},
        "crowded": {"alibi_slopes": struct(4, dtype=jnp.float32)},
    }
    served = set()
    for entry in mosaic_gpu.tiles.shipped():
        sizes = BlockSizes(**entry["block_sizes"])
        operands = Operands(*[struct(2, 8, 4, entry["width"])] * 3, **extras[entry["logits"]])
        assert mosaic_gpu.supports(Spec(1.0, block_sizes=sizes), operands) is None
        # An entry says all of it: nothing is left to another one.
        assert {getattr(sizes, field) for fields in mosaic_gpu.tiles.FIELDS.values() for field in fields}.isdisjoint({None})
        served.add((entry["logits"], entry["width"]))
    assert served == {(logits, width) for logits, widths in mosaic_gpu.tiles.LARGEST.items() for width in widths}


def test_the_most_specific_entry_of_the_table_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(key: int, **where: Any) -> dict[str, Any]:
        anywhere = {"arch": None, "dtype": None, "logits": "plain", "width": 64, "causal": None, "length": 0}
        return {**anywhere, **where, "block_sizes": {"key": key}, "source": "a test"}

    table = (
        entry(1), entry(2, dtype="bfloat16"), entry(3, dtype="bfloat16", causal=True), entry(4, dtype="bfloat16", causal=True, length=4096),
        entry(5, arch="another"), entry(6, width=128),
    )  # fmt: skip
    monkeypatch.setattr(mosaic_gpu.tiles, "shipped", lambda: table)
    tuned = lambda *asked: mosaic_gpu.tiles.tuned("plain", *asked).key
    assert tuned("float16", 64, True, 9000) == 1
    assert tuned("bfloat16", 64, False, 9000) == 2
    assert [tuned("bfloat16", 64, True, length) for length in (1, 4095, 4096, 9000)] == [3, 3, 4, 4]
    assert tuned("bfloat16", 128, True, 9000) == 6


def test_a_tile_that_is_freed_before_its_use_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The race detector sees these kernels: it finds the race when a tile may be overwritten while it is read. Every barrier still sees all of its phases, so nobody waits for ever."""
    take, free = mosaic_gpu.dialect.Ring.take, mosaic_gpu.dialect.Ring.free

    def hasty(ring: mosaic_gpu.dialect.Ring, index: Any) -> tuple[Any, ...]:
        parts = take(ring, index)
        free(ring, index)
        return parts

    monkeypatch.setattr(mosaic_gpu.dialect.Ring, "take", hasty)
    monkeypatch.setattr(mosaic_gpu.dialect.Ring, "free", lambda ring, index: None)
    arrays, _ = draw(1, 64, 640, 1, 1, 128, jnp.bfloat16)
    try:
        jax.block_until_ready(mosaic_gpu.forward(Spec(0.1), Operands(*arrays[:3]), interpret=True))
        found = interpreter.get_races().races_found
    except Exception as error:  # From jax 0.12 on a race is an error.
        found = "RACE" in str(error)
    assert found


def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


QKV = [struct(2, 8, 4, 64)] * 3


@pytest.mark.parametrize(
    ("spec", "operands", "reason"),
    [
        (Spec(1.0), Operands(*[struct(2, 8, 4, 64, dtype=jnp.float32)] * 3), "float32"),
        (Spec(1.0), Operands(struct(2, 0, 4, 64), *QKV[1:]), "empty"),
        (Spec(1.0), Operands(*[struct(70_000, 8, 4, 64)] * 3), "65535"),
        (Spec(1.0), Operands(*QKV, bias=struct(1, 4, 8, 8)), "bias"),
        (Spec(1.0), Operands(*QKV, mask=struct(1, 1, 8, 8, dtype=bool)), "mask"),
        (Spec(1.0, block_mask=BigBird(8)), Operands(*QKV), "bands"),
        (Spec(1.0, block_mask=Causal()), Operands(*QKV, q_offset=struct(2, dtype=jnp.int32)), "q_offset"),
        (Spec(0.0), Operands(*QKV), "positive"),
        (Spec(1.0, block_sizes=BlockSizes(query=64)), Operands(*QKV), "128 queries, and block_sizes.query is 64"),
        (Spec(1.0, block_sizes=BlockSizes(key=192)), Operands(*QKV), "block_sizes.key is 64 or 128, as wgmma"),
        (Spec(1.0, block_sizes=BlockSizes(key_backward=0)), Operands(*QKV), "block_sizes.key_backward is 64 or 128, as wgmma"),
        (Spec(1.0, soft_cap=9.0, block_sizes=BlockSizes(query_backward=128)), Operands(*QKV), "query_backward is 64, as wgmma"),
        (Spec(1.0, block_sizes=BlockSizes(key=128, key_stages=7)), Operands(*QKV), "room for 6 tiles of 128 × 64"),
        (Spec(1.0, block_sizes=BlockSizes(query_backward_stages=0)), Operands(*QKV), "query_backward_stages, which is 0"),
    ],
)
def test_says_why_it_cannot_serve(spec: Spec, operands: Operands, reason: str) -> None:
    assert reason in mosaic_gpu.supports(spec, operands)


def test_serves_what_it_has_tiles_for() -> None:
    for width in (1, 64, 65, 128, 256):
        assert mosaic_gpu.supports(Spec(1.0), Operands(*[struct(2, 8, 4, width)] * 3)) is None
