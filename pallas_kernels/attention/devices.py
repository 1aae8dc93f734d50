"""Over several devices, each computes the batches and the heads that it holds: no two of them have to do with each other.

XLA does not see that by itself. A loop over tiles makes it gather everything on every device, and a kernel it cannot divide at all. So it is told, in the three ways in which arrays of jax may lie over a mesh: where XLA decides (axes of type Auto) by `custom_partitioning`, which TPUs do not have, where the types of arrays say it (Explicit) by a `shard_map`, and within somebody's `shard_map` (Manual) there is nothing left to divide.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention.problem import Gradients, Operands, Spec

# What each axis of an array counts: batches (b), heads of the queries (n), heads of the keys (k), or what is never divided.
OPERANDS = Operands("b.n.", "b.k.", "b.k.", "bn..", "bn..", "b.", "b.", "b", "b", "n", "n", "b")
OUT, LSE = "b.n.", "bn."


def divided_forward(forward: Callable[..., Any], spec: Spec, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`forward(spec, operands)`, on each device with its own part of the operands."""
    axes = _axes(operands)
    return _divided(functools.partial(forward, spec), (operands,), (axes,), (OUT, LSE))


def divided_backward(
    backward: Callable[..., Gradients], spec: Spec, operands: Operands, *rest: jax.Array | None, differentiable: bool = False
) -> Gradients:
    """`backward(spec, operands, out, lse, d_out, d_lse)`, on each device with its own part; gradients of what the devices share are summed over them. A `differentiable` one is left to XLA where axes are Auto, because `custom_partitioning` has neither derivatives nor vmap."""
    axes = _axes(operands)
    results = Gradients(*(getattr(axes, name) for name in Gradients._fields))
    results = results if spec.bias_gradient else results._replace(bias=None)
    rest_axes = [None if x is None else letters for x, letters in zip(rest, (OUT, LSE, OUT, LSE))]
    backward = functools.partial(backward, spec)
    gradients = _divided(backward, (operands, *rest), (axes, *rest_axes), results, differentiable)

    def as_given(gradient: jax.Array | None, name: str) -> jax.Array | None:
        place = jax.typeof(getattr(operands, name)).sharding
        return jax.sharding.reshard(gradient, place) if place.mesh.explicit_axes else gradient

    return Gradients(*(None if x is None else as_given(x, name) for x, name in zip(gradients, Gradients._fields)))


def divided_tangents(
    tangents: Callable[..., Any], spec: Spec, operands: Operands, out: jax.Array, lse: jax.Array, moving: Gradients
) -> tuple[jax.Array, jax.Array]:
    """`tangents(spec, operands, out, lse, moving)`, differentiable, on each device with its own part."""
    axes = _axes(operands)
    moving_axes = Gradients(*(None if x is None else getattr(axes, name) for name, x in zip(Gradients._fields, moving)))
    args = operands, out, lse, moving
    return _divided(functools.partial(tangents, spec), args, (axes, OUT, LSE, moving_axes), (OUT, LSE), True)


def varying_alike(arrays: Any, like: Any = None) -> Any:
    """Arrays that differ from device to device along the same axes of a `shard_map` as all of them (or `like`) together do, as its `check_vma` wants to see them. Nothing is computed."""
    together = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(arrays if like is None else like)))

    def vary(x: jax.Array) -> jax.Array:
        missing = together - jax.typeof(x).mat.varying
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, arrays)


def _axes(operands: Operands) -> Operands:
    """`OPERANDS`, without those axes along which an array is broadcast."""

    def whole(x: jax.Array | None, letters: str) -> str | None:
        return None if x is None else "".join(a if length > 1 else "." for a, length in zip(letters, x.shape))

    return Operands(*map(whole, operands, OPERANDS))


