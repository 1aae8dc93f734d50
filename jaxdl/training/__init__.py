"""State, step, loop, checkpoints, logs: training that knows no model."""

from jaxdl.training.beginning import OPTIMIZERS, matrices, start
from jaxdl.training.inside import Inside, look
from jaxdl.training.loop import Interrupted, fit
from jaxdl.training.parallel import Layout, data_mesh, distribute
from jaxdl.training.run import ASIDE, Execution, Run, load_run
from jaxdl.training.state import TrainState, init_state, parameters_sha256
from jaxdl.training.step import Aux, Batch, Frozen, make_step

__all__ = [
    "ASIDE",
    "OPTIMIZERS",
    "Aux",
    "Batch",
    "Execution",
    "Frozen",
    "Inside",
    "Interrupted",
    "Layout",
    "Run",
    "TrainState",
    "data_mesh",
    "distribute",
    "fit",
    "init_state",
    "load_run",
    "look",
    "make_step",
    "matrices",
    "parameters_sha256",
    "start",
]
