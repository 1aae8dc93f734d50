"""The program that docs/results.md is made with says what statistics says."""

import math
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.seeds import summary


def test_a_line_has_mean_range_deviation_and_the_error_of_the_set():
    values = [0.9, 0.8, 0.85]
    (line,) = summary([{"accuracy": value} for value in values], examples=400)
    error = math.sqrt(0.85 * 0.15 / 400)
    assert line == f"accuracy: 0.85 (0.8 to 0.9, deviation {statistics.stdev(values):.2g}); ± {error:.2g} of 400 examples"


def test_what_not_all_runs_have_is_left_out_and_no_share_has_no_error():
    assert summary([{"loss": 2.0, "bleu": 30.0}, {"loss": 3.0}], examples=10) == ["loss: 2.5 (2 to 3, deviation 0.71)"]


def test_flags_go_to_the_experiment_and_seeds_to_folders(tmp_path):
    command = [sys.executable, "-m", "benchmarks.seeds", "vit", "--workdir", str(tmp_path), "--first", "10", "--last", "11", "--"]
    command += ["--steps", "2", "--width", "16", "--depth", "1", "--num-heads", "2", "--batch-size", "8"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vit, seeds 10 to 11:\ntest_accuracy: " in done.stdout
    assert sorted(each.name for each in tmp_path.iterdir()) == ["seed_10", "seed_11"]
