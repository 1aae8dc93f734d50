"""How a step lies over devices."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdl.errors import UserError
from jaxdl.training.state import TrainState
from jaxdl.training.step import Batch, Step


def data_mesh() -> Mesh:
    """All devices along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def distribute(step: Step, state: TrainState, mesh: Mesh) -> tuple[Step, TrainState, Callable[[dict[str, np.ndarray]], Batch]]:
    """Compiles a step for `mesh`: the state on every device, each batch cut along its first axis.

    Gives the compiled step, which consumes the state that it is given, the state in its place, and the function that brings a batch of numpy arrays to the devices. XLA adds the communication, so the result is that of one device up to rounding.
    """
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def place(batch: dict[str, np.ndarray]) -> Batch:
        rows = len(next(iter(batch.values())))
        if rows % mesh.size:
            raise UserError(
                f"a batch of {rows} cannot be spread over {mesh.size} devices: choose a --batch-size that is a multiple of {mesh.size}"
            )
        return jax.device_put(batch, sharded)

    return jax.jit(step, donate_argnums=0), jax.device_put(state, replicated), place
