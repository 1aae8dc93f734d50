"""Attention measured: how exact, how fast and how large every implementation is that runs on the machine at hand.

FlashAttention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691) computes exact attention in tiles, in memory linear in the length. Here `pallas_kernels` is measured beside jax.nn's implementations, jax's own Pallas kernels, torch's SDPA with each backend pinned, and tokamax, as far as they are installed and serve.
"""

import dataclasses
import functools
import importlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, MinLen
from tqdm import tqdm

import pallas_kernels
from jaxdl import figures, launch
from jaxdl.errors import UserError
from jaxdl.training import Execution, Run
from pallas_kernels.attention import reference
from pallas_kernels.attention.problem import Operands, Spec

Case = Literal["full", "causal", "window", "packed"]
PASSES = "forward", "forward+backward"
BACKWARD_SHARE = 3.5
"""Five products of matrices in the backward pass for two in the forward pass (Dao 2023, section 4.1)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    preset: str = "default"
    """Named settings, which the other flags change."""
    cases: Annotated[tuple[Case, ...], MinLen(1)] = ("full", "causal", "window", "packed")
    """What is visible: everything, keys up to the query, a causal window, or causal documents packed into one sequence."""
    lengths: Annotated[tuple[Annotated[int, Ge(16)], ...], MinLen(1)] = (1024, 2048, 4096)
    """Tokens of a sequence, queries and keys alike."""
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
    repeats: Annotated[int, Ge(1)] = 7
    """Measurements of each, of which the median counts."""
    seconds: Annotated[int, Ge(1)] = 3
    """After which no further measurement of one implementation is begun, but two are made in any case."""
    seed: Annotated[int, Ge(0)] = 0
    """Of the numbers that are attended to."""

    def __post_init__(self) -> None:
        launch.check(self)
        for width in self.widths:
            if self.features % width:
                raise UserError(f"--features {self.features} are no whole number of heads of --widths {width}: choose a multiple")

    @property
    def data(self) -> str:
        return "numbers from a normal distribution"


PRESETS = {
    "default": Config(),
    # The protocol of FlashAttention-3 (Shah et al. 2024, section 4.1): 16k tokens, 2048 features.
    "gpu": Config(
        preset="gpu", lengths=(2048, 4096, 8192, 16384), widths=(64, 128, 256), tokens=16384, features=2048, dtype="bfloat16",
        window=1024, repeats=30,
    ),
    "long": Config(preset="long", cases=("causal", "window"), lengths=(8192, 16384, 32768), tokens=32768, window=1024, repeats=3),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """One point of the measurement."""

    case: Case
    length: int
    width: int
    batch: int
    heads: int
    window: int
    ends: tuple[int, ...]
    """Where the packed documents end."""

    @property
    def segments(self) -> np.ndarray:
        return np.searchsorted(self.ends, np.arange(self.length), side="right").astype(np.int32)

    @property
    def arguments(self) -> dict[str, Any]:
        """What `pallas_kernels.dot_product_attention` takes beside query, key and value."""
        match self.case:
            case "full":
                return {}
            case "causal":
                return {"is_causal": True}
            case "window":
                return {"is_causal": True, "local_window_size": (self.window - 1, 0)}
            case "packed":
                ids = jnp.asarray(np.broadcast_to(self.segments, (self.batch, self.length)))
                return {"is_causal": True, "q_segment_ids": ids, "kv_segment_ids": ids}

    @property
    def visible(self) -> np.ndarray:
        """Bool `length length`."""
        rows, columns = np.arange(self.length)[:, None], np.arange(self.length)
        visible = np.ones((self.length, self.length), bool) if self.case == "full" else columns <= rows
        if self.case == "window":
            visible &= rows - columns < self.window
        if self.case == "packed":
            visible &= self.segments[:, None] == self.segments
        return visible

    @property
    def operations(self) -> float:
        """Of the forward pass: a multiplication and an addition in each of two products, for each pair that is visible."""
        return 4.0 * self.batch * self.heads * self.width * float(self.visible.sum())


Timed = Callable[[], None]


@dataclasses.dataclass
class Candidate:
    """An implementation at a shape, ready to be timed."""

    run: dict[str, Timed]
    """For each of `PASSES`."""
    temporary: dict[str, int | None]
    """Bytes that a pass needs beside its arguments and results, where the compiler says it."""
    results: Callable[[], list[np.ndarray]]
    """Output and gradients."""


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Measures in `workdir`, draws, and returns what is in its `result.json`."""
    with Run.open(workdir, "flash_attention", config, execution) as run:
        rows, absent = [], {}
        peak = matmul_speed(config.dtype)
        run.say(f"{device()}: a product of large {config.dtype} matrices reaches {peak / 1e12:.3g} TFLOP/s")
        points = shapes(config)
        for shape in tqdm(points, desc="shapes", disable=None):
            arrays = draw(config, shape)
            candidates = {}
            for name, build in IMPLEMENTATIONS.items():
                try:
                    candidates[name] = build(shape, arrays)
                except Exception as error:  # Whatever a library finds no way to do is a result too.
                    absent.setdefault(
                        name, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
                    )
            errors = measure_errors(config, shape) if shape is points[0] or shape.length == min(config.lengths) else {}
            for name, times in time_all(candidates, config).items():
                for passes, seconds in times.items():
                    rate = shape.operations * (1 if passes == "forward" else BACKWARD_SHARE) / float(np.median(seconds))
                    rows.append(
                        {
                            "case": shape.case, "length": shape.length, "width": shape.width, "batch": shape.batch,
                            "heads": shape.heads, "implementation": name, "passes": passes,
                            "milliseconds": 1e3 * float(np.median(seconds)),
                            "quartiles": [1e3 * float(x) for x in np.quantile(seconds, (0.25, 0.75))],
                            "measurements": len(seconds), "tflops": rate / 1e12, "share_of_matmul": rate / peak,
                            "temporary_mib": None if (b := candidates[name].temporary[passes]) is None else b / 2**20,
                            "largest_error": errors.get(name, {}),
                        }
                    )  # fmt: skip
        result = {
            "experiment": "flash_attention",
            "preset": config.preset,
            "device": device(),
            "matmul_tflops": peak / 1e12,
            "versions": {"jax": jax.__version__, "torch": _version("torch")},
            "not_measured": absent,
            "rows": rows,
            "seconds": round(run.seconds, 1),
        }
        (run.directory / "result.json").write_text(json.dumps(result, indent=1))
        table = markdown(result)
        (run.directory / "table.md").write_text(table)
        run.say(table)
        draw_figures(rows, run.figures)
        run.say(f"the result is in {run.directory / 'result.json'}, pictures in {run.figures}")
        return result


