"""Which tiles the Hopper kernels should have on the GPU at hand: each that fits is held against the oracle, then timed."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.attention.benchmark.errors import LIMITS, Oracle
from pallas_kernels.attention.benchmark.implementations import Candidate, in_one_line, ours
from pallas_kernels.attention.benchmark.shapes import Shape, draw
from pallas_kernels.attention.benchmark.timing import Times, time_in_turns
from pallas_kernels.attention.mosaic_gpu.tiles import ARCH, FIELDS, TABLE, Tiles, candidates, kernel_width, shipped, tuned
from pallas_kernels.attention.problem import BlockSizes

Entry = dict[str, Any]
"""Of the table of `pallas_kernels.attention.mosaic_gpu.tiles`."""
Build = Callable[[Shape, tuple[jax.Array, ...], BlockSizes], Candidate]
__all__ = ["KEY", "TABLE", "Tuner", "places", "read", "table"]

KEY = "arch", "logits", "dtype", "width", "causal", "length"


def build_hopper(shape: Shape, arrays: tuple[jax.Array, ...], sizes: BlockSizes) -> Candidate:
    """The kernel with these tiles."""
    return ours("mosaic_gpu", shape, arrays, sizes)


def places(points: Iterable[Shape], dtype: str) -> dict[Shape, Entry]:
    """The keys of the entries that these shapes decide on: one each, but for windows, whose tiles are those of causal. Lengths below the shortest take its tiles."""
    points = [point for point in points if point.case != "window"]
    found = {}
    for point in points:
        shortest = min(other.length for other in points if (other.case, other.width) == (point.case, point.width))
        found[point] = {
            "arch": ARCH,
            "logits": "segments" if point.case == "packed" else "plain",
            "dtype": dtype,
            "width": kernel_width(point.width),
            "causal": point.case != "full",
            "length": 0 if point.length == shortest else point.length,
        }
    return found


class Tuner:
    """The measurement of tiles, of which it tells `say`."""

    def __init__(
        self,
        dtype: str,
        seed: int,
        say: Callable[[str], None],
        build: Build = build_hopper,
        time: Callable[..., dict[str, Times | Exception]] = time_in_turns,
        repeats: int = 7,
        shortest: float = 0.01,
    ):
        self.dtype, self.seed, self.say, self.build, self.time = dtype, seed, say, build, time
        self.repeats, self.shortest = repeats, shortest
        self.oracles: dict[tuple[str, int], Oracle] = {}
        self.verdicts: dict[tuple[str, int, BlockSizes], str | None] = {}

    def best(self, shape: Shape, logits: str) -> BlockSizes:
        """The fastest that is right. The kernels do not know of each other: the forward pass is timed with each of its tiles, then the backward pass with each of one kernel's, the other one's being the best so far."""
        width = kernel_width(shape.width)
        sizes = tuned(logits, self.dtype, width, shape.case != "full", shape.length)
        arrays = draw(shape, self.dtype, self.seed)
        for kernel, fields in FIELDS.items():
            passes, found = "forward" if kernel == "forward" else "backward", {}
            for tiles in candidates(kernel, logits, width):
                tried = dataclasses.replace(sizes, **dict(zip(fields, tiles)))
                seconds = self._seconds(shape, arrays, tried, passes)
                if isinstance(seconds, float):
                    found[tiles] = seconds
                self.say(f"{shape}: {kernel}, {tiles}: {seconds if isinstance(seconds, str) else f'{1e3 * seconds:.4g} ms'}")
            if found:
                tiles: Tiles = min(found, key=found.__getitem__)
                sizes = dataclasses.replace(sizes, **dict(zip(fields, tiles)))
        return sizes

    def _seconds(self, shape: Shape, arrays: tuple[jax.Array, ...], sizes: BlockSizes, passes: str) -> float | str:
        """For a call, or why not."""
        try:
            wrong = self._wrong(shape, sizes)
            if wrong:
                return wrong
            ready = self.build(shape, arrays, sizes).passes[passes]()
        except Exception as error:
            return in_one_line(error)
        times = self.time({"": ready}, self.repeats, 1.0, self.shortest)[""]
        return times.median if isinstance(times, Times) else in_one_line(times)

    def _wrong(self, shape: Shape, sizes: BlockSizes) -> str | None:
        """What is wrong with the values, which depend on no length: each tile is looked at once for a case and width."""
        place = shape.case, shape.width
        if place not in self.oracles:
            self.oracles[place] = Oracle(shape, self.dtype, self.seed)
        if (*place, sizes) not in self.verdicts:
            errors = self.oracles[place].errors(lambda shape, arrays: self.build(shape, arrays, sizes))
            far = {part: error for part, error in errors.items() if not error < LIMITS[self.dtype]}
            self.verdicts[*place, sizes] = f"wrong values: errors of {far}" if far else None
        return self.verdicts[*place, sizes]


def table(found: Iterable[Entry]) -> str:
    """The shipped table, as JSON, with what was found in it: entries of the same place are replaced, others added."""
    found = list(found)
    keys = [[entry[name] for name in KEY] for entry in found]
    kept = [entry for entry in shipped() if [entry[name] for name in KEY] not in keys]
    return "[\n" + ",\n".join(f" {json.dumps(entry)}" for entry in [*kept, *found]) + "\n]\n"


def read(path: Path, source: str) -> list[Entry]:
    """What was found on this device by an earlier command."""
    return [entry for entry in json.loads(path.read_text()) if entry["source"] == source] if path.exists() else []
