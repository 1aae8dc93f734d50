"""Recurrent networks: RNN, LSTM and GRU read names letter by letter (Elman 1990; Hochreiter and Schmidhuber 1997; Cho et al. 2014).

One network, a cell scanned over one-hot symbols and a linear map of its states, is put to four tasks, which are four ways to use it:

| `--task` | reads | answers |
|---|---|---|
| `classify` | a name | its language, from the last state (n:1) |
| `generate` | a language, then what it wrote itself | a name (1:n; trained as n:n on the next character) |
| `tag` | a name without its spaces | for each character whether a word begins there (n:n) |
| `copy` | symbols, a long pause | the symbols again (n:n): the gradient must cross the pause, which truncated backpropagation cannot |

The names are countries, languages and currencies in 18 languages (`builtin:names`), or lists of your own (`folder:PATH`).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Lt
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import figures, launch
from jaxdl.data import NAMES
from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.nn import Recurrent, SequenceModel
from jaxdl.tasks.names import Classify, Generate, Tag
from jaxdl.tasks.sequences import Copy, Network, SequenceTask, read
from jaxdl.training import Aux, Batch, Report, Run, TrainState, configured, setup_training, train
from jaxdl.training.logging import read_metrics
from jaxdl.training.run import read_result

PACE = {"rnn_tanh": 0.25, "gru": 1.0, "lstm": 1.0}
"""What to multiply the learning rate by when cells are compared: at the one that suits gates, a vanilla network gets 0.39 of the default names right, at a quarter of it 0.68."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Ask):
    """What this experiment computes."""

    task: Literal["classify", "generate", "tag", "copy"] = "classify"
    """A name's language; names of a language; where words begin; symbols repeated after a pause."""
    cell: Literal[*PACE] = "lstm"
    """Vanilla, which wants a quarter of the learning rate, gated recurrent unit or long short-term memory."""
    hidden: Annotated[int, Ge(1)] = 128
    """Width of the state."""
    num_layers: Annotated[int, Ge(1)] = 1
    """Recurrent layers, each reading the one below."""
    bidirectional: bool = False
    """Read backwards too."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of activations that are dropped between two layers."""
    blank: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of characters that are read as unknown in training, so that unknown ones do no harm later."""
    truncate: Annotated[int, Ge(0)] = 0
    """Cut the gradient every so many characters (truncated backpropagation through time). 0: it goes all the way."""
    length: Annotated[int, Ge(2)] = 24
    """Characters of a name that are read; longer ones are cut."""
    temperature: Annotated[float, Gt(0)] = 0.8
    """Of generating: below 1 likely characters become likelier still."""
    lag: Annotated[int, Ge(1)] = 30
    """Of copying: blanks between the last symbol and the sign to repeat them."""
    copied: Annotated[int, Ge(1)] = 5
    """Of copying: how many symbols."""
    compare: bool = True
    """Afterwards train what the task is best compared with, each in a run of its own inside this one: the other cells, one direction only, a truncated gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ask and self.task != "classify":
            raise UserError(f"--ask is for --task classify, and not for {self.task}")
        if not all(name.strip() for name in self.ask):
            raise UserError("--ask wants names: an empty one has no language")
        if self.bidirectional and self.task == "generate":
            raise UserError("--bidirectional cannot generate: it would have to read the future")


_NAMES = Config(
    data="builtin:names", steps=1800, batch_size=64, learning_rate=0.02, weight_decay=0.01, warmup=0.05, evaluate_every=300
)

