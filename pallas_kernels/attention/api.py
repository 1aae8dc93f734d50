"""The functions that a user calls, and the choice among implementations."""

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.typing import ArrayLike

from pallas_kernels.attention import checks, devices, differentiation, jax_nn, vmap
from pallas_kernels.attention.masks import Mask
from pallas_kernels.attention.problem import BlockSizes, Gradients, Operands, Spec

Implementation = Literal["mosaic_gpu", "mosaic_tpu", "xla_chunked", "cudnn", "xla", "kernel"]
"""`kernel` is that of the platform, or an error."""
KERNELS = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
"""The platform of each kernel."""


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    q_offset: ArrayLike | None = None,
    block_mask: Mask | None = None,
    block_sizes: BlockSizes | None = None,
    precision: jax.lax.PrecisionLike = None,
    interpret: bool = False,
) -> Any:
    """Exact attention softmax(QKᵀ·scale + …)V in tiles, with the arguments of `jax.nn.dot_product_attention` and more; memory grows with T + S instead of T · S, forward and backward.

    Shapes: query `B T N H`, key and value `B S K H`, where K divides N and head n reads key head n // (N/K); or all three without B. float32, bfloat16 or float16 (float64 with jax's x64), softmax in float32. `attention.problem` defines every term, and the order in which they apply.

    - `bias`, `mask`: up to four axes, the last of `B N T S`, each 1 or whole. A mask is True where a query may look.
    - `scale`: 1/√H where None. One that is traced multiplies the queries, which rounds them to their dtype.
    - `is_causal`: key j is visible to query i if j ≤ i, or j ≤ i + q_offset.
    - `query_seq_lengths`, `key_value_seq_lengths`: integers `B`, at most T and S. What lies behind them may hold anything, NaN too.
    - `local_window_size`: so many positions to the left and right, both inclusive.
    - `q_segment_ids`, `kv_segment_ids`: integers `B T`, `B S`: a query sees its own segment. Those of the keys may be left out where T = S.
    - `logits_soft_cap`: cap · tanh(logit / cap), before ALiBi and bias (Gemma 2).
    - `sinks`: `N`, one more logit per head, without a value (gpt-oss).
    - `alibi_slopes`: `N`; −slope · |i + q_offset − j| is added to logits.
    - `q_offset`: a scalar or `B`: the position of the first query, for decoding and for pieces of a sequence.
    - `block_mask`: an object of `attention.masks`, known while tracing: empty tiles are skipped.
    - `block_sizes`, `precision`: see `attention.problem.BlockSizes`, `jax.lax.Precision`.
    - `implementation`: None chooses by the platform that is being lowered for: the kernel of that platform where it serves, else `xla_chunked`. A named one that cannot serve raises; `kernel` is that of the platform or an error. A program that `jax.export` makes for several platforms at once needs a named one: jax lowers each for all of them.
    - `interpret`: runs the named kernel in its interpreter, on a CPU.

    A row that sees nothing gives 0, a log-sum-exp of −∞ (that of its sink, if it has one) and zero gradients. Differentiable in reverse mode by the implementation's own backward pass, which is deterministic, and in forward mode by XLA tiles; `jax.hessian` works; reverse mode twice does not. `cudnn` and `xla` are jax's and differentiate themselves.

    Arrays may lie over several devices, under `jit` with axes of a mesh that are Auto or Explicit, and within `shard_map`. Each device computes the batches and heads of the queries that it holds, with whole sequences, and gathers none of the others (heads where the key heads come out even too, or there is only one). Where axes are Auto, XLA divides what is left: forward mode, and on TPUs everything, by tiles instead of the kernel.

    Returns the output `B T N H` in the query's dtype; with `return_residual` also the log-sum-exp `B T N` in float32 (float64 for float64), differentiable. Raises `ValueError` for arguments that do not fit together, and `NotImplementedError`, saying why, where the named implementation cannot serve.
    """
    batched = jnp.ndim(query) == 4
    spec, operands = _problem(
        query, key, value, bias, mask, query_lengths=query_seq_lengths, key_value_lengths=key_value_seq_lengths,
        q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids, sinks=sinks, alibi_slopes=alibi_slopes, q_offset=q_offset,
        scale=scale, is_causal=is_causal, window=local_window_size, soft_cap=logits_soft_cap, block_mask=block_mask,
        block_sizes=block_sizes, precision=precision,
    )  # fmt: skip
    if implementation is not None:
        reason = _refusal(implementation, spec, operands, return_residual)
        if reason is not None:
            raise NotImplementedError(
                f"implementation={implementation!r} cannot serve here: {reason}; implementation=None takes one that can"
            )
    if interpret and implementation not in KERNELS:
        raise ValueError(
            f"interpret=True runs a kernel in its interpreter: name one of {', '.join(KERNELS)}, not {implementation}"
        )

    if not operands.query.size or not operands.key.size:
        out, lse = _of_nothing(operands)
    elif implementation in ("cudnn", "xla"):
        out, lse = jax_nn.attention(spec, _blank(operands), implementation), None
    else:
        out, lse = differentiation.attention(_passes(implementation, interpret), spec, devices.varying_alike(operands))
    if not batched:
        out, lse = out[0], None if lse is None else lse[0]
    return (out, lse.swapaxes(-1, -2)) if return_residual else out


