"""The convolutional network as an experiment: it times its methods, and learns colours and grey alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.cnn import EXPERIMENT, PRESETS, time_methods
from jaxdl import launch
from jaxdl.errors import UserError
from jaxdl.models.lenet import LeNet

TINY = dataclasses.replace(
    PRESETS["default"], channels=(4,), hidden=(), kernel_size=3, batch_size=8, timing_rounds=0, learning_rate=0.01
)


def test_every_method_is_timed_in_every_round():
    images = np.zeros((2, 8, 8, 1), np.float32)
    module = LeNet((3,), (), kernel_size=3)
    params = module.init(jax.random.key(0), jnp.asarray(images))["params"]
    times = time_methods(module, params, images, rounds=3)
    assert list(times) == ["fastest", "taps", "unfold", "lax"]
    assert all(len(part) == 3 and min(part) > 0 for both in times.values() for part in both.values())


def test_coloured_images_in_folders_are_classes(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for channel, name in enumerate(("red", "green")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(6):
                image = random.integers(0, 100, (9, 7 + index, 3)).astype(np.uint8)
                image[..., channel] += 100
                Image.fromarray(image).save(tmp_path / split / name / f"{index}.png")
    config = dataclasses.replace(TINY, data=f"folder:{tmp_path}", steps=60)
    assert launch.run(EXPERIMENT, config, tmp_path / "run")["metrics"]["test_accuracy"] == 1.0


def test_images_that_are_too_small_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be halved 4 times"):
        launch.run(EXPERIMENT, dataclasses.replace(TINY, steps=1, channels=(2, 2, 2, 2)), tmp_path / "small")
