"""What a classifier says about files is what it says about the same images held out."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from experiments.mlp import EXPERIMENT, PRESETS
from jaxdl import launch
from jaxdl.data import LABELLED_IMAGES
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.tasks.classification import as_colored_as

CONFIG = dataclasses.replace(PRESETS["default"], steps=150, study_steps=0, evaluate_every=150)


def test_a_finished_run_recognises_files_and_keeps_its_result(tmp_path, capsys):
    result = launch.run(EXPERIMENT, CONFIG, tmp_path / "run")
    _, held_out = LABELLED_IMAGES.open("builtin:digits")
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    for file, example in zip(files, held_out):
        Image.fromarray(example.image[..., 0]).save(file)
    capsys.readouterr()
    assert launch.run(EXPERIMENT, dataclasses.replace(CONFIG, ask=tuple(files)), tmp_path / "run") == result
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
    found = [line.split(": ")[1].split()[0] for line in said]
    assert len(said) == 3 and result["metrics"]["test_accuracy"] > 0.8
    assert sum(name == held_out.info.classes[example.label] for name, example in zip(found, held_out)) >= 2


def test_what_is_no_image_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="nothing.png does not exist"):
        launch.run(EXPERIMENT, dataclasses.replace(CONFIG, ask=(str(tmp_path / "nothing.png"),)), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_grey_processor_sees_the_luminance_of_a_coloured_image():
    image = np.zeros((1, 3, 3), np.uint8)
    image[0, [0, 1, 2], [0, 1, 2]] = 255
    grey = as_colored_as(image, ImageProcessor((1, 3), (0.5,), (0.5,)))
    wanted = np.asarray(Image.fromarray(image).convert("L"))
    assert np.abs(grey[..., 0].astype(int) - wanted).max() <= 1
    assert as_colored_as(image, ImageProcessor((1, 3), (0.5,) * 3, (0.5,) * 3)) is image
