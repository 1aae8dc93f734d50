"""The benchmark: what it counts, what it leaves behind, and how it ends on bad input."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import flash_attention
from experiments.flash_attention import PASSES, Config
from jaxdl.errors import UserError

TINY = Config(lengths=(64, 96), widths=(16,), tokens=64, features=32, window=8, documents=3, repeats=2)


def test_a_run_leaves_a_table_pictures_and_a_result_of_every_implementation_that_runs(tmp_path: Path) -> None:
    result = flash_attention.main(dataclasses.replace(TINY, cases=("causal", "packed")), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))
    assert {"time_16.png", "memory_16.png"} == {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    measured = {(row["case"], row["length"], row["implementation"], row["passes"]) for row in result["rows"]}
    for case in ("causal", "packed"):
        for length in (64, 96):
            for name in ("xla_chunked", "jax.nn xla"):
                assert {(case, length, name, passes) for passes in PASSES} <= measured
    for row in result["rows"]:
        assert row["milliseconds"] > 0 and row["tflops"] > 0 and row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
        if row["length"] == 64:
            assert set(row["largest_error"]) == {"output", "d_query", "d_key", "d_value"}
            assert max(row["largest_error"].values()) < 1e-5
    assert set(result["not_measured"]) >= {"mosaic_gpu", "mosaic_tpu", "jax.nn cudnn", "torch cudnn"}
    assert "| packed | 96 | 16 | forward+backward | xla_chunked |" in (tmp_path / "run" / "table.md").read_text()


def test_operations_are_those_of_visible_pairs() -> None:
    by_case = {shape.case: shape for shape in flash_attention.shapes(TINY) if shape.length == 64}
    pairs = {"full": 64 * 64, "causal": 64 * 65 // 2, "window": sum(min(i + 1, 8) for i in range(64))}
    parts = np.diff([0, *by_case["packed"].ends, 64])
    assert len(parts) == 3 and parts.sum() == 64
    pairs["packed"] = sum(part * (part + 1) // 2 for part in parts)
    for case, count in pairs.items():
        assert by_case[case].visible.sum() == count
        assert by_case[case].operations == 2 * 2 * count * 2 * 16  # Two products; two operations each; two heads of 16.


@pytest.mark.parametrize("case", ["full", "causal", "window", "packed"])
def test_all_implementations_compute_the_same(case: str) -> None:
    shape = next(shape for shape in flash_attention.shapes(TINY) if shape.case == case)
    arrays = flash_attention.draw(TINY, shape)
    results = {}
    for name in ("xla_chunked", "jax.nn xla", "torch flash"):
        if name == "torch flash":
            pytest.importorskip("torch")
        results[name] = flash_attention.IMPLEMENTATIONS[name](shape, arrays).results()
    for name, parts in results.items():
        for part, wanted in zip(parts, results["jax.nn xla"], strict=True):
            np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


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
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(tmp_path: Path, flags: list[str], message: str) -> None:
    command = [sys.executable, "-m", "experiments.flash_attention", "--workdir", str(tmp_path / "run"), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 2 and len(ended.stderr.strip().splitlines()) == 1 and message in ended.stderr
    assert not (tmp_path / "run").exists()


def test_the_speed_of_a_product_is_plausible() -> None:
    assert 1e8 < flash_attention.matmul_speed("float32") < 1e15
    assert flash_attention.device().endswith(f"× {jax.device_count()}")
