"""A run is one working directory: config, log, checkpoints, figures, result."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from annotated_types import Ge, Gt
from tqdm import tqdm

from jaxdl import figures
from jaxdl.data import Source, report_left_out, stack, train_batches
from jaxdl.data.pipeline import Collate, Transform
from jaxdl.errors import UserError
from jaxdl.files import file_name, local_path, parse_json, replace_text
from jaxdl.training.aside import discard
from jaxdl.training.checkpoint import Checkpoints
from jaxdl.training.environment import Environment
from jaxdl.training.identity import plain
from jaxdl.training.logging import JsonLines, TensorBoard, WandB, Writer, read_metrics
from jaxdl.training.parallel import Layout, Rules
from jaxdl.training.processes import any_process, first_process_first, is_first, look_for_stop
from jaxdl.training.seeds import mean_and_spread
from jaxdl.training.state import TrainState, parameters_sha256
from jaxdl.training.step import Batch, Mean
from jaxdl.training.workdir import claimed

Report = dict[str, Any]
"""What an evaluation has found, by name: numbers, one for each seed where there are several, `Mean`s, and pictures; None counts as nothing."""


def is_number(value: Any, axes: int = 0) -> bool:
    """Whether a value of a report is a number, or a row of them where `axes` is 1."""
    return not isinstance(value, str) and np.ndim(value) == axes and np.issubdtype(np.asarray(value).dtype, np.number)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a run is carried out. Its result does not depend on it, so a resumed run may change it. The one exception is randomness within `pmap`, where each device draws dropout of its own: another draw, from the same distribution."""

    overwrite: bool = False
    """Delete the run that is in the working directory and start anew. It is there again if that fails before the first step."""
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
    """Steps between two looks inside: activations, gradients and updates of every layer, in DIR/layers.jsonl and as figures. 0: none. Each costs as much as two steps or three."""
    export: str = ""
    """Write the finished model into this folder, in the published layout that transformers or diffusers read: config.json, model.safetensors, tokenizer and processor."""
    wandb: bool = False
    """Also log to Weights & Biases (pip install 'jaxdl[wandb]')."""
    parallel: Literal["jit", "fsdp", "pmap"] = "jit"
    """How training lies over all devices: the batch is spread (jit), parameters and optimizer state too (fsdp), or one program per device (pmap)."""


