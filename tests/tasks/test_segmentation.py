"""Segmentation: a class for each pixel that follows the image, and the scores of an oracle and of one who says the same everywhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxdl import launch
from jaxdl.data import AnnotatedImage, Boxes, Subset, scenes
from jaxdl.data.augment import random_flip
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.metrics import IGNORE
from jaxdl.tasks.segmentation import Segmentation, class_map, class_names, open_masks, resize_classes, row
from jaxdl.training import Aux, Run, configured, setup_training, train


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """Of a network without a size."""

    resolution: int = 32
    """Side of an image."""


CONFIG = Config(data="builtin:crowded", steps=2, batch_size=4)
PROCESS = ImageProcessor.symmetric(32)
COUNT = 6
KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)


@pytest.fixture
def run(tmp_path):
    with Run.open(tmp_path, "network", CONFIG) as opened:
        yield opened


@pytest.mark.parametrize("data", ["builtin:scenes", "builtin:crowded"])
def test_each_pixel_has_the_class_of_the_mask_that_it_is_in(data, tmp_path):
    with Run.open(tmp_path, "network", dataclasses.replace(CONFIG, data=data)) as run:
        source, _ = open_masks(run)
    assert class_names(source) == ("background", *scenes.SHAPES)
    for example in Subset(source, range(5)):
        image, classes = class_map(example)
        assert image is example.image
        for (y, x), found in np.ndenumerate(classes):
            labels = [label + 1 for mask, label in zip(example.masks, example.boxes.labels) if mask[y, x]]
            assert found == (labels[-1] if labels else 0)


def two_things() -> AnnotatedImage:
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :2, :2], masks[1, 5:, 5:] = True, True
    return AnnotatedImage(np.zeros((8, 8, 3), np.uint8), boxes=Boxes.around(masks, np.array([3, 1], np.int32)), masks=masks)


def test_classes_follow_the_image_and_nothing_is_known_beyond_its_edge():
    _, classes = class_map(two_things(), lambda example: example.flip())
    assert (classes[:2, 6:] == 4).all() and (classes[5:, :3] == 2).all() and (classes != 0).sum() == 13
    _, classes = class_map(two_things(), lambda example: example.window(4, 4, 8, 8))  # The first thing leaves it.
    expected = np.full((8, 8), IGNORE)
    expected[:4, :4] = 0
    expected[1:4, 1:4] = 2
    np.testing.assert_array_equal(classes, expected)


def test_classes_are_resized_to_those_of_the_nearest_pixels():
    classes = np.array([[0, 7], [IGNORE, 3]])
    np.testing.assert_array_equal(resize_classes(classes, (4, 6)), classes.repeat(2, 0).repeat(3, 1))
    np.testing.assert_array_equal(resize_classes(classes.repeat(3, 0).repeat(3, 1), (2, 2)), classes)
    made = row(two_things(), RANDOM, process=ImageProcessor.symmetric((16, 24)))
    assert made["image"].shape == (16, 24, 3) and made["classes"].shape == (16, 24) and made["classes"].dtype == np.int32
    assert (made["classes"][:4, :6] == 4).all() and (made["classes"][10:, 15:] == 2).all()


def chosen(held_out) -> list:
    return [class_map(held_out[int(index)]) for index in np.linspace(0, len(held_out) - 1, COUNT)]


def network(run: Run, process: ImageProcessor = PROCESS, oracle: bool = True) -> tuple[Segmentation, Subset]:
    """An oracle, which knows the images, or one who always says "background"."""
    source, held_out = open_masks(run)
    known = np.stack([process(image) for image, _ in chosen(held_out)])
    classes = np.stack([resize_classes(classes, process.size) for _, classes in chosen(held_out)]) * oracle

    def apply(variables, images):
        which = jnp.abs(images[:, None] - known).sum((2, 3, 4)).argmin(1)
        return (jnp.asarray(classes)[which][..., None] == jnp.arange(5)) * variables["params"]["trust"]

    return Segmentation(run, apply, source, held_out, process, count=COUNT, batch_size=4), source


VARIABLES = {"params": {"trust": 1.0}}


def test_an_oracle_is_right_everywhere_through_a_whole_run(run):
    watched, source = network(run)
    batches = run.batches(source, functools.partial(row, process=PROCESS, augment=random_flip))
    seen = []

    def objective(params, state, batch, key):
        seen.append((batch["image"].shape, batch["classes"].shape))
        return (params["trust"] - 1.0) ** 2 * (batch["classes"] != IGNORE).mean(), Aux()

    init = lambda key: {"params": {"trust": jnp.array(1.0)}}
    step, state = setup_training(CONFIG, run.layout, configured(CONFIG, objective, optax.sgd), init=init)
    parts = dict(evaluate=watched.evaluate, show=watched.show, conclude=watched.conclude)
    metrics = train(run, step, state, batches, **parts)["metrics"]
    assert [metrics[name] for name in ("mean_iou", "pixel_accuracy", "dice")] == [1, 1, 1]
    assert 0 < metrics["single_pixel_mean_iou"] < 0.5 < metrics["single_pixel_pixel_accuracy"] < 0.95
    assert seen[0] == ((4, 32, 32, 3), (4, 32, 32))
    with Image.open(run.figures / "masks.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_who_says_background_everywhere_is_right_where_it_is(run):
    watched, _ = network(run, oracle=False)
    found = watched.evaluate(VARIABLES, KEY)
    pixels = np.concatenate([classes.ravel() for classes in watched.true])
    share = (pixels == 0).mean()
    assert found["pixel_accuracy"] == pytest.approx(share)
    assert found["mean_iou"] == pytest.approx(share / len(set(pixels.tolist())))


def test_what_is_predicted_is_measured_at_the_images_own_size(run):
    """At half of it an oracle is nearly right, but not quite: PIL takes the lower right pixel of each four."""
    watched, _ = network(run, ImageProcessor.symmetric(16))
    found = watched.evaluate(VARIABLES, KEY)["pixel_accuracy"]
    expected = np.mean([classes[1::2, 1::2].repeat(2, 0).repeat(2, 1) == classes for classes in watched.true])
    assert found == pytest.approx(expected) and 0.8 < expected < 1


def test_data_without_masks_and_processors_that_crop_are_refused(run, tmp_path):
    config = dataclasses.replace(CONFIG, data="builtin:digits")
    with Run.open(tmp_path / "digits", "network", config) as other, pytest.raises(UserError, match="have no boxes|have no masks"):
        open_masks(other)
    with pytest.raises(UserError, match="without a class"):
        network(run, ImageProcessor.symmetric(32, resize_mode="crop"))