def flash_attention(*args: Any, **kwargs: Any) -> Any:
    """`dot_product_attention` by the kernel of the platform or not at all: where that cannot serve, it raises `NotImplementedError` with the reason."""
    return dot_product_attention(*args, **{"implementation": "kernel", **kwargs})


def supports(implementation: Implementation, *args: Any, **kwargs: Any) -> str | None:
    """Why an implementation cannot serve `dot_product_attention(*args, **kwargs)`, or None where it can. Looks at shapes and dtypes only: arrays may be `jax.ShapeDtypeStruct`, and no device is asked."""
    given = inspect.signature(dot_product_attention).bind(*args, **kwargs).arguments
    residual = given.pop("return_residual", False)
    given.pop("interpret", None)
    given = {_RENAMED.get(name, name): value for name, value in given.items()}
    arrays = {name: given.pop(name) for name in Operands._fields if hasattr(given.get(name), "shape")}
    reasons = []

    def ask(arrays: dict[str, Any]) -> None:
        reasons.append(_refusal(implementation, *_problem(**given, **arrays), residual))

    jax.eval_shape(ask, arrays)
    return reasons[0]


# What the public function calls otherwise than `_problem`.
_RENAMED = {
    "query_seq_lengths": "query_lengths",
    "key_value_seq_lengths": "key_value_lengths",
    "local_window_size": "window",
    "logits_soft_cap": "soft_cap",
}


