"""The benchmark: what it counts, what it leaves behind, what it does with failures, interrupts and limits, and how it ends on bad input."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import flash_attention
from experiments.flash_attention import PRESETS, Config
from jaxdl import launch
from jaxdl.errors import RunError, UserError
from jaxdl.training import Execution, Run
from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention.benchmark import devices, goals, implementations, measure, report, timing, tuning
from pallas_kernels.attention.benchmark.goals import Goal
from pallas_kernels.attention.benchmark.implementations import Absent, Candidate, Pass
from pallas_kernels.attention.benchmark.shapes import PASSES, Shape, cut, draw
from pallas_kernels.attention.benchmark.timing import Times, time_in_turns
from pallas_kernels.attention.mosaic_gpu.tiles import Tiles
from pallas_kernels.attention.problem import BlockSizes

TINY = Config(lengths=(64, 96), widths=(16,), tokens=64, features=32, window=8, documents=3, repeats=2, milliseconds=0)


def run(
    config: Config,
    directory: Path,
    clock: timing.Clock = time.perf_counter,
    execution: Execution = Execution(),
    preset: str = "default",
) -> dict[str, Any]:
    """What `launch.run` does, by a clock of one's choice."""
    with Run.open(directory, flash_attention.EXPERIMENT.name, config, execution, preset=preset) as opened:
        return flash_attention.main(config, opened, clock)


# What is counted.


def shape(case: str = "causal", length: int = 64, width: int = 16, window: int = 8, ends: tuple[int, ...] = ()) -> Shape:
    return Shape(case, length, width, batch=1, heads=2, window=window, ends=ends)


@given(st.sampled_from(["full", "causal", "window", "packed"]), st.integers(1, 60), st.integers(1, 80), st.integers(1, 9))
def test_pairs_in_closed_form_are_those_of_the_dense_mask(case: str, length: int, window: int, documents: int) -> None:
    point = shape(case, length, window=window, ends=cut(length, documents, seed=length))
    assert point.pairs == point.visible.sum()
    assert point.operations == 2 * 2 * point.pairs * 2 * 16  # Two products; two operations each; two heads of 16.


def test_documents_of_different_lengths_fill_the_sequence() -> None:
    point = shape("packed", 64, ends=cut(64, 3, seed=0))
    lengths = np.bincount(point.segments)
    assert len(lengths) == 3 and lengths.sum() == 64 and len(set(lengths)) == 3
    assert point.pairs == sum(n * (n + 1) // 2 for n in lengths)


def test_the_preset_for_hopper_is_the_protocol_of_the_goals() -> None:
    points = flash_attention.shapes(PRESETS["h200"])
    assert PRESETS["h200"].dtype == "bfloat16"
    assert {point.width for point in points} == {64, 128, 256} and {point.heads * point.width for point in points} == {2048}
    assert {point.batch * point.length for point in points} == {2**14, 2**15}
    lengths = {case: {point.length for point in points if point.case == case} for case in ("full", "causal", "window", "packed")}
    to_16k = {2048, 4096, 8192, 16384}
    assert lengths == {"full": to_16k, "causal": to_16k | {32768}, "window": {32768}, "packed": {16384}}
    assert len(points) == len({point.key for point in points})
    # Each goal speaks of shapes that are measured.
    for goal in goals.GOALS["gpu"]:
        assert goals.judge(goal, [], {}, points)["why"] != "this run has no such shape"


@pytest.mark.parametrize(("process", "settings"), [("plain", []), ("jaxdl", ["keep_freed_memory", "take_wide_vectors"])])
def test_a_plain_process_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, process: str, settings: list[str]) -> None:
    called: list[str] = []
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    for name in ("keep_freed_memory", "take_wide_vectors"):
        monkeypatch.setattr(launch.cpu, name, functools.partial(called.append, name))
    flash_attention.EXPERIMENT.set_up(Config(process=process))
    assert called == settings and os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


@pytest.mark.parametrize("case", ["full", "causal", "window", "packed"])
def test_all_implementations_compute_the_same(case: str) -> None:
    point = next(point for point in flash_attention.shapes(TINY) if point.case == case)
    arrays = draw(point, "float32", 0)
    results = {}
    for name in ("xla_chunked", "jax.nn xla", "torch flash", "torch math"):
        if name.startswith("torch"):
            pytest.importorskip("torch")
        results[name] = implementations.IMPLEMENTATIONS[name](point, arrays).results()
    for name, parts in results.items():
        for part, wanted in zip(parts, results["jax.nn xla"], strict=True):
            np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


