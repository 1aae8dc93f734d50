"""Training from several seeds at once: one program, whose state is stacked over them."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array

from jaxdl.errors import UserError
from jaxdl.training.state import TrainState, parameter_paths
from jaxdl.training.step import GRADIENT_NORMS, Batch, Mean, Metrics, Step, UpdateStep

_STACKED = TrainState(step=None, params=0, opt_state=0, variables=0, key=0, ema=0, carry=0, constants=None)
"""The axis of the seeds in each part of a state."""


@dataclasses.dataclass(frozen=True)
class SeedsStep:
    """The step that `over_seeds` makes."""

    step: Step
    count: int
    batches: Literal["shared", "own"]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        own = self.batches == "own"
        if own:
            batch = jax.tree.map(self._by_seed, batch)
        mapped = jax.vmap(self.step, in_axes=(_STACKED, 0 if own else None), out_axes=(_STACKED, 0), axis_size=self.count)
        state, metrics = mapped(state, batch)
        found: Metrics = {}
        for name, value in metrics.items():
            if isinstance(value, Mean):
                found[name] = Mean(value.total.sum(0), value.count.sum(0))
            elif name.endswith(GRADIENT_NORMS):
                found[name] = value.max(0)
            else:
                found |= mean_and_spread(name, value)
        return state, found

    def gradient_paths(self, state: TrainState) -> dict[str, list[str]]:
        """Which parameters the metrics `GRADIENT_NORMS` speak of, in their order: they have the same names for every seed."""
        known = isinstance(self.step, UpdateStep)
        return self.step.gradient_paths(state) if known else {GRADIENT_NORMS: parameter_paths(state.params)}

    def _by_seed(self, rows: Array | np.ndarray) -> Array | np.ndarray:
        if len(rows) % self.count:
            raise UserError(f"a batch of {len(rows)} cannot be shared out to {self.count} seeds: choose a multiple")
        return rows.reshape(self.count, -1, *rows.shape[1:])


def over_seeds(step: Step, count: int, batches: Literal["shared", "own"] = "shared") -> SeedsStep:
    """A step of `count` states at once, as `init_state(..., seeds=count)` stacks them: all see the same batch, or each its own share of the rows, one after another. Their metrics are the mean, and as `NAME_spread` the standard deviation, over the seeds; of a `Mean`, that of what all have seen."""
    return SeedsStep(step, count, batches)


def mean_and_spread(name: str, values: Array | np.ndarray) -> dict[str, Any]:
    """A number of each seed as what is logged of it: the mean, and the standard deviation with Bessel's correction, 0 for a single seed."""
    spread = values.std(0, ddof=1) if len(values) > 1 else 0.0 * values[0]
    return {name: values.mean(0), f"{name}_spread": spread}
