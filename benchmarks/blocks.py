"""Every block of `jaxdl.nn`, in `flax.linen` and in torch eager: forward, and forward with backward, side by side on this machine's CPU.

    python -m benchmarks.blocks [--only layer_norm lstm ...] [--rounds 18] [--threads 2] [--json FILE]

The arrays and functions are those of `benchmarks.counterparts`. Jax compiles ours and Flax's; torch runs as it is, under `no_grad` where there is no backward pass. Torch has a process of its own, where jax's threads do not disturb it, while ours and Flax share one and its arrays: where these lie in memory makes up to three times the time of a function that does little but read and write. Both have the same number of threads and `jaxdl.launch.keep_freed_memory`, from which torch profits too, and jax has `take_wide_vectors`, which torch takes by itself. The three take turns of some 30 ms, in another order in every round, so that all see the same noise. Each round gives a ratio of times, above 1 where ours is the faster one; the table has their median, range, and after a semicolon the ratio of the least times, which a busy machine disturbs less.

`=` marks rows that XLA compiles to the same instructions from Flax's function and from ours: what their ratio differs from 1 by is noise. `!` marks rows that want work: by the median and by the least times, ours is slower than Flax by more than 5 %, or slower than torch.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import PyTree

from benchmarks.counterparts import ROWS, Sides, forward_and_back, tensors, torch_cotangent, torch_forward_and_back
from jaxdl.errors import UserError, unknown
from jaxdl.launch import keep_freed_memory, take_wide_vectors

LIBRARIES = {"jaxdl": "jax", "flax": "jax", "torch": "torch"}
"""And the process that each is measured in."""
PASSES = ("forward", "forward and back")
TURN = 0.03
"""Seconds that a library computes before it is the next one's turn."""
SLACK = {"flax": 1.05, "torch": 1.0}
"""How many times longer than theirs ours may take without a mark."""


def timed(library: str, passes: str, sides: Sides) -> Callable[[], None]:
    """A function that does it once and waits for the result."""
    if library == "torch":
        inputs = tensors(sides)
        theirs = torch_cotangent(sides)

        def forward() -> None:
            with torch.no_grad():
                sides.torch(*inputs)

        return forward if passes == "forward" else lambda: torch_forward_and_back(sides.torch, theirs, inputs)
    compiled, arguments = prepared(library, passes, sides)
    return lambda: jax.block_until_ready(compiled(*arguments))


@functools.lru_cache(maxsize=1)
def given(sides: Sides) -> tuple[Sequence[jax.Array], PyTree]:
    """Arrays and cotangent on the device, the same ones for ours and for Flax."""
    return jax.device_put((sides.arrays, sides.cotangent))


def prepared(library: str, passes: str, sides: Sides) -> tuple[Callable[..., PyTree], Sequence[PyTree]]:
    """A function of ours or of Flax, to be compiled, and its arguments on the device."""
    function = sides.ours if library == "jaxdl" else sides.flax
    arrays, cotangent = given(sides)
    return (jax.jit(function), arrays) if passes == "forward" else (jax.jit(forward_and_back(function)), (cotangent, arrays))


def program(library: str, passes: str, sides: Sides) -> str:
    """The instructions that XLA compiles, without what tells where they come from, and with names in the order in which they occur."""
    compiled, arguments = prepared(library, passes, sides)
    text = re.sub(r", metadata=\{[^}]*\}", "", compiled.lower(*arguments).compile().as_text())
    text = text[text.index("\n%" if "\n%" in text else "\nENTRY") :]  # Before it stand tables of files and functions.
    names: dict[str, str] = {}
    return re.sub(r"%[\w.-]+|[\w.-]+(?=: \w+\[)", lambda match: names.setdefault(match[0].strip("%"), f"%{len(names)}"), text)


def serve(threads: int, turns: Connection) -> None:
    """The life of a process: for each library, row and passes that come, prepares and answers with the program, empty for torch; for each library and number, makes so many calls and answers with the seconds of one."""
    # XLA takes as many threads as it may use cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    jax.config.update("jax_platforms", "cpu")
    keep_freed_memory()
    take_wide_vectors()
    runs: dict[str, Callable[[], None]] = {}
    row = functools.lru_cache(maxsize=1)(lambda name: ROWS[name].sides())
    while order := turns.recv():
        library, task = order
        if isinstance(task, int):
            started = time.perf_counter()
            for _ in range(task):
                runs[library]()
            turns.send((time.perf_counter() - started) / task)
        else:
            name, passes = task
            sides = row(name)
            runs[library] = timed(library, passes, sides)
            for _ in range(3):
                runs[library]()
            turns.send("" if library == "torch" else program(library, passes, sides))


