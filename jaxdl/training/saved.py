"""What finished runs have left, and their models beside published ones: to begin with, and to hand on.

A run keeps what describes its model in `DIR/model`, in the published layout but for the weights, which are in its checkpoints. So the name of a run serves wherever a folder of published weights or a name on the hub does.
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from jaxdl import pretrained
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.files import local_path, parse_json
from jaxdl.nn import stack_blocks, unstack_blocks
from jaxdl.pretrained.files import WEIGHT_FILES
from jaxdl.training.checkpoint import read_variables
from jaxdl.training.identity import as_identity, config_from_json
from jaxdl.training.processes import is_first, to_host
from jaxdl.training.run import Run
from jaxdl.training.workdir import FOLDERS, RUN_FOLDERS

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
        saved = as_identity(parse_json(path)) if path.exists() else None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}): restore it from a copy, or give another run") from None
    if saved is None:
        raise UserError(f"{directory} is no run: give the --workdir of an experiment, with its config.json")
    experiment, config = saved["experiment"], saved["config"]
    if config_class is not None:
        config = config_from_json(config, config_class, path)
    stored = read_variables(path.parent / "checkpoints")
    params = stored["params"] if stored["ema"] is None else {**stored["params"], **stored["ema"]}
    return SavedRun(experiment, config, {"params": params, **stored["variables"]})


@dataclasses.dataclass(frozen=True)
class Model:
    """What a run hands on: a module whose family has published weights, and what prepares its inputs."""

    module: nn.Module
    tokenizer: Any = None
    """A tokenizer, a pair of them, or a processor of prompts (`pretrained.save`)."""
    process: ImageProcessor | None = None

    def keep(self, run: Run, params: PyTree) -> None:
        """Describes the model in the run's folder, if the published layout can. Raises `UserError` if it cannot and the run is to be exported, or if the export would take the place of something else."""
        if not is_first():
            return
        try:
            shapes = jax.eval_shape(lambda: params)
            pretrained.save_config(self.module, shapes, run.directory / MODEL, tokenizer=self.tokenizer, process=self.process)
        except UserError as error:
            if run.execution.export:
                raise UserError(f"the model cannot be exported: {error}") from None
        if run.execution.export:
            _refuse_other_files(Path(run.execution.export).expanduser(), run.directory)

    def export(self, run: Run, params: PyTree) -> None:
        """Writes the model with these weights to the folder that the run's export names."""
        params = jax.tree.map(to_host, params)
        if is_first():
            directory = local_path(run.execution.export)
            pretrained.save(self.module, params, directory, tokenizer=self.tokenizer, process=self.process)
            run.say(f"the model is exported to {directory}")


def _refuse_other_files(folder: Path, directory: Path) -> None:
    """Raises `UserError` if an export of the run in `directory` cannot go to the folder: it is none, it belongs to what the run keeps, or there are files of another model that would be replaced. An earlier export of the same model may be."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--export {folder} is a file: give a folder")
    kept, target = directory.resolve(), folder.resolve()
    if target == kept or any(target.is_relative_to(kept / name) for name in (*FOLDERS, *RUN_FOLDERS)):
        raise UserError(f"--export {folder} belongs to what the run keeps in {directory}: give a folder elsewhere")
    described = directory / MODEL
    replaced = (*(file.name for file in described.iterdir()), *WEIGHT_FILES)
    there = sorted({path.name for pattern in replaced for path in folder.glob(pattern)})
    config = folder / "config.json"
    if there and not (config.is_file() and config.read_bytes() == (described / "config.json").read_bytes()):
        raise UserError(
            f"--export {folder} holds files of another model ({', '.join(there[:3])}), which would be replaced: give a new folder"
        )


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
