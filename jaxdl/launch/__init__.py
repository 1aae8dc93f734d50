"""From the command line, or from Python, to a run."""

from jaxdl.launch.cluster import Processes
from jaxdl.launch.command_line import launch, parse
from jaxdl.launch.config import Agents, Ask, Config, Data, Init, Training, Transformer, check
from jaxdl.launch.cpu import keep_freed_memory, set_up_cpu, take_wide_vectors
from jaxdl.launch.experiment import Experiment, run

__all__ = [
    "Agents",
    "Ask",
    "Config",
    "Data",
    "Experiment",
    "Init",
    "Processes",
    "Training",
    "Transformer",
    "check",
    "keep_freed_memory",
    "launch",
    "parse",
    "run",
    "set_up_cpu",
    "take_wide_vectors",
]