def shapes(config: Config) -> list[Shape]:
    """Every case at every width and length."""
    points = []
    for case in config.cases:
        for width in config.widths:
            for length in config.lengths:
                cuts = np.random.default_rng(config.seed).choice(
                    np.arange(1, length), min(config.documents, length) - 1, replace=False
                )
                ends = tuple(int(cut) for cut in np.sort(cuts))
                batch = max(config.tokens // length, 1)
                points.append(Shape(case, length, width, batch, config.features // width, config.window, ends))
    return points


def draw(config: Config, shape: Shape) -> tuple[jax.Array, ...]:
    """Query, key, value and the cotangent of the output: `B T N H` each, from a normal distribution."""
    random = np.random.default_rng(config.seed)
    size = shape.batch, shape.length, shape.heads, shape.width
    return tuple(jnp.asarray(random.standard_normal(size, np.float32), config.dtype) for _ in range(4))


# The implementations.


def of_jax(attend: Callable[..., jax.Array], arrays: tuple[jax.Array, ...]) -> Candidate:
    """From `attend(query, key, value)` on `B T N H`."""
    operands = arrays[:3]

    def both(*args: jax.Array) -> Any:
        out, pull = jax.vjp(attend, *args[:3])
        return out, *pull(args[3])

    compiled = {
        "forward": jax.jit(attend).lower(*operands).compile(),
        "forward+backward": jax.jit(both).lower(*arrays).compile(),
    }
    given = {"forward": operands, "forward+backward": arrays}
    run = {
        passes: functools.partial(lambda f, x: jax.block_until_ready(f(*x)), compiled[passes], given[passes]) for passes in PASSES
    }
    temporary = {passes: compiled[passes].memory_analysis().temp_size_in_bytes for passes in PASSES}
    return Candidate(run, temporary, lambda: [np.asarray(x).astype(np.float64) for x in compiled["forward+backward"](*arrays)])


def ours(implementation: str, shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """One of `pallas_kernels`' own implementations."""
    platform = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}.get(implementation, jax.default_backend())
    if platform != jax.default_backend():
        raise NotImplementedError(f"needs a {platform.upper()}")
    attend = functools.partial(pallas_kernels.dot_product_attention, **shape.arguments, implementation=implementation)
    return of_jax(attend, arrays)


def jax_nn(implementation: str, shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """`jax.nn.dot_product_attention` by XLA or by cuDNN; packed documents by a mask, since it has no segments."""
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise NotImplementedError("needs a GPU")
    arguments = {name: x for name, x in shape.arguments.items() if not name.endswith("segment_ids")}
    if shape.case == "packed":
        arguments = {"mask": jnp.asarray(shape.visible)[None, None]}
    return of_jax(functools.partial(jax.nn.dot_product_attention, **arguments, implementation=implementation), arrays)


def jax_pallas(shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """The flash attention that jax itself carries for the platform."""
    if shape.case == "window":
        raise NotImplementedError("has no window")
    causal, scale, segments = shape.case != "full", 1 / math.sqrt(shape.width), shape.arguments.get("q_segment_ids")
    match jax.default_backend():
        case "gpu":
            module = importlib.import_module("jax.experimental.pallas.ops.gpu.attention")
            return of_jax(lambda q, k, v: module.mha(q, k, v, segments, sm_scale=scale, causal=causal), arrays)
        case "tpu":
            module = importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention")
            ids = None if segments is None else module.SegmentIds(segments, segments)

            def attend(*args: jax.Array) -> jax.Array:
                heads_first = (x.swapaxes(1, 2) for x in args)
                return module.flash_attention(*heads_first, segment_ids=ids, causal=causal, sm_scale=scale).swapaxes(1, 2)

            return of_jax(attend, arrays)
    raise NotImplementedError("needs a GPU or a TPU")


def tokamax(shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """tokamax's choice for the platform, where the package is installed."""
    module = importlib.import_module("tokamax")
    arguments = {name: x for name, x in shape.arguments.items() if not name.endswith("segment_ids")}
    if shape.case == "packed":
        arguments = {"mask": jnp.asarray(shape.visible)[None, None]}
    return of_jax(functools.partial(module.dot_product_attention, **arguments), arrays)


def torch_sdpa(backend: str, shape: Shape, arrays: tuple[jax.Array, ...]) -> Candidate:
    """`torch.nn.functional.scaled_dot_product_attention`, pinned to one backend, where torch is installed."""
    torch = importlib.import_module("torch")
    kernels = importlib.import_module("torch.nn.attention")
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise NotImplementedError("torch sees no GPU")
    where = "cuda" if on_gpu else "cpu"
    tensors = [
        torch.tensor(np.asarray(x.astype(jnp.float32))).to(where, getattr(torch, str(x.dtype))).transpose(1, 2).contiguous()
        for x in arrays
    ]
    arguments = {"is_causal": shape.case == "causal"}
    if shape.case in ("window", "packed"):
        arguments["attn_mask"] = torch.tensor(shape.visible).to(where)

    def attend(*args: Any) -> Any:
        with kernels.sdpa_kernel(getattr(kernels.SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(*args, **arguments)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad():
            attend(*tensors[:3])
        wait()

    def both() -> Any:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, tensors[3])

    def timed() -> None:
        both()
        wait()

    both()
    return Candidate(
        {"forward": forward, "forward+backward": timed},
        dict.fromkeys(PASSES),
        lambda: [x.detach().transpose(1, 2).double().cpu().numpy() for x in both()],
    )


IMPLEMENTATIONS: dict[str, Callable[[Shape, tuple[jax.Array, ...]], Candidate]] = {
    "xla_chunked": functools.partial(ours, "xla_chunked"),
    "mosaic_gpu": functools.partial(ours, "mosaic_gpu"),
    "mosaic_tpu": functools.partial(ours, "mosaic_tpu"),
    "jax.nn xla": functools.partial(jax_nn, "xla"),
    "jax.nn cudnn": functools.partial(jax_nn, "cudnn"),
    "jax's Pallas": jax_pallas,
    "tokamax": tokamax,
    "torch flash": functools.partial(torch_sdpa, "FLASH_ATTENTION"),
    "torch cudnn": functools.partial(torch_sdpa, "CUDNN_ATTENTION"),
    "torch efficient": functools.partial(torch_sdpa, "EFFICIENT_ATTENTION"),
}


# The measurements.


def time_all(candidates: dict[str, Candidate], config: Config) -> dict[str, dict[str, list[float]]]:
    """Seconds of each pass of each candidate. They take turns, so that what else the machine does hits all of them."""
    times: dict[str, dict[str, list[float]]] = {name: {passes: [] for passes in PASSES} for name in candidates}
    for candidate in candidates.values():
        for run in candidate.run.values():
            run()
    for repeat in range(config.repeats):
        for name, candidate in candidates.items():
            for passes, run in candidate.run.items():
                if repeat >= 2 and sum(times[name][passes]) > config.seconds:
                    continue
                start = time.perf_counter()
                run()
                times[name][passes].append(time.perf_counter() - start)
    return times


def measure_errors(config: Config, shape: Shape) -> dict[str, dict[str, float]]:
    """Largest errors of output and gradients against the definition in float64, at the same case with 256 tokens, as a share of the largest value."""
    small = dataclasses.replace(
        shapes(dataclasses.replace(config, cases=(shape.case,), lengths=(256,), widths=(shape.width,), tokens=256))[0], heads=2
    )
    arrays = draw(config, small)
    mask = jnp.asarray(small.visible)[None, None]
    spec, operands = Spec(scale=1 / math.sqrt(shape.width)), Operands(*arrays[:3], mask=mask)
    out, _ = reference.forward(spec, operands)
    wanted = [out, *reference.backward(spec, operands, np.asarray(arrays[3]), None)[:3]]
    errors = {}
    for name, build in IMPLEMENTATIONS.items():
        try:
            results = build(small, arrays).results()
        except Exception:
            continue
        names = "output", "d_query", "d_key", "d_value"
        errors[name] = {
            part: float(np.abs(got - want).max() / np.abs(want).max()) for part, got, want in zip(names, results, wanted)
        }
    return errors


def matmul_speed(dtype: str) -> float:
    """Floating-point operations per second of a product of square matrices: what this device gives to anybody."""
    size = 4096 if jax.default_backend() != "cpu" else 2048
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    multiply(a).block_until_ready()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def device() -> str:
    """The kind and number of devices."""
    return f"{jax.devices()[0].device_kind} × {jax.device_count()}"


def _version(name: str) -> str | None:
    try:
        return importlib.import_module(name).__version__
    except ImportError:
        return None


# What is left in the run's folder.


def markdown(result: dict[str, Any]) -> str:
    """A table with a line for each implementation at each shape, and what was not measured."""
    lines = [
        f"{result['device']}; a product of matrices reaches {result['matmul_tflops']:.3g} TFLOP/s.",
        "",
        "| case | length | width | passes | implementation | ms (quartiles) | TFLOP/s | of a matmul | temporary MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["quartiles"]
        memory = "–" if row["temporary_mib"] is None else f"{row['temporary_mib']:.1f}"
        lines.append(
            f"| {row['case']} | {row['length']} | {row['width']} | {row['passes']} | {row['implementation']} | "
            f"{row['milliseconds']:.1f} ({low:.1f}–{high:.1f}) | {row['tflops']:.3f} | {row['share_of_matmul']:.0%} | {memory} |"
        )
    lines += ["", *(f"Not measured: {name}: {reason}" for name, reason in result["not_measured"].items())]
    return "\n".join(lines) + "\n"


def draw_figures(rows: list[dict[str, Any]], directory: Path) -> None:
    """Time and temporary memory over the length, a panel for each case."""
    import matplotlib.ticker  # Here, as in `figures.subplots`.

    widths, cases = sorted({row["width"] for row in rows}), list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    colors = dict(zip(names, (f"C{index}" for index in range(len(names)))))
    for width in widths:
        for quantity, label in (("milliseconds", "milliseconds"), ("temporary_mib", "temporary MiB")):
            figure, axes = figures.subplots(len(PASSES), len(cases), 2.9, 2.6)
            for axis, (passes, case) in zip(axes, [(passes, case) for passes in PASSES for case in cases]):
                for name in names:
                    points = [
                        row
                        for row in rows
                        if (row["width"], row["passes"], row["case"], row["implementation"]) == (width, passes, case, name)
                        and row[quantity] is not None
                    ]
                    if points:
                        lengths, values = [row["length"] for row in points], [row[quantity] for row in points]
                        axis.plot(lengths, values, marker=".", color=colors[name], label=name)
                        if quantity == "milliseconds":
                            low, high = zip(*[row["quartiles"] for row in points])
                            axis.fill_between(lengths, low, high, color=colors[name], alpha=0.2, linewidth=0)
                axis.set(xscale="log", yscale="log", xlabel="length", ylabel=label)
                ticks = sorted({row["length"] for row in rows})
                axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
                axis.minorticks_off()
                # A decade has three ticks, since what is drawn may lie within one.
                axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.tick_params(axis="y", labelsize=7)
                axis.set_title(f"{case}, {passes}", fontsize=9)
                axis.grid(alpha=0.3)
            axes[0].legend(fontsize=7)
            figures.save(figure, directory / f"{'time' if quantity == 'milliseconds' else 'memory'}_{width}.png")


@dataclasses.dataclass(frozen=True)
class Measurement(launch.Experiment):
    """An experiment that trains nothing, so that its config has none of the fields of training."""

    presets: Mapping[str, Config]

    @property
    def config_class(self) -> type[Config]:
        return Config


EXPERIMENT = Measurement(
    name="flash_attention",
    summary="Measures exact attention: error, time and memory of every implementation that runs here.",
    paper="Dao 2023, FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning, arXiv:2307.08691",
    result="causal float32 at 4,096 tokens several times as fast as jax.nn in a few hundredths of its memory",
    minutes=5,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
