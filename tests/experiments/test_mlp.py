"""The perceptron as an experiment: it starts, its two ways back agree, and its study is what it says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.mlp import Config, Recipe, learn, main, recipes
from jaxdl.data import open_labelled
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.models.mlp import MLP
from jaxdl.training.logging import read_metrics

ROOT = Path(__file__).parents[2]
TINY = dict(hidden=(8,), batch_size=8, study_steps=0)


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.mlp", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_names_the_ways_back_and_the_presets():
    done = run("--help")
    assert done.returncode == 0 and "--backward" in done.stdout and "mnist_800" in done.stdout


def test_two_steps_leave_accuracies_and_pictures(tmp_path):
    done = run("--workdir", tmp_path, "--steps=2", "--batch-size=8", "--hidden", 8, 6, "--study-steps=4", "--study-examples=20")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics.keys() == {
        "test_accuracy",
        *(f"test_accuracy_of_20/{name}" for name in ("everything", "without_normalisation", "without_L2")),
        *(f"test_accuracy_of_20/{name}" for name in ("without_dropout", "without_minibatches")),
    }
    pictures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"confusion.png", "left_out.png", "mistakes.png"} <= pictures


def test_both_ways_back_learn_the_same(tmp_path):
    for backward in ("hand", "jax"):
        main(Config(steps=30, backward=backward, **TINY), tmp_path / backward)
    hand, jaxs = ([row["loss"] for row in read_metrics(tmp_path / b / "metrics.jsonl") if "loss" in row] for b in ("hand", "jax"))
    assert hand[-1] < 0.9 * hand[0]
    np.testing.assert_allclose(hand, jaxs, rtol=1e-4)


def test_each_recipe_lacks_one_ingredient():
    config = Config(batch_size=32, study_examples=100, weight_decay=0.1, dropout=0.3)
    everything, *others = recipes(config).values()
    assert everything == Recipe(True, 0.1, 0.3, 32)
    assert others == [
        Recipe(False, 0.1, 0.3, 32),
        Recipe(True, 0.0, 0.3, 32),
        Recipe(True, 0.1, 0.0, 32),
        Recipe(True, 0.1, 0.3, 100),
    ]


def test_a_recipe_is_followed():
    """A penalty so strong that nothing can be learned, and the same without it."""
    config = Config(hidden=(16,), study_steps=80, study_examples=100)
    source, held_out = open_labelled("builtin:digits")
    process = ImageProcessor.standardising((source[index]["image"] for index in range(100)), 8)
    follow = lambda *recipe: learn(Recipe(*recipe), config, MLP((16,)), process, source, held_out)
    free, tied = follow(True, 0.0, 0.0, 20), follow(True, 5.0, 0.0, 20)
    assert free.steps.tolist() == list(range(2, 81, 2)) and free.loss.shape == free.test_loss.shape == free.accuracy.shape == (
        3,
        40,
    )
    assert (free.loss[:, -1] < 1).all() and (free.accuracy[:, -1] > 0.5).all() and (tied.loss[:, -1] > 2).all()
    np.testing.assert_array_equal(follow(True, 0.0, 0.0, 20).loss, free.loss)


def test_pictures_in_folders_are_classes(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, level in (("dark", 40), ("light", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(6):
                picture = random.integers(level - 30, level + 30, (9, 7 + index, 3)).astype(np.uint8)
                Image.fromarray(picture).save(tmp_path / split / name / f"{index}.png")
    result = main(Config(data=f"folder:{tmp_path}", steps=40, **TINY), tmp_path / "run")
    assert result["metrics"]["test_accuracy"] == 1.0


@pytest.mark.parametrize("data", ["builtin:scenes", "folder"])
def test_data_without_labels_is_refused(tmp_path, caption_folder, data):
    spec = f"folder:{caption_folder}" if data == "folder" else data
    with pytest.raises(UserError, match="has no labels"):
        main(Config(data=spec, steps=1, **TINY), tmp_path)


def test_held_out_data_of_other_classes_is_refused(tmp_path):
    for split, name in (("train", "cats"), ("test", "dogs")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / name / "0.png")
    with pytest.raises(UserError, match="classes of training and held-out data differ"):
        main(Config(data=f"folder:{tmp_path}", steps=1, **TINY), tmp_path / "run")
