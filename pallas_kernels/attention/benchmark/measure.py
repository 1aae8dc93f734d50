"""Every implementation at one shape: a row for each of its passes, whatever happens."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.attention.benchmark.devices import device_answers, release_memory
from pallas_kernels.attention.benchmark.errors import Oracle
from pallas_kernels.attention.benchmark.goals import Row
from pallas_kernels.attention.benchmark.implementations import IMPLEMENTATIONS, Absent, Pass, in_one_line
from pallas_kernels.attention.benchmark.shapes import PASSES, WORK, Shape, draw
from pallas_kernels.attention.benchmark.timing import Times

Timer = Callable[[dict[str, Pass]], dict[str, Times | Exception]]
"""`timing.time_in_turns` with how often and how long."""


class BrokenDevice(Exception):
    """An implementation did what a GPU does not forgive: the process can compute nothing any more."""

    def __init__(self, shape: Shape, implementation: str, reason: str):
        super().__init__(f"the device computes no longer since {implementation} at {shape} ({reason})")
        self.rows = [row(shape, implementation, passes, error=reason, broke_the_device=True) for passes in PASSES]


def measure(
    shape: Shape, dtype: str, seed: int, time: Timer, *, skip: set[str], absent: dict[str, str], compare: bool
) -> list[Row]:
    """A row for each pass of each implementation but those to `skip`; fills `absent` with those that cannot be here. `compare` holds their values against the definition too. Raises `BrokenDevice`."""
    arrays, candidates, rows = draw(shape, dtype, seed), {}, []

    def fail(name: str, error: Exception, *passes: str) -> None:
        reason = in_one_line(error)
        rows.extend(row(shape, name, each, error=reason) for each in passes)
        if not device_answers():
            raise BrokenDevice(shape, name, reason)

    for name, build in IMPLEMENTATIONS.items():
        if name in skip or name in absent:
            continue
        try:
            candidates[name] = build(shape, arrays)
        except Absent as error:
            absent[name] = str(error)
        except Exception as error:  # Whatever a library finds no way to do is a result too.
            fail(name, error, *PASSES)

    errors = {}
    if compare:
        oracle = Oracle(shape, dtype, seed)
        for name in candidates:
            try:
                errors[name] = oracle.errors(IMPLEMENTATIONS[name])
            except Exception as error:
                fail(name, error)

    # On a CPU they take turns. A GPU is disturbed by nobody, and what one of them keeps for its backward pass may leave no room for another's.
    groups = [list(candidates)] if jax.default_backend() == "cpu" else [[name] for name in candidates]
    for passes, group in [(passes, group) for passes in PASSES for group in groups]:
        ready = {}
        for name in group:
            try:
                ready[name] = candidates[name].passes[passes]()
            except Exception as error:
                fail(name, error, passes)
        for name, times in time(ready).items():
            if isinstance(times, Exception):
                fail(name, times, passes)
                continue
            temporary = ready[name].temporary
            measured = row(
                shape, name, passes,
                milliseconds=1e3 * times.median,
                quartiles=[1e3 * x for x in times.quartiles],
                measurements=len(times.seconds),
                calls=times.calls,
                tflops=shape.operations * WORK[passes] / times.median / 1e12,
                temporary_mib=None if temporary is None else temporary / 2**20,
                largest_error=errors.get(name, {}),
            )  # fmt: skip
            rows.append(measured)
        ready.clear()
        release_memory()
    return rows


def row(shape: Shape, implementation: str, passes: str, **found: Any) -> Row:
    """What was found of a pass of an implementation, with its place."""
    place = {name: getattr(shape, name) for name in ("case", "length", "width", "batch", "heads")}
    return {**place, "implementation": implementation, "passes": passes, **found}


def place(row: Row) -> tuple[str, int, int]:
    """The `Shape.key` that a row is of."""
    return row["case"], row["length"], row["width"]
