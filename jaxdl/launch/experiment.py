"""What an experiment is, and how it is run from Python."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxdl import signals
from jaxdl.launch.cpu import set_up_cpu
from jaxdl.training import Execution, Run
from jaxdl.training.parallel import Rules

Field = Literal[
    "first principles", "vision", "vision and language", "language", "sequences", "generation", "graphs", "agents", "kernels"
]
"""What `python -m experiments` groups by, in this order."""

Bounds = tuple[float | None, float | None]
"""The least and the most that a metric of the result may be, each None where there is no such bound."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `python -m experiments` lists, and what `launch` runs: `main(config, run)` trains, measures, and returns what is in the run's `result.json`. It is called by the name of its file."""

    main: Callable[[Any, Run], dict[str, Any]]
    presets: Mapping[str, Any]
    """Configs by name, `default` among them."""
    field: Field
    summary: str
    paper: str
    minutes: float
    """Of the whole default run on two cores."""
    expects: Mapping[str, Bounds]
    """What the default run reaches, by metric. The list, the README and the slow tests say it from here."""
    rules: Rules = ()
    """Of the layout: how carry, and under `fsdp` parameters, lie over devices."""
    set_up: Callable[[Any], None] = set_up_cpu
    """What the command line does with the config before jax computes anything: settings of the whole process, which `run` leaves to the program that calls it."""

    @property
    def name(self) -> str:
        module = self.main.__module__
        return (sys.modules[module].__spec__.name if module == "__main__" else module).rpartition(".")[2]

    @property
    def config_class(self) -> type:
        return type(self.presets["default"])

    @property
    def promise(self) -> str:
        """What is expected, in words: "test_accuracy ≥ 0.97"; nothing where nothing is."""

        def bound(name: str, least: float | None, most: float | None) -> str:
            if least is not None and most is not None:
                return f"{least:g} ≤ {name} ≤ {most:g}"
            return f"{name} ≥ {least:g}" if least is not None else f"{name} ≤ {most:g}"

        return ", ".join(bound(name, *bounds) for name, bounds in self.expects.items())

    @property
    def duration(self) -> str:
        """The minutes in words, rounded to halves: "about a minute"."""
        halves = max(math.floor(2 * self.minutes + 0.5), 1) / 2
        return {0.5: "half a minute", 1: "about a minute"}.get(halves, f"about {halves:g} minutes")

    @property
    def outcome(self) -> str:
        """What the default run promises and takes: "test_accuracy ≥ 0.97, about a minute on two cores"."""
        return ", ".join(filter(None, [self.promise, f"{self.duration} on two cores"]))

    def missed(self, metrics: Mapping[str, float]) -> list[str]:
        """What of a result is not as expected, a line for each."""
        found = []
        for name, (least, most) in self.expects.items():
            value = metrics.get(name, math.nan)
            if not (-math.inf if least is None else least) <= value <= (math.inf if most is None else most):
                found.append(f"{name} is {value:g}, expected from {least} to {most}")
        return found


def run(
    experiment: Experiment, config: Any, workdir: str | Path, execution: Execution = Execution(), *, preset: str = "default"
) -> dict[str, Any]:
    """Runs an experiment in `workdir`, or goes on with it, and returns what is then in its `result.json`. `preset` is only recorded. Raises what `Run.open` and the experiment raise."""
    how = dict(preset=preset, rules=experiment.rules)
    with Run.open(workdir, experiment.name, config, execution, **how) as opened:
        result = experiment.main(config, opened)
        signals.look()
    return result