# How it is timed.


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> Pass:
        """Something that takes so long for a call, of which the first takes a second more."""
        self.now += 1

        def run(calls: int) -> None:
            self.now += calls * seconds

        return Pass(run, 1 << 20)


def test_a_measurement_has_as_many_calls_as_make_it_long_and_few_measurements_where_they_are_slow() -> None:
    clock = Clock()
    found = time_in_turns({"short": clock.passes(2**-10), "long": clock.passes(2.0)}, 5, 3.0, 10 * 2**-10, clock)
    assert found["short"].calls == 10 and found["long"].calls == 1
    np.testing.assert_allclose(found["short"].seconds, [2**-10] * 5)
    np.testing.assert_allclose(found["long"].seconds, [2.0] * 2)


def test_what_one_leaves_to_the_next_in_turn_is_not_counted() -> None:
    """Each call of the one costs the other's next call a second."""
    clock, debts = Clock(), []

    def careless(calls: int) -> None:
        clock.now += 4 * calls
        debts.append(1)

    def careful(calls: int) -> None:
        clock.now += 2 * calls + len(debts)
        debts.clear()

    found = time_in_turns({"careless": Pass(careless), "careful": Pass(careful)}, 3, 100.0, 0.0, clock)
    assert found["careless"].seconds == [4] * 3 and found["careful"].seconds == [2] * 3


def test_what_fails_while_it_is_timed_fails_alone() -> None:
    clock, calls = Clock(), []

    def run(count: int) -> None:
        calls.append(count)
        if len(calls) == 4:
            raise MemoryError("no room")

    found = time_in_turns({"failing": Pass(run), "other": clock.passes(1.0)}, 5, 100.0, 0.0, clock)
    assert isinstance(found["failing"], MemoryError) and len(found["other"].seconds) == 5


def test_a_program_that_the_machine_has_no_memory_for_is_not_begun() -> None:
    with pytest.raises(MemoryError, match="it needs 1073741824.0 GiB"):
        implementations.must_fit(1 << 60)


# What is left behind.


