"""What finished runs have left, and their models beside published ones: to begin with, and to hand on.

A run keeps what describes its model in `DIR/model`, in the published layout but for the weights, which are in its checkpoints. So the name of a run serves wherever a folder of published weights or a name on the hub does.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from jaxdl import pretrained
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.files import local_path
from jaxdl.nn import stack_blocks, unstack_blocks
from jaxdl.training.checkpoint import read_variables
from jaxdl.training.processes import is_first, to_host
from jaxdl.training.run import Run

MODEL = "model"
"""The folder of a run that describes its model."""


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a run has left."""

    experiment: str
    config: Any
    """Of the class that was asked for, or a dict as `config.json` has it."""
    variables: dict[str, PyTree]
    """For `module.apply`, as numpy arrays: `params`, averages in the place of those parameters of which one was kept, and the other collections."""


def load_run(directory: str | Path, config_class: type | None = None) -> SavedRun:
    """What a run computes, and the variables of its newest checkpoint; its config as an instance of `config_class`, equal to the one that it was begun with.

    Raises `UserError` if there is no run, it has no checkpoint that can be read, or its config is not one of that class.
    """
    path = local_path(directory) / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        experiment, config = saved["experiment"], saved["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{directory} is no run: give the --workdir of an experiment, with its config.json") from None
    if config_class is not None:
        config = config_from_json(config, config_class, path)
    stored = read_variables(path.parent / "checkpoints")
    params = stored["params"] if stored["ema"] is None else {**stored["params"], **stored["ema"]}
    return SavedRun(experiment, config, {"params": params, **stored["variables"]})


def config_from_json(values: dict[str, Any], config_class: type, path: Path) -> Any:
    """The config that was written to a `config.json`: lists become tuples where its fields are tuples. Raises `UserError` for what does not fit the class."""
    import pydantic  # Here, so that help does not wait for it.

    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown_fields := sorted(values.keys() - known):
        raise UserError(
            f"{path} has {', '.join(unknown_fields)}, which {config_class.__module__} does not know: give a run of that experiment"
        )
    try:
        return pydantic.TypeAdapter(config_class).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}, {where}: {first['msg']}; give a run of {config_class.__module__}") from None


@dataclasses.dataclass(frozen=True)
class Model:
    """What a run hands on: a module whose family has published weights, and what prepares its inputs."""

    module: nn.Module
    tokenizer: Any = None
    """A tokenizer, a pair of them, or a processor of prompts (`pretrained.save`)."""
    process: ImageProcessor | None = None

    def keep(self, run: Run, params: PyTree) -> None:
        """Describes the model in the run's folder, if the published layout can. Raises `UserError` if it cannot and the run is to be exported."""
        if not is_first():
            return
        try:
            shapes = jax.eval_shape(lambda: params)
            pretrained.save_config(self.module, shapes, run.directory / MODEL, tokenizer=self.tokenizer, process=self.process)
        except UserError as error:
            if run.execution.export:
                raise UserError(f"the model cannot be exported: {error}") from None

    def export(self, run: Run, params: PyTree) -> None:
        """Writes the model with these weights to the folder that the run's export names."""
        params = jax.tree.map(to_host, params)
        if is_first():
            directory = local_path(run.execution.export)
            pretrained.save(self.module, params, directory, tokenizer=self.tokenizer, process=self.process)
            run.say(f"the model is exported to {directory}")


def published_folder(name: str) -> str:
    """Where the description of a model lies: for a run its folder `model`, for anything else the name itself. Raises `UserError` for a run without one."""
    directory = local_path(name)
    if not (directory / "checkpoints").is_dir():
        return name
    if not (directory / MODEL / "config.json").is_file():
        raise UserError(
            f"{name} is a run whose model has no published layout, so nothing else can begin with it: give another run, or published weights"
        )
    return str(directory / MODEL)


def load_model(
    name: str, expected: type[nn.Module] = nn.Module, *, scan: bool = False, **changes: Any
) -> tuple[nn.Module, PyTree]:
    """The module and parameters of a finished run, of a folder with published weights, or of a name on the hub; the arguments are those of `pretrained.load`. Raises `UserError` where that does, and for a run that has no checkpoint or whose model has no published layout."""
    folder = published_folder(name)
    if folder == name:
        return pretrained.load(name, expected, scan=scan, **changes)
    changes.pop("param_dtype", None)  # Runs keep float32.
    module = pretrained.load_module(folder, expected, scan=scan, **changes)
    params = unstack_blocks(load_run(name).variables["params"])
    return module, stack_blocks(params) if scan else params
