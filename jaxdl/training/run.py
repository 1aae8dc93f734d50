"""A run is one working directory: config, log, checkpoints, figures, result."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from annotated_types import Ge, Gt
from jaxtyping import PyTree
from tqdm import tqdm

from jaxdl import figures
from jaxdl.errors import UserError
from jaxdl.training.checkpoint import Checkpoints, read_variables
from jaxdl.training.logging import JsonLines, TensorBoard, WandB, Writer, read_metrics, replace_text
from jaxdl.training.parallel import Layout
from jaxdl.training.processes import agree, first_process_first, is_first
from jaxdl.training.state import TrainState, parameters_sha256

ASIDE = {"aside": True}
"""Metadata of a config's field that the result does not depend on, such as a question to the finished model: `config.json` is without it, and a resumed run may change it."""


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a run is carried out. Its result does not depend on it, so a resumed run may change it. The one exception is chance within `pmap`, where each device draws dropout of its own: another draw, from the same distribution."""

    overwrite: bool = False
    """Delete the run that is in the working directory and start anew."""
    log_every: Annotated[int, Ge(1)] = 10
    """Steps between two rows of the log."""
    checkpoint_every: Annotated[int, Ge(1)] = 1000
    """Steps between two checkpoints."""
    checkpoint_minutes: Annotated[float, Gt(0)] = 10.0
    """Minutes after which a checkpoint is written even if its step has not come."""
    keep_checkpoints: Annotated[int, Ge(1)] = 2
    """How many of the newest checkpoints are kept."""
    profile: bool = False
    """Record a trace of a few steps in DIR/profile, to be opened with XProf or Perfetto."""
    inspect_every: Annotated[int, Ge(0)] = 0
    """Steps between two looks inside: activations, gradients and updates of every layer, in DIR/inside.jsonl and as pictures. 0: none. Each costs as much as two steps or three."""
    wandb: bool = False
    """Also log to Weights & Biases (pip install 'jaxdl[wandb]')."""
    parallel: Literal["jit", "fsdp", "pmap"] = "jit"
    """How training lies over all devices: the batch is spread (jit), parameters and optimizer state too (fsdp), or one program per device (pmap)."""


class Run:
    """An open working directory, and the layout of what is computed in it. Use `Run.open`; closing waits for what is still being written.

    `config.json`, `metrics.jsonl`, `result.json`, `checkpoints/`, `figures/`, `tensorboard/` are what it leaves, and `inside.jsonl` if it is asked to look inside; an experiment may keep more beside them (a tokenizer, say) in a block of `first_process_first`. Several processes of one run share the directory: the first one claims it, logs and talks; pictures that the others draw go to `figures` of their own, which do not last.
    """

    def __init__(self, directory: Path, experiment: str, config: Any, execution: Execution, figures: Path):
        self.directory, self.experiment, self.config, self.execution = directory, experiment, config, execution
        self.layout = Layout(execution.parallel)
        self.checkpoints = Checkpoints(directory / "checkpoints", _plain(config), execution.keep_checkpoints)
        self.figures = figures
        self.started = time.perf_counter()
        self.seconds_before = 0.0
        self._writers: list[Writer] = []
        self._inside: JsonLines | None = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, directory: str | Path, experiment: str, config: Any, execution: Execution = Execution()) -> Iterator["Run"]:
        """Begins the run, or goes on with the one that is there.

        Raises `UserError` if the directory holds a run with another config (the difference is shown) or other people's files, if it cannot be written, or if another process is at work in it.
        """
        directory = Path(directory)
        with contextlib.ExitStack() as stack:
            problem = None
            if is_first():
                try:
                    stack.enter_context(_claimed(directory, experiment, config, execution.overwrite))
                    figures = directory / "figures"
                    figures.mkdir(exist_ok=True)
                except UserError as error:
                    problem = error
            else:
                figures = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (failed,) = agree(problem is not None)
            if failed:
                raise problem or UserError("the first process cannot use the working directory; it says why")
            run = cls(directory, experiment, config, execution, figures)
            try:
                yield run
            finally:
                for writer in [*run._writers, *filter(None, [run._inside])]:
                    writer.close()
                run.checkpoints.close()

    @property
    def shard(self) -> dict[str, int]:
        """Which rows of each batch this process loads, as `train_batches` takes it."""
        return {"process": jax.process_index(), "processes": jax.process_count()}

    def first_process_first(self) -> AbstractContextManager[None]:
        """A block that writes files which other processes of the run then find, as does a later run that resumes."""
        return first_process_first(f"{self.directory}")

    @property
    def seconds(self) -> float:
        """Wall time spent on this run, earlier attempts up to their last checkpoint included."""
        return self.seconds_before + time.perf_counter() - self.started

    def say(self, text: str) -> None:
        """A line for the person who watches; it does not disturb the progress bar."""
        if is_first():
            tqdm.write(text)

    def start_logging(self, step: int) -> None:
        """Opens the log of a run that begins at `step`, and that of what is inside where there is one or will be."""
        if not is_first():
            return
        inside = self.directory / "inside.jsonl"
        if self.execution.inspect_every or inside.exists():
            self._inside = JsonLines(inside, step)
        self._writers = [JsonLines(self.directory / "metrics.jsonl", step), TensorBoard(self.directory / "tensorboard", step)]
        if self.execution.wandb:
            name = f"{self.experiment}-{self.directory.name}"
            self._writers.append(WandB(self.directory, name, _plain(self.config)))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)

    def log_inside(self, step: int, row: dict[str, Any]) -> None:
        """A row of `inside.jsonl`."""
        if self._inside is not None:
            self._inside.write(step, row)

    def finish(self, state: TrainState, metrics: dict[str, float]) -> dict[str, Any]:
        """Logs the final metrics, draws the learning curves and what was seen inside, writes `result.json`, and says where things are."""
        step = int(state.step)
        self.log(step, {f"eval/{name}": value for name, value in metrics.items()})
        result = {
            "experiment": self.experiment,
            "preset": self.config.preset,
            "steps": step,
            "metrics": metrics,
            "parameters_sha256": parameters_sha256(state.params),
            "seconds": round(self.seconds, 1),
            "versions": {name: importlib.metadata.version(name) for name in ("jaxdl", "jax", "flax", "optax", "numpy")},
            "device": f"{self.layout.mesh.size} × {jax.devices()[0].device_kind} ({platform.machine()})",
        }
        if is_first():
            rows = read_metrics(self.directory / "metrics.jsonl")
            figures.learning_curves(rows, self.figures / "learning_curves.png")
            if self._inside is not None:
                figures.inside(read_metrics(self.directory / "inside.jsonl"), self.figures)
            replace_text(self.directory / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            self.report(result)
        return result

    @property
    def result(self) -> dict[str, Any] | None:
        """What is in `result.json`, if the run has come to its end before."""
        path = self.directory / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def report(self, result: dict[str, Any]) -> None:
        width = max(map(len, result["metrics"]), default=0)
        self.say(f"\nafter {result['steps']:,} steps and {result['seconds']:.0f} seconds:")
        for name, value in result["metrics"].items():
            self.say(f"  {name:<{width}}  {value:.4g}")
        pictures = ", ".join(sorted(path.name for path in self.figures.glob("*.png")))
        self.say(f"everything is in {self.directory}; pictures in {self.figures}: {pictures}")


def load_run(directory: str | Path) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """What a run computes, as its `config.json` says it (`experiment`, `config`), and the variables of its newest checkpoint, for `module.apply`: numpy arrays, of which `params` are the average where the run keeps one.

    Raises `UserError` if there is no run, or it has no checkpoint that can be read.
    """
    path = Path(directory).expanduser() / "config.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        told["experiment"], told["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{directory} is no run: give the --workdir of an experiment, with its config.json") from None
    stored = read_variables(path.parent / "checkpoints")
    params = stored["params"] if stored["ema"] is None else stored["ema"]
    return told, {"params": params, **stored["variables"]}


@contextlib.contextmanager
def _claimed(directory: Path, experiment: str, config: Any, overwrite: bool) -> Iterator[None]:
    """Holds the directory for this run, with its `config.json` in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to the working directory {directory}: {error.strerror}; give another --workdir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is training in {directory}: wait for it, or give another --workdir") from None
        _write_config(directory, experiment, config, overwrite)
        yield


