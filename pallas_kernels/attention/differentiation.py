"""One rule of differentiation for every implementation: forward mode by tiles of XLA, reverse mode by the implementation's own backward pass.

jax has `custom_vjp`, which forbids forward mode, and `custom_jvp`, whose reverse mode is the transpose of the tangent's code, which would keep every tile of probabilities. So the tangent is a `custom_jvp` whose linear part is a primitive, `linear_p`, that carries its own transpose. (`jax.custom_derivatives.linear_call` is the same idea, but has no rule for vmap.)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels.attention import devices, xla_chunked
from pallas_kernels.attention.problem import Gradients, Operands, Spec

Forward = Callable[[Spec, Operands], tuple[jax.Array, jax.Array]]
Backward = Callable[..., Gradients]


@dataclasses.dataclass(frozen=True)
class Passes:
    """The two passes of an implementation, or of a choice among several; both are called under jit."""

    forward: Forward
    backward: Backward


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def attention(passes: Passes, spec: Spec, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """The output and lse of `problem`, differentiable in both modes by query, key, value, bias, slopes and sinks."""
    return _forward(passes, spec, operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(passes: Passes, spec: Spec, operands: Operands) -> tuple[jax.Array, jax.Array]:
    return passes.forward(spec, operands)


def _jvp(passes: Passes, spec: Spec, primals: tuple[Operands], tangents: tuple[Operands]) -> Any:
    (operands,), (d_operands,) = primals, tangents
    out, lse = attention(passes, spec, operands)
    moving = Gradients(*(_moving(getattr(d_operands, name)) for name in Gradients._fields))
    spec = dataclasses.replace(spec, bias_gradient=moving.bias is not None)
    return (out, lse), _linear(_Linear(passes, spec), (operands, out, lse), moving)


attention.defjvp(_jvp, symbolic_zeros=True)


def _moving(tangent: Any) -> jax.Array | None:
    return None if isinstance(tangent, SymbolicZero) else tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradients(passes: Passes, spec: Spec, operands: Operands, *rest: jax.Array | None) -> Gradients:
    return passes.backward(spec, operands, *rest)


@_gradients.defjvp
def _gradients_jvp(passes: Passes, spec: Spec, primals: Any, tangents: Any) -> Any:
    # Forward over reverse, as in `jax.hessian`: no kernel can be differentiated, so XLA's tiles stand in.
    backward = functools.partial(devices.divided_backward, xla_chunked.backward, spec, differentiable=True)
    return jax.jvp(backward, primals, tangents)


@dataclasses.dataclass(frozen=True)
class _Linear:
    """The map from tangents of operands to those of out and lse, and its transpose. Residuals are `(operands, out, lse)`."""

    passes: Passes
    spec: Spec

    def apply(self, residuals: Any, moving: Gradients) -> tuple[jax.Array, jax.Array]:
        return devices.divided_tangents(xla_chunked.tangents, self.spec, *residuals, moving)

    def transpose(self, residuals: Any, cotangents: Sequence[jax.Array | None], wanted: Sequence[bool]) -> Gradients:
        """Gradients where they are wanted, None elsewhere; a cotangent is None if it is known to be zero."""
        d_out, d_lse = cotangents
        operands, out, lse = residuals
        d_out = jnp.zeros_like(out) if d_out is None else d_out
        # Whatever flows into a row that sees nothing ends there, NaN too.
        blind = lse == -jnp.inf
        if operands.query_lengths is not None:
            blind |= (jnp.arange(out.shape[1], dtype=jnp.int32) >= operands.query_lengths[:, None])[:, None]
        d_out = jnp.where(blind.swapaxes(1, 2)[..., None], 0, d_out)
        into_tiles = None if d_lse is None else jnp.where(blind, 0, d_lse)
        gradients = _gradients(self.passes, self.spec, operands._replace(sinks=None), out, lse, d_out, into_tiles)
        if operands.sinks is not None:
            gradients = gradients._replace(sinks=_sinks_gradient(operands.sinks, out, lse, d_out, d_lse))
        return Gradients(*(gradient if want else None for gradient, want in zip(gradients, wanted)))


def _sinks_gradient(sinks: jax.Array, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array | None) -> jax.Array:
    """No tile has a sink, so this is the same for every implementation."""
    delta = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=lse.dtype)
    delta = delta if d_lse is None else delta - d_lse
    # A sink of −∞ is none.
    return -jnp.where(lse == -jnp.inf, 0, jnp.exp(sinks[:, None] - lse) * delta).sum((0, 2))


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A linear map under vmap: everything linear has the axis in front, and so have those residuals that `axes` says."""

    inner: Any
    axes: Any
    """For each leaf of the residuals, 0 or None."""

    def apply(self, residuals: Any, moving: Gradients) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(self.inner.apply, (self._tree(residuals), 0))(residuals, moving)

    def transpose(self, residuals: Any, cotangents: Sequence[jax.Array | None], wanted: Sequence[bool]) -> Gradients:
        return jax.vmap(lambda r, c: self.inner.transpose(r, c, wanted), (self._tree(residuals), 0))(residuals, cotangents)

    def _tree(self, residuals: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(residuals), self.axes)


