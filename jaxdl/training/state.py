"""What training carries from step to step."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from jaxdl.training.processes import whole


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes, and that a checkpoint holds.

    `params` and `opt_state` may be dicts with one entry per network (GANs, reinforcement learning). `variables` are the other Linen collections (`batch_stats`, ...). `key` never changes: step keys are `fold_in(key, step)`. `ema` is an average of `params`, or None. Leaves may be abstract, or stacked over seeds: that is why they are not typed further.
    """

    step: PyTree
    """int32 scalar: how many updates were made."""
    params: PyTree
    opt_state: PyTree
    variables: PyTree
    key: PyTree
    """A typed scalar key."""
    ema: PyTree | None = None

    @property
    def measured(self) -> PyTree:
        """The parameters to evaluate: their average where one is kept."""
        return self.params if self.ema is None else self.ema


def init_state(
    init: Callable[[Key[Array, ""]], dict[str, Any]],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema: bool = False,
    params: PyTree | None = None,
    shardings: Callable[[TrainState], TrainState] | None = None,
) -> TrainState:
    """The state at step 0, made by one compiled program.

    `init` is a module's initialisation given its key: `lambda key: module.init(key, images, tokens)`. `params`, where given, stand in for the initialised ones (fine-tuning); of a tree of dicts they may be a part, and the rest is initialised. `shardings` (a layout's `state_shardings`) says where each leaf of the abstract state will lie: it is made there, and no device ever holds one whole that is to be cut.
    """

    def make(given: PyTree | None) -> TrainState:
        init_key, key = jax.random.split(jax.random.key(seed))
        variables = dict(init(init_key))
        fresh = variables.pop("params")
        params = fresh if given is None else _filled(given, fresh)
        average = jax.tree.map(jnp.copy, params) if ema else None
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), variables, key, average)

    if shardings is None:
        return jax.jit(make)(params)
    placed = shardings(jax.eval_shape(make, params))
    if params is not None:
        params = jax.tree.map(_put, params, _like(params, placed.params))
    return jax.jit(make, out_shardings=placed)(params)


def _filled(given: PyTree, fresh: PyTree) -> PyTree:
    """What is given, and the rest of what is fresh."""
    if not isinstance(fresh, Mapping):
        return given
    return {**fresh, **{name: _filled(values, fresh[name]) for name, values in given.items()}}


def _like(given: PyTree, whole: PyTree) -> PyTree:
    """The part of the whole that is given."""
    return {name: _like(part, whole[name]) for name, part in given.items()} if isinstance(given, Mapping) else whole


def _put(values: np.ndarray | Array, sharding: jax.sharding.Sharding) -> Array:
    """Each device gets its part and nothing more."""
    values = np.asarray(values)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def parameter_paths(params: PyTree) -> list[str]:
    """The name of each leaf, as in "vision/encoder/block_0/norm/scale", in the order of `jax.tree.leaves`."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def parameters_sha256(params: PyTree) -> str:
    """Digest of all parameters' bytes in the order of their paths: equal if and only if every bit is."""
    digest = hashlib.sha256()
    for _, leaf in sorted(zip(parameter_paths(params), jax.tree.leaves(params), strict=True), key=lambda pair: pair[0]):
        digest.update(np.ascontiguousarray(whole(leaf)).tobytes())
    return digest.hexdigest()


def parameter_table(params: PyTree, depth: int = 2) -> str:
    """How many parameters each part has, as lines of text; parts are paths cut after `depth` names."""
    rows: dict[str, int] = {}
    for path, leaf in zip(parameter_paths(params), jax.tree.leaves(params), strict=True):
        part = "/".join(path.split("/")[:depth])
        rows[part] = rows.get(part, 0) + leaf.size
    rows["total"] = sum(rows.values())
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {count:>13,}" for name, count in rows.items())