PRESETS = {
    "default": _NAMES,
    # Give it --data folder:PATH with the classic lists.
    "surnames": dataclasses.replace(_NAMES, data="folder:names", length=16),
    "generate": dataclasses.replace(_NAMES, task="generate", hidden=256, weight_decay=0.1, blank=0.0),
    "tag": dataclasses.replace(_NAMES, task="tag", bidirectional=True),
    "copy": dataclasses.replace(_NAMES, task="copy", learning_rate=0.01),
}


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, compares, and returns what is in `result.json`."""
    with run.first_process_first():
        task = open_task(config, run.directory)
    run.say(task.description)
    batches = run.batches(task.source, task.example)
    module = build(config, task)
    symbols = jnp.asarray(task.rows[:1])
    update = configured(
        config,
        functools.partial(objective, module, task.num_symbols),
        functools.partial(optax.adamw, weight_decay=config.weight_decay),
    )
    init = lambda key: module.init(key, jax.nn.one_hot(symbols, task.num_symbols))
    step, state = setup_training(config, run.layout, update, init=init)
    network = Network(module, task.num_symbols, run.layout)

    def evaluate(variables: PyTree, key: Key[Array, ""]) -> Report:
        return task.measure(network, variables)

    def show(variables: PyTree, key: Key[Array, ""]) -> Report:
        return task.show(network, variables)

    def conclude(variables: PyTree, key: Key[Array, ""]) -> Report:
        simple = task.simple_baselines()
        return simple | (compare(task, run, evaluate(variables, key), simple) if config.compare else {})

    def answer(variables: PyTree) -> None:
        for line in task.answers(network, variables, config.ask):
            run.say(line)

    asked = answer if config.ask else None
    return train(run, step, state, batches, evaluate=evaluate, show=show, conclude=conclude, answer=asked)


def open_task(config: Config, directory: Path) -> SequenceTask:
    """The task with its data. An alphabet is kept in the directory."""
    if config.task == "copy":
        return Copy(config.copied, config.lag)
    sources = NAMES.open(config.data, config.eval_data, data_dir=config.data_dir)
    fields = dict(directory=directory, length=config.length, blank=config.blank)
    match config.task:
        case "classify":
            return Classify(*sources, **fields)
        case "generate":
            return Generate(*sources, **fields, temperature=config.temperature, seed=config.seed)
        case "tag":
            return Tag(*sources, **fields)


def build(config: Config, task: SequenceTask) -> SequenceModel:
    """The network for a task."""
    core = Recurrent(
        config.hidden,
        config.cell,
        num_layers=config.num_layers,
        bidirectional=config.bidirectional,
        dropout=config.dropout,
        truncate=config.truncate or None,
        dtype=config.dtype,
    )
    return SequenceModel(core, features=task.num_answers, mode=task.mode)


def objective(
    module: SequenceModel, width: int, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """Negative log-likelihood of the targets that count: the mean over each sequence, then over sequences, so that it is a mean over examples however they are spread."""
    logits = read(module, width, params, batch["symbols"], train=True, rngs={"dropout": key})
    counts, right = batch["counts"], logits.argmax(-1) == batch["targets"]
    one = lambda logits, targets, counts: cross_entropy(logits, targets, mask=counts)
    share = jax.vmap(lambda right, counts: (right & counts).sum() / counts.sum())(right, counts)
    return jax.vmap(one)(logits, batch["targets"], counts).mean(), Aux({"accuracy": share.mean()})


def baselines(config: Config) -> tuple[str, dict[str, Config]]:
    """What the run is called beside others, and those to compare it with, by names for the metrics."""
    match config.task:
        case "classify":
            rate = config.learning_rate / PACE[config.cell]
            other = lambda cell: dataclasses.replace(config, cell=cell, learning_rate=rate * PACE[cell])
            return config.cell, {cell: other(cell) for cell in PACE if cell != config.cell}
        case "tag" if config.bidirectional:
            return "both directions", {"forwards_only": dataclasses.replace(config, bidirectional=False)}
        case "copy" if not config.truncate and config.lag > 1:
            return "full gradient", {"truncated": dataclasses.replace(config, truncate=config.lag // 2)}
    return "this run", {}


def compare(task: SequenceTask, run: Run, measured: dict[str, float], simple: dict[str, float]) -> Report:
    """What is `measured` of the task's baselines, each trained in a run of its own below this one, and a figure of how all came to it."""
    name, others = baselines(run.config)
    report: Report = {}
    curves = {name: logged(run.directory, task.score) | {run.config.steps: measured[task.score]}}
    for other, config in others.items():
        directory = run.directory / "beside" / other
        result = read_result(directory)
        if result is None or not measured.keys() <= result.get("metrics", {}).keys():
            run.say(f"\nbeside it, {other.replace('_', ' ')}, in {directory}:")
            alone = dataclasses.replace(config, compare=False, ask=())
            result = launch.run(EXPERIMENT, alone, directory, run.execution, preset=run.preset)
        report |= {f"{other}_{metric}": result["metrics"][metric] for metric in measured}
        curves[other.replace("_", " ")] = logged(directory, task.score)
    if others:
        lines = {name: (np.array(list(curve)), np.array(list(curve.values()))) for name, curve in curves.items()}
        levels = {label: simple[metric] for metric, label in task.levels.items()}
        title = f"{task.score.replace('_', ' ')} in the course of training"
        report["beside"] = figures.curves({title: lines}, levels=levels, limits=(0, 1.02))
    return report


def logged(directory: Path, metric: str) -> dict[int, float]:
    """A metric on held-out data by the step, as a run has logged it so far."""
    name = f"eval/{metric}"
    return {row["step"]: row[name] for row in read_metrics(directory / "metrics.jsonl") if name in row}


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="sequences",
    summary="RNN, LSTM and GRU read names letter by letter: they tell languages apart, write names, part words, and copy.",
    paper="Hochreiter and Schmidhuber 1997, Long Short-Term Memory, Neural Computation 9(8), https://doi.org/10.1162/neco.1997.9.8.1735; Cho et al. 2014, arXiv:1406.1078",
    minutes=1,
    expects={"test_accuracy": (0.79, None)},
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
