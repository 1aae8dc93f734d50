"""From an objective and an optimizer to a step: `(state, batch) -> (state, metrics)`."""

import dataclasses
import functools
import re
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from jaxdl.errors import UserError
from jaxdl.training.state import TrainState, parameter_paths

Batch = dict[str, Array | np.ndarray]
Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

GRADIENT_NORMS = "gradient_norms"
"""The one metric that is a vector: the norm of each parameter's gradient, by which the loop names what went wrong."""


@flax.struct.dataclass
class Aux:
    """What an objective says beside the loss: scalars to log, and the new values of the non-parameter collections."""

    metrics: Metrics = flax.struct.field(default_factory=dict)
    variables: dict[str, PyTree] = flax.struct.field(default_factory=dict)


LossFn = Callable[[PyTree, dict[str, PyTree], Batch, Key[Array, ""]], tuple[Float[Array, ""], Aux]]
"""`(params, variables, batch, key) -> (loss, Aux)`, a mean over the batch's examples."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameters that stay as they are, for a time: those of a part that was trained before, while what is new around it finds its way (Zhai et al. 2022, arXiv:2111.07991, locked-image tuning)."""

    paths: str
    """A regular expression, searched in a parameter's path such as "vision/encoder/block_0/norm/scale"."""
    steps: int | None = None
    """Updates after which they learn too. None: never."""

    def among(self, params: PyTree) -> PyTree:
        """True for each leaf that is frozen. Raises `UserError` if there is none."""
        frozen = [re.search(self.paths, path) is not None for path in parameter_paths(params)]
        if not any(frozen):
            raise UserError(f"no parameter has a path with {self.paths!r}, which was to be frozen")
        return jax.tree.unflatten(jax.tree.structure(params), frozen)


@dataclasses.dataclass(frozen=True)
class GradientStep:
    """The step that `make_step` makes, with what one has to know to look inside of it."""

    update: Step
    loss_fn: LossFn
    accumulate: int
    axis_name: str | None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.update(state, batch)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule | None = None,
    accumulate: int = 1,
    ema_decay: float | None = None,
    axis_name: str | None = None,
    frozen: Frozen | None = None,
) -> GradientStep:
    """One update of the parameters.

    `schedule`, where given, is logged as `learning_rate`. `accumulate` cuts the batch into that many equal parts (every `accumulate`-th row, so that no row leaves its device), one after the other, and averages their gradients: the same update for an objective that is a mean over examples, in a part of the memory; an objective that compares examples with each other sees only one part at a time. `ema_decay` keeps `ema ← decay·ema + (1 − decay)·params`. `axis_name` (a layout's) averages gradients, metrics and variables over that mapped axis, and gives each device a key of its own. The backward pass of `frozen` parameters is left out as long as they are: their gradient is zero, for the optimizer too, and no decay of weights moves them.

    The metrics are scalars, beside `GRADIENT_NORMS`, and stay on the device.
    """

    def gradients(loss_fn: LossFn, state: TrainState, batch: Batch) -> tuple[PyTree, dict[str, PyTree], Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate == 1:
            (loss, aux), grads = value_and_grad(state.params, state.variables, batch, key)
            return grads, aux.variables, {"loss": loss, **aux.metrics}

        rows = len(jax.tree.leaves(batch)[0])
        if rows % accumulate:
            raise UserError(
                f"{rows} rows on a device cannot be cut into {accumulate} equal parts: choose another --accumulate or --batch-size"
            )
        parts = jax.tree.map(lambda x: x.reshape(rows // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(carry: tuple, part: tuple) -> tuple[tuple, Metrics]:
            total, variables = carry
            index, batch = part
            (loss, aux), grads = value_and_grad(state.params, variables, batch, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, total, grads), aux.variables), {"loss": loss, **aux.metrics}

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (total, variables), metrics = jax.lax.scan(add, (zeros, state.variables), (jnp.arange(accumulate), parts))
        return jax.tree.map(lambda x: x / accumulate, total), variables, jax.tree.map(lambda x: x.mean(0), metrics)

    def update(held: PyTree | None, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """With the parameters where `held` is true left as they are."""
        hold = lambda tree, change: tree if held is None else jax.tree.map(lambda x, still: change(x) if still else x, tree, held)
        fixed = lambda params, *rest: loss_fn(hold(params, jax.lax.stop_gradient), *rest)
        grads, variables, metrics = gradients(fixed, state, batch)
        if axis_name is not None:
            grads, variables, metrics = jax.lax.pmean((grads, variables, metrics), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = hold(updates, jnp.zeros_like)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
        norms = jnp.stack([optax.tree.norm(leaf) for leaf in jax.tree.leaves(grads)])
        metrics |= {"gradient_norm": jnp.linalg.norm(norms), GRADIENT_NORMS: norms}
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(state.step + 1, params, opt_state, variables, state.key, ema), metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if frozen is None:
            return update(None, state, batch)
        first = functools.partial(update, frozen.among(state.params))
        if frozen.steps is None:
            return first(state, batch)
        return jax.lax.cond(state.step < frozen.steps, first, functools.partial(update, None), state, batch)

    return GradientStep(step, loss_fn, accumulate, axis_name)
