"""Attention measured: how exact, how fast and how large every implementation is that runs on the machine at hand.

FlashAttention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691) computes exact attention in tiles, in memory linear in the length. Here `pallas_kernels` is measured beside jax.nn's implementations, jax's own Pallas kernels, torch's SDPA with each backend pinned, and tokamax, as far as they are installed and serve. The parts are in `_attention`; this is how they go together.

Nothing is lost: whatever fails is a row that says why, `result.json` is written after every shape, and the same command goes on from there.
"""

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from annotated_types import Ge, MinLen
from tqdm import tqdm

from experiments._attention import tuning
from experiments._attention.devices import (
    device,
    device_answers,
    leave_memory_to_others,
    matmul_speed,
    on_hopper,
    release_memory,
    target_description,
)  # fmt: skip
from experiments._attention.errors import Oracle
from experiments._attention.goals import GOALS, compared, judge
from experiments._attention.implementations import IMPLEMENTATIONS, Absent, in_one_line
from experiments._attention.report import draw_figures, markdown
from experiments._attention.shapes import PASSES, WORK, Case, Shape, cut, draw
from experiments._attention.timing import Clock, time_in_turns
from jaxdl import launch
from jaxdl.errors import RunError, UserError
from jaxdl.training import ASIDE, Execution, Run
from jaxdl.training.cost import peak_flops
from jaxdl.training.logging import replace_text

Length = Annotated[int, Ge(16)]
PACKAGES = "jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "numpy", "torch", "tokamax"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    preset: str = "default"
    """Named settings, which the other flags change."""
    cases: Annotated[tuple[Case, ...], MinLen(1)] = ("full", "causal", "window", "packed")
    """What is visible: everything, keys up to the query, a causal window, or causal documents packed into one sequence."""
    lengths: Annotated[tuple[Length, ...], MinLen(1)] = (1024, 2048, 4096)
    """Tokens of a sequence, queries and keys alike."""
    window_lengths: tuple[Length, ...] = ()
    """Those of the case `window`, at which `causal` is measured too, to compare. None: those of --lengths."""
    packed_lengths: tuple[Length, ...] = ()
    """Those of the case `packed`. None: those of --lengths."""
    widths: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] = (64,)
    """Widths of a head."""
    tokens: Annotated[int, Ge(1)] = 4096
    """Tokens of a batch: as many sequences as fit, and at least one."""
    features: Annotated[int, Ge(1)] = 512
    """Heads times their width."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of queries, keys and values."""
    window: Annotated[int, Ge(1)] = 256
    """Keys that a query sees in the case `window`, itself included."""
    documents: Annotated[int, Ge(1)] = 8
    """Sequences that are packed into one in the case `packed`, of different lengths."""
    process: Literal["plain", "jaxdl"] = "plain"
    """What they find on a CPU: memory and vectors as every program does that sets nothing, or as this library's experiments set them (`jaxdl.launch.keep_freed_memory`, `take_wide_vectors`)."""
    repeats: Annotated[int, Ge(1)] = 7
    """Measurements of each, of which the median counts."""
    milliseconds: Annotated[int, Ge(0)] = 10
    """A measurement has as many calls, one after another, as it takes to last so long: one short call would measure its launch."""
    seconds: Annotated[int, Ge(1)] = 3
    """After which no further measurement of one implementation is begun, but two are made in any case."""
    limit: Annotated[int, Ge(0)] = dataclasses.field(default=0, metadata=ASIDE)
    """Seconds after which the command shall have ended: it begins no shape that might take longer, and the same command goes on with it. 0: none."""
    tune: bool = dataclasses.field(default=False, metadata=ASIDE)
    """Measure on a Hopper GPU which tiles its kernel should have, instead, and leave the table in DIR/mosaic_gpu_tiles.json."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the numbers that are attended to."""

    def __post_init__(self) -> None:
        launch.check(self)
        for width in self.widths:
            if self.features % width:
                raise UserError(f"--features {self.features} are no whole number of heads of --widths {width}: choose a multiple")
        if self.tune and self.dtype == "float32":
            raise UserError(
                "--tune is for the kernel in bfloat16 and float16, not float32: give --preset h200, or --dtype bfloat16"
            )

    @property
    def data(self) -> str:
        return "numbers from a normal distribution"