def _problem(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    query_lengths: ArrayLike | None = None,
    key_value_lengths: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    q_offset: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    window: int | tuple[int, int] | None = None,
    soft_cap: float | None = None,
    block_mask: Mask | None = None,
    block_sizes: BlockSizes | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Spec, Operands]:
    """Checks what was given, and brings it into the form that implementations take."""
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    ranks = {x.ndim for x in (query, key, value)}
    if ranks not in ({3}, {4}):
        raise ValueError(
            f"query, key and value are `B T N H`, `B S K H`, `B S K H`, or all without B; got {query.shape}, {key.shape}, {value.shape}"
        )
    batched = ranks == {4}
    if not batched:
        query, key, value = query[None], key[None], value[None]
    batch, queries, heads, width = query.shape
    keys, key_heads = key.shape[1:3]
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != width:
        raise ValueError(
            f"key and value have one shape `B S K H`, with B and H of the query: got query {query.shape}, key {key.shape}, value {value.shape}"
        )
    if not key_heads or heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key heads: the first must be a multiple of the second")

    def pairs(name: str, x: ArrayLike | None) -> jax.Array | None:
        if x is None:
            return None
        x, whole = jnp.asarray(x), (batch, heads, queries, keys)
        shape = (1,) * (4 - x.ndim) + x.shape
        if len(shape) > 4 or any(a not in (1, b) for a, b in zip(shape, whole)):
            raise ValueError(f"{name} broadcasts to `B N T S` = {whole}, each axis 1 or whole: got {x.shape}")
        return x.reshape(shape)

    def vector(name: str, x: ArrayLike | None, dtype: Any, *shape: int) -> jax.Array | None:
        if x is None:
            return None
        x = jnp.asarray(x)
        x = x[None] if not batched and x.ndim == len(shape) - 1 and shape[0] == 1 else x
        if x.shape != shape or not jnp.issubdtype(x.dtype, dtype):
            raise ValueError(f"{name} is {dtype.__name__} of shape {shape}: got {x.dtype} of shape {x.shape}")
        return x.astype(jnp.int32 if dtype is jnp.integer else jnp.promote_types(query.dtype, jnp.float32))

    def lengths(name: str, x: ArrayLike | None, longest: int) -> jax.Array | None:
        x = vector(name, x, jnp.integer, batch)
        return None if x is None else jnp.clip(x, 0, longest)

    bias, mask = pairs("bias", bias), pairs("mask", mask)
    checks.check_dtypes(query, key, value, bias, mask)
    checks.check_numbers(scale, soft_cap)
    if kv_segment_ids is None and q_segment_ids is not None and queries == keys:
        kv_segment_ids = q_segment_ids
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids come together (those of the keys may be left out where T = S)")
    window = None if window is None else checks.window_sides(window)
    if block_sizes is not None and any(block is not None and block < 1 for block in dataclasses.astuple(block_sizes)):
        raise ValueError(f"block_sizes are 1 or more, or None for the implementation's choice: got {block_sizes}")
    if isinstance(q_offset, int | np.integer) and q_offset == 0:
        q_offset = None
    if q_offset is not None:
        q_offset = jnp.asarray(q_offset)
        q_offset = jnp.broadcast_to(q_offset, batch) if q_offset.ndim == 0 else q_offset

    if isinstance(scale, jax.core.Tracer):
        query, scale = (query * scale).astype(query.dtype), 1.0

    operands = Operands(
        query,
        key,
        value,
        bias,
        mask,
        vector("q_segment_ids", q_segment_ids, jnp.integer, batch, queries),
        vector("kv_segment_ids", kv_segment_ids, jnp.integer, batch, keys),
        lengths("query_seq_lengths", query_lengths, queries),
        lengths("key_value_seq_lengths", key_value_lengths, keys),
        vector("alibi_slopes", alibi_slopes, jnp.floating, heads),
        vector("sinks", sinks, jnp.floating, heads),
        vector("q_offset", q_offset, jnp.integer, batch),
    )
    spec = Spec(
        scale=1 / math.sqrt(width) if scale is None else float(scale),
        is_causal=bool(is_causal),
        window=window,
        soft_cap=soft_cap if soft_cap is None else float(soft_cap),
        block_mask=block_mask,
        block_sizes=block_sizes or BlockSizes(),
        precision=precision if precision is None else jax.lax.Precision(precision),
    )
    return spec, operands


