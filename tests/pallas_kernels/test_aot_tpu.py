"""The TPU kernels compiled by libtpu for each kind of TPU, without one: they lower, their tiles fit into vector memory, and their memory is linear in length.

It needs `pip install 'jax[tpu]'`, whose libtpu must not be left to look for a TPU: JAX_PLATFORMS=cpu.
"""

import importlib.util
import os
from typing import Any

# Before libtpu is loaded: there is nobody to ask which machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# Nor is there a TPU that two processes could fight for: a lock in /tmp would keep other tests, and other users, from compiling.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.attention import mosaic_tpu
from pallas_kernels.attention.masks import Causal, Longformer
from pallas_kernels.attention.problem import BlockSizes, Operands, Spec

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"),
]

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@pytest.fixture(params=TOPOLOGIES, scope="module")
def sharding(request: pytest.FixtureRequest) -> NamedSharding:
    """On one TPU that is not there."""
    topology = topologies.get_topology_desc(topology_name=TOPOLOGIES[request.param], platform="tpu")
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())


def compile_(
    sharding: NamedSharding,
    sizes: tuple[int, int, int, int, int, int],
    spec: dict[str, Any],
    extras: dict[str, tuple[tuple[int, ...], Any]],
    dtype: Any = jnp.bfloat16,
) -> list[Any]:
    """The forward and the backward pass for B, T, S, N, K, H."""

    def struct(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch, queries, keys, heads, key_heads, width = sizes
    problem = Spec(width**-0.5, **spec)
    query, key = struct(batch, queries, heads, width), struct(batch, keys, key_heads, width)
    operands = Operands(query, key, key, **{name: struct(*shape, dtype=kind) for name, (shape, kind) in extras.items()})
    assert mosaic_tpu.supports(problem, operands) is None
    statistic = struct(batch, heads, queries, dtype=jnp.float32)
    forward = jax.jit(lambda operands: mosaic_tpu.forward(problem, operands)).lower(operands).compile()
    backward = jax.jit(lambda *all_: mosaic_tpu.backward(problem, *all_))
    return [forward, backward.lower(operands, query, statistic, query, statistic).compile()]


def kernels(compiled: Any) -> int:
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_the_shipped_tiles_compile(sharding: NamedSharding, width: int, dtype: Any) -> None:
    """At a length where every tile is whole, and some are partial and some full."""
    forward, backward = compile_(sharding, (1, 4096, 4096, 4, 2, width), {"is_causal": True}, {}, dtype)
    assert kernels(forward) == 1 and kernels(backward) == 2


INTEGER, FLOAT = jnp.int32, jnp.float32
SMALL = BlockSizes(256, 256, 256, 256)
"""They compile in a fraction of the time."""
FEATURES: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "every feature that goes with a window": (
        (2, 2048, 2048, 4, 2, 64),
        dict(is_causal=True, window=(500, 0), soft_cap=30.0),
        dict(
            q_segment_ids=((2, 2048), INTEGER),
            kv_segment_ids=((2, 2048), INTEGER),
            query_lengths=((2,), INTEGER),
            key_value_lengths=((2,), INTEGER),
            q_offset=((2,), INTEGER),
            alibi_slopes=((4,), FLOAT),
            sinks=((4,), FLOAT),
        ),
    ),
    "a block mask": ((1, 2048, 2048, 2, 1, 80), dict(block_sizes=SMALL, block_mask=Longformer(256, (0, 1000)) & Causal()), {}),
    "a mask": ((2, 1024, 1024, 2, 2, 128), dict(block_sizes=SMALL), dict(mask=((2, 1, 1024, 1024), bool))),
    "a mask of keys": ((2, 1024, 1024, 2, 2, 128), dict(block_sizes=SMALL), dict(mask=((2, 1, 1, 1024), bool))),
    "a mask of queries": ((2, 1024, 1024, 2, 2, 128), dict(block_sizes=SMALL), dict(mask=((1, 2, 1024, 1), bool))),
    "lengths between tiles and an odd width": ((1, 1000, 129, 2, 2, 17), {}, {}),
    "one query": ((4, 1, 1000, 8, 1, 128), {}, dict(key_value_lengths=((4,), INTEGER))),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_compiles(sharding: NamedSharding, feature: str) -> None:
    sizes, spec, extras = FEATURES[feature]
    forward, backward = compile_(sharding, sizes, spec, extras)
    assert kernels(forward) == 1 and kernels(backward) == 2


def test_temporary_memory_is_linear_in_length(sharding: NamedSharding) -> None:
    """At most as much as six operands whose heads are as wide as the lanes: heads narrower than those have to be laid out anew. Short ones may need none, since XLA keeps them in vector memory."""
    heads, width, lanes = 4, 64, 128
    for length in (8192, 32768):
        for compiled in compile_(sharding, (1, length, length, heads, 2, width), {"is_causal": True}, {}):
            assert compiled.memory_analysis().temp_size_in_bytes <= 6 * length * heads * lanes * 2
