"""What the README says is so."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from published_siglip import write_published_siglip

import experiments

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_lines_of_python_run(tmp_path):
    lines = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    write_published_siglip(tmp_path)
    Image.fromarray(np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)).save(tmp_path / "cat.jpg")
    lines = lines.replace("google/siglip-base-patch16-224", str(tmp_path))
    done = subprocess.run([sys.executable, "-W", "error", "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("(1, 8) [["), done


def test_pictures_and_folders_that_it_names_are_there():
    root = Path(__file__).parent.parent
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / path).exists(), path
    for path in re.findall(r"^([a-z_]+/[\w./]*) ", README, re.MULTILINE):
        assert (root / path).exists(), path


def test_every_experiment_has_a_row_with_its_minutes():
    rows = dict(re.findall(r"^\| `(\w+)` \| \[.* \| ([\d.]+) \|$", README, re.MULTILINE))
    names = [info.name for info in pkgutil.iter_modules(experiments.__path__) if not info.name.startswith("_")]
    assert sorted(rows) == sorted(names)
    for name in names:
        assert float(rows[name]) == importlib.import_module(f"experiments.{name}").EXPERIMENT.minutes, name