class Run:
    """An open working directory, and the layout of what is computed in it. Use `Run.open`; closing waits for what is still being written.

    `config.json`, `environment.json`, `metrics.jsonl`, `result.json`, `checkpoints/`, `figures/`, `tensorboard/` are what it leaves, and `layers.jsonl` if it is asked to look inside; an experiment may keep more beside them (a tokenizer, say) in a block of `first_process_first`, under names that `jaxdl.training.workdir` lists. Several processes of one run share the directory: the first one claims it, logs and talks; pictures that the others draw go to `figures` of their own, which do not last.
    """

    def __init__(
        self, directory: Path, experiment: str, config: Any, execution: Execution, figures: Path, preset: str, rules: Rules
    ):
        self.directory, self.experiment, self.config, self.execution = directory, experiment, config, execution
        self.preset, self.layout = preset, Layout(execution.parallel, rules=rules)
        self.checkpoints = Checkpoints(directory / "checkpoints", experiment, config, execution.keep_checkpoints)
        self.figures = figures
        self.started = time.perf_counter()
        self.seconds_before = 0.0
        self._environment = Environment(directory / "environment.json")
        self._writers: list[Writer] = []
        self._layer_stats: JsonLines | None = None

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        directory: str | Path,
        experiment: str,
        config: Any,
        execution: Execution = Execution(),
        *,
        preset: str = "default",
        rules: Rules = (),
    ) -> Iterator["Run"]:
        """Begins the run, or goes on with the one that is there. `preset` is only recorded; `rules` are those of its layout.

        Raises `UserError` if the directory holds a run with another config (the difference is shown) or other people's files, if it cannot be written, or if another process is at work in it (`jaxdl.training.workdir`).
        """
        directory = local_path(directory)
        if ".." in directory.parts:
            directory = directory.resolve()
        if execution.export:
            local_path(execution.export)
        with contextlib.ExitStack() as stack:
            problem = None
            if is_first():
                try:
                    stack.enter_context(claimed(directory, experiment, preset, config, execution.overwrite))
                    figures = directory / "figures"
                except UserError as error:
                    problem = error
            else:
                figures = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (failed,) = any_process(problem is not None)
            if failed:
                raise problem or UserError("the first process cannot use the working directory; it says why")
            run = cls(directory, experiment, config, execution, figures, preset, rules)
            try:
                yield run
            finally:
                for writer in [*run._writers, *filter(None, [run._layer_stats])]:
                    writer.close()
                run.checkpoints.close()

    @property
    def shard(self) -> dict[str, int]:
        """Which rows of each batch this process loads, as `train_batches` takes it."""
        return {"process": jax.process_index(), "processes": jax.process_count()}

    def batches(
        self, source: Source, transform: Transform, collate: Collate = stack, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Endless batches for this process, from the config's seed, with as many rows as the config says unless it is said here (`jaxdl.data.train_batches`)."""
        self._environment.reads(source)
        rows = self.config.batch_size if batch_size is None else batch_size
        return train_batches(source, transform, batch_size=rows, seed=self.config.seed, collate=collate, **self.shard)

    def reads(self, *sources: Source) -> None:
        """Says what of the data is left out, and keeps in mind which data they are: a run that goes on with others says so."""
        self._environment.reads(*sources)
        for line in report_left_out(*sources):
            self.say(line)

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
        """Opens the log of a run that begins at `step`, and that of its layers where there is one or will be. A run that goes on says what it depends on besides its config and has changed since it began."""
        if not is_first():
            return
        discard(self.directory)
        if not step:
            self._environment.record()
        elif changes := self._environment.changes():
            self.say(changes)
        layers = self.directory / "layers.jsonl"
        if self.execution.inspect_every or layers.exists():
            self._layer_stats = JsonLines(layers, step)
        self._writers = [JsonLines(self.directory / "metrics.jsonl", step), TensorBoard(self.directory / "tensorboard", step)]
        if self.execution.wandb:
            name = f"{self.experiment}-{self.directory.name}"
            self._writers.append(WandB(self.directory, name, plain(self.config)))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)

    def log_layers(self, step: int, row: dict[str, Any]) -> None:
        """A row of `layers.jsonl`."""
        if self._layer_stats is not None:
            self._layer_stats.write(step, row)

    def report(self, step: int, report: Report, *, last: bool = False) -> dict[str, float]:
        """Logs the numbers of a report under `eval/`, and leaves its pictures in `figures/` as NAME_STEP, or at the end as NAME. Returns the numbers; of one for each seed there are the mean and, as NAME_spread, the standard deviation."""
        numbers: dict[str, float] = {}
        for name, value in report.items():
            if isinstance(value, Mean):
                numbers |= {name: float(value.total / value.count)} if value.count else {}
            elif is_number(value):
                numbers[name] = float(value)
            elif is_number(value, axes=1):
                numbers |= {each: float(number) for each, number in mean_and_spread(name, np.asarray(value, np.float64)).items()}
            elif value is not None and is_first():
                look_for_stop()
                label = file_name(name)
                file = figures.save(value, self.figures / (label if last else f"{label}_{step:06d}"))
                for writer in self._writers:
                    writer.draw(step, name, file)
        if numbers:
            self.log(step, {f"eval/{name}": value for name, value in numbers.items()})
        return numbers

    def finish(self, state: TrainState, report: Report) -> dict[str, Any]:
        """Logs and draws the final report, draws the learning curves and the statistics of layers, writes `result.json`, and says where things are."""
        step = int(state.step)
        metrics = self.report(step, report, last=True)
        result = {
            "experiment": self.experiment,
            "preset": self.preset,
            "steps": step,
            "metrics": metrics,
            "parameters_sha256": parameters_sha256(state.params),
            "seconds": round(self.seconds, 1),
            "versions": {name: importlib.metadata.version(name) for name in ("jaxdl", "jax", "flax", "optax", "numpy")},
            "device": f"{self.layout.mesh.size} × {jax.devices()[0].device_kind} ({platform.machine()})",
        }
        if is_first():
            drawn = {"learning_curves": figures.learning_curves(read_metrics(self.directory / "metrics.jsonl"))}
            if self._layer_stats is not None:
                drawn |= figures.layer_stats(read_metrics(self.directory / "layers.jsonl"))
            self.report(step, drawn, last=True)
            replace_text(self.directory / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            self._say_result(result)
        return result

    @property
    def result(self) -> dict[str, Any] | None:
        """What is in `result.json`, if the run has come to its end before and the file is whole."""
        return read_result(self.directory)

    def _say_result(self, result: dict[str, Any]) -> None:
        width = max(map(len, result["metrics"]), default=0)
        self.say(f"\nafter {result['steps']:,} steps and {result['seconds']:.0f} seconds:")
        for name, value in result["metrics"].items():
            self.say(f"  {name:<{width}}  {value:.4g}")
        pictures = ", ".join(sorted(path.name for path in self.figures.iterdir() if not re.search(r"_\d{6}\.\w+$", path.name)))
        self.say(f"everything is in {self.directory}; pictures in {self.figures}: {pictures}")


def read_result(directory: Path) -> dict[str, Any] | None:
    """What is in the `result.json` of a run, or None if there is none that is whole: the same command writes it again."""
    try:
        result = parse_json(directory / "result.json")
    except ValueError:
        return None
    return result if isinstance(result, dict) and result else None
