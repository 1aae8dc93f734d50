"""The page on adding a family is a whole experiment, and it does what the page says."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdl import launch
from jaxdl.errors import UserError

PAGE = (Path(__file__).parent.parent / "docs" / "adding.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory):
    """The module that the page's code is, in the order of the page."""
    path = tmp_path_factory.mktemp("page") / "vae.py"
    path.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("page.vae", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_is_about_eighty_lines_of_code(vae):
    lines = [line for line in Path(vae.__file__).read_text().splitlines() if line.strip()]
    assert len(lines) <= 100


def test_it_learns_beats_pixels_alone_and_goes_on_with_the_same_bits(vae, tmp_path):
    config = lambda steps: vae.Config(
        data="builtin:digits", steps=steps, learning_rate=3e-3, evaluate_every=50, show_every=100, warmup=0.0
    )
    result = launch.run(vae.EXPERIMENT, config(150), tmp_path / "whole")
    assert result["metrics"]["nats"] < result["metrics"]["nats_of_pixels_alone"]
    drawn = {path.name for path in (tmp_path / "whole" / "figures").iterdir()}
    assert {"samples.png", "samples_000100.png", "learning_curves.png"} <= drawn
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_bad_input_is_one_line(vae):
    with pytest.raises(UserError, match="--latent 0"):
        vae.Config(latent=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11, 12])
def test_the_default_run_keeps_its_promise(vae, tmp_path, seed):
    import dataclasses

    result = launch.run(vae.EXPERIMENT, dataclasses.replace(vae.PRESETS["default"], seed=seed), tmp_path / "run")
    assert vae.EXPERIMENT.missed(result["metrics"]) == []