PRESETS = {
    "default": Config(),
    # For Hopper, by the protocol of FlashAttention-3 (Shah et al. 2024, section 4.1): 16k tokens, 2048 features. Packed documents and windows come first, since they are few.
    "h200": Config(
        preset="h200", cases=("packed", "window", "causal", "full"), lengths=(2048, 4096, 8192, 16384), window_lengths=(32768,),
        packed_lengths=(16384,), widths=(64, 128, 256), tokens=16384, features=2048, dtype="bfloat16", window=1024, repeats=15,
        seconds=1, limit=540,
    ),
    "long": Config(preset="long", cases=("causal", "window"), lengths=(8192, 16384, 32768), tokens=32768, window=1024, repeats=3),
}  # fmt: skip


def main(
    config: Config, workdir: str | Path, execution: Execution = Execution(), clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Measures in `workdir`, draws, and returns what is in its `result.json`. Raises `RunError` if the device computes no longer; the same command then goes on without what broke it."""
    started = clock()
    leave_memory_to_others()
    if config.tune and not on_hopper():
        raise UserError(f"--tune measures the tiles of the kernel for Hopper, and this is {device()}: run it on an H100 or H200")
    with Run.open(workdir, "flash_attention", config, execution) as run:
        description = target_description(jax.devices()[:1])
        if description:
            replace_text(run.directory / "target.txtpb", description)
        deadline = _Deadline(clock, started, config.limit)
        return tune(config, run, deadline) if config.tune else measure(config, run, deadline)


class _Deadline:
    """Whether there is time for one more of what was begun before."""

    def __init__(self, clock: Clock, started: float, limit: int):
        self.clock, self.started, self.limit = clock, started, limit
        self.begun, self.longest = started, 0.0

    def allows_another(self) -> bool:
        """To be asked before each of them."""
        now = self.clock()
        self.longest, self.begun = max(self.longest, now - self.begun), now
        return not self.limit or now - self.started + self.longest <= self.limit

    @property
    def seconds(self) -> float:
        return self.clock() - self.started


def measure(config: Config, run: Run, deadline: _Deadline) -> dict[str, Any]:
    """Every shape that an earlier command has not measured."""
    path, points = run.directory / "result.json", shapes(config)
    result = _begin(config, path)
    rows, absent, before = result["rows"], result["not_measured"], result["seconds"]

    def save() -> None:
        platform_ = jax.default_backend()
        done = {_key(row) for row in rows if not row.get("broke_the_device")}
        result["rows"][:] = compared(rows, platform_, result["matmul_tflops"], result["peak_tflops"])
        result["goals"] = [judge(goal, rows, absent, points) for goal in GOALS.get(platform_, ())]
        result["complete"] = done >= {point.key for point in points}
        result["seconds"] = round(before + deadline.seconds, 1)
        replace_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    run.say(f"{device()}: a product of large {config.dtype} matrices reaches {result['matmul_tflops']:.3g} TFLOP/s")
    done = {_key(row) for row in rows if not row.get("broke_the_device")}
    left = [point for point in points if point.key not in done]
    for point in tqdm(left, desc="shapes", disable=None):
        if not deadline.allows_another():
            break
        broken = {row["implementation"] for row in rows if _key(row) == point.key}
        try:
            rows += measure_shape(config, point, broken, absent, deadline.clock)
        except BrokenDevice as error:
            rows += [_row(point, error.implementation, passes, error=str(error), broke_the_device=True) for passes in PASSES]
            raise RunError(
                f"the device computes no longer since {error.implementation} at {point} ({error}): "
                "the same command goes on without it there"
            ) from None
        finally:
            save()
    save()
    table = markdown(result)
    replace_text(run.directory / "table.md", table)
    run.say(table)
    draw_figures(rows, run.figures)
    if not result["complete"]:
        run.say("time is up, and not every shape is measured: the same command goes on")
    run.say(f"the result is in {path}, pictures in {run.figures}")
    return result


def _begin(config: Config, path: Path) -> dict[str, Any]:
    """What an earlier command has left, or a result without rows."""
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["device"] != device():
            raise UserError(f"{path} is of {result['device']}, and this is {device()}: give another --workdir, or --overwrite")
        return result
    peak = peak_flops(jax.devices()[0].device_kind) if config.dtype != "float32" else None
    return {
        "experiment": "flash_attention",
        "preset": config.preset,
        "config": json.loads((path.parent / "config.json").read_text(encoding="utf-8"))["config"],
        "device": device(),
        "platform": jax.default_backend(),
        "machine": platform.machine(),
        "peak_tflops": peak and peak / 1e12,
        "matmul_tflops": matmul_speed(config.dtype) / 1e12,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "complete": False,
        "seconds": 0.0,
        "goals": [],
        "not_measured": {},
        "rows": [],
    }


class BrokenDevice(Exception):
    """An implementation did what a GPU does not forgive: the process can compute nothing any more."""

    def __init__(self, implementation: str, reason: str):
        super().__init__(reason)
        self.implementation = implementation


def measure_shape(config: Config, shape: Shape, skip: set[str], absent: dict[str, str], clock: Clock) -> list[dict[str, Any]]:
    """A row for each pass of each implementation but those to `skip`; fills `absent` with those that cannot be here. Raises `BrokenDevice`."""
    arrays, candidates, rows = draw(shape, config.dtype, config.seed), {}, []

    def fail(name: str, error: Exception, *passes: str) -> None:
        reason = in_one_line(error)
        rows.extend(_row(shape, name, each, error=reason) for each in passes)
        if not device_answers():
            raise BrokenDevice(name, reason)

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
    if shape.length == min(lengths(config, shape.case)):
        oracle = Oracle(shape, config.dtype, config.seed)
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
        measured = time_in_turns(ready, config.repeats, config.seconds, config.milliseconds / 1e3, clock)
        for name, times in measured.items():
            if isinstance(times, Exception):
                fail(name, times, passes)
                continue
            temporary = ready[name].temporary
            row = _row(
                shape, name, passes,
                milliseconds=1e3 * times.median,
                quartiles=[1e3 * x for x in times.quartiles],
                measurements=len(times.seconds),
                calls=times.calls,
                tflops=shape.operations * WORK[passes] / times.median / 1e12,
                temporary_mib=None if temporary is None else temporary / 2**20,
                largest_error=errors.get(name, {}),
            )  # fmt: skip
            rows.append(row)
        ready.clear()
        release_memory()
    return rows


def _row(shape: Shape, implementation: str, passes: str, **found: Any) -> dict[str, Any]:
    """What was found of a pass of an implementation, with its place."""
    place = {name: getattr(shape, name) for name in ("case", "length", "width", "batch", "heads")}
    return {**place, "implementation": implementation, "passes": passes, **found}


def tune(config: Config, run: Run, deadline: _Deadline) -> dict[str, Any]:
    """The best tiles at every shape, as the table of `pallas_kernels.attention.mosaic_gpu_tiles`; returns the entries that were measured here."""
    path, source = run.directory / "mosaic_gpu_tiles.json", f"{device()}, jax {jax.__version__}"
    found, tuner = tuning.read(path, source), tuning.Tuner(config.dtype, config.seed, run.say)
    wanted = tuning.places(shapes(config), config.dtype)
    have = [[entry[name] for name in tuning.KEY] for entry in found]
    left = {shape: place for shape, place in wanted.items() if [place[name] for name in tuning.KEY] not in have}
    for shape, place in tqdm(left.items(), desc="shapes", disable=None):
        if not deadline.allows_another():
            run.say("time is up, and not every shape is tuned: the same command goes on")
            break
        sizes = {name: size for name, size in vars(tuner.best(shape, place["logits"])).items() if size is not None}
        found.append({**place, "block_sizes": sizes, "source": source})
        tuning.write(path, found)
    run.say(f"the table is in {path}; it counts once it is in the place of pallas_kernels/attention/{path.name}")
    return {"entries": found, "complete": len(found) == len(wanted)}


def lengths(config: Config, case: Case) -> tuple[int, ...]:
    """At which a case is measured."""
    return {"window": config.window_lengths, "packed": config.packed_lengths}.get(case) or config.lengths


def shapes(config: Config) -> list[Shape]:
    """Every case at every width and length, and causal where windows are compared with it."""
    wanted: dict[tuple[Case, int, int], None] = {}
    for case in config.cases:
        for width in config.widths:
            for length in lengths(config, case):
                wanted[case, width, length] = None
                if case == "window" and "causal" in config.cases:
                    wanted["causal", width, length] = None
    return [
        Shape(
            case=case,
            length=length,
            width=width,
            batch=max(config.tokens // length, 1),
            heads=config.features // width,
            window=config.window,
            ends=cut(length, config.documents, config.seed),
        )
        for case, width, length in wanted
    ]


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["case"], row["length"], row["width"]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclasses.dataclass(frozen=True)
class Measurement(launch.Experiment):
    """An experiment that trains nothing, so that its config has none of the fields of training."""

    presets: Mapping[str, Config]

    @property
    def config_class(self) -> type[Config]:
        return Config

    def set_up(self, config: Config) -> None:
        if config.process == "jaxdl":
            super().set_up(config)


EXPERIMENT = Measurement(
    name="flash_attention",
    summary="Measures exact attention: error, time and memory of every implementation that runs here.",
    paper="Dao 2023, FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning, arXiv:2307.08691",
    result="causal float32 at 4,096 tokens several times as fast as jax.nn in less than a sixtieth of its memory",
    minutes=12,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
