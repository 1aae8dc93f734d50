"""The convolutional network as an experiment: it starts, leaves its pictures, and learns colours and grey alike."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.cnn import METHODS, Config, main, time_methods
from jaxdl.errors import UserError
from jaxdl.models.lenet import LeNet

ROOT = Path(__file__).parents[2]
TINY = dict(channels=(4,), hidden=(), kernel_size=3, batch_size=8, timing_rounds=0)


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.cnn", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_names_the_methods_and_the_presets():
    done = run("--help")
    assert done.returncode == 0 and "unfold" in done.stdout and "lenet5" in done.stdout


def test_two_steps_leave_an_accuracy_and_pictures(tmp_path):
    done = run("--workdir", tmp_path, "--steps=2", "--batch-size=8", "--channels", 4, 4, "--hidden", 8, "--method=unfold")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["metrics"].keys() == {"test_accuracy"}
    pictures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"confusion.png", "feature_maps.png", "filters.png", "methods.png"} <= pictures
    assert all(f"{method} " in done.stdout for method in METHODS)


def test_every_method_is_timed_in_every_round():
    images = np.zeros((2, 8, 8, 1), np.float32)
    module = LeNet((3,), (), kernel_size=3)
    params = module.init(jax.random.key(0), jnp.asarray(images))["params"]
    times = time_methods(module, params, images, rounds=3)
    assert list(times) == ["fastest", "taps", "unfold", "lax"]
    assert all(len(part) == 3 and min(part) > 0 for both in times.values() for part in both)


def test_coloured_pictures_in_folders_are_classes(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for channel, name in enumerate(("red", "green")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(6):
                picture = random.integers(0, 100, (9, 7 + index, 3)).astype(np.uint8)
                picture[..., channel] += 100
                Image.fromarray(picture).save(tmp_path / split / name / f"{index}.png")
    config = Config(data=f"folder:{tmp_path}", steps=60, learning_rate=0.01, **TINY)
    assert main(config, tmp_path / "run")["metrics"]["test_accuracy"] == 1.0


def test_data_without_labels_and_pictures_that_are_too_small_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no labels"):
        main(Config(data="builtin:scenes", steps=1, **TINY), tmp_path / "scenes")
    with pytest.raises(UserError, match="cannot be halved 4 times"):
        main(Config(steps=1, **TINY | {"channels": (2, 2, 2, 2)}), tmp_path / "small")
