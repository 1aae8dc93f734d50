"""What an experiment reaches on several seeds: the numbers of docs/results.md.

    python -m benchmarks.seeds vit --workdir runs/vit [--first 10] [--last 14] [--examples 360] [-- FLAG ...]

Each seed is a run in `WORKDIR/seed_N`, one after another; those that have ended are not run again. Flags after `--` are the experiment's own.
"""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from annotated_types import Ge


@dataclasses.dataclass(frozen=True)
class Options:
    """What an experiment reaches on several seeds: mean, range and standard deviation of every metric."""

    experiment: tyro.conf.Positional[str]
    """The name of its file."""
    workdir: Path
    """Where the runs go."""
    first: int = 10
    """The first seed. Settings were chosen on seeds below 10."""
    last: int = 14
    """The last seed."""
    examples: Annotated[int, Ge(0)] = 0
    """How many held-out examples a metric between 0 and 1 is a share of: prints the standard error that so small a set has, whatever the seed. 0: none."""
    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """The experiment's own, after --."""


def summary(results: list[dict[str, float]], examples: int = 0) -> list[str]:
    """A line for each metric that all results have: mean, range, standard deviation over seeds and, for shares of so many examples, the binomial standard error of one run."""
    lines = []
    for name in results[0]:
        values = np.array([metrics.get(name, math.nan) for metrics in results])
        if np.isnan(values).any():
            continue
        spread = f", deviation {values.std(ddof=1):.2g}" if len(values) > 1 else ""
        line = f"{name}: {values.mean():.4g} ({values.min():.4g} to {values.max():.4g}{spread})"
        if examples and 0 <= values.min() and values.max() <= 1:
            share = float(values.mean())
            line += f"; ± {math.sqrt(share * (1 - share) / examples):.2g} of {examples} examples"
        lines.append(line)
    return lines


def main(options: Options) -> None:
    results = []
    for seed in range(options.first, options.last + 1):
        directory = options.workdir / f"seed_{seed}"
        command = [sys.executable, "-m", f"experiments.{options.experiment}", "--workdir", str(directory), "--seed", str(seed)]
        subprocess.run([*command, *options.flags], check=True)
        results.append(json.loads((directory / "result.json").read_text("utf-8"))["metrics"])
    print(f"\n{options.experiment}, seeds {options.first} to {options.last}:")
    print("\n".join(summary(results, options.examples)))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
