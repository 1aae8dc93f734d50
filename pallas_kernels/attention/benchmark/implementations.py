"""Everybody who computes attention, each pinned to one kernel, in the form in which they are timed."""

import functools
import importlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.attention.benchmark.shapes import Shape
from pallas_kernels.attention.problem import BlockSizes


class Absent(NotImplementedError):
    """This machine has not what an implementation needs, whatever the shape."""


def in_one_line(error: Exception) -> str:
    """Its kind and as much of its text as a table has room for."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Pass(NamedTuple):
    """One of `PASSES`, compiled and warm."""

    run: Callable[[int], None]
    """Makes so many calls, one after another, and waits for the last."""
    temporary: int | None = None
    """Bytes that it needs beside its arguments and results, where the compiler says it."""


class Candidate(NamedTuple):
    """An implementation at a shape."""

    passes: Mapping[str, Callable[[], Pass]]
    """How to get each of `PASSES`."""
    results: Callable[[], list[np.ndarray]]
    """Output and gradients in float64, each `B T N H`."""


Build = Callable[[Shape, tuple[jax.Array, ...]], Candidate]
"""From a shape and query, key, value and cotangent. Raises whatever a library finds no way to do."""


def of_jax(attend: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], *extras: Any) -> Candidate:
    """From `attend(query, key, value, *extras)` on `B T N H`. What is large (a mask) is among the extras, since a constant would be compiled in."""
    query, key, value, d_out = arrays

    def differentiated(query: jax.Array, key: jax.Array, value: jax.Array, *extras: Any) -> Any:
        return jax.vjp(lambda *operands: attend(*operands, *extras), query, key, value)

    def both(d_out: jax.Array, *operands: Any) -> Any:
        out, pull = differentiated(*operands)
        return out, *pull(d_out)

    def backward() -> Pass:
        # What the forward pass keeps for it is given, as in training.
        _, pull = jax.jit(differentiated)(query, key, value, *extras)
        return compiled(lambda pull, d_out: pull(d_out), pull, d_out)

    operands = query, key, value, *extras
    passes = {
        "forward": lambda: compiled(attend, *operands),
        "backward": backward,
        "forward+backward": lambda: compiled(both, d_out, *operands),
    }
    return Candidate(passes, lambda: [np.asarray(x).astype(np.float64) for x in jax.jit(both)(d_out, *operands)])


def compiled(f: Callable[..., Any], *args: Any) -> Pass:
    """A function of arrays for just these."""
    program = jax.jit(f).lower(*args).compile()
    memory = program.memory_analysis()
    must_fit(memory.temp_size_in_bytes if memory else 0)

    def run(calls: int) -> None:
        for _ in range(calls):
            result = program(*args)
        jax.block_until_ready(result)

    return Pass(run, memory.temp_size_in_bytes if memory else None)


def must_fit(size: int) -> None:
    """Raises `MemoryError` for more bytes than the machine has, where it would rather end the process: on a CPU."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if jax.default_backend() == "cpu" and size > most:
        raise MemoryError(f"it needs {size / 2**30:.1f} GiB, and the machine has {most / 2**30:.1f}")


def needs(*platforms: str) -> None:
    """Raises `Absent` on others."""
    if jax.default_backend() not in platforms:
        raise Absent(f"needs a {' or a '.join(platform.upper() for platform in platforms)}")


def imported(name: str) -> Any:
    """A module, or `Absent`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"cannot be imported: {error}") from None


def segment_ids(shape: Shape) -> list[jax.Array]:
    """`B T`, where documents are packed."""
    return [jnp.asarray(np.tile(shape.segments, (shape.batch, 1)))] if shape.case == "packed" else []


def ours(
    implementation: str,
    shape: Shape,
    arrays: tuple[jax.Array, ...],
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> Candidate:
    """One of `pallas_kernels`' own implementations."""
    platform = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}.get(implementation)
    if platform and not interpret:
        needs(platform)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array | None = None) -> jax.Array:
        return pallas_kernels.dot_product_attention(
            query, key, value, **shape.arguments, q_segment_ids=ids, kv_segment_ids=ids,
            implementation=implementation, block_sizes=block_sizes, interpret=interpret,
        )  # fmt: skip

    return of_jax(attend, arrays, *segment_ids(shape))


