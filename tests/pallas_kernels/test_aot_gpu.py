"""The Hopper kernels compiled to machine code by ptxas, without a GPU: nothing of theirs may spill, wait or overflow.

It needs jax's CUDA plugin: `pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V` with V the version of jax, and nothing else of CUDA.
"""

import importlib.util
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before the plugin is loaded: the first lets it be without a driver, the second has ptxas tell what it did.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention.problem import BlockSizes, Operands, Spec

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="jax-cuda13-plugin is not installed: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, of jax's version",
    ),
]

BATCH, HEADS = 2, 8
FEATURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "causal": ({"is_causal": True}, ()),
    "window": ({"window": (1000, 0)}, ()),
    "two-sided window": ({"window": (1000, 1000)}, ()),
    "lengths": ({}, ("query_lengths", "key_value_lengths")),
    "causal with offset and lengths": ({"is_causal": True}, ("q_offset", "query_lengths", "key_value_lengths")),
    "packed documents": ({"is_causal": True}, ("q_segment_ids", "kv_segment_ids")),
    "packed documents in a window": ({"window": (1000, 0)}, ("q_segment_ids", "kv_segment_ids")),
    "sinks": ({"is_causal": True}, ("sinks",)),
    "soft cap": ({"is_causal": True, "soft_cap": 50.0}, ()),
    "ALiBi": ({"is_causal": True}, ("alibi_slopes",)),
    "everything": (
        {"window": (1000, 1000), "soft_cap": 50.0},
        ("q_offset", "query_lengths", "key_value_lengths", "q_segment_ids", "kv_segment_ids", "sinks", "alibi_slopes"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def without_cache() -> Iterator[None]:
    """What comes from the cache has not been compiled, and ptxas has said nothing."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", kept)


def mesh_of(name: str) -> Mesh:
    """One GPU that is not there."""
    description = Path(__file__).with_name(f"{name}.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology_name=name, target_config=description, topology="1x1x1")
    return Mesh(np.array(topology.devices[:1]), ("x",))


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """An H100, which stands for the H200: `test_an_h200_gets_the_code_of_an_h100`."""
    return mesh_of("h100")


def arguments(
    mesh: Mesh, width: int, length: int, names: tuple[str, ...], key_heads: int, dtype: Any, batch: int = BATCH
) -> tuple[Any, ...]:
    """Operands, and what the backward pass is given beside them."""

    def struct(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    sizes = {"q_segment_ids": (batch, length), "kv_segment_ids": (batch, length), "sinks": (HEADS,), "alibi_slopes": (HEADS,)}
    extras = {
        name: struct(*sizes.get(name, (batch,)), dtype=jnp.float32 if name in ("sinks", "alibi_slopes") else jnp.int32)
        for name in names
    }
    out, lse = struct(batch, length, HEADS, width), struct(batch, HEADS, length, dtype=jnp.float32)
    key = struct(batch, length, key_heads, width)
    return Operands(out, key, key, **extras), out, lse, out, lse


def lower(
    mesh: Mesh,
    width: int,
    names: tuple[str, ...],
    length: int = 4096,
    key_heads: int = HEADS,
    dtype: Any = jnp.bfloat16,
    batch: int = BATCH,
    **spec: Any,
) -> list[Any]:
    """The forward and the backward pass."""
    spec = Spec(width**-0.5, **spec)
    operands, *rest = arguments(mesh, width, length, names, key_heads, dtype, batch)
    assert mosaic_gpu.supports(spec, operands) is None
    with jax.set_mesh(mesh):
        forward = jax.jit(lambda operands: mosaic_gpu.forward(spec, operands)).lower(operands)
        return [forward, jax.jit(lambda *all_: mosaic_gpu.backward(spec, *all_)).lower(operands, *rest)]


def compile_(mesh: Mesh, *args: Any, **kwargs: Any) -> list[Any]:
    """What `lower` gives, compiled. Mosaic refuses a kernel that needs more than the 227 KiB of shared memory."""
    lowered = lower(mesh, *args, **kwargs)
    with jax.set_mesh(mesh):
        return [each.compile() for each in lowered]


def judge(report: str) -> None:
    """On what ptxas says of three kernels or more: nothing spilled, no products one after another. A kernel that was compiled before, for the same lengths too, is not compiled again."""
    assert report.count("Compiling entry function") >= 3, "ptxas has not compiled the kernels, or its word did not come through"
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and all(int(number) == 0 for pair in spills for number in pair), report
    assert "serialized" not in report, report


@pytest.mark.parametrize("width", mosaic_gpu.tiles.WIDTHS)
@pytest.mark.parametrize("feature", list(FEATURES))
def test_keeps_everything_in_registers_and_products_asynchronous(
    mesh: Mesh, width: int, feature: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a key head for each query head, and with one that four share."""
    spec, names = FEATURES[feature]
    reason = mosaic_gpu.supports(Spec(width**-0.5, **spec), arguments(mesh, width, 4096, names, HEADS, jnp.bfloat16)[0])
    if reason is not None:
        pytest.skip(reason)
    for key_heads in (HEADS, HEADS // 4):
        compile_(mesh, width, names, length=4096 + 128 * list(FEATURES).index(feature), key_heads=key_heads, **spec)
        judge("".join(capfd.readouterr()))


@pytest.mark.parametrize("width", mosaic_gpu.tiles.WIDTHS)
def test_so_it_is_with_odd_lengths_and_float16(mesh: Mesh, width: int, capfd: pytest.CaptureFixture[str]) -> None:
    compile_(mesh, width, (), length=4095, key_heads=2, dtype=jnp.float16, is_causal=True)
    judge("".join(capfd.readouterr()))


def test_so_it_is_with_one_sequence_of_packed_documents(mesh: Mesh, capfd: pytest.CaptureFixture[str]) -> None:
    compile_(mesh, 128, ("q_segment_ids", "kv_segment_ids"), length=16384, batch=1, is_causal=True)
    judge("".join(capfd.readouterr()))


LOGITS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "segments": ({}, ("q_segment_ids", "kv_segment_ids")),
    "crowded": ({"soft_cap": 50.0}, ("alibi_slopes", "q_segment_ids", "kv_segment_ids")),
}
"""What stands for each kind of logits: that which needs the most registers."""


@pytest.mark.parametrize(
    "entry", mosaic_gpu.tiles.shipped(), ids=lambda entry: f"{entry['logits']}-{entry['width']}-{entry['length']}"
)
def test_so_does_every_entry_of_the_table_of_tiles(mesh: Mesh, entry: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """At a length that no other test has, so that the kernels are compiled here."""
    spec, names = LOGITS[entry["logits"]]
    for causal in {False, True} if entry["causal"] is None else {entry["causal"]}:
        sizes, dtype = BlockSizes(**entry["block_sizes"]), jnp.dtype(entry["dtype"] or "bfloat16")
        compile_(mesh, entry["width"], names, entry["length"] + 2048, dtype=dtype, is_causal=causal, block_sizes=sizes, **spec)
        judge("".join(capfd.readouterr()))


@pytest.mark.parametrize("width", mosaic_gpu.tiles.WIDTHS)
@pytest.mark.parametrize("logits", mosaic_gpu.tiles.LARGEST)
def test_so_do_all_tiles_that_are_accepted(mesh: Mesh, logits: str, width: int, capfd: pytest.CaptureFixture[str]) -> None:
    """With the fewest and the most stages that `--tune` tries, and as many as shared memory is said to have room for."""
    if width not in mosaic_gpu.tiles.LARGEST[logits]:
        pytest.skip("it has no kernel for such heads")
    spec, names = LOGITS[logits]

    def choices(kernel: str) -> list[mosaic_gpu.tiles.Tiles]:
        chosen = []
        for rows, tried in itertools.groupby(mosaic_gpu.tiles.candidates(kernel, logits, width), lambda tiles: tiles.rows):
            fewest, *_, most = *tried, mosaic_gpu.tiles.Tiles(rows, mosaic_gpu.tiles.most_stages(kernel, logits, width, rows))
            chosen += [fewest, most._replace(stages=min(most.stages, 6)), most]
        return list(dict.fromkeys(chosen))

    kernels = mosaic_gpu.tiles.Tuning._fields
    # All three in one program; one that has fewer choices than another is then the table's.
    for row in itertools.zip_longest(*map(choices, kernels)):
        sizes = {
            field: size
            for kernel, tiles in zip(kernels, row)
            for field, size in zip(mosaic_gpu.tiles.FIELDS[kernel], tiles or ())
        }
        compile_(mesh, width, names, 6144, is_causal=True, block_sizes=BlockSizes(**sizes), **spec)
    judge("".join(capfd.readouterr()))


def test_an_h200_gets_the_code_of_an_h100(mesh: Mesh) -> None:
    """It has more memory, and faster one, which XLA is told and the kernels do not ask about: one description stands for both."""
    if jax.__version__.startswith("0.11."):
        pytest.skip("jax 0.11 numbers the kernels that it lowers: no text comes twice")
    for one, other in zip(lower(mesh, 64, (), is_causal=True), lower(mesh_of("h200"), 64, (), is_causal=True)):
        assert "mosaic_gpu" in one.as_text() and one.as_text() == other.as_text()


def test_temporary_memory_is_linear_in_the_length(mesh: Mesh) -> None:
    """Of the backward pass: the log-sum-exp and delta, padded; of the forward pass: nothing that grows faster."""
    short, long = (compile_(mesh, 64, (), length=length, is_causal=True) for length in (8192, 32768))
    for small, large in zip(short, long):
        small, large = (each.memory_analysis().temp_size_in_bytes for each in (small, large))
        assert large <= 4 * small + 4096
        assert large <= 3 * 4 * BATCH * HEADS * 32768 + 4096
