"""What the contracts in tests/families have to know of a family. Each says it in a file of its own there, named as its experiment is."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jaxtyping import PyTree

from jaxdl import launch
from jaxdl.training import Layout, Objective, Update

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""From a random generator and the number of rows to one array of a batch."""


def integers(below: int, *shape: int) -> Draw:
    return lambda rng, rows: rng.integers(0, below, (rows, *shape)).astype(np.int32)


def normal(*shape: int) -> Draw:
    return lambda rng, rows: rng.standard_normal((rows, *shape), np.float32)


def one_hot(classes: int) -> Draw:
    return lambda rng, rows: np.eye(classes, dtype=np.float32)[rng.integers(0, classes, rows)]


def repeated(*row: Any) -> Draw:
    """The same row again and again."""
    return lambda rng, rows: np.tile(np.array(row, bool if isinstance(row[0], bool) else np.int32), (rows, 1))


def descend(objective: Objective, **fields: Any) -> Update:
    """An update by plain gradients with momentum: what differs in gradients differs in parameters, in proportion."""
    return Update(objective, optax.sgd(0.5, momentum=0.9), **fields)


@dataclasses.dataclass(frozen=True)
class Learner:
    """A small module with batches, and the updates that its experiment makes of it."""

    module: nn.Module
    batch: Mapping[str, Draw]
    inputs: Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]]
    """Of a batch, what the module is called with."""
    updates: Callable[[nn.Module, Layout], Sequence[Update]]
    init: Callable[[nn.Module, jax.Array, tuple], PyTree] = lambda module, key, inputs: module.init(key, *inputs)
    """Variables of a module from a key and inputs of one row."""
    compares: bool = False
    """Whether examples of a batch see each other (contrast, batch statistics), so that parts of a batch have another objective than the batch."""

    def batches(self, count: int, rows: int = 16) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        return [{name: draw(rng, rows) for name, draw in self.batch.items()} for _ in range(count)]

    def has(self, field: str) -> bool:
        """Whether the module, or one within it, has a field of this name."""
        return _has(self.module, field)


@dataclasses.dataclass(frozen=True)
class Reference:
    """How transformers computes the same as the learner's module, from the files that this library writes."""

    auto_class: str
    """The class of transformers that reads them."""
    call: Callable[..., Any]
    """`(model, *inputs)` to the tensor that is compared, of the inputs of the learner's module as torch tensors."""
    ours: Callable[[Any], Any] = lambda out: out.logits
    """The same of what the module gives."""


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One experiment, and what is in its smallest run."""

    experiment: launch.Experiment
    tiny: Mapping[str, Any]
    """Values of a config, few steps of which take no time."""
    metrics: Collection[str]
    """Of the result of such a run."""
    figures: Collection[str]
    """The names of its figures, beside learning curves, which every training leaves."""
    learner: Learner | None = None
    reference: Reference | None = None
    refused: Sequence[tuple[Mapping[str, Any], str]] = ()
    """Values that do not go together, and what is said about them: a part of the one line."""
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values with which every preset can be built here and soon, beside `data`, and no `init`."""
    data: Callable[[Path], str] | None = None
    """Writes a few data of the kind into a folder, and returns their name. None: those of the default preset are few."""

    @property
    def trains(self) -> bool:
        """Whether its config is that of a training."""
        return issubclass(self.experiment.config_class, launch.Config)

    @property
    def name(self) -> str:
        return self.experiment.name

    def some_data(self, folder: Path) -> str:
        """The name of a few data of its kind."""
        return self.data(folder) if self.data else self.experiment.presets["default"].data

    def config(self, **values: Any) -> Any:
        """The config of the smallest run, with other values."""
        return dataclasses.replace(self.experiment.presets["default"], **{**self.tiny, **values})

    def flags(self, **values: Any) -> list[str]:
        """The same on a command line."""
        return [word for name, value in {**self.tiny, **values}.items() for word in _flag(name.replace("_", "-"), value)]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]


def modules_within(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that are fields of a module."""
    fields = {field.name: getattr(module, field.name, None) for field in dataclasses.fields(module) if field.name != "parent"}
    return {name: value for name, value in fields.items() if isinstance(value, nn.Module)}


def _has(module: nn.Module, field: str) -> bool:
    return hasattr(module, field) or any(_has(part, field) for part in modules_within(module).values())


def changed(module: nn.Module, **values: Any) -> nn.Module:
    """A module with other values of those fields that it has, and so for the modules within it."""
    own = {name: value for name, value in values.items() if name in {field.name for field in dataclasses.fields(module)}}
    return module.clone(**own, **{name: changed(part, **values) for name, part in modules_within(module).items()})