def measure(name: str, passes: str, servers: dict[str, Connection], rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Seconds of a call in each round, for each library that has the row, and whether Flax's program is ours."""

    def ask(library: str, task: tuple[str, str] | int) -> Any:
        server = servers[LIBRARIES[library]]
        server.send((library, task))
        return server.recv()

    libraries = [library for library in LIBRARIES if library != "flax" or ROWS[name].sides().flax is not None]
    programs = {library: ask(library, (name, passes)) for library in libraries}
    calls = {library: max(1, round(TURN / ask(library, 1))) for library in libraries}
    times: dict[str, list[float]] = {library: [] for library in libraries}
    # In all orders, so that each comes as often after torch, whose threads spin for a while.
    for order in itertools.islice(itertools.cycle(itertools.permutations(libraries)), rounds):
        for library in order:
            times[library].append(ask(library, calls[library]))
    return times, programs["jaxdl"] == programs.get("flax")


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, least and largest: of each library's milliseconds, and of the ratios theirs / ours; of these also the ratio of the least times."""

    def spread(values: np.ndarray) -> dict[str, float]:
        low, middle, high = (float(value) for value in np.quantile(values, [0, 0.5, 1]))
        return dict(median=middle, least=low, largest=high)

    milliseconds = {library: spread(np.asarray(measured) * 1e3) for library, measured in times.items()}
    ratios = {}
    for library in [name for name in times if name != "jaxdl"]:
        best = milliseconds[library]["least"] / milliseconds["jaxdl"]["least"]
        ratios[f"{library} / jaxdl"] = spread(np.asarray(times[library]) / np.asarray(times["jaxdl"])) | dict(best=best)
    return milliseconds | ratios


def slower(numbers: dict[str, dict[str, float]], same: bool) -> list[str]:
    """The libraries that ours is too slow beside."""
    ratios = {library: numbers.get(f"{library} / jaxdl") for library in SLACK if not (same and library == "flax")}
    return [library for library, ratio in ratios.items() if ratio and max(ratio["median"], ratio["best"]) * SLACK[library] < 1]


def line(name: str, passes: str, numbers: dict[str, dict[str, float]], same: bool) -> str:
    """A row of the table on stdout."""
    cells = [f"{name:28}", f"{passes:16}", f"{numbers['jaxdl']['median']:8.2f}"]
    for library in SLACK:
        ratio = numbers.get(f"{library} / jaxdl")
        mark = "=" if same and library == "flax" else "!" if library in slower(numbers, same) else " "
        cells.append(
            f"{ratio['median']:5.2f}{mark} ({ratio['least']:.2f} to {ratio['largest']:.2f}; {ratio['best']:.2f})"
            if ratio
            else "–"
        )
    return f"{cells[0]} {cells[1]} {cells[2]}  {cells[3]:30} {cells[4]}"


def parse() -> argparse.Namespace:
    """The command line. Raises `UserError` for a row that is not in the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help=f"rows to time: {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=18)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    for name in options.only:
        if name not in ROWS:
            raise unknown("row of the benchmark", name, ROWS)
    return options


def main() -> None:
    """Measures and prints."""
    try:
        options = parse()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    context = multiprocessing.get_context("spawn")
    servers: dict[str, Connection] = {}
    for name in dict.fromkeys(LIBRARIES.values()):
        servers[name], theirs = context.Pipe()
        context.Process(target=serve, args=(options.threads, theirs), daemon=True).start()
        theirs.close()

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "torch"))
    print(f"{versions}; {options.threads} threads of {os.cpu_count()} cores; {options.rounds} rounds", flush=True)
    print(f"{'':28} {'':16} {'ours, ms':>8}  {'flax / ours':30} torch / ours", flush=True)
    rows = []
    for name in options.only or ROWS:
        if not ROWS[name].sides().given:
            continue
        for passes in PASSES:
            times, same = measure(name, passes, servers, options.rounds)
            numbers = summary(times)
            print(line(name, passes, numbers, same), flush=True)
            rows.append(dict(row=name, passes=passes, **numbers, same_program_as_flax=same, slower=slower(numbers, same)))
        if options.json:
            about = dict(versions=versions, threads=options.threads, cores=os.cpu_count(), rounds=options.rounds)
            options.json.write_text(json.dumps(dict(about=about, rows=rows), indent=1) + "\n", encoding="utf-8")
    for server in servers.values():
        server.send(None)


if __name__ == "__main__":
    main()
