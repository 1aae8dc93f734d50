"""State, step, loop, checkpoints, logs: training that knows no model."""

from jaxdl.signals import Interrupted
from jaxdl.training.identity import NOT_IDENTITY
from jaxdl.training.inspection import LayerStats, inspect_step
from jaxdl.training.loop import Evaluate, fit
from jaxdl.training.parallel import Layout, data_mesh, distribute
from jaxdl.training.processes import is_first, to_host
from jaxdl.training.run import Execution, Report, Run
from jaxdl.training.saved import Model, SavedRun, load_model, load_run, published_folder
from jaxdl.training.seeds import over_seeds
from jaxdl.training.setup import OPTIMIZERS, configured, decay_mask, init_state, setup_training
from jaxdl.training.state import TrainState, parameters_sha256
from jaxdl.training.step import (
    Aux,
    Batch,
    Frozen,
    Mean,
    Metrics,
    Objective,
    Update,
    UpdateStep,
    apply_gradients,
    cut_batch,
    gradients,
    make_step,
)
from jaxdl.training.train import train

__all__ = [
    "NOT_IDENTITY",
    "OPTIMIZERS",
    "Aux",
    "Batch",
    "Evaluate",
    "Execution",
    "Frozen",
    "Interrupted",
    "LayerStats",
    "Layout",
    "Mean",
    "Metrics",
    "Model",
    "Objective",
    "Report",
    "Run",
    "SavedRun",
    "TrainState",
    "Update",
    "UpdateStep",
    "apply_gradients",
    "configured",
    "cut_batch",
    "data_mesh",
    "decay_mask",
    "distribute",
    "fit",
    "gradients",
    "init_state",
    "inspect_step",
    "is_first",
    "load_model",
    "load_run",
    "make_step",
    "over_seeds",
    "parameters_sha256",
    "published_folder",
    "setup_training",
    "to_host",
    "train",
]
