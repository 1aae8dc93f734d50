"""From objectives and optimizers to a step: `(state, batch) -> (state, metrics)`.

A step is made of updates, one after the other: an objective, the optimizer that minimises it, and the part of the parameters that it moves. One update is supervised learning; a critic's five and a generator's one are a GAN; an actor's, a critic's and a temperature's are reinforcement learning. A family whose step has another form writes it with `gradients` and `apply_gradients`, of which this one is made too.
"""

import dataclasses
import re
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxdl.errors import UserError
from jaxdl.training.state import TrainState, merge, parameter_paths

Batch = PyTree
"""Arrays with a row for each example, most often a dict of them; None for training that makes its own data."""

GRADIENT_NORMS = "gradient_norms"
"""The one metric that is a vector: the norm of each parameter's gradient, by which the loop names what went wrong."""


@flax.struct.dataclass
class Mean:
    """A metric over as many things as a step happened to see: `total / count`, and nothing to say where the count is 0, as when no episode has ended."""

    total: PyTree
    count: PyTree


Metrics = dict[str, Array | Mean]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@flax.struct.dataclass
class Aux:
    """What an objective says beside the loss."""

    metrics: Metrics = flax.struct.field(default_factory=dict)
    """Scalars to log."""
    variables: dict[str, PyTree] = flax.struct.field(default_factory=dict)
    """New values of other collections than the parameters; those that are left out stay as they are."""
    carry: PyTree = None
    """The new carry. None: it stays as it is."""


Objective = Callable[[PyTree, TrainState, Batch, Key[Array, ""]], tuple[Float[Array, ""], Aux]]
"""`(params, state, batch, key) -> (loss, Aux)`, a mean over the batch's examples. It is differentiated by `params`, the update's part of the parameters; of the state it may see the rest of them, statistics, averages, constants and the step."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameters that stay as they are, for a time or for good: those of a part that was trained before, while what is new around it learns (Zhai et al. 2022, arXiv:2111.07991, locked-image tuning; Hu et al. 2021, arXiv:2106.09685, low-rank adapters).

    Those that never learn have no optimizer state.
    """

    paths: str
    """A regular expression, searched in a parameter's path such as "vision/encoder/block_0/norm/scale"."""
    steps: int | None = None
    """Steps after which they learn too. None: never."""

    def mask(self, params: PyTree) -> PyTree[bool]:
        """True for each leaf that is frozen. Raises `UserError` if there is none."""
        frozen = [re.search(self.paths, path) is not None for path in parameter_paths(params)]
        if not any(frozen):
            raise UserError(f"no parameter has a path with {self.paths!r}, which was to be frozen")
        return jax.tree.unflatten(jax.tree.structure(params), frozen)


@dataclasses.dataclass(frozen=True)
class Update:
    """One move of a part of the parameters, down the gradient of an objective."""

    objective: Objective
    optimizer: optax.GradientTransformation
    of: str | None = None
    """The entry of `state.params` that it moves. None: all."""
    name: str = ""
    """Of its metrics, where a step has several updates, and of its optimizer state. Empty: that of the part, or "params"."""
    repeats: int = 1
    """How often it is made in a step. The batch of a step is cut into as many parts as its most repeated update has; an update that is made r times sees the last r of them, one after the other."""
    ema: float | Callable[[Array], Array] | None = None
    """Decay of an average of its part, `ema ← decay · ema + (1 − decay) · params`, or a function from the step to it. None: no average is kept."""
    frozen: Frozen | None = None
    project: Callable[[PyTree], PyTree] | None = None
    """Where parameters are brought after each move, as by clipping."""
    schedule: optax.Schedule | None = None
    """Of the learning rate, to be logged: a function of the step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.of or "params")

    def part(self, params: PyTree) -> PyTree:
        """What it moves. Raises `UserError` if there is no such entry."""
        if self.of is None:
            return params
        if self.of not in params:
            raise UserError(f"there are no parameters {self.of!r} to update: the entries are {', '.join(params)}")
        return params[self.of]

    def init(self, params: PyTree) -> optax.OptState:
        """The optimizer's state for the parameters of all networks."""
        return self.optimizer.init(self.split(self.part(params))[0])

    def split(self, part: PyTree) -> tuple[PyTree, PyTree]:
        """The leaves that learn, now or later, and those that never do, each with None in place of the other's."""
        if self.frozen is None or self.frozen.steps is not None:
            return part, jax.tree.map(lambda leaf: None, part)
        mask = self.frozen.mask(part)
        choose = lambda wanted: jax.tree.map(lambda leaf, frozen: leaf if frozen == wanted else None, part, mask)
        return choose(False), choose(True)

    def held(self, part: PyTree, step: Array) -> tuple[PyTree, Bool[Array, ""]] | None:
        """Which leaves stay as they are for a time, and whether that lasts; None where none do."""
        if self.frozen is None or self.frozen.steps is None:
            return None
        return self.frozen.mask(part), step < self.frozen.steps