def like_jax_nn(attention: Callable[..., jax.Array], shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """From a function with the arguments of `jax.nn.dot_product_attention`; packed documents by a mask, since it has no segments."""
    if shape.case == "packed":
        mask = jnp.asarray(shape.visible)[None, None]
        return of_jax(lambda query, key, value, mask: attention(query, key, value, mask=mask), arrays, mask)
    return of_jax(functools.partial(attention, **shape.arguments), arrays)


def jax_nn(implementation: str, shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """`jax.nn.dot_product_attention` by XLA or by cuDNN."""
    if implementation == "cudnn":
        needs("gpu")
    return like_jax_nn(functools.partial(jax.nn.dot_product_attention, implementation=implementation), shape, arrays)


def jax_pallas(shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """The flash attention that jax itself carries: by Triton for GPUs, by Mosaic for TPUs."""
    needs("gpu", "tpu")
    if shape.case == "window":
        raise NotImplementedError("it has no window")
    causal, scale = shape.case != "full", 1 / math.sqrt(shape.width)
    if jax.default_backend() == "gpu":
        triton = imported("jax.experimental.pallas.ops.gpu.attention")
        return of_jax(
            lambda query, key, value, ids=None: triton.mha(query, key, value, ids, sm_scale=scale, causal=causal),
            arrays,
            *segment_ids(shape),
        )
    mosaic = imported("jax.experimental.pallas.ops.tpu.flash_attention")

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array | None = None) -> jax.Array:
        heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
        pair = None if ids is None else mosaic.SegmentIds(ids, ids)
        return mosaic.flash_attention(*heads_first, segment_ids=pair, causal=causal, sm_scale=scale).swapaxes(1, 2)

    return of_jax(attend, arrays, *segment_ids(shape))


def jax_mosaic_gpu(shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """`attention_mgpu`, jax's example for Hopper, with the largest tiles that it does not spill registers with. It computes in float16, and does not scale."""
    needs("gpu")
    if shape.case not in ("full", "causal"):
        raise NotImplementedError("it has no windows and no segments")
    module = imported("jax.experimental.pallas.ops.gpu.attention_mgpu")
    tiles = module.TuningConfig(
        block_q=64, block_kv=128 if shape.width <= 128 else 64, max_concurrent_steps=2, causal=shape.case == "causal",
        block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64,
    )  # fmt: skip

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return module.attention(query * query.dtype.type(1 / math.sqrt(shape.width)), key, value, tiles)

    return of_jax(attend, tuple(x.astype(jnp.float16) for x in arrays))


def jax_splash(shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """jax's splash attention for TPUs, which skips what a static mask hides. It does not scale."""
    needs("tpu")
    return of_jax(splash(shape), arrays, *segment_ids(shape))


def splash(shape: Shape, interpret: bool = False) -> Callable[..., jax.Array]:
    """The same as a function of query, key, value and segments."""
    kernels = imported("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel")
    masks = imported("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask")
    size = shape.length, shape.length
    match shape.case:
        case "full":
            mask = masks.FullMask(size)
        case "window":
            mask = masks.LocalMask(size, (shape.window - 1, 0), 0)
        case "causal" | "packed":
            mask = masks.CausalMask(size)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * shape.heads), head_shards=1, q_seq_shards=1, interpret=interpret
    )

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array | None = None) -> jax.Array:
        query = query * query.dtype.type(1 / math.sqrt(shape.width))
        heads_first = (x.swapaxes(1, 2) for x in (query, key, value))
        pair = None if ids is None else kernels.SegmentIds(ids, ids)
        return jax.vmap(kernel)(*heads_first, pair).swapaxes(1, 2)

    return attend


def tokamax(shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """tokamax's kernel in Mosaic, where the package is installed."""
    needs("gpu", "tpu")
    attention = functools.partial(imported("tokamax").dot_product_attention, implementation="mosaic")
    return like_jax_nn(attention, shape, arrays)


def torch_sdpa(backend: str, shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """`torch.nn.functional.scaled_dot_product_attention`, pinned to one backend; windows and packed documents by a mask."""
    if backend in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        needs("gpu")
    torch, kernels = imported("torch"), imported("torch.nn.attention")
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise Absent("torch sees no GPU")
    if backend == "MATH":
        # Logits and weights, and the gradients of both.
        must_fit(4 * shape.batch * shape.heads * shape.length**2 * arrays[0].dtype.itemsize)
    tensors = [torch.from_dlpack(x).transpose(1, 2).contiguous() for x in arrays]
    arguments = {"is_causal": shape.case == "causal"}
    if shape.case in ("window", "packed"):
        arguments["attn_mask"] = torch.from_numpy(shape.visible).to(tensors[0].device)

    def attend(*operands: Any) -> Any:
        with kernels.sdpa_kernel(getattr(kernels.SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(*operands, **arguments)

    def forward() -> Any:
        with torch.no_grad():
            return attend(*tensors[:3])

    def recorded() -> Any:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        return attend(*leaves), leaves

    def both() -> Any:
        out, leaves = recorded()
        return out, *torch.autograd.grad(out, leaves, tensors[3])

    def repeated(call: Callable[[], Any]) -> Pass:
        def run(calls: int) -> None:
            for _ in range(calls):
                call()
            if on_gpu:
                torch.cuda.synchronize()

        return Pass(run)

    def backward() -> Pass:
        out, leaves = recorded()
        return repeated(lambda: torch.autograd.grad(out, leaves, tensors[3], retain_graph=True))

    passes = {"forward": lambda: repeated(forward), "backward": backward, "forward+backward": lambda: repeated(both)}
    return Candidate(passes, lambda: [x.detach().transpose(1, 2).double().cpu().numpy() for x in both()])


IMPLEMENTATIONS: dict[str, Build] = {
    "xla_chunked": functools.partial(ours, "xla_chunked"),
    "mosaic_gpu": functools.partial(ours, "mosaic_gpu"),
    "mosaic_tpu": functools.partial(ours, "mosaic_tpu"),
    "jax.nn xla": functools.partial(jax_nn, "xla"),
    "jax.nn cudnn": functools.partial(jax_nn, "cudnn"),
    "jax's Pallas": jax_pallas,
    "jax's Mosaic GPU, float16": jax_mosaic_gpu,
    "jax's splash": jax_splash,
    "tokamax": tokamax,
    "torch flash": functools.partial(torch_sdpa, "FLASH_ATTENTION"),
    "torch cudnn": functools.partial(torch_sdpa, "CUDNN_ATTENTION"),
    "torch efficient": functools.partial(torch_sdpa, "EFFICIENT_ATTENTION"),
    "torch math": functools.partial(torch_sdpa, "MATH"),
}
COMPARED = {
    "cpu": ("jax.nn xla", "torch flash"),
    "gpu": ("jax.nn cudnn", "torch flash", "tokamax"),
    "tpu": ("jax's Pallas", "jax's splash", "tokamax"),
}
"""Whom the table compares everybody with, by the kind of device."""
