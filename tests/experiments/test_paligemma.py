"""PaliGemma's experiment on a few scenes: where it may begin, what it learns from, and what it answers."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from experiments import paligemma, siglip
from jaxdl import launch, pretrained
from jaxdl.data import ANNOTATED_IMAGES, AnnotatedImage, Boxes
from jaxdl.data.location_tokens import WORDS
from jaxdl.data.prompts import PromptProcessor
from jaxdl.data.scenes import SHAPES
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.models.siglip import image_processor
from jaxdl.nn import unstack_blocks
from jaxdl.tasks.vision_language import Question
from jaxdl.training import Execution, TrainState, load_run
from jaxdl.weights import flatten_dict

TINY = dict(
    steps=2, batch_size=2, resolution=16, patch_size=8, width=16, depth=1, num_heads=2, text_width=16, text_depth=1, text_heads=2,
    head_width=4, evaluate_every=2, eval_examples=3, pretrain=0,
)  # fmt: skip
DEFAULT = paligemma.PRESETS["default"]


def train(workdir: Path, execution: Execution = Execution(), **values) -> dict:
    return launch.run(paligemma.EXPERIMENT, dataclasses.replace(DEFAULT, **TINY | values), workdir, execution)


def example(number: int = 0) -> AnnotatedImage:
    return ANNOTATED_IMAGES.open("builtin:scenes")[1][number]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run in which an image tower learned first, and an export of it."""
    workdir = tmp_path_factory.mktemp("finished")
    train(workdir / "run", Execution(export=str(workdir / "published")), pretrain=1, freeze=1.0)
    return workdir


def test_a_run_leaves_scores_answers_and_figures(finished):
    result = json.loads((finished / "run" / "result.json").read_text())
    scores = {"answer_exact_match", "caption_exact_match", "detect_mean_iou", "detect_above_half"}
    assert result["metrics"].keys() == {"validation_loss", *scores}
    figures = {path.name for path in (finished / "run" / "figures").iterdir()}
    assert {"answers.png", "boxes.png"} <= figures
    assert (finished / "run" / "answers.txt").read_text().count("\n  right  ") == 9


def test_without_a_tower_one_learns_first_and_the_run_begins_with_it_and_goes_on_to_the_same_bits(finished):
    tower = load_run(finished / "run" / "tower", paligemma.TowerConfig)
    assert (tower.experiment, tower.config.steps, tower.config.width) == ("paligemma_tower", 1, 16)
    learned = load_run(finished / "run").variables["params"]
    found, begun = (flatten_dict(params["vision"], sep="/") for params in (learned, tower.variables["params"]))
    assert found.keys() == {path for path in begun if not path.startswith("head/")}
    assert all((found[path] == begun[path]).all() for path in found)  # It was frozen.
    before = json.loads((finished / "run" / "result.json").read_text())
    assert train(finished / "run", pretrain=1, freeze=1.0)["parameters_sha256"] == before["parameters_sha256"]


def test_a_finished_run_answers_and_stays_as_it_is(finished, tmp_path, capsys):
    Image.fromarray(example().image).save(tmp_path / "scene.png")
    before = (finished / "run" / "result.json").read_text()
    asked = (str(tmp_path / "scene.png"), "what color is the ring?", "detect ring")
    assert train(finished / "run", pretrain=1, freeze=1.0, ask=asked) == json.loads(before)
    said = capsys.readouterr().out
    assert "answer en what color is the ring?\n  → " in said and "\ndetect ring\n  → " in said
    assert (finished / "run" / "result.json").read_text() == before


def test_what_a_run_has_learned_is_exported_and_is_where_another_begins(finished, tmp_path):
    learned = load_run(finished / "run").variables["params"]
    module, params = pretrained.load(finished / "published", paligemma.PaliGemma)
    jax.tree.map(np.testing.assert_array_equal, params, learned)
    process, prompts = pretrained.load_processors(finished / "published")
    assert prompts.image_token == module.image_token and prompts.vocab_size == module.text.vocab_size and process.size == (16, 16)
    metrics = [train(tmp_path / name, init=str(finished / name), steps=0)["metrics"] for name in ("run", "published")]
    assert metrics[0] == metrics[1] == json.loads((finished / "run" / "result.json").read_text())["metrics"]


