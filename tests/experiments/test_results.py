"""What the default runs promise, from the commands that a newcomer gives. Minutes each: pytest -m slow."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import experiments

NAMES = sorted(info.name for info in pkgutil.iter_modules(experiments.__path__) if not info.name.startswith("_"))
ALL = [importlib.import_module(f"experiments.{name}").EXPERIMENT for name in NAMES]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("experiment", [each for each in ALL if each.expects], ids=lambda each: each.name)
def test_a_default_run_reaches_what_it_promises(tmp_path, experiment):
    command = [sys.executable, "-m", f"experiments.{experiment.name}", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert experiment.missed(json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]) == []
