"""How long it takes, and whether there is time for more."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention.benchmark.implementations import Pass

Clock = Callable[[], float]
MOST_CALLS = 1000


class Times(NamedTuple):
    """Measurements of one pass of one implementation, in seconds for a call."""

    seconds: list[float]
    calls: int
    """In each of the measurements."""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> list[float]:
        return [float(x) for x in np.quantile(self.seconds, (0.25, 0.75))]


def time_in_turns(
    passes: dict[str, Pass], repeats: int, seconds: float, shortest: float, clock: Clock = time.perf_counter
) -> dict[str, Times | Exception]:
    """Times of each, or what it failed with. They take turns, so that what else the machine does hits all of them, and each turn begins with a call that does not count: it pays for what the one before has left, memory that was given back to the system and caches full of other things.

    A measurement has as many calls as make it last for `shortest` seconds, so that what it takes to launch one is hidden behind the one before. After `seconds` no further measurement of a pass is begun, but two are made in any case.
    """
    times: dict[str, Times | Exception] = {}

    def clocked(name: str, calls: int) -> float:
        start = clock()
        passes[name].run(calls)
        return clock() - start

    for name in passes:
        try:
            once = clocked(name, 1)
            if once < 100 * shortest:
                # The first call is slower than those that follow, but not by that much.
                once = clocked(name, 1)
            times[name] = Times([], min(max(math.ceil(shortest / max(once, 1e-9)), 1), MOST_CALLS))
        except Exception as error:
            times[name] = error
    for repeat in range(repeats):
        for name, found in times.items():
            if isinstance(found, Exception) or (repeat >= 2 and sum(found.seconds) * found.calls > seconds):
                continue
            try:
                if len(times) > 1:
                    passes[name].run(1)
                found.seconds.append(clocked(name, found.calls) / found.calls)
            except Exception as error:
                times[name] = error
    return times


class Deadline:
    """Whether there is time for one more of what was begun before: `limit` seconds from now, or without end if it is 0."""

    def __init__(self, clock: Clock, limit: int):
        self.clock, self.limit = clock, limit
        self.started = self.begun = clock()
        self.longest = 0.0

    def allows_another(self) -> bool:
        """To be asked before each of them."""
        now = self.clock()
        self.longest, self.begun = max(self.longest, now - self.begun), now
        return not self.limit or self.seconds + self.longest <= self.limit

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self.clock() - self.started