def test_a_run_leaves_a_table_pictures_and_a_result_of_every_implementation_that_runs(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, cases=("packed",), lengths=(64,))
    result = launch.run(flash_attention.EXPERIMENT, config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))
    assert {"time_16.png", "memory_16.png"} == {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    measured = {(row["implementation"], row["passes"]) for row in result["rows"]}
    for name in ("xla_chunked", "jax.nn xla"):
        assert {(name, passes) for passes in PASSES} <= measured
    for row in result["rows"]:
        assert row["milliseconds"] > 0 and row["tflops"] > 0 and row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
        assert row["share_of_matmul"] > 0 and row["share_of_peak"] is None
        assert (row["faster_than"]["jax.nn xla"] == 1) == (row["implementation"] == "jax.nn xla")
        assert set(row["largest_error"]) == {"output", "d_query", "d_key", "d_value"}
        assert max(row["largest_error"].values()) < 1e-5
    assert set(result["not_measured"]) >= {"mosaic_gpu", "mosaic_tpu", "jax.nn cudnn", "torch cudnn", "jax's splash"}
    assert result["complete"] and result["versions"]["jax"] == jax.__version__ and result["config"]["features"] == 32
    assert {goal["status"] for goal in result["goals"]} == {"not measured"}
    table = (tmp_path / "run" / "table.md").read_text()
    assert "| packed | 64 | 16 | forward+backward | xla_chunked |" in table and "- not measured: forward at least 4 ×" in table


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """A run in which nothing is computed: implementations are to be put into `IMPLEMENTATIONS`, and a shape takes as long as they say."""
    monkeypatch.setattr(measure, "IMPLEMENTATIONS", {})
    monkeypatch.setattr(measure, "draw", lambda *args: ())
    monkeypatch.setattr(measure, "Oracle", lambda *args: NoOracle())
    monkeypatch.setattr(flash_attention, "matmul_speed", lambda dtype: 1e12)
    monkeypatch.setattr(report, "curves", lambda rows: {})
    yield Clock()


class NoOracle:
    def errors(self, build: Any) -> dict[str, float]:
        return {}


def fake(clock: Clock, seconds: float, seen: list[tuple[Any, ...]] | None = None) -> Callable[..., Candidate]:
    """An implementation that takes so long for each call."""

    def build(point: Shape, arrays: Any) -> Candidate:
        if seen is not None:
            seen.append(point.key)
        return Candidate({passes: lambda: clock.passes(seconds) for passes in PASSES}, lambda: [])

    return build


POINTS = [(case, length, 16) for case in ("full", "causal", "window", "packed") for length in (64, 96)]


def test_a_failure_is_a_row_that_says_why_and_keeps_nobody_from_being_measured(clock: Clock, tmp_path: Path) -> None:
    def refusing(point: Shape, arrays: Any) -> Candidate:
        raise NotImplementedError("no kernel\nfor this")

    def greedy(point: Shape, arrays: Any) -> Candidate:
        def run(calls: int) -> None:
            clock.now += 1
            if point.length == 96:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        return Candidate({passes: lambda: Pass(run) for passes in PASSES}, lambda: [])

    def absent(point: Shape, arrays: Any) -> Candidate:
        raise Absent("needs a GPU")

    measure.IMPLEMENTATIONS.update(
        {
            "refusing": refusing,
            "jax.nn xla": fake(clock, 0.5),
            "greedy": greedy,
            "absent": absent,
            "xla_chunked": fake(clock, 0.25),
        }
    )
    result = run(TINY, tmp_path / "run", clock)
    rows = {(row["case"], row["length"], row["implementation"], row["passes"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == len(POINTS) * len(PASSES) * 4
    for case, length, _ in POINTS:
        for passes in PASSES:
            assert rows[case, length, "refusing", passes]["error"] == "NotImplementedError: no kernel for this"
            assert ("error" in rows[case, length, "greedy", passes]) == (length == 96)
            assert rows[case, length, "xla_chunked", passes]["faster_than"]["jax.nn xla"] == 2
    assert result["not_measured"] == {"absent": "needs a GPU"} and result["complete"]
    table = (tmp_path / "run" / "table.md").read_text()
    assert "Failed: greedy, backward, packed 96 × 16: RuntimeError: RESOURCE_EXHAUSTED: Out of memory" in table


def test_after_an_interrupt_the_same_command_goes_on(clock: Clock, tmp_path: Path) -> None:
    seen: list[Any] = []
    steady = fake(clock, 0.1, seen)

    def interrupted(point: Shape, arrays: Any) -> Candidate:
        if len(seen) == 3:
            raise KeyboardInterrupt
        return steady(point, arrays)

    measure.IMPLEMENTATIONS["xla_chunked"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(TINY, tmp_path / "run", clock)
    kept = json.loads((tmp_path / "run" / "result.json").read_text())
    assert seen == POINTS[:3] and len(kept["rows"]) == 3 * len(PASSES) and not kept["complete"]
    measure.IMPLEMENTATIONS["xla_chunked"] = steady
    result = run(TINY, tmp_path / "run", clock)
    assert seen == POINTS and result["complete"] and result["rows"][: len(kept["rows"])] == kept["rows"]
    assert run(TINY, tmp_path / "run", clock)["rows"] == result["rows"] and seen == POINTS


def test_it_ends_before_the_limit_and_another_command_goes_on(clock: Clock, tmp_path: Path) -> None:
    """Each shape takes 3 × (1 + 3 × 8) = 75 seconds."""
    seen: list[Any] = []
    measure.IMPLEMENTATIONS["xla_chunked"] = fake(clock, 8.0, seen)
    config = dataclasses.replace(TINY, limit=350)
    for measured in (4, 8):
        started = clock()
        result = run(config, tmp_path / "run", clock)
        assert clock() - started <= 350 and seen == POINTS[:measured] and result["complete"] == (measured == 8)
    assert result["seconds"] == 8 * 75
    # A limit is no part of what is measured.
    run(TINY, tmp_path / "run", clock)


def test_a_device_that_breaks_ends_the_command_and_the_next_one_leaves_out_what_broke_it(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[bool] = []

    def breaking(point: Shape, arrays: Any) -> Candidate:
        if point.key == POINTS[1]:
            broken.append(True)
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        return fake(clock, 0.1)(point, arrays)

    monkeypatch.setattr(measure, "device_answers", lambda: not broken)
    measure.IMPLEMENTATIONS.update(breaking=breaking, steady=fake(clock, 0.1))
    with pytest.raises(RunError, match="since breaking at full, 96 tokens, heads of 16 .*ILLEGAL_ADDRESS"):
        run(TINY, tmp_path / "run", clock)
    broken.clear()
    result = run(TINY, tmp_path / "run", clock)
    assert result["complete"] and not broken
    there = [row for row in result["rows"] if (row["case"], row["length"]) == ("full", 96)]
    assert {row["implementation"] for row in there if "error" in row} == {"breaking"}
    assert {row["implementation"] for row in there if "error" not in row} == {"steady"}


def test_a_result_of_another_device_is_not_continued(clock: Clock, tmp_path: Path) -> None:
    measure.IMPLEMENTATIONS["xla_chunked"] = fake(clock, 0.1)
    run(TINY, tmp_path / "run", clock)
    path = tmp_path / "run" / "result.json"
    path.write_text(path.read_text().replace(devices.device(), "NVIDIA H200 × 1"))
    with pytest.raises(UserError, match="is of NVIDIA H200 × 1, and this is"):
        run(TINY, tmp_path / "run", clock)
    run(TINY, tmp_path / "run", clock, Execution(overwrite=True))


# What it is held against.


def rows_of(**milliseconds: float | str) -> list[dict[str, Any]]:
    """At `causal` of 64 and of 96, by `implementation_length`."""
    rows = []
    for name, value in milliseconds.items():
        implementation, length = name.split("_")
        row = {"case": "causal", "length": int(length), "width": 16, "passes": "forward", "implementation": implementation}
        rows.append({**row, **({"error": value} if isinstance(value, str) else {"milliseconds": value})})
    return rows


@pytest.mark.parametrize(
    "rows, status, why",
    [
        (rows_of(a_64=1.0, b_64=2.0, a_96=1.0, b_96=3.0), "met", "2.00 to 3.00 × at 2 of 2 shapes, least at causal, 64 × 16"),
        (rows_of(a_64=1.0, b_64=1.9, a_96=1.0, b_96=3.0), "missed", "1.90 to 3.00 × at 2 of 2"),
        (rows_of(a_64=1.0, b_64=2.0, a_96=1.0), "not measured", "at 1 of 2 shapes, least at causal, 64 × 16; no ratio at 1: b: needs a GPU"),
        (rows_of(a_64=1.0, b_64=1.9, a_96="no room"), "missed", "no ratio at 1: a at causal, 96 × 16: no room"),
        ([], "not measured", "no ratio at 2: a: not measured yet at causal, 64 × 16"),
    ],
)  # fmt: skip
def test_a_goal_is_met_if_it_is_at_every_shape(rows: list[dict[str, Any]], status: str, why: str) -> None:
    goal = Goal("a twice as fast as b", "a", "forward", "b", 2, ("causal",))
    verdict = goals.judge(goal, rows, {"b": "needs a GPU"}, [shape(length=64), shape(length=96)])
    assert verdict["status"] == status and why in verdict["why"]


def test_a_window_is_compared_with_all_of_causal() -> None:
    goal = goals.GOALS["gpu"][-1]
    rows = [
        {"case": case, "length": 32768, "width": 64, "passes": "forward", "implementation": "mosaic_gpu", "milliseconds": time}
        for case, time in (("window", 1.0), ("causal", 12.5))
    ]
    verdict = goals.judge(goal, rows, {}, [shape("window", 32768, 64), shape("causal", 32768, 64)])
    assert verdict["status"] == "met" and "12.50 to 12.50 × at 1 of 1" in verdict["why"]


# Tuning.


def test_tuning_takes_the_fastest_tiles_that_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the kernel is XLA's, whose values are right whatever the tiles, and times are made up."""
    wrong, impossible, fastest = Tiles(128, 5), Tiles(64, 3), Tiles(64, 2)
    monkeypatch.setattr(tuning, "candidates", lambda *args: [wrong, impossible, Tiles(128, 2), fastest])

    def build(point: Shape, arrays: Any, sizes: BlockSizes) -> Candidate:
        if (sizes.key, sizes.key_stages) == impossible:
            raise ValueError("exceeds available shared memory")
        right = implementations.IMPLEMENTATIONS["xla_chunked"](point, arrays)
        values = (lambda: [2 * x for x in right.results()]) if (sizes.key, sizes.key_stages) == wrong else right.results
        costs = {
            "forward": sizes.key + sizes.key_stages,
            "backward": sizes.key_backward + sizes.key_backward_stages + sizes.query_backward + sizes.query_backward_stages,
        }
        passes = {name: lambda cost=cost: Pass(lambda calls: None, cost) for name, cost in costs.items()}
        return Candidate(passes, values)

    def time(passes: dict[str, Pass], *args: Any) -> dict[str, Any]:
        return {name: Times([float(each.temporary)], 1) for name, each in passes.items()}

    said: list[str] = []
    tuner = tuning.Tuner("float16", 0, said.append, build, time)
    sizes = tuner.best(shape("causal", 64), "plain")
    assert sizes == BlockSizes(
        key=64, key_stages=2, key_backward=64, key_backward_stages=2, query_backward=64, query_backward_stages=2
    )
    assert (
        sum("wrong values" in line for line in said) == 1 and sum("exceeds available shared memory" in line for line in said) == 1
    )
    assert len(said) == 3 * 4

    entry = {
        **tuning.places([shape("causal", 64), shape("causal", 96)], "float16")[shape("causal", 96)],
        "block_sizes": {name: size for name, size in vars(sizes).items() if size}, "source": "a test",
    }  # fmt: skip
    assert {name: entry[name] for name in ("logits", "dtype", "width", "causal", "length")} == {
        "logits": "plain", "dtype": "float16", "width": 64, "causal": True, "length": 96,
    }  # fmt: skip
    (tmp_path / "table.json").write_text(tuning.table([entry]))
    assert tuning.read(tmp_path / "table.json", "a test") == [entry]
    # What it leaves is the shipped table with one entry more, which counts where it is for.
    written = tuple(json.loads((tmp_path / "table.json").read_text()))
    assert written == (*mosaic_gpu.tiles.shipped(), entry)
    default = mosaic_gpu.tiles.tuned("plain", "float16", 64, True, 96)
    monkeypatch.setattr(mosaic_gpu.tiles, "shipped", lambda: written)
    assert mosaic_gpu.tiles.tuned("plain", "float16", 64, True, 200) == sizes
    assert mosaic_gpu.tiles.tuned("plain", "float16", 64, True, 95) == default != sizes


def test_tuning_goes_on_where_it_stopped(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def best(tuner: Any, point: Shape, logits: str) -> BlockSizes:
        clock.now += 100
        seen.append(point.key)
        return BlockSizes(key=64)

    monkeypatch.setattr(tuning.Tuner, "best", best)
    config = dataclasses.replace(TINY, tune=True, dtype="bfloat16", limit=350)
    monkeypatch.setattr(flash_attention, "on_hopper", lambda: True)
    monkeypatch.setattr(flash_attention, "target_description", lambda devices: "an H100")
    tune = functools.partial(run, config, tmp_path / "run", clock)
    assert not tune()["complete"] and len(seen) == 3
    result = tune()
    # Windows have causal's tiles.
    assert result["complete"] and seen == [point for point in POINTS if point[0] != "window"]
    assert (tmp_path / "run" / "target.txtpb").read_text() == "an H100"
    table = json.loads((tmp_path / "run" / "tiles.json").read_text())
    assert [entry for entry in table if entry["source"] != "analysis"] == result["entries"]


# The device.


def test_the_speed_of_a_product_is_plausible() -> None:
    assert 1e8 < devices.matmul_speed("float32") < 1e15
    assert devices.device().endswith(f"× {jax.device_count()}") and devices.device_answers()
    assert devices.target_description(jax.devices()[:1]) is None


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax-cuda13-plugin is not installed")
def test_the_description_of_a_gpu_is_one_that_can_be_compiled_for() -> None:
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    describe = functools.partial(topologies.get_topology_desc, platform="cuda", topology_name="h100", topology="1x1x1")
    written = (Path(__file__).parents[1] / "pallas_kernels" / "h100.txtpb").read_text()
    text = devices.target_description(describe(target_config=written).devices)
    assert "core_count: 132" in text and "ACCELERATED_FEATURES" in text
    assert devices.target_description(describe(target_config=text).devices) == text


# Bad input.


def test_a_width_that_does_not_divide_the_features_is_refused() -> None:
    with pytest.raises(UserError, match="--features 512 are no whole number of heads of --widths 48"):
        Config(widths=(48,))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lengths", "3"], "lengths"),
        (["--cases", "diagonal"], "cases"),
        (["--features", "100"], "--features 100 are no whole number of heads"),
        (["--preset", "gpu9"], "gpu9"),
        (["--tune"], "--tune is for the kernel in bfloat16 and float16, not float32"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(tmp_path: Path, flags: list[str], message: str) -> None:
    command = [sys.executable, "-m", "experiments.flash_attention", "--workdir", str(tmp_path / "run"), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 2 and len(ended.stderr.strip().splitlines()) == 1 and message in ended.stderr
    assert not (tmp_path / "run").exists()


def test_tiles_are_tuned_on_no_other_device_and_the_folder_serves_what_can_be_measured(tmp_path: Path, clock: Clock) -> None:
    measure.IMPLEMENTATIONS["xla_chunked"] = fake(clock, 0.1)
    config = dataclasses.replace(TINY, dtype="bfloat16")
    with pytest.raises(UserError, match="run it on an H100 or H200"):
        run(dataclasses.replace(config, tune=True), tmp_path / "run", clock)
    assert run(config, tmp_path / "run", clock, preset="h200")["preset"] == "h200"