def test_it_learns_from_captions_and_from_questions_of_ones_own(tmp_path, caption_folder):
    metrics = train(tmp_path / "captions", data=f"folder:{caption_folder}/train", captions="any")["metrics"]
    assert metrics.keys() == {"validation_loss", "caption_exact_match", "caption_bleu"}
    for split in ("train", "val"):
        (tmp_path / "own" / split).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "own" / split / "a.png")
        rows = [["how dark is it?", "very"]], [["detect dot", "<loc0001><loc0001><loc0009><loc0009> dot"]]
        lines = [json.dumps({"file_name": "a.png", "questions": questions}) for questions in rows]
        (tmp_path / "own" / split / "metadata.jsonl").write_text("\n".join(lines))
    own = f"folder:{tmp_path}/own"
    metrics = train(tmp_path / "run", data=own, augment="crop")["metrics"]
    assert metrics.keys() == {"validation_loss", "answer_exact_match", "detect_mean_iou", "detect_above_half"}
    assert (tmp_path / "run" / "figures" / "boxes.png").exists()
    with pytest.raises(UserError, match=r"own: its images have nothing for --tasks caption: choose other data"):
        train(tmp_path / "caption", data=own, tasks=("caption",))
    with pytest.raises(UserError, match=r"no captioned images.*--tower names one.*, --pretrain 0 does without"):
        train(tmp_path / "first", data=own, pretrain=1)


def test_questions_are_about_what_augmentation_has_left():
    """The thing on the left half is in a mirrored image on the right; where a crop has cut it off, the image stays whole."""
    config = dataclasses.replace(DEFAULT, tasks=("detect",), augment="flip")
    left = Boxes(np.array([[0, 0.25, 0.5, 0.75]], np.float32), np.array([3], np.int32))
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4] = 255
    arrays = lambda image, question: {"bright": np.array(image[0, 0, 0] == 255), "answer": np.array(question.answers[0])}
    how, random = dict(config=config, classes=SHAPES, arrays=arrays), np.random.default_rng(0)
    drawn = [paligemma.draw_row(AnnotatedImage(image, boxes=left), random, **how) for _ in range(40)]
    answers = {True: "<loc0256><loc0000><loc0768><loc0512> ring", False: "<loc0256><loc0512><loc0768><loc1023> ring"}
    assert {bool(row["bright"]) for row in drawn} == {True, False} and all(
        row["answer"] == answers[bool(row["bright"])] for row in drawn
    )
    corner = Boxes(np.array([[0, 0, 0.02, 0.02]], np.float32), np.array([3], np.int32))
    how["config"] = dataclasses.replace(config, augment="crop")
    drawn = [paligemma.draw_row(AnnotatedImage(np.zeros((64, 64, 3), np.uint8), boxes=corner), random, **how) for _ in range(40)]
    assert "<loc0000><loc0000><loc0020><loc0020> ring" in {str(row["answer"]) for row in drawn}


def test_an_example_without_a_question_is_a_mistake_in_the_data():
    config = dataclasses.replace(DEFAULT, tasks=("answer",))
    with pytest.raises(UserError, match="an example of builtin:scenes has nothing for --tasks answer"):
        image = AnnotatedImage(example().image, ("a ring",))
        paligemma.draw_row(image, np.random.default_rng(0), config=config, classes=(), arrays=lambda image, question: {})