class _Division(NamedTuple):
    """Over which axes of the mesh batches and heads are divided."""

    mesh: Mesh | AbstractMesh
    batches: tuple[str, ...]
    heads: tuple[str, ...]

    @staticmethod
    def of(mesh: Mesh | AbstractMesh, spec: P, operands: Operands) -> "_Division":
        """As the queries lie, where that comes out even: heads that share keys stay together, unless all of them share the same."""

        def names(axis: int, length: int) -> tuple[str, ...]:
            given = spec[axis] if axis < len(spec) else None
            given = given if isinstance(given, tuple) else () if given is None else (given,)
            return given if length % math.prod(mesh.shape[name] for name in given) == 0 else ()

        (batches, _, heads, _), key_heads = operands.query.shape, operands.key.shape[2]
        return _Division(mesh, names(0, batches), names(2, key_heads if key_heads > 1 else heads))

    def spec(self, letters: str) -> P:
        """How an array lies."""
        parts = {"b": self.batches, "n": self.heads, "k": self.heads}
        return P(*(parts.get(letter) or None for letter in letters))

    def total(self, x: jax.Array, letters: str) -> jax.Array:
        """The sum over devices of what they share."""
        over = () if "b" in letters else self.batches
        over += () if "n" in letters or "k" in letters else self.heads
        return jax.lax.psum(x, over) if over else x


def _divided(
    f: Callable[..., Any], args: tuple[Any, ...], axes: tuple[Any, ...], results: Any, differentiable: bool = False
) -> Any:
    """`f(*args)`, whose results are arrays with the axes `results`."""
    operands = args[0]

    def part(division: _Division) -> Callable[..., Any]:
        return lambda *args: jax.tree.map(division.total, f(*args), results)

    of_query = jax.typeof(operands.query).sharding
    if of_query.mesh.manual_axes or (differentiable and not of_query.mesh.explicit_axes):
        return f(*args)
    if of_query.mesh.explicit_axes:
        division = _Division.of(of_query.mesh, of_query.spec, operands)
        in_specs, out_specs = jax.tree.map(division.spec, (axes, results))
        args = jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(division.mesh, spec)), args, in_specs)
        return jax.shard_map(part(division), mesh=division.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    def partition(mesh: Mesh, shapes: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
        division = _Division.of(mesh, shapes[0].query.sharding.spec, shapes[0])
        places = jax.tree.map(lambda letters: NamedSharding(mesh, division.spec(letters)), (results, axes))
        return mesh, part(division), *places

    f = jax.jit(f)
    call = custom_partitioning(f)
    shared = operands.query.shape[2] > operands.key.shape[2]
    call.def_partition(partition, sharding_rule=_rule(jax.tree.leaves(axes), jax.tree.leaves(results), shared))
    return jax.lax.platform_dependent(*args, tpu=f, default=call)  # The compiler for TPUs has no such calls.


def _rule(arrays: Sequence[str], results: Sequence[str], shared: bool) -> str:
    """Which axes XLA should divide alike, in the notation of `custom_partitioning`. Where heads share keys, those of queries and of keys are not the same."""
    count = itertools.count()

    def names(letters: str) -> str:
        return " ".join(
            f"x{next(count)}" if letter == "." else "n" if letter == "k" and not shared else letter for letter in letters
        )

    return " -> ".join(", ".join(map(names, group)) for group in (arrays, results))


# What is left to XLA.


def unless_divided(kernel: Callable[..., Any], otherwise: Callable[..., Any], *args: Any) -> Any:
    """`kernel(*args)`, but `otherwise(*args)` in a program that XLA divides over several devices: it cannot divide a kernel."""
    flat, tree = jax.tree.flatten(args)
    call, shapes = jax.make_jaxpr(lambda *flat: kernel(*jax.tree.unflatten(tree, flat)), return_shape=True)(*flat)

    def instead(*flat: jax.Array) -> Any:
        return jax.tree.leaves(otherwise(*jax.tree.unflatten(tree, flat)))

    return jax.tree.unflatten(jax.tree.structure(shapes), unless_divided_p.bind(*flat, call=call, instead=instead))


def _lower_unless_divided(ctx: Any, *args: Any, call: Any, instead: Callable[..., Any]) -> Any:
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        divided = set(context.manual_axes) | set(context.mesh.manual_axes) != set(context.mesh.axis_names)
    else:
        divided = context.num_devices > 1
    return mlir.lower_fun(instead if divided else jaxpr_as_fun(call), multiple_results=True)(ctx, *args)


unless_divided_p = Primitive("attention_unless_divided")
unless_divided_p.multiple_results = True
unless_divided_p.def_abstract_eval(lambda *args, call, instead: call.out_avals)
mlir.register_lowering(unless_divided_p, _lower_unless_divided)