def gradients(
    update: Update,
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
    *,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[PyTree, Aux]:
    """The gradient of an update's objective by what it moves, and what the objective says, its value as the metric `loss`.

    `accumulate` cuts the batch into that many equal parts (every `accumulate`-th row, so that no row leaves its device), one after the other, and averages their gradients: the same for an objective that is a mean over examples, in a part of the memory; one that compares examples with each other sees only one part at a time. `axis_name` (a layout's) averages gradients, metrics and floating-point variables over that mapped axis; the carry is each device's own. The backward pass of frozen parameters is left out as long as they are; those that never learn have no gradient (None), those that will have zeros.
    """
    part = update.part(state.params)
    learning, fixed = update.split(part)

    def differentiate(
        mask: PyTree | None, state: TrainState, batch: Batch, key: Key[Array, ""]
    ) -> tuple[tuple[Array, Aux], PyTree]:
        def objective(learning: PyTree) -> tuple[Float[Array, ""], Aux]:
            if mask is not None:
                learning = jax.tree.map(lambda leaf, held: jax.lax.stop_gradient(leaf) if held else leaf, learning, mask)
            return update.objective(_join(learning, fixed), state, batch, key)

        return jax.value_and_grad(objective, has_aux=True)(learning)

    def whole(mask: PyTree | None, state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[PyTree, Aux]:
        if accumulate == 1:
            (loss, aux), grads = differentiate(mask, state, batch, key)
            return grads, aux.replace(metrics={"loss": loss, **aux.metrics})

        def add(carried: tuple[PyTree, PyTree, PyTree], indexed: tuple[Array, Batch]) -> tuple[tuple, Metrics]:
            total, variables, carry = carried
            index, batch = indexed
            before = state.replace(variables=variables, carry=carry)
            (loss, aux), grads = differentiate(mask, before, batch, jax.random.fold_in(key, index))
            after = _take(before, aux)
            return (jax.tree.map(jnp.add, total, grads), after.variables, after.carry), {"loss": loss, **aux.metrics}

        zeros = jax.tree.map(jnp.zeros_like, learning)
        parts = jnp.arange(accumulate), cut_batch(batch, accumulate)
        (total, variables, carry), metrics = jax.lax.scan(add, (zeros, state.variables, state.carry), parts)
        aux = Aux(jax.tree.map(lambda x: x.mean(0), metrics), variables, carry)
        return jax.tree.map(lambda x: x / accumulate, total), aux

    held = update.held(learning, state.step)
    if held is None:
        grads, aux = whole(None, state, batch, key)
    else:
        mask, holds = held
        branch = lambda mask: lambda *given: whole(mask, *given)
        grads, aux = jax.lax.cond(holds, branch(mask), branch(None), state, batch, key)
    if axis_name is not None:
        average = lambda x: jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x
        grads, metrics = jax.lax.pmean((grads, aux.metrics), axis_name)
        aux = aux.replace(metrics=metrics, variables=jax.tree.map(average, aux.variables))
    return grads, aux


def apply_gradients(update: Update, state: TrainState, grads: PyTree, **more: PyTree | Callable) -> TrainState:
    """The state after an update's optimizer has made its move: parameters, optimizer state, average. `more` are arguments that some optimizers of optax want. The step stays as it is: it may have further updates."""
    part = update.part(state.params)
    learning, fixed = update.split(part)
    optimizer = optax.with_extra_args_support(update.optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state[update.name], learning, **more)
    held = update.held(learning, state.step)
    if held is not None:
        mask, holds = held
        updates = jax.tree.map(lambda x, still: jnp.where(holds, jnp.zeros_like(x), x) if still else x, updates, mask)
    moved = _join(optax.apply_updates(learning, updates), fixed)
    if update.project is not None:
        moved = update.project(moved)
    replace = lambda whole: moved if update.of is None else {**whole, update.of: moved}
    ema = state.ema
    if update.ema is not None:
        decay = update.ema(state.step) if callable(update.ema) else update.ema
        before = ema if update.of is None else ema[update.of]
        average = optax.incremental_update(moved, before, 1 - decay)
        ema = average if update.of is None else {**ema, update.of: average}
    opt_state = {**state.opt_state, update.name: opt_state}
    return state.replace(params=replace(state.params), opt_state=opt_state, ema=ema)


@dataclasses.dataclass(frozen=True)
class UpdateStep:
    """The step that `make_step` makes, with what one has to know to look inside of it."""

    updates: tuple[Update, ...]
    accumulate: int = 1
    axis_name: str | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        metrics: Metrics = {}
        for update, part, key in self.calls(state, batch):
            if update.repeats == 1:
                state, found = self._make(update, state, part, key)
            else:
                repeated = lambda state, given, update=update: self._make(update, state, *given)
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(update.repeats))
                state, found = jax.lax.scan(repeated, state, (part, keys))
                found = jax.tree.map(lambda x: x.mean(0), found)
            if update.schedule is not None:
                found["learning_rate"] = jnp.asarray(update.schedule(state.step), jnp.float32)
            metrics |= {self.metric(update, name): value for name, value in found.items()}
        return state.replace(step=state.step + 1), metrics

    def calls(self, state: TrainState, batch: Batch) -> list[tuple[Update, Batch, Key[Array, ""]]]:
        """Each update with its part of the batch, stacked over repeats where there are some, and its key."""
        key = jax.random.fold_in(state.key, state.step)
        if self.axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))
        most = max(update.repeats for update in self.updates)
        parts = batch if most == 1 else cut_batch(batch, most)
        found = []
        for number, update in enumerate(self.updates):
            last = slice(-update.repeats, None) if update.repeats > 1 else -1
            own = parts if most == 1 else jax.tree.map(lambda x, last=last: x[last], parts)
            found.append((update, own, key if len(self.updates) == 1 else jax.random.fold_in(key, number)))
        return found

    def metric(self, update: Update, name: str) -> str:
        """What a metric of an update is called."""
        return name if len(self.updates) == 1 else f"{update.name}/{name}"

    def gradient_paths(self, state: TrainState) -> dict[str, list[str]]:
        """Which parameters the metrics `GRADIENT_NORMS` speak of, in their order."""
        found = {}
        for update in self.updates:
            prefix = f"{update.of}/" if update.of else ""
            learning, _ = update.split(update.part(state.params))
            found[self.metric(update, GRADIENT_NORMS)] = [prefix + path for path in parameter_paths(learning)]
        return found

    def _make(self, update: Update, state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        grads, aux = gradients(update, state, batch, key, accumulate=self.accumulate, axis_name=self.axis_name)
        state = _take(apply_gradients(update, state, grads), aux)
        norms = jnp.stack([optax.tree.norm(leaf) for leaf in jax.tree.leaves(grads)])
        return state, {**aux.metrics, "gradient_norm": jnp.linalg.norm(norms), GRADIENT_NORMS: norms}


def make_step(*updates: Update, accumulate: int = 1, axis_name: str | None = None) -> UpdateStep:
    """A step of these updates, one after the other: each sees what those before it have moved.

    `accumulate` and `axis_name` are those of `gradients`, for all of them; over a mapped axis each device has a key of its own. The metrics are scalars and `Mean`s, beside `GRADIENT_NORMS`, and stay on the device; of several updates they are named `UPDATE/METRIC`. Raises `UserError` for two updates of one name.
    """
    names = [update.name for update in updates]
    if not updates or len(set(names)) < len(names):
        raise UserError(
            f"the updates of a step are called {', '.join(names) or 'nothing'}: give one or more, each with a name of its own"
        )
    return UpdateStep(updates, accumulate, axis_name)


def cut_batch(batch: Batch, parts: int) -> Batch:
    """A batch in so many equal parts, stacked: part i has every `parts`-th row from row i on, so that no row leaves its device. Raises `UserError` where the rows cannot be shared out."""

    def cut(x: Array | np.ndarray) -> Array | np.ndarray:
        if len(x) % parts:
            raise UserError(
                f"{len(x)} rows on a device cannot be cut into {parts} equal parts: choose another batch size or number of parts"
            )
        return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def _join(learning: PyTree, fixed: PyTree) -> PyTree:
    """The inverse of `Update.split`."""
    return jax.tree.map(lambda one, other: other if one is None else one, learning, fixed, is_leaf=lambda leaf: leaf is None)


def _take(state: TrainState, aux: Aux) -> TrainState:
    """The state with what an objective has made beside the loss."""
    carry = state.carry if aux.carry is None else aux.carry
    return state.replace(variables=merge(aux.variables, state.variables), carry=carry)
