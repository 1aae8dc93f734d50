"""Attention measured: how exact, how fast and how large every implementation is that runs on the machine at hand.

FlashAttention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691) computes exact attention in tiles, in memory linear in the length. Here `pallas_kernels` is measured beside jax.nn's implementations, jax's own Pallas kernels, torch's SDPA with each backend pinned, and tokamax, as far as they are installed and serve. The parts are in `pallas_kernels.attention.benchmark`; this is how they go together.

Nothing is lost: whatever fails is a row that says why, `result.json` is written after every shape, and the same command goes on from there.
"""

import dataclasses
import functools
import importlib.metadata
import json
import platform
import time
from typing import Annotated, Any, ClassVar, Literal

import jax
from annotated_types import Ge, Lt, MinLen
from tqdm import tqdm

from jaxdl import figures, launch
from jaxdl.errors import RunError, UserError
from jaxdl.files import replace_text
from jaxdl.training import NOT_IDENTITY, Run
from jaxdl.training.cost import peak_flops
from pallas_kernels.attention.benchmark import report
from pallas_kernels.attention.benchmark.devices import (
    device,
    leave_memory_to_others,
    matmul_speed,
    on_hopper,
    target_description,
)  # fmt: skip
from pallas_kernels.attention.benchmark.goals import GOALS, compared, judge
from pallas_kernels.attention.benchmark.measure import BrokenDevice, measure, place
from pallas_kernels.attention.benchmark.shapes import Case, Shape, cut
from pallas_kernels.attention.benchmark.timing import Clock, Deadline, time_in_turns

Length = Annotated[int, Ge(16)]
PACKAGES = "jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "numpy", "torch", "tokamax"


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    data: ClassVar[str] = "numbers from a normal distribution"
    cases: Annotated[tuple[Case, ...], MinLen(1)] = ("full", "causal", "window", "packed")
    """What is visible: everything, keys up to the query, a causal window, or causal documents packed into one sequence."""
    lengths: Annotated[tuple[Length, ...], MinLen(1)] = (1024, 2048, 4096)
    """Tokens of a sequence, queries and keys alike."""
    window_lengths: tuple[Length, ...] = ()
    """Those of the case `window`, at which `causal` is measured too, to compare. Empty: those of --lengths."""
    packed_lengths: tuple[Length, ...] = ()
    """Those of the case `packed`. Empty: those of --lengths."""
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
    limit: Annotated[int, Ge(0)] = dataclasses.field(default=0, metadata=NOT_IDENTITY)
    """Seconds after which the command shall have ended: it begins no shape that might take longer, and the same command goes on with it. 0: none."""
    tune: bool = dataclasses.field(default=False, metadata=NOT_IDENTITY)
    """Measure on a Hopper GPU which tiles its kernel should have, instead, and leave the table in DIR/tiles.json."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
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


PRESETS = {
    "default": Config(),
    # For Hopper, by the protocol of FlashAttention-3 (Shah et al. 2024, section 4.1): 16k tokens, 2048 features. Packed documents and windows come first, since they are few.
    "h200": Config(
        cases=("packed", "window", "causal", "full"), lengths=(2048, 4096, 8192, 16384), window_lengths=(32768,),
        packed_lengths=(16384,), widths=(64, 128, 256), tokens=16384, features=2048, dtype="bfloat16", window=1024, repeats=15,
        seconds=1, limit=540,
    ),
    "long": Config(cases=("causal", "window"), lengths=(8192, 16384, 32768), tokens=32768, window=1024, repeats=3),
}  # fmt: skip


def set_up(config: Config) -> None:
    """Leaves memory of a GPU to torch, and a CPU's settings as they are unless the config says otherwise."""
    leave_memory_to_others()
    if config.process == "jaxdl":
        launch.set_up_cpu()


