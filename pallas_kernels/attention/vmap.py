"""Under vmap, the mapped axis becomes part of the batch, so that an implementation sees one larger problem instead of a loop or a kernel with one more axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from pallas_kernels.attention.problem import Gradients, Operands, Spec


def foldable_forward(forward: Callable[..., Any], spec: Spec, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`forward(spec, operands)` with a rule for vmap."""

    @custom_vmap
    def call(operands: Operands) -> tuple[jax.Array, jax.Array]:
        return forward(spec, operands)

    @call.def_vmap
    def rule(size: int, batched: list[Operands], operands: Operands) -> Any:
        (mapped,) = batched
        if mapped.sinks or mapped.alibi_slopes:
            return _one_by_one(call, (mapped,), (operands,)), (True, True)
        out, lse = call(_fold(operands, mapped, size))
        return (_unfold(out, size), _unfold(lse, size)), (True, True)

    return call(operands)


def foldable_backward(backward: Callable[..., Gradients], spec: Spec, operands: Operands, *rest: jax.Array | None) -> Gradients:
    """`backward(spec, operands, out, lse, d_out, d_lse)` with a rule for vmap."""

    @custom_vmap
    def call(operands: Operands, *rest: jax.Array | None) -> Gradients:
        return backward(spec, operands, *rest)

    @call.def_vmap
    def rule(size: int, batched: list[Any], operands: Operands, *rest: jax.Array | None) -> Any:
        mapped, *rest_mapped = batched
        summed = operands.alibi_slopes, operands.bias if spec.bias_gradient else None
        if any(array is not None for array in summed):
            # Their gradients are sums over the batch, and each example of the mapped axis has its own.
            gradients = _one_by_one(call, batched, (operands, *rest))
        else:
            folded = [None if x is None else _fold_array(x, is_mapped, size) for x, is_mapped in zip(rest, rest_mapped)]
            gradients = jax.tree.map(lambda x: _unfold(x, size), call(_fold(operands, mapped, size), *folded))
        return gradients, jax.tree.map(lambda _: True, gradients)

    return call(operands, *rest)


def _fold(operands: Operands, mapped: Operands, size: int) -> Operands:
    folded = {}
    for name, array, is_mapped in zip(Operands._fields, operands, mapped):
        alike = array is None or name in ("sinks", "alibi_slopes")
        if name in ("bias", "mask") and array is not None:
            alike = not is_mapped and len(array) == 1
            if is_mapped and array.shape[1] == 1:  # One for the whole batch, but another for each example.
                batch = operands.query.shape[1 if mapped.query else 0]
                array = jnp.broadcast_to(array, (size, batch, *array.shape[2:]))
        folded[name] = array if alike else _fold_array(array, is_mapped, size)
    return Operands(**folded)


def _fold_array(x: jax.Array, is_mapped: bool, size: int) -> jax.Array:
    x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
    return x.reshape(-1, *x.shape[2:])


def _unfold(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(size, -1, *x.shape[1:])


def _one_by_one(call: Callable[..., Any], mapped: Any, args: Any) -> Any:
    """A loop over the mapped axis."""
    flat, tree = jax.tree.flatten(args)
    is_mapped = jax.tree.leaves(mapped)

    def example(moving: list[jax.Array]) -> Any:
        moving = iter(moving)
        return call(*jax.tree.unflatten(tree, [next(moving) if m else x for x, m in zip(flat, is_mapped)]))

    return lax.map(example, [x for x, m in zip(flat, is_mapped) if m])
