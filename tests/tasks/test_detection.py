"""Detection: boxes that follow their images, padded batches, and average precision of an oracle, of a constant and of nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxdl import launch
from jaxdl.data import AnnotatedImage, Boxes, Subset
from jaxdl.data.augment import random_crop
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.metrics import constant_detections
from jaxdl.tasks.detection import Detection, DetectionFields, Prepare, detection_batches, letterbox, open_boxes
from jaxdl.training import Aux, Run, configured, setup_training, train


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, DetectionFields):
    """Of a detector without a size."""


CONFIG = Config(data="builtin:crowded", steps=2, batch_size=4, resolution=48, max_boxes=5)
COUNT = 6
KEY = jax.random.key(0)


def white_box(height: int, width: int) -> AnnotatedImage:
    """Black with a white rectangle, and the box around it."""
    image = np.zeros((height, width, 3), np.uint8)
    image[4 : height // 2, 6 : width // 2] = 255
    return AnnotatedImage(image, boxes=Boxes.around(image[None, ..., 0] > 0, np.array([1], np.int32)))


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (40, 40), (31, 47)])
@pytest.mark.parametrize("size", [(96, 96), (64, 96)])
@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_boxes_stay_around_what_they_were_around(shape, size, fit):
    prepare = Prepare(ImageProcessor(size, (0.0,) * 3, (1.0,) * 3, resample="nearest"), fit)
    row = prepare.row(white_box(*shape))
    assert row["image"].shape == (*size, 3) and row["boxes"]["labels"].tolist() == [1]
    seen = Boxes.around(row["image"][None, ..., 0] > 0.5, np.array([1], np.int32)).xyxy
    np.testing.assert_allclose(row["boxes"]["xyxy"], seen, atol=1.01 / min(size))
    (left, top, right, bottom), (height, width) = seen[0] * np.tile(size[::-1], 2), shape
    aspect = (width // 2 - 6) / (height // 2 - 4)
    if fit == "letterbox":
        assert (right - left) / (bottom - top) == pytest.approx(aspect, rel=0.12)


def test_a_letterboxed_image_fills_one_of_the_sides_and_lies_in_the_middle():
    example = AnnotatedImage(np.full((20, 40, 3), 255, np.uint8))
    boxed = letterbox(example, (64, 64)).image
    assert boxed.shape == (40, 40, 3) and (boxed[10:30] == 255).all() and not boxed[:10].any() and not boxed[30:].any()
    assert letterbox(example, (32, 64)).image is example.image or (letterbox(example, (32, 64)).image == 255).all()


@pytest.fixture
def run(tmp_path):
    with Run.open(tmp_path, "detector", CONFIG) as opened:
        yield opened


def sources(run: Run):
    """Thirty scenes to train on, and all that are held out."""
    train, held_out = open_boxes(run)
    return Subset(train, range(30)), held_out


def test_batches_are_padded_and_say_what_did_not_fit(run):
    source, _ = sources(run)
    prepare = Prepare(ImageProcessor.symmetric(32), "stretch")
    batch = next(detection_batches(run, source, prepare, 5))
    boxes = batch["boxes"]
    assert batch["image"].shape == (4, 32, 32, 3) and boxes["xyxy"].shape == (4, 5, 4) and boxes["labels"].shape == (4, 5)
    known = {example.boxes.xyxy[0].tobytes(): len(example.boxes) for example in source}
    for xyxy, valid, cut in zip(boxes["xyxy"], boxes["valid"], boxes["cut"]):
        assert valid.sum() + cut == known[xyxy[0].tobytes()] and not xyxy[~valid].any()
    beyond = lambda example, rng: example.window(1000, 1000, 48, 48)
    batch = next(detection_batches(run, source, prepare, 5, beyond))
    assert not batch["boxes"]["valid"].any() and not batch["boxes"]["cut"].any()
    batch = next(detection_batches(run, source, prepare, 5, lambda example, rng: random_crop(example, rng, (20, 20))))
    assert 0 < batch["boxes"]["xyxy"].max() <= 1 and batch["image"].shape == (4, 32, 32, 3)


def watched(kind: str, run: Run) -> tuple[Detection, Subset]:
    """An oracle, which knows the images, or what says the same of all."""
    source, held_out = sources(run)
    prepare = Prepare(ImageProcessor.symmetric(32))
    chosen = [held_out[int(index)] for index in np.linspace(0, len(held_out) - 1, COUNT)]
    constant = constant_detections([example.boxes for example in source])
    boxes = [constant] * COUNT if kind == "constant" else [example.boxes for example in chosen]
    most = max(map(len, boxes))
    pad = lambda array: np.concatenate([array, np.zeros((most - len(array), *array.shape[1:]), array.dtype)])
    table = {name: np.stack([pad(getattr(each, name)) for each in boxes]) for name in ("xyxy", "labels")}
    table["scores"] = np.stack([pad(getattr(each, "scores", np.ones(len(each), np.float32))) for each in boxes])
    known = np.stack([prepare.process(example.image) for example in chosen])

    def detect(variables, images):
        which = jnp.abs(images[:, None] - known).sum((2, 3, 4)).argmin(1)
        found = {name: jnp.asarray(values)[which] for name, values in table.items()}
        return found | {"scores": found["scores"] * variables["params"]["trust"]}

    return Detection(run, detect, source, held_out, prepare, count=COUNT, batch_size=4), source


def test_an_oracle_has_the_highest_precision_through_a_whole_run(run):
    detection, source = watched("oracle", run)
    batches = detection_batches(run, source, detection.prepare, CONFIG.max_boxes)

    def objective(params, state, batch, key):
        boxes = batch["boxes"]
        return (params["trust"] - 0.9) ** 2 * boxes["valid"].mean(), Aux({"cut": boxes["cut"].mean()})

    init = lambda key: {"params": {"trust": jnp.array(0.9)}}
    step, state = setup_training(CONFIG, run.layout, configured(CONFIG, objective, optax.sgd), init=init)
    parts = dict(evaluate=detection.evaluate, show=detection.show, conclude=detection.conclude)
    metrics = train(run, step, state, batches, **parts)["metrics"]
    assert [metrics[name] for name in ("ap", "ap50", "ap75", "recall")] == [1, 1, 1, 1]
    assert 0 < metrics["constant_ap"] < metrics["constant_ap50"] < 0.6
    with Image.open(run.figures / "boxes.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_a_constant_is_what_it_is_compared_with_and_nothing_finds_nothing(run):
    detection, _ = watched("constant", run)
    found, compared = detection.evaluate({"params": {"trust": 1.0}}, KEY), detection.conclude({}, KEY)
    assert {f"constant_{name}": value for name, value in found.items()} == compared and 0 < found["ap50"] < 1
    assert set(detection.evaluate({"params": {"trust": 0.0}}, KEY).values()) == {0.0}


def test_data_without_boxes_and_processors_that_crop_are_refused(tmp_path):
    config = dataclasses.replace(CONFIG, data="builtin:digits")
    with Run.open(tmp_path / "digits", "detector", config) as run, pytest.raises(UserError, match="have no boxes"):
        open_boxes(run)
    with pytest.raises(UserError, match="would lose boxes"):
        Prepare(ImageProcessor.symmetric(32, resize_mode="crop"))