def main(config: Config, run: Run, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Measures, draws, and returns what is in `result.json`. Raises `RunError` if the device computes no longer; the same command then goes on without what broke it."""
    if config.tune and not on_hopper():
        raise UserError(f"--tune measures the tiles of the kernel for Hopper, and this is {device()}: run it on an H100 or H200")
    if description := target_description(jax.devices()[:1]):
        replace_text(run.directory / "target.txtpb", description)
    return (tune if config.tune else measure_shapes)(config, run, Deadline(clock, config.limit))


def measure_shapes(config: Config, run: Run, deadline: Deadline) -> dict[str, Any]:
    """Every shape that an earlier command has not measured."""
    points, result = shapes(config), _begin(config, run)
    rows, absent, before = result["rows"], result["not_measured"], result["seconds"]
    timer = functools.partial(
        time_in_turns, repeats=config.repeats, seconds=config.seconds, shortest=config.milliseconds / 1e3, clock=deadline.clock
    )

    def measured() -> set[tuple[str, int, int]]:
        return {place(row) for row in rows if not row.get("broke_the_device")}

    def save() -> None:
        backend = jax.default_backend()
        rows[:] = compared(rows, backend, result["matmul_tflops"], result["peak_tflops"])
        result["goals"] = [judge(goal, rows, absent, points) for goal in GOALS.get(backend, ())]
        result["complete"] = measured() >= {point.key for point in points}
        result["seconds"] = round(before + deadline.seconds, 1)
        replace_text(run.directory / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    run.say(f"{device()}: a product of large {config.dtype} matrices reaches {result['matmul_tflops']:.3g} TFLOP/s")
    done = measured()
    for point in tqdm([point for point in points if point.key not in done], desc="shapes", disable=None):
        if not deadline.allows_another():
            break
        broken = {row["implementation"] for row in rows if place(row) == point.key}
        first = point.length == min(lengths(config, point.case))
        try:
            rows += measure(point, config.dtype, config.seed, timer, skip=broken, absent=absent, compare=first)
        except BrokenDevice as error:
            rows += error.rows
            raise RunError(f"{error}: the same command goes on without it there") from None
        finally:
            save()
    save()
    table = report.markdown(result)
    replace_text(run.directory / "table.md", table)
    run.say(table)
    for picture, panels in report.curves(rows).items():
        ylabel = "milliseconds" if picture.startswith("time") else "temporary MiB"
        run.report(0, {picture: figures.scaling(panels, columns=len(config.cases), xlabel="length", ylabel=ylabel)}, last=True)
    if not result["complete"]:
        run.say("time is up, and not every shape is measured: the same command goes on")
    run.say(f"the result is in {run.directory / 'result.json'}, pictures in {run.figures}")
    return result


def _begin(config: Config, run: Run) -> dict[str, Any]:
    """What an earlier command has left, or a result without rows."""
    if result := run.result:
        if result["device"] != device():
            raise UserError(
                f"{run.directory} is of {result['device']}, and this is {device()}: give another --workdir, or --overwrite"
            )
        return result
    if (run.directory / "result.json").exists():
        raise UserError(f"{run.directory / 'result.json'} is damaged: restore it from a copy, or remove it to measure anew")
    peak = peak_flops(jax.devices()[0].device_kind) if config.dtype != "float32" else None
    return {
        **json.loads((run.directory / "config.json").read_text(encoding="utf-8")),
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


def tune(config: Config, run: Run, deadline: Deadline) -> dict[str, Any]:
    """The best tiles at every shape, as the table of `pallas_kernels.attention.mosaic_gpu.tiles`; returns the entries that were measured here."""
    from pallas_kernels.attention.benchmark import tuning  # Here, since jax's part for Hopper takes long to import.

    path, source = run.directory / tuning.TABLE.name, f"{device()}, jax {jax.__version__}"
    found, tuner = tuning.read(path, source), tuning.Tuner(config.dtype, config.seed, run.say)
    wanted = tuning.places(shapes(config), config.dtype)
    have = [[entry[name] for name in tuning.KEY] for entry in found]
    left = {shape: entry for shape, entry in wanted.items() if [entry[name] for name in tuning.KEY] not in have}
    for shape, entry in tqdm(left.items(), desc="shapes", disable=None):
        if not deadline.allows_another():
            run.say("time is up, and not every shape is tuned: the same command goes on")
            break
        sizes = {name: size for name, size in vars(tuner.best(shape, entry["logits"])).items() if size is not None}
        found.append({**entry, "block_sizes": sizes, "source": source})
        replace_text(path, tuning.table(found))
    run.say(f"the table is in {path}; it counts once it is in the place of {tuning.TABLE}")
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


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="kernels",
    summary="Measures exact attention: error, time and memory of every implementation that runs here.",
    paper="Dao 2023, FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning, arXiv:2307.08691",
    minutes=12,
    expects={},
    set_up=set_up,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
