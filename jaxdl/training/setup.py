"""From objectives and a config to what the loop takes: the step, and the state at its beginning."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, Key, PyTree

from jaxdl.errors import UserError
from jaxdl.training.parallel import Layout
from jaxdl.training.state import TrainState, merge
from jaxdl.training.step import Objective, Update, UpdateStep, make_step

Mask = Callable[[PyTree], PyTree]
"""Of parameters: true for those that decay."""

Init = Callable[[Key[Array, ""]], Mapping[str, Any]]
"""A module's initialisation given its key: `lambda key: module.init(key, images, tokens)`."""


@runtime_checkable
class Training(Protocol):
    """What a config says about training (`jaxdl.launch.Training`)."""

    steps: int
    seed: int
    clip: float
    accumulate: int
    ema_decay: float

    def schedule(self) -> optax.Schedule: ...


def configured(
    config: Training,
    objective: Objective,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    **fields: Any,
) -> Update:
    """The update that minimises an objective as `config` wants it: the gradient is clipped to the norm `config.clip`, the schedule is logged, and an average is kept if the config has a decay for it.

    `optimizer` makes one of a schedule; `fields` are the other fields of the update. An update that is repeated has the learning rate of its step all the while.
    """
    schedule, repeats = config.schedule(), fields.get("repeats", 1)
    of_moves = schedule if repeats == 1 else lambda count: schedule(count // repeats)
    clipped = optax.chain(optax.clip_by_global_norm(config.clip), optimizer(of_moves))
    return Update(objective, clipped, **dict(ema=config.ema_decay or None, schedule=schedule) | fields)


def setup_training(
    config: Training,
    layout: Layout,
    *updates: Update,
    init: Init,
    params: PyTree | None = None,
    carry: Callable[[Key[Array, ""]], PyTree] | None = None,
    constants: PyTree = None,
) -> tuple[UpdateStep, TrainState]:
    """The step of these updates, and the state at step 0 in its place, as `config` and `layout` want them; `init`, `params`, `carry` and `constants` are `init_state`'s."""
    shardings = layout.state_shardings
    state = init_state(init, updates, seed=config.seed, params=params, carry=carry, constants=constants, shardings=shardings)
    return make_step(*updates, accumulate=config.accumulate, axis_name=layout.axis_name), state


def init_state(
    init: Init,
    updates: Sequence[Update],
    *,
    seed: int,
    seeds: int | None = None,
    params: PyTree | None = None,
    carry: Callable[[Key[Array, ""]], PyTree] | None = None,
    constants: PyTree = None,
    shardings: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
    """The state at step 0, made by one compiled program.

    `params`, where given, stand in for the initialised ones (fine-tuning); of a tree of dicts they may be a part, and the rest is initialised. `carry` makes the first one from a key of its own. With `seeds`, every leaf but `step` and `constants` is stacked over the states of the seeds from `seed` on, as `over_seeds` takes them. `shardings` (a layout's `state_shardings`) says where each leaf of the abstract state will lie: it is made there, and no device ever holds one whole that is to be cut. Raises `UserError` for a seed that is negative or has more than 32 bits, of which jax would take the last ones.
    """

    def make_one(given: PyTree | None, seed: Array) -> TrainState:
        init_key, key = jax.random.split(jax.random.key(seed))
        variables = dict(init(init_key))
        fresh = variables.pop("params")
        params = fresh if given is None else merge(given, fresh)
        opt_state = {update.name: update.init(params) for update in updates}
        averages = {update.of: update.part(params) for update in updates if update.ema is not None}
        ema = jax.tree.map(jnp.copy, averages.get(None, averages)) if averages else None
        carried = carry(jax.random.fold_in(init_key, 1)) if carry else None
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, variables, key, ema, carried)

    def make(given: PyTree | None) -> TrainState:
        if seeds is None:
            return make_one(given, jnp.asarray(np.int64(seed)))  # As `jax.random.key` takes large ones.
        each = (np.arange(seeds, dtype=np.uint64) + seed).astype(np.uint32)
        # One after another: a batch of QR decompositions (orthogonal kernels) waits within XLA's pool of threads for threads of that pool, and two at a time wait for ever on two cores (seen with jaxlib 0.10.2).
        stacked = jax.lax.map(lambda seed: make_one(given, seed), jnp.asarray(each))
        return stacked.replace(step=jnp.zeros((), jnp.int32))

    if not 0 <= seed < 2**32:
        raise UserError(f"the seed {seed} has no 32 bits: give one from 0 to {2**32 - 1}")
    if shardings is None:
        return jax.jit(make)(params).replace(constants=jax.tree.map(jnp.asarray, constants))
    abstract = jax.eval_shape(make, params)
    placed = shardings(abstract.replace(constants=jax.eval_shape(lambda: constants)))
    if params is not None and seeds is None:
        params = jax.tree.map(_put, params, _like(params, placed.params))
    state = jax.jit(make, out_shardings=placed.replace(constants=None))(params)
    return state.replace(constants=jax.tree.map(_put, constants, placed.constants))


def _like(given: PyTree, whole: PyTree) -> PyTree:
    """The part of the whole that is given."""
    return {name: _like(part, whole[name]) for name, part in given.items()} if isinstance(given, Mapping) else whole


def _put(values: np.ndarray | Array, sharding: jax.sharding.Sharding) -> Array:
    """Each device gets its part and nothing more."""
    if isinstance(values, jax.Array) and jax.dtypes.issubdtype(values.dtype, jax.dtypes.prng_key):
        return jax.device_put(values, sharding)
    values = np.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def adamw(
    schedule: optax.Schedule, decay: float, *, b2: float = 0.95, mask: Mask | None = None, embeddings: float | None = None
) -> optax.GradientTransformation:
    """Adam with decoupled decay (Loshchilov and Hutter 2019). It treats embeddings like all others."""
    return optax.adamw(schedule, b2=b2, weight_decay=decay, mask=mask)


def muon(
    schedule: optax.Schedule, decay: float, *, b2: float = 0.95, mask: Mask | None = None, embeddings: float | None = None
) -> optax.GradientTransformation:
    """Orthogonalises the updates of matrices, each block's its own, and leaves the rest to Adam (Jordan et al. 2024).

    Where `embeddings` is given, Adam takes tables of embeddings too, and all that it takes learns at this share of the rate: in a table of which most rows are rare, orthogonal updates make much of the noise in those.
    """

    def by_muon(params: PyTree) -> PyTree:
        def one(path: tuple, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
            table = jax.tree_util.keystr(path, simple=True, separator="/").endswith(("/embedding", "/table"))
            orthogonal = _axes(path, leaf) == 2 and not (table and embeddings is not None)
            return optax.contrib.MuonDimensionNumbers(-2, -1) if orthogonal else None

        return jax.tree_util.tree_map_with_path(one, params)

    return optax.contrib.muon(
        schedule,
        weight_decay=decay,
        weight_decay_mask=mask,
        adam_b2=b2,
        adam_learning_rate=None if embeddings is None else lambda step: embeddings * schedule(step),
        muon_weight_dimension_numbers=by_muon,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": adamw, "muon": muon}
"""By name `(schedule, weight_decay, *, b2, mask, embeddings)`, of which experiments let one choose. `b2` is Adam's β₂, `mask` says what decays (all, where it is None)."""


def decay_mask(params: PyTree) -> PyTree:
    """A `mask` of weight decay: kernels and embeddings, but no scale and no bias (Radford et al. 2018, section 4.1)."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _axes(path, leaf) > 1, params)


def _axes(path: tuple, leaf: Array) -> int:
    """Those that a parameter has in its layer: under `blocks`, a `Transformer` with `scan` stacks those of all its blocks on one more, the first."""
    return leaf.ndim - sum(getattr(step, "key", None) == "blocks" for step in path)
