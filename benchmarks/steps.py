"""Training steps of whole models, here and in torch eager, side by side on this machine's CPU.

    python -m benchmarks.steps [--rounds 15] [--seconds 0.3] [--threads 2] MODEL [its sizes]

Both sides make the same step, in float32, on the same batch. Each has a process of its own, where the other's threads do not disturb it, with the same number of threads and with `jaxdl.launch.keep_freed_memory`, from which torch profits too; ours has `take_wide_vectors`, which torch does by itself. They take turns, so that both see the same noise. Each round gives a ratio of times, above 1 where ours is the faster one.
"""

import dataclasses
import importlib.metadata
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

import numpy as np
import tyro

from benchmarks.step_cnn import Cnn
from benchmarks.step_gpt import Gpt
from benchmarks.step_mlp import Mlp
from benchmarks.step_rnn import Rnn
from benchmarks.step_siglip import Siglip
from benchmarks.step_translation import Translation
from benchmarks.step_vit import Vit

LIBRARIES = ("jaxdl", "torch")


class Model(Protocol):
    """A model's sizes. Each method prepares a side and returns a function that makes one step and waits for it."""

    def jaxdl(self) -> Callable[[], None]: ...

    def torch(self) -> Callable[[], None]: ...


MODELS: dict[str, Model] = {
    "cnn": Cnn(),
    "gpt": Gpt(),
    "mlp": Mlp(),
    "rnn": Rnn(),
    "siglip": Siglip(),
    "translation": Translation(),
    "vit": Vit(),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Training steps of whole models, here and in torch eager."""

    model: tyro.extras.subcommand_type_from_defaults(MODELS, prefix_names=False)
    rounds: int = 15
    """Turns that each side has."""
    seconds: float = 0.3
    """How long a turn is."""
    threads: int = os.cpu_count() or 1
    """Threads of each side."""


def serve(library: str, model: Model, threads: int, turns: Connection) -> None:
    """The life of a process: for each number that comes, make so many steps and answer with the seconds that one took."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA takes as many threads as it may use cores.
    if library == "torch":
        import torch

        torch.set_num_threads(threads)
    from jaxdl.launch import keep_freed_memory, take_wide_vectors

    keep_freed_memory()
    take_wide_vectors()
    run = getattr(model, library)()
    while steps := turns.recv():
        started = time.perf_counter()
        for _ in range(steps):
            run()
        turns.send((time.perf_counter() - started) / steps)


def measure(model: Model, rounds: int, seconds: float, threads: int) -> dict[str, list[float]]:
    """Seconds of a step in each round, for each library."""
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    for library in LIBRARIES:
        sides[library], theirs = context.Pipe()
        context.Process(target=serve, args=(library, model, threads, theirs), daemon=True).start()
        theirs.close()

    def turn(library: str, steps: int) -> float:
        sides[library].send(steps)
        return sides[library].recv()

    for library in LIBRARIES:
        turn(library, 2)
    counts = {library: max(1, round(seconds / turn(library, 2))) for library in LIBRARIES}
    times: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for number in range(rounds):
        for library in LIBRARIES if number % 2 else reversed(LIBRARIES):
            times[library].append(turn(library, counts[library]))
    for side in sides.values():
        side.send(0)
    return times


def main() -> None:
    """Measures and prints."""
    options = tyro.cli(Options, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    times = measure(options.model, options.rounds, options.seconds, options.threads)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch"))
    print(f"{options.model}\n{versions}; {options.threads} threads of {os.cpu_count()} cores; {options.rounds} rounds")
    for library, measured in times.items():
        low, middle, high = np.quantile(measured, [0, 0.5, 1]) * 1e3
        print(f"{library}: {middle:.2f} ms a step (from {low:.2f} to {high:.2f})")
    ratios = np.array(times["torch"]) / np.array(times["jaxdl"])
    least = min(times["torch"]) / min(times["jaxdl"])
    print(
        f"torch / jaxdl: {np.median(ratios):.2f} (from {ratios.min():.2f} to {ratios.max():.2f}; of the least times {least:.2f})"
    )


if __name__ == "__main__":
    main()