linear_p = Primitive("attention_tangents")
linear_p.multiple_results = True


def _linear(linear: Any, residuals: Any, moving: Gradients) -> Any:
    """`linear.apply(residuals, moving)` as a primitive: linear in `moving`, and transposed by `linear.transpose`."""
    flat, tree = jax.tree.flatten(residuals)
    flat_moving, moving_tree = jax.tree.flatten(moving)
    return tuple(linear_p.bind(*flat, *flat_moving, linear=linear, residuals=tree, moving=moving_tree))


@functools.partial(jax.jit, static_argnames=("linear", "residuals", "moving"))
def _apply(*args: jax.Array, linear: Any, residuals: Any, moving: Any) -> Sequence[jax.Array]:
    count = residuals.num_leaves
    return linear.apply(jax.tree.unflatten(residuals, args[:count]), jax.tree.unflatten(moving, args[count:]))


@functools.partial(jax.jit, static_argnames=("linear", "wanted"))
def _transpose(residuals: Any, cotangents: Any, linear: Any, wanted: tuple[bool, ...]) -> Gradients:
    return linear.transpose(residuals, cotangents, wanted)


def _linear_abstract(*args: Any, **params: Any) -> Any:
    # Out and lse are the last two residuals, and their tangents look like them.
    count = params["residuals"].num_leaves
    return [aval.update(weak_type=False) for aval in args[count - 2 : count]]


def _linear_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    count = params["residuals"].num_leaves
    result = linear_p.bind(*primals, **params)
    if all(type(x) is ad.Zero for x in tangents[:count]):
        moved = [ad.instantiate_zeros(x) for x in tangents[count:]]
        return result, linear_p.bind(*primals[:count], *moved, **params)
    # A second derivative in forward mode: that of the code of the first.
    moved = [ad.instantiate_zeros(x) for x in tangents]
    return result, list(jax.jvp(functools.partial(_apply, **params), list(primals), moved)[1])


def _linear_transpose(cotangents: Sequence[Any], *args: Any, linear: Any, residuals: Any, moving: Any) -> Any:
    count = residuals.num_leaves
    needed = [ad.is_undefined_primal(x) for x in args[count:]]
    wanted = tuple(x is not None for x in jax.tree.unflatten(moving, needed))
    given = tuple(None if type(x) is ad.Zero else x for x in cotangents)
    if given[0] is None and given[1] is None:
        return [None] * count + [ad.Zero(x.aval) if ad.is_undefined_primal(x) else None for x in args[count:]]
    gradients = _transpose(jax.tree.unflatten(residuals, args[:count]), given, linear, wanted)
    return [None] * count + jax.tree.leaves(gradients)


def _linear_batch(args: Sequence[Any], dims: Sequence[Any], *, linear: Any, residuals: Any, moving: Any) -> Any:
    count = residuals.num_leaves
    (size,) = {x.shape[d] for x, d in zip(args, dims) if d is not None}
    front = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims)]
    axes = [None if d is None else 0 for d in dims]
    # Out and lse must have the axis: their shapes are those of the result.
    for index in (*range(count - 2, count), *range(count, len(args))):
        if axes[index] is None:
            front[index] = jnp.broadcast_to(front[index], (size, *front[index].shape))
            axes[index] = 0
    mapped = _Mapped(linear, tuple(axes[:count]))
    result = linear_p.bind(*front, linear=mapped, residuals=residuals, moving=moving)
    return result, [0] * len(result)


linear_p.def_impl(lambda *args, **params: list(_apply(*args, **params)))
linear_p.def_abstract_eval(_linear_abstract)
ad.primitive_jvps[linear_p] = _linear_jvp
ad.primitive_transposes[linear_p] = _linear_transpose
batching.primitive_batchers[linear_p] = _linear_batch
mlir.register_lowering(linear_p, mlir.lower_fun(lambda *args, **params: list(_apply(*args, **params)), multiple_results=True))