def _of_nothing(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Without queries or without keys."""
    batch, queries, heads, _ = operands.query.shape
    nothing = jnp.full(heads, -jnp.inf, jnp.promote_types(operands.query.dtype, jnp.float32))
    lse = nothing if operands.sinks is None else operands.sinks
    return jnp.zeros_like(operands.query), jnp.broadcast_to(lse[:, None], (batch, heads, queries))


# The choice.


def _module(name: str) -> Any:
    """Imported when it is first wanted: jax 0.10 needs absl-py to import its part for Hopper."""
    return importlib.import_module(f"pallas_kernels.attention.{name}")


def _refusal(implementation: str, spec: Spec, operands: Operands, return_residual: bool = False) -> str | None:
    match implementation:
        case "xla_chunked" | "kernel":
            return None
        case "xla" | "cudnn":
            reason = jax_nn.supports(spec, operands, implementation)
            return "its log-sum-exp has no gradient" if reason is None and return_residual else reason
        case "mosaic_gpu" | "mosaic_tpu":
            if operands.query.dtype == jnp.float64:
                return "kernels have no float64"
            if operands.query.shape[-1] > 256:
                return f"kernels take heads of up to 256, not {operands.query.shape[-1]}"
            try:
                return _module(implementation).supports(spec, operands)
            except ImportError as error:
                return f"it cannot be imported ({error})"
    raise ValueError(f"implementation is one of {', '.join(get_args(Implementation))} or None: got {implementation!r}")


@functools.cache  # The same object each time, since jit caches by it.
def _passes(implementation: Implementation | None, interpret: bool) -> differentiation.Passes:
    return differentiation.Passes(*(functools.partial(f, implementation, interpret) for f in (_forward, _backward)))


def _forward(
    implementation: Implementation | None, interpret: bool, spec: Spec, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    forward = functools.partial(_choose, "forward", implementation, interpret)
    if not interpret:  # An interpreter is for one device: it has side effects, which nobody divides.
        forward = functools.partial(devices.divided_forward, forward)
    return vmap.foldable_forward(forward, spec, operands)


def _backward(
    implementation: Implementation | None, interpret: bool, spec: Spec, operands: Operands, *rest: jax.Array | None
) -> Gradients:
    backward = functools.partial(_choose, "backward", implementation, interpret)
    if not interpret:
        backward = functools.partial(devices.divided_backward, backward)
    return vmap.foldable_backward(backward, spec, operands, *rest)


def _call(step: str, name: str, interpret: bool, spec: Spec, operands: Operands, *rest: Any) -> Any:
    """The `step` ("forward" or "backward") of an implementation."""
    run = getattr(_module(name), step)
    if name not in KERNELS:
        return run(spec, operands, *rest)
    # A kernel has no number of 64 bits, and with `jax_enable_x64` each constant in it would be one.
    with jax.enable_x64(False):
        results = run(spec, _blank(operands), *rest, interpret=interpret)
    return devices.varying_alike(results, operands)


def _choose(step: str, implementation: Implementation | None, interpret: bool, spec: Spec, operands: Operands, *rest: Any) -> Any:
    """`_call` of the implementation that is wanted on the platform that is being lowered for."""
    if interpret or implementation == "xla_chunked":
        return _call(step, implementation, interpret, spec, operands, *rest)
    chunked = functools.partial(_call, step, "xla_chunked", False, spec)

    def refuse(reason: str) -> Callable[..., Any]:
        def refusing(*args: Any) -> Any:
            shapes, tree = jax.tree.flatten(jax.eval_shape(chunked, *args))
            avals = tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in shapes)
            return devices.varying_alike(jax.tree.unflatten(tree, refuse_p.bind(reason=reason, avals=avals)), args)

        return refusing

    branches: dict[str, Callable[..., Any]] = {}
    for name, platform in KERNELS.items():
        if implementation in (None, "kernel", name):
            reason = _refusal(name, spec, operands)
            if reason is None and name == "mosaic_gpu" and implementation != name and not _on_hopper():
                reason = "no GPU of compute capability 9 is in sight"
            if reason is None:
                branches[platform] = functools.partial(_call, step, name, False, spec)
                if implementation is None and platform == "tpu":
                    whole = functools.partial(_call, step, "xla_chunked", False, dataclasses.replace(spec, whole_batch=True))
                    branches[platform] = functools.partial(devices.unless_divided, branches[platform], whole)
            elif implementation is not None:
                branches[platform] = refuse(f"the attention kernel {name} cannot serve here: {reason}")
    if implementation is None:
        default = chunked
    else:
        names = " and ".join(f"{name} on {platform}" for name, platform in KERNELS.items() if implementation in ("kernel", name))
        default = refuse(
            f"no attention kernel for this platform: {names}; elsewhere use interpret=True, or dot_product_attention without naming it"
        )
    return jax.lax.platform_dependent(operands, *rest, default=default, **branches) if branches else default(operands, *rest)


def _on_hopper() -> bool:
    """Only Hopper has the instructions of the GPU kernel."""
    try:
        return str(getattr(jax.devices("cuda")[0], "compute_capability", "")).startswith("9.")
    except RuntimeError:
        return False


refuse_p = Primitive("attention_refused")
"""Stands where no kernel can, and raises if it is lowered, which happens on the platform in question only."""
refuse_p.multiple_results = True


def _refuse(_: Any, *, reason: str, avals: Any) -> Any:
    raise NotImplementedError(reason)


refuse_p.def_abstract_eval(lambda *, reason, avals: avals)
mlir.register_lowering(refuse_p, _refuse)


# What lies behind lengths.


def _blank(operands: Operands) -> Operands:
    """Zeros behind the lengths, whatever was there."""
    return operands._replace(
        query=_zeros_behind(operands.query, operands.query_lengths),
        key=_zeros_behind(operands.key, operands.key_value_lengths),
        value=_zeros_behind(operands.value, operands.key_value_lengths),
    )


def _zeros_behind(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    if lengths is None:
        return x
    return jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None, None], x, 0)
