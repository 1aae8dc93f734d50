"""The perceptron as an experiment: its two ways back agree, and its study is what it says."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.mlp import EXPERIMENT, PRESETS, Config, Recipe, learn, recipes
from jaxdl import launch
from jaxdl.data import LABELLED_IMAGES
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.models.mlp import MLP
from jaxdl.training.logging import read_metrics

TINY = dataclasses.replace(PRESETS["default"], hidden=(8,), batch_size=8, study_steps=0)


def main(config: Config, directory: Path) -> dict:
    return launch.run(EXPERIMENT, config, directory)


def test_both_ways_back_learn_the_same(tmp_path):
    for backward in ("hand", "jax"):
        main(dataclasses.replace(TINY, steps=30, backward=backward), tmp_path / backward)
    hand, jaxs = ([row["loss"] for row in read_metrics(tmp_path / b / "metrics.jsonl") if "loss" in row] for b in ("hand", "jax"))
    assert hand[-1] < 0.9 * hand[0]
    np.testing.assert_allclose(hand, jaxs, rtol=1e-4)


def test_each_recipe_lacks_one_ingredient():
    config = dataclasses.replace(TINY, batch_size=32, study_examples=100, weight_decay=0.1, dropout=0.3)
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
    config = dataclasses.replace(TINY, hidden=(16,), study_steps=80, study_examples=100, batch_size=64)
    source, held_out = LABELLED_IMAGES.open("builtin:digits")
    process = ImageProcessor.fit((source[index].image for index in range(100)), 8)
    follow = lambda *recipe: learn(Recipe(*recipe), config, MLP((16,)), process, source, held_out)
    free, tied = follow(True, 0.0, 0.0, 20), follow(True, 5.0, 0.0, 20)
    assert free.steps.tolist() == list(range(2, 81, 2)) and free.loss.shape == free.test_loss.shape == free.accuracy.shape == (
        3,
        40,
    )
    assert (free.loss[:, -1] < 1).all() and (free.accuracy[:, -1] > 0.5).all() and (tied.loss[:, -1] > 2).all()
    np.testing.assert_array_equal(follow(True, 0.0, 0.0, 20).loss, free.loss)


def test_images_in_folders_are_classes(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, level in (("dark", 40), ("light", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(6):
                image = random.integers(level - 30, level + 30, (9, 7 + index, 3)).astype(np.uint8)
                Image.fromarray(image).save(tmp_path / split / name / f"{index}.png")
    result = main(dataclasses.replace(TINY, data=f"folder:{tmp_path}", steps=40), tmp_path / "run")
    assert result["metrics"]["test_accuracy"] == 1.0


def test_held_out_data_of_other_classes_is_refused(tmp_path):
    for split, name in (("train", "cats"), ("test", "dogs")):
        (tmp_path / split / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / name / "0.png")
    with pytest.raises(UserError, match="classes"):
        main(dataclasses.replace(TINY, data=f"folder:{tmp_path}", steps=1), tmp_path / "run")
