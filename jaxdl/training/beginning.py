"""From an objective and a config to what `fit` takes: the step and the state at its beginning."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import optax
import optax.contrib
from jaxtyping import Array, Key, PyTree

from jaxdl.training.parallel import Layout
from jaxdl.training.state import TrainState, init_state
from jaxdl.training.step import Frozen, GradientStep, LossFn, make_step

Mask = Callable[[PyTree], PyTree]
"""Of parameters: true for those that decay."""


@runtime_checkable
class Training(Protocol):
    """What a config says about training (`jaxdl.launch.Training`)."""

    seed: int
    clip: float
    accumulate: int
    ema_decay: float

    def schedule(self) -> optax.Schedule: ...


def start(
    config: Training,
    layout: Layout,
    loss_fn: LossFn,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    init: Callable[[Key[Array, ""]], dict[str, Any]],
    params: PyTree | None = None,
    frozen: Frozen | None = None,
) -> tuple[GradientStep, TrainState]:
    """The step that minimises `loss_fn`, and the state at step 0, both as `config` and `layout` want them.

    `optimizer` makes one of a schedule; the gradient is clipped to the norm `config.clip` before it comes there. `init` and `params` are `init_state`'s, `frozen` is `make_step`'s.
    """
    schedule = config.schedule()
    clipped = optax.chain(optax.clip_by_global_norm(config.clip), optimizer(schedule))
    state = init_state(init, clipped, seed=config.seed, ema=config.ema_decay > 0, params=params, shardings=layout.state_shardings)
    step = make_step(
        loss_fn,
        clipped,
        schedule=schedule,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay or None,
        axis_name=layout.axis_name,
        frozen=frozen,
    )
    return step, state


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


def matrices(params: PyTree) -> PyTree:
    """A `mask` of weight decay: kernels and embeddings, but no scale and no bias (Radford et al. 2018, section 4.1)."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _axes(path, leaf) > 1, params)


def _axes(path: tuple, leaf: Array) -> int:
    """Those that a parameter has in its layer: under `blocks`, a `Transformer` with `scan` stacks those of all its blocks on one more, the first."""
    return leaf.ndim - sum(getattr(step, "key", None) == "blocks" for step in path)