def test_the_loss_is_that_of_the_answers_alone():
    config = dataclasses.replace(DEFAULT, **TINY)
    prompts = PromptProcessor.extending(Tokenizer.train(["what color is the ring red blue circle"], 100), 4, WORDS)
    module = paligemma.build(config, paligemma.initial_parts(config, "").vision, prompts)
    asked = [Question("answer", "what color is the ring", ("red",)), Question("answer", "is", ("blue circle ring",))]
    rows = [paligemma.row(example().image, each, process=image_processor(16), prompts=prompts, length=24) for each in asked]
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    params = module.init(jax.random.key(0), batch["image"], batch["tokens"], batch["prefix"])["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, {}, jax.random.key(0))
    value, _ = paligemma.objective(module, params, state, batch, jax.random.key(0))
    logits = module.apply({"params": params}, batch["image"], batch["tokens"], batch["prefix"]).logits
    logits = np.asarray(logits, np.float64)
    expected = []
    for row, each in enumerate(asked):
        wanted = [*prompts.model.encode(each.answers[0], add_special_tokens=False).ids, prompts.end]
        first = int(batch["prefix"][row])
        scores = logits[row, first - 1 : first - 1 + len(wanted)]
        log_probabilities = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        expected.append(-log_probabilities[np.arange(len(wanted)), wanted].mean())
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(paligemma.answer_losses(module, {"params": params}, batch), expected, rtol=1e-5)
    other = dict(batch, tokens=jnp.where(jnp.arange(24) < batch["prefix"][:, None] + 6, batch["tokens"], 5))
    np.testing.assert_array_equal(paligemma.objective(module, params, state, other, jax.random.key(0))[0], value)


def test_an_image_tower_of_a_run_of_siglip_is_where_it_begins_and_it_learns_after_its_share_of_the_steps(finished, tmp_path):
    sizes = dict(resolution=16, patch_size=8, width=16, depth=1, num_heads=2, text_width=16, text_length=6)
    small = dict(batch_size=4, eval_examples=4, vocab_size=300, steps=1)
    config = dataclasses.replace(siglip.PRESETS["default"], **sizes, **small, scan_layers=True)
    launch.run(siglip.EXPERIMENT, config, tmp_path / "siglip")
    learned = unstack_blocks(load_run(tmp_path / "siglip").variables["params"])["vision"]
    expected = {name: part for name, part in learned.items() if name != "head"}
    parts = paligemma.initial_parts(dataclasses.replace(DEFAULT, **TINY), str(tmp_path / "siglip"))
    assert parts.side == 16 and not parts.vision.head and not parts.vision.scan
    jax.tree.map(np.testing.assert_array_equal, parts.params["vision"], expected)
    train(tmp_path / "staged", tower=str(tmp_path / "siglip"), freeze=0.5)
    found = load_run(tmp_path / "staged").variables["params"]["vision"]
    assert not (found["patches"]["projection"]["kernel"] == expected["patches"]["projection"]["kernel"]).all()
    with pytest.raises(UserError, match=r"the weights are those of a PaliGemma: give those of a SigLIP"):
        train(tmp_path / "other", tower=str(finished / "run"))


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A small PaliGemma with random weights, in the files in which one is published."""
    directory, random = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    text = PromptProcessor.extending(Tokenizer.train(["what color is the ring red blue circle"], 100), 4, WORDS)
    text.save(directory)
    shapes = {"patches": (12, 3, 8, 8), "positions": (4, 12), "tokens": (text.vocab_size, 16)}
    names = {
        "patches": "vision_tower.embeddings.patch_embedding.weight",
        "positions": "vision_tower.embeddings.position_embedding.weight",
        "tokens": "language_model.model.embed_tokens.weight",
    }
    tensors = {names[name]: shape for name, shape in shapes.items()} | {"vision_tower.embeddings.patch_embedding.bias": (12,)}
    linear = lambda name, out, width, bias: {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})
    layer = "vision_tower.encoder.layers.0"
    for name in (f"{layer}.layer_norm1", f"{layer}.layer_norm2", "vision_tower.post_layernorm"):
        tensors |= {f"{name}.weight": (12,), f"{name}.bias": (12,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        tensors |= linear(f"{layer}.self_attn.{name}", 12, 12, True)
    tensors |= linear(f"{layer}.mlp.fc1", 20, 12, True) | linear(f"{layer}.mlp.fc2", 12, 20, True)
    tensors |= linear("multi_modal_projector.linear", 16, 12, True)
    layer = "language_model.model.layers.0"
    for name in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "language_model.model.norm"):
        tensors[f"{name}.weight"] = (16,)
    for name, out in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
        tensors |= linear(f"{layer}.self_attn.{name}", out, 16, False)
    tensors |= linear(f"{layer}.self_attn.o_proj", 16, 8, False) | linear(f"{layer}.mlp.gate_proj", 24, 16, False)
    tensors |= linear(f"{layer}.mlp.up_proj", 24, 16, False) | linear(f"{layer}.mlp.down_proj", 16, 24, False)
    save_file(
        {name: random.standard_normal(shape, np.float32) for name, shape in tensors.items()}, directory / "model.safetensors"
    )
    vision = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    decoder = dict(
        model_type="gemma", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        intermediate_size=24, vocab_size=text.vocab_size,
    )  # fmt: skip
    config = dict(
        model_type="paligemma", projection_dim=16, image_token_index=text.image_token, vision_config=vision, text_config=decoder
    )
    (directory / "config.json").write_text(json.dumps(config))
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}, "image_seq_length": 4}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    return directory


def test_published_weights_answer_without_training(published, tmp_path, capsys):
    Image.fromarray(example().image).save(tmp_path / "scene.png")
    config = dataclasses.replace(
        paligemma.PRESETS["published"],
        init=str(published),
        length=8,
        precision="f32",
        ask=(str(tmp_path / "scene.png"), "what color is the ring?"),
    )
    assert launch.run(paligemma.EXPERIMENT, config, tmp_path / "run") == {}
    assert "answer en what color is the ring?\n  → " in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


def test_published_weights_are_where_fine_tuning_begins(published, tmp_path):
    found = train(tmp_path / "run", init=str(published), freeze=1.0, length=48)
    assert np.isfinite(found["metrics"]["validation_loss"]) and not (tmp_path / "run" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(ask=("scene.png",)), "--ask wants an image file and at least one question"),
        (dict(ask=("nowhere.png", "what is it?")), r"nowhere\.png does not exist"),
        (dict(init="a", tower="b"), "give one of them"),
        (dict(init="/nowhere"), "there is no directory /nowhere"),
        (dict(tower="/nowhere"), "there is no directory /nowhere"),
        (dict(tasks=("detect",), data="builtin:digits"), "have nothing for --tasks detect"),
        (dict(length=4), r"give more \(--length\)"),
        (dict(num_heads=3), "cannot be split into 3 heads"),
    ],
)
def test_bad_input_is_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **values)