def _write_config(directory: Path, experiment: str, config: Any, overwrite: bool) -> None:
    """Makes sure that the directory is this run's, and writes its `config.json`."""
    path = directory / "config.json"
    wanted = {"experiment": experiment, "config": _plain(config)}
    others = [entry for entry in directory.iterdir() if entry.name != ".lock"]
    if not path.exists() and others:
        raise UserError(f"{directory} holds {others[0].name} and is no run: give another --workdir")
    if path.exists() and overwrite:
        for entry in others:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differences = _differences(found, wanted)
        except (json.JSONDecodeError, AttributeError, KeyError):
            raise UserError(f"{path} cannot be read: restore it, or start anew with --overwrite") from None
        if differences:
            raise UserError(
                f"{directory} holds a run with another config ({'; '.join(differences)}): "
                "give the same flags to resume it, another --workdir to keep both, or --overwrite to start anew"
            )
    replace_text(path, json.dumps(wanted, indent=2) + "\n")


def _plain(config: Any) -> dict[str, Any]:
    """A config as JSON reads it back, tuples as lists, without the fields that are `ASIDE`."""
    aside = {field.name for field in dataclasses.fields(config) if field.metadata.get("aside")}
    return json.loads(json.dumps({name: value for name, value in dataclasses.asdict(config).items() if name not in aside}))


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What would change, as `name: there → here`."""
    if found["experiment"] != wanted["experiment"]:
        return [f"experiment: {found['experiment']} → {wanted['experiment']}"]
    there, here = found["config"], wanted["config"]
    names = [*there, *(name for name in here if name not in there)]
    return [f"{name}: {there.get(name)} → {here.get(name)}" for name in names if there.get(name) != here.get(name)]
