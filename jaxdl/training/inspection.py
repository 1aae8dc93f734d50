"""What happens inside of a step: activations and gradients of every module by its path, and how far each parameter moves.

Nothing of it is built into the modules. Linen's interceptors see the calls of all submodules; each output passes through an identity whose derivative computes statistics of the output and of its gradient. Statistics leave the backward pass as the gradient of a dummy input, the tap, so that autodiff adds them up wherever the call is: in a `scan`, a `remat`, a `vmap`. No activation is kept longer than the backward pass keeps it, and statistics alone leave the device.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxdl.figures import OCTAVES
from jaxdl.training.parallel import Layout
from jaxdl.training.state import TrainState, parameter_paths
from jaxdl.training.step import Batch, Update, UpdateStep, cut_batch


@flax.struct.dataclass
class Moments:
    """Statistics of the arrays that pass a place in one step: of one array, or of several of one size, whose sum over the calls each field is.

    `mean`, `variance` and `zeros` (a share) are those of an array. `histogram` has the share of its elements in each of `OCTAVES`: the negative ones, the largest first, then the positive ones, the smallest first. Zeros and what is not finite are in none. Leaves may be stacked over places.
    """

    calls: PyTree
    mean: PyTree
    square_of_mean: PyTree
    variance: PyTree
    zeros: PyTree
    histogram: PyTree

    @classmethod
    def of(cls, x: Float[Array, "*shape"]) -> "Moments":
        """Those of one array, in float32. The variance is taken from centred values."""
        x = x.astype(jnp.float32).ravel()
        mean = x.mean()
        _, exponent = jnp.frexp(x)  # x = m · 2^exponent with ½ ≤ |m| < 1.
        octave = jnp.clip(exponent - 1 - OCTAVES.start, 0, len(OCTAVES) - 1)
        bins = jnp.where(x < 0, len(OCTAVES) - 1 - octave, len(OCTAVES) + octave)
        # In integers: a float32 does not count beyond 2²⁴.
        counts = jnp.zeros(2 * len(OCTAVES), jnp.int32).at[bins].add((x != 0) & jnp.isfinite(x))
        histogram = counts / x.size
        return cls(jnp.ones(()), mean, mean**2, jnp.square(x - mean).mean(), (x == 0).mean(dtype=jnp.float32), histogram)

    @classmethod
    def none(cls) -> "Moments":
        return cls(*[jnp.zeros(())] * 5, jnp.zeros(2 * len(OCTAVES)))

    @property
    def average(self) -> "Moments":
        """Of all calls as if they were one array: its variance is the mean variance, and that of the means."""
        calls = np.maximum(self.calls, 1)
        each = jax.tree.map(lambda total: total / calls.reshape(calls.shape + (1,) * (np.ndim(total) - calls.ndim)), self)
        spread = np.where(self.calls > 1, np.maximum(each.square_of_mean - each.mean**2, 0), 0)
        return each.replace(calls=self.calls, square_of_mean=each.mean**2, variance=each.variance + spread)


@flax.struct.dataclass
class Calls:
    """What the calls of modules gave, and what came back. Leaves are stacked over the calls, in the order in which they end.

    Names are paths of modules (the class' name for the outermost), with the path within an output that is a tree. Of several entries of one name, those with no calls were traced and never run, as jax traces the body of a `scan` more than once.
    """

    names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    activations: PyTree
    """`Moments` of the outputs."""
    gradients: PyTree
    """`Moments` of the gradients of the objective by the outputs."""

    @property
    def seen(self) -> dict[str, int]:
        """Where the calls are that the objective depends on, by name, with `#2`, `#3` … for repeated ones."""
        seen: dict[str, int] = {}
        repeated: collections.Counter[str] = collections.Counter()
        for index, name in enumerate(self.names):
            if self.activations.calls[index] > 0:
                repeated[name] += 1
                seen[name if repeated[name] == 1 else f"{name}#{repeated[name]}"] = index
        return seen


@flax.struct.dataclass
class LayerStats:
    """What was seen in one step. Norms are stacked over parameters, in the order of `parameters`, which are named as by `parameter_paths`."""

    calls: PyTree
    """`Calls`."""
    parameters: tuple[str, ...] = flax.struct.field(pytree_node=False)
    norms: PyTree
    """‖w‖ of each parameter before the step."""
    gradient_norms: PyTree
    update_norms: PyTree
    """‖Δw‖: how far the step moves each."""

    @classmethod
    def of(cls, calls: Calls, params: PyTree, grads: PyTree, after: PyTree) -> "LayerStats":
        """What `record` gave for parameters, and where a step takes them."""
        updates = jax.tree.map(jnp.subtract, after, params)
        return cls(calls, tuple(parameter_paths(params)), *map(_norms, (params, grads, updates)))

    @classmethod
    def joined(cls, parts: Mapping[str, "LayerStats"]) -> "LayerStats":
        """Several networks in one record: names begin with those of the parts."""
        nameless = [part.replace(calls=part.calls.replace(names=()), parameters=()) for part in parts.values()]
        whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *nameless)
        calls = whole.calls.replace(names=tuple(f"{name}/{call}" for name, part in parts.items() for call in part.calls.names))
        return whole.replace(
            calls=calls, parameters=tuple(f"{name}/{path}" for name, part in parts.items() for path in part.parameters)
        )

    def row(self) -> dict[str, Any]:
        """For a log: by call `mean`, `std`, `zeros` and `histogram` of `activations` and of `gradients`; of `parameters` by path `norm`, `gradient_norm` and `update_ratio`, ‖Δw‖ / ‖w‖, which is None for a parameter that is zero.

        Calls that the objective does not depend on are left out.
        """
        inside = jax.device_get(self)
        activations, gradients = inside.calls.activations.average, inside.calls.gradients.average
        parameters = zip(inside.parameters, inside.norms, inside.gradient_norms, inside.update_norms, strict=True)
        return {
            "activations": {name: _summary(activations, index) for name, index in inside.calls.seen.items()},
            "gradients": {name: _summary(gradients, index) for name, index in inside.calls.seen.items()},
            "parameters": {
                name: {
                    "norm": _short(norm),
                    "gradient_norm": _short(gradient),
                    "update_ratio": _short(update / norm) if norm > 0 else None,
                }
                for name, norm, gradient, update in parameters
            },
        }


Inspect = Callable[[TrainState, Batch], LayerStats]
"""`(state, batch) -> LayerStats`, a pure function as a step is: of the step that the batch is about to make."""


def inspect_step(step: UpdateStep) -> Inspect:
    """The statistics of a step that `make_step` made; of several updates, names begin with theirs. How far parameters move is taken from the step itself.

    Gradients of frozen parameters are shown as they would be if they were not. All updates are seen from where the step begins. Where batches are cut into parts, by accumulation or repeats, activations and their gradients are those of the first part. Over a mapped axis they are those of all devices together; an output that is not made of examples, such as a learned scalar, is there once for each device, and so is its share of the gradient.
    """
    accumulate, axis_name = step.accumulate, step.axis_name

    def stats(update: Update, state: TrainState, batch: Batch, key: Key[Array, ""], after: PyTree) -> LayerStats:
        if update.repeats > 1:
            key, batch = jax.random.fold_in(key, 0), jax.tree.map(lambda x: x[0], batch)
        if accumulate > 1:
            key, batch = jax.random.fold_in(key, 0), jax.tree.map(lambda x: x[0], cut_batch(batch, accumulate))
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        objective = lambda params, *given: update.objective(params, *given)[0] / devices
        params = update.part(state.params)
        calls, grads = record(objective, params, state, batch, key)
        if axis_name is not None:
            # A device's loss is its share of the mean over devices, so gradients add up; its part of an array counts as a call.
            calls, grads = jax.lax.psum((calls, grads), axis_name)
        return LayerStats.of(calls, params, grads, update.part(after))

    def inspect(state: TrainState, batch: Batch) -> LayerStats:
        after, _ = step(state, batch)
        found = {update.name: stats(update, state, part, key, after.params) for update, part, key in step.calls(state, batch)}
        return next(iter(found.values())) if len(found) == 1 else LayerStats.joined(found)

    return inspect


def record(objective: Callable[..., Float[Array, ""]], params: PyTree, *arguments: PyTree) -> tuple[Calls, PyTree]:
    """Differentiates `objective(params, *arguments)`, a scalar, and watches all calls of modules within; also the gradient by `params`.

    A call is that of a module's `__call__`; outputs that are not floating-point are not seen. A call in a `scan` or `vmap` has one entry, with the statistics of all its turns together: for those of each layer, leave the layers unscanned.
    """
    names: list[str] = []
    with _watching(lambda name, x: names.append(name) or x):
        jax.eval_shape(lambda *given: objective(*given), params, *arguments)  # A function of its own, or jax may know the answer.

    def watched(params: PyTree, taps: list[tuple[Moments, Moments]]) -> Float[Array, ""]:
        left = iter(taps)
        with _watching(lambda name, x: _watch(x, next(left))):
            return objective(params, *arguments)

    taps = [(Moments.none(), Moments.none()) for _ in names]
    grads, taps = jax.grad(watched, argnums=(0, 1))(params, taps)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *taps) if taps else (Moments.none(), Moments.none())
    return Calls(tuple(names), *stacked), grads


@jax.custom_vjp
def _watch(x: Float[Array, "*shape"], tap: tuple[Moments, Moments]) -> Float[Array, "*shape"]:
    """`x`. What autodiff takes for the gradient by the tap are the moments of `x` and of its gradient."""
    return x


_watch.defvjp(lambda x, tap: (x, Moments.of(x)), lambda moments, gradient: (gradient, (moments, Moments.of(gradient))))


@contextlib.contextmanager
def _watching(see: Callable[[str, Array], Array]) -> Iterator[None]:
    """A context in which `see(name, output)` stands in for each floating-point output of a module's call."""

    def intercept(
        call: Callable[..., PyTree], args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> PyTree:
        output = call(*args, **kwargs)
        if context.method_name != "__call__":
            return output
        name = "/".join(context.module.path) or type(context.module).__name__

        def leaf(path: tuple, value: Any) -> Any:
            if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jnp.floating) or value.size == 0:
                return value
            return see("/".join(filter(None, (name, jax.tree_util.keystr(path, simple=True, separator="/")))), value)

        return jax.tree_util.tree_map_with_path(leaf, output)

    with nn.intercept_methods(intercept):
        yield


def distribute_inspection(inspect: Inspect, state: TrainState, layout: Layout) -> Inspect:
    """Compiles an inspection for a layout, as `distribute` does a step; it consumes nothing. For `pmap` it must have been given `layout.axis_name`."""
    if layout.strategy == "pmap":
        return jax.jit(layout.pmap(inspect, state, out_axes=None))
    return jax.jit(inspect, in_shardings=(layout.state_shardings(state), layout.batch_sharding), out_shardings=layout.replicated)


def _norms(tree: PyTree) -> Float[Array, "P"]:
    """Of each leaf."""
    return jnp.stack([optax.tree.norm(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])


def _summary(moments: Moments, index: int) -> dict[str, Any]:
    return {
        "mean": _short(moments.mean[index]),
        "std": _short(moments.variance[index] ** 0.5),
        "zeros": _short(moments.zeros[index]),
        "histogram": [_short(share) for share in moments.histogram[index]],
    }


def _short(value: np.floating) -> float | int:
    """With five digits, which is enough for a log and keeps it small."""
    short = float(f"{value:.5g}")
    return 0 if short == 0 else short
