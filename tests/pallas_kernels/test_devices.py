"""Attention over four virtual devices is that of one, however arrays lie, and nobody gathers queries, keys or values."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dot_product_attention

DEVICES = 4
pytestmark = pytest.mark.eight_devices

RANDOM = np.random.default_rng(0)
BATCH, QUERIES, KEYS, HEADS, WIDTH = 8, 40, 48, 4, 8


def arrays(key_heads: int) -> dict[str, jax.Array]:
    """What is differentiated, among it what all batches or all heads share."""
    keys = BATCH, KEYS, key_heads, WIDTH
    shapes = {"query": (BATCH, QUERIES, HEADS, WIDTH), "key": keys, "value": keys, "bias": (1, HEADS, QUERIES, KEYS)}
    shapes |= {"alibi_slopes": (HEADS,), "sinks": (HEADS,)}
    return {name: jnp.asarray(RANDOM.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


HIDING = {
    "q_segment_ids": jnp.asarray(RANDOM.integers(0, 2, (BATCH, QUERIES))),
    "kv_segment_ids": jnp.asarray(RANDOM.integers(0, 2, (BATCH, KEYS))),
    "key_value_seq_lengths": jnp.asarray([48, 0, 5, 20, 48, 30, 7, 1]),
    "q_offset": jnp.asarray([0, 8, 8, 0, -3, 1, 2, 3]),
    "mask": jnp.asarray(RANDOM.random((BATCH, 1, QUERIES, KEYS)) < 0.9),
}
BY_BATCH = {name: P("data") for name in ("query", "key", "value", *HIDING)} | {
    name: P() for name in ("bias", "alibi_slopes", "sinks")
}
BY_HEADS = dict.fromkeys(("query", "key", "value"), P("data", None, "model")) | {"bias": P(None, "model")}
BY_BOTH = BY_BATCH | BY_HEADS | dict.fromkeys(("alibi_slopes", "sinks"), P("model"))


def loss(moving: dict[str, jax.Array], hiding: dict[str, jax.Array]) -> jax.Array:
    out, lse = dot_product_attention(**moving, **hiding, is_causal=True, return_residual=True)
    return (out**2).mean() + jnp.where(lse > -jnp.inf, jnp.sin(lse), 0).mean()


def put(mesh: jax.sharding.Mesh, places: dict[str, P], given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jax.device_put(x, NamedSharding(mesh, places[name])) for name, x in given.items()}


def assert_close(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def mesh_of(kind: AxisType, *shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:DEVICES])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_jit_divides_batches_and_heads_and_gathers_nothing(kind: AxisType, key_heads: int) -> None:
    moving = arrays(key_heads)
    places = BY_BOTH if key_heads > 1 else BY_BOTH | dict.fromkeys(("key", "value"), P("data"))
    given = [put(mesh_of(kind, 2, 2), places, x) for x in (moving, HIDING)]
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*given).compile()
    assert_close(compiled(*given), jax.value_and_grad(loss)(moving, HIDING))
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()


def test_long_sequences_stay_where_they_are() -> None:
    """So long that there are several groups of streams, each of which has a place in a sharded axis."""
    shape, mesh = jax.ShapeDtypeStruct((8, 2048, 2, 32), jnp.bfloat16), mesh_of(AxisType.Auto, 4, 1)
    attend = functools.partial(dot_product_attention, is_causal=True)
    pull = lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out)
    text = jax.jit(pull, in_shardings=NamedSharding(mesh, P("data"))).lower(*[shape] * 4).compile().as_text()
    assert "all-gather" not in text and "all-reduce" not in text


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_within_a_shard_map_whose_types_are_checked(kind: AxisType) -> None:
    mesh, moving = mesh_of(kind, 4, 1), arrays(2)
    places = tuple({name: BY_BATCH[name] for name in x} for x in (moving, HIDING))
    part = lambda moving, hiding: jax.lax.pmean(loss(moving, hiding), "data")
    mapped = jax.shard_map(part, mesh=mesh, in_specs=places, out_specs=P())
    given = [put(mesh, BY_BATCH, x) for x in (moving, HIDING)]
    assert_close(jax.jit(jax.value_and_grad(mapped))(*given), jax.value_and_grad(loss)(moving, HIDING))


def test_a_program_for_tpus_has_the_kernel_where_xla_need_not_divide_it() -> None:
    """The compiler for TPUs can be told nothing about dividing: there XLA divides tiles, which all examples go through together."""
    moving = {name: x for name, x in arrays(2).items() if name != "bias"}  # The kernel has none.
    check = export.DisabledSafetyCheck.custom_call("tpu_custom_call")
    mesh, places = mesh_of(AxisType.Auto, 4, 1), tuple({name: BY_BATCH[name] for name in x} for x in (moving, HIDING))

    def kernels(loss: Callable[..., Any], *given: Any) -> int:
        step = export.export(jax.jit(jax.grad(loss)), platforms=["tpu"], disabled_checks=[check])
        return step(*given).mlir_module().count("@tpu_custom_call")

    part = lambda moving, hiding: jax.lax.pmean(loss(moving, hiding), "data")
    mapped = jax.shard_map(part, mesh=mesh, in_specs=places, out_specs=P())
    assert kernels(loss, moving, HIDING) == kernels(mapped, moving, HIDING) == 3
    assert kernels(loss, *(put(mesh, BY_BATCH, x) for x in (moving, HIDING))) == 0


def test_pmap_needs_nothing_of_that() -> None:
    moving = {name: x for name, x in arrays(2).items() if name in ("query", "key", "value")}
    split = {name: x.reshape(DEVICES, -1, *x.shape[1:]) for name, x in moving.items()}
    values, gradients = jax.pmap(jax.value_and_grad(lambda x: loss(x, {})))(split)
    value, wanted = jax.value_and_grad(lambda x: loss(x, {}))(moving)
    assert_close(values.mean(), value)
    assert_close({name: x.reshape(moving[name].shape) / DEVICES for name, x in gradients.items()}, wanted)


FORWARD: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (jax.tree.map(jnp.sin, x),)),
    "jvp of grad": lambda f, x: jax.jvp(jax.grad(f), (x,), (jax.tree.map(jnp.sin, x),)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_knows_of_types_that_say_how_arrays_lie(name: str) -> None:
    moving = arrays(2)
    given = [put(mesh_of(AxisType.Explicit, 2, 2), BY_BOTH, x) for x in (moving, HIDING)]
    derivative = lambda moving, hiding: FORWARD[name](lambda moving: loss(moving, hiding), moving)
    assert_close(jax.jit(derivative)(*given), derivative(moving, HIDING))
