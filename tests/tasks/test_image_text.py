"""Images and texts that belong together: rows, retrieval, prompts of classes and of scenes, and the objective."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captioned import Listed
from PIL import Image

from jaxdl.data import CAPTIONED_IMAGES, CaptionedImage
from jaxdl.data.images import TEMPLATES
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.losses import sigmoid_loss, softmax_loss
from jaxdl.models import clip, siglip
from jaxdl.models.clip import CLIP
from jaxdl.models.siglip import image_processor
from jaxdl.tasks.image_text import (
    AUGMENTATIONS,
    TwoTowers,
    caption_texts,
    new_siglip,
    objective,
    row,
)
from jaxdl.tasks.retrieval import Inputs
from jaxdl.training import TrainState

SIZES = TwoTowers(resolution=16, width=16, depth=1, num_heads=2, text_width=24, text_length=6)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(image_processor(16), Tokenizer.train(["a red ring", "two blue dots"], 100), 6)


def test_of_an_examples_captions_each_is_drawn_as_often_as_the_others(inputs):
    example = CaptionedImage(np.zeros((8, 8, 3), np.uint8), ("a ring", "red", "two blue dots"))
    random = np.random.default_rng(0)
    rows = [row(example, random, augment=AUGMENTATIONS["none"], inputs=inputs) for _ in range(600)]
    counts = [sum((each["tokens"] == inputs.tokens([text])[0]).all() for each in rows) for text in example.captions]
    assert sum(counts) == 600 and all(abs(count - 200) < 50 for count in counts)
    assert rows[0]["image"].shape == (16, 16, 3) and (rows[0]["image"] == -1).all()


def test_a_crop_is_mirrored_half_of_the_time_and_keeps_at_least_half_of_the_area():
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, 0)
    random = np.random.default_rng(0)
    crops = [AUGMENTATIONS["crop"](CaptionedImage(ramp, ("a",)), random).image[..., 0] for _ in range(300)]
    mirrored = [crop[0, 0] > crop[0, -1] for crop in crops]
    assert 110 < sum(mirrored) < 190
    assert all(crop.size >= 0.48 * ramp.size for crop in crops) and len({crop.shape for crop in crops}) > 50


@pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])
def test_the_objective_is_the_loss_of_the_modules_output_in_its_order(loss, inputs):
    fields = SIZES.vision_fields()
    module = new_siglip(SIZES, inputs.tokenizer.vocab_size)
    if loss is softmax_loss:
        module = CLIP(clip.VisionTower(features=16, **fields), clip.TextTower(inputs.tokenizer.vocab_size, **SIZES.text_fields()))
    random = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(random.normal(size=(4, 16, 16, 3)), jnp.float32),
        "tokens": jnp.asarray(inputs.tokens(["a ring", "red", "two", "blue dots"])),
    }
    params = module.init(jax.random.key(0), batch["image"], batch["tokens"])["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, {}, jax.random.key(1))
    value, aux = objective(module, loss, params, state, batch, jax.random.key(1))
    logits = np.asarray(module.apply({"params": params}, batch["image"], batch["tokens"]).logits, np.float64)
    if loss is sigmoid_loss:
        expected = np.mean([sum(np.log1p(np.exp(-(1 if i == j else -1) * logits[i, j])) for j in range(4)) for i in range(4)])
        assert aux.metrics.keys() == {"logit_scale", "logit_bias"} and aux.metrics["logit_bias"] == -10
    else:
        own = np.diag(logits)
        expected = np.mean([np.log(np.exp(logits).sum(axis)) - own for axis in (0, 1)])
        assert aux.metrics.keys() == {"logit_scale"}
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["logit_scale"], np.exp(params["log_temperature"]), rtol=1e-6)


def test_a_tokenizer_is_trained_on_all_captions_and_on_those_of_classes_once():
    assert caption_texts(Listed([("a", "b"), ("a",)])) == ["a", "b", "a"]
    found = caption_texts(Listed([("small a",), ("small a",)], [0, 0], ("a",)))
    assert found == [*(text.format("a") for text in TEMPLATES), "small a"]


def test_a_folder_in_which_no_image_has_a_caption_is_refused(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / split / "a.png")
        line = json.dumps({"file_name": "a.png", "questions": [["what is it?", "noise"]]})
        (tmp_path / split / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match="no captioned images"):
        CAPTIONED_IMAGES.open(f"folder:{tmp_path}")


def test_sizes_are_those_of_the_towers():
    module = new_siglip(SIZES, 99, dropout=0.1)
    assert module.vision == siglip.VisionTower(8, 16, 1, 2, 64, dropout=0.1)
    assert module.text == siglip.TextTower(99, 24, 1, 2, 96, 16, dropout=0.1)
