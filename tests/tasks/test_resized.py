"""Held-out photographs are kept as small as the model sees them, and are measured as they were."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import launch
from jaxdl.data import AnnotatedImage, Boxes, CaptionedImage, Info, LabelledImage, Source
from jaxdl.data.image import ImageProcessor
from jaxdl.tasks.classification import Classification
from jaxdl.tasks.detection import Detection, Prepare
from jaxdl.tasks.generation import ImageGeneration
from jaxdl.tasks.resized import resized
from jaxdl.tasks.retrieval import Embedder, Matching
from jaxdl.tasks.segmentation import Segmentation
from jaxdl.tasks.vision_language import EvalSet, Question
from jaxdl.training import Run

SIDES = (90, 120)
COUNT = 12
PROCESS = ImageProcessor.symmetric(16)
KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """Of a network without a size."""


class Photographs(Source):
    """Each is read anew, and it is known which are still in memory."""

    info = Info(classes=("a", "b"))

    def __init__(self, element):
        self.element, self.read, self.alive = element, 0, weakref.WeakSet()

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        class Pixels(np.ndarray):
            """Weak sets want what can be hashed."""

            __hash__ = object.__hash__
            __eq__ = object.__eq__

        image = np.random.default_rng(index).integers(0, 256, (*SIDES, 3), np.uint8).view(Pixels)
        self.alive.add(image)
        self.read += 1
        return self.element(image, index)

    def annotations(self, index):
        return self.element(np.zeros((0, 0, 3), np.uint8), index)


def annotated(image, index):
    masks = np.zeros((1, *SIDES), bool)
    masks[0, 10:40, 20 : 30 + index] = True
    return AnnotatedImage(image, ("a",), boxes=Boxes.around(masks, np.array([index % 2], np.int32)), masks=masks)


labelled = lambda image, index: LabelledImage(image, index % 2)


def logits(variables, images):
    return images.reshape(len(images), -1)[:, :2]


def detect(variables, images):
    shape = (len(images), 2)
    return {"xyxy": jnp.full((*shape, 4), 0.5), "labels": jnp.zeros(shape, jnp.int32), "scores": jnp.full(shape, 0.9)}


class Means(Embedder):
    """Of colours."""

    def __init__(self, process):
        """It needs no module and no tokenizer."""
        self.process = process

    def images(self, variables, images):
        return np.stack([self.process(image).mean((0, 1)) for image in images])

    def texts(self, variables, texts):
        return np.eye(3)[[len(text) % 3 for text in texts]]


def classification(run):
    source = Photographs(labelled)
    watched = Classification(run, logits, source, PROCESS)
    return source, lambda: (watched.evaluate({}, KEY), watched.show({}, KEY))


def detection(run):
    source = Photographs(annotated)
    watched = Detection(run, detect, source, source, Prepare(PROCESS), count=COUNT)
    return source, lambda: (watched.evaluate({}, KEY), watched.show({}, KEY))


def segmentation(run):
    source = Photographs(annotated)
    watched = Segmentation(run, lambda variables, images: images, source, source, PROCESS, count=COUNT)
    return source, lambda: (watched.evaluate({}, KEY), watched.show({}, KEY))


def generation(run):
    source = Photographs(labelled)
    features = lambda images: images.reshape(len(images), -1)[:, :4].astype(np.float32)
    sample = lambda variables, keys, label: jax.vmap(lambda key: jax.random.normal(key, (16, 16, 3)))(keys)
    conditions = lambda example: {"label": np.int32(example.label)}
    watched = ImageGeneration(run, sample, source, features, PROCESS, learned=source, conditions=conditions)
    return source, lambda: (watched.evaluate({}, KEY), watched.show({}, KEY))


def matching(run):
    source = Photographs(lambda image, index: CaptionedImage(image, ("x" * (index + 1),)))
    source.info = Info()
    kept, process = resized(source, PROCESS)
    watched = Matching(Means(process), kept, COUNT)
    return source, lambda: (watched.evaluate({}, KEY), watched.show({}, KEY))


def answers(run):
    source = Photographs(annotated)
    asked = EvalSet.of(source, lambda example: [Question("caption", "caption en", example.captions)], COUNT, PROCESS)
    return source, lambda: asked.figures(["a"] * COUNT)


@pytest.mark.parametrize("make", [classification, detection, segmentation, generation, matching, answers])
def test_no_photograph_stays_in_memory(make, tmp_path):
    with Run.open(tmp_path / "run", "network", Config()) as run:
        source, look = make(run)
        for _ in range(2):
            look()
        gc.collect()
        assert source.read >= COUNT and not source.alive
        if make is not segmentation and make is not generation:
            assert source.read == COUNT  # Each once, however often it is measured.


@pytest.mark.parametrize(
    "fields",
    [{}, dict(resize_mode="crop"), dict(resize_mode="crop", shorter_side=24), dict(resample="nearest", size=(16, 20))],
    ids=["stretch", "crop", "crop of a larger one", "nearest"],
)
def test_what_is_kept_and_the_rest_of_the_processor_give_what_it_gives(fields):
    process = ImageProcessor.symmetric(
        fields.get("size", 16), **{name: value for name, value in fields.items() if name != "size"}
    )
    source = Photographs(labelled)
    kept, rest = resized(source, process)
    for index in range(3):
        np.testing.assert_array_equal(rest(kept[index].image), process(np.asarray(source[index].image)))
        assert kept[index].image.nbytes < 0.05 * np.prod((*SIDES, 3)) and kept.annotations(index).label == index % 2
    assert kept.info == source.info


def test_scores_are_those_of_the_whole_photographs(tmp_path):
    source = Photographs(labelled)
    with Run.open(tmp_path / "run", "network", Config()) as run:
        found, labels = Classification(run, logits, source, PROCESS).scores({})
    expected = np.stack([PROCESS(np.asarray(example.image)).reshape(-1)[:2] for example in source])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert labels.tolist() == [index % 2 for index in range(COUNT)]
