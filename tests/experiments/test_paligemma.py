"""PaliGemma's experiment on a few scenes: its tasks, its marks, where it may begin, and what it answers."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from tiny_siglip import ROOT

from experiments import paligemma, siglip
from jaxdl.data import open_source
from jaxdl.data.paligemma import TextProcessor, boxes
from jaxdl.data.scenes import scene
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.training import Execution, load_run
from jaxdl.weights import flatten_dict

TINY = dict(
    steps=2, batch_size=2, resolution=16, patch=8, width=16, depth=1, num_heads=2, text_width=16, text_depth=1, text_heads=2,
    head_width=4, evaluate_every=1, eval_examples=3, pretrain=0,
)  # fmt: skip


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.paligemma", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def train(workdir: Path, **how) -> dict:
    return paligemma.main(paligemma.Config(**TINY | how), workdir, Execution())


def example(number: int = 0) -> dict:
    return open_source("builtin:scenes", "test", fields=paligemma.FIELDS)[number]


def test_two_steps_leave_what_a_run_leaves_and_the_finished_model_answers(tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    done = run("--workdir", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    marks = {"answer_exact_match", "caption_exact_match", "detect_mean_iou", "detect_above_half"}
    assert result["metrics"].keys() == {"validation_loss", *marks}
    pictures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert pictures == {"learning_curves.png", "answers.png", "boxes.png"}
    assert (tmp_path / "run" / "answers.txt").read_text().count("\n  right  ") == 9
    Image.fromarray(example()["image"]).save(tmp_path / "scene.png")
    again = run("--workdir", tmp_path / "run", *flags, "--ask", tmp_path / "scene.png", "what color is the ring?", "detect ring")
    assert again.returncode == 0, again.stderr
    assert "answer en what color is the ring?\n  → " in again.stdout and "\ndetect ring\n  → " in again.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def test_it_runs_with_other_settings(tmp_path):
    how = dict(scan_layers=True, attention="flash", remat=True, optimizer="adamw", precision="bf16", dropout=0.1)
    assert np.isfinite(train(tmp_path, **how)["metrics"]["validation_loss"])


def test_it_learns_from_captions_from_questions_of_ones_own_and_from_labels(tmp_path, caption_folder):
    metrics = train(tmp_path / "captions", data=f"folder:{caption_folder}/train", captions="any")["metrics"]
    assert metrics.keys() == {"validation_loss", "caption_exact_match", "caption_bleu"}
    metrics = train(tmp_path / "digits", data="builtin:digits")["metrics"]
    assert metrics.keys() == {"validation_loss", "answer_exact_match"}
    for split in ("train", "val"):
        (tmp_path / "own" / split).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "own" / split / "a.png")
        rows = [["how dark is it?", "very"]], [["detect dot", "<loc0001><loc0001><loc0009><loc0009> dot"]]
        lines = [json.dumps({"file_name": "a.png", "questions": questions}) for questions in rows]
        (tmp_path / "own" / split / "metadata.jsonl").write_text("\n".join(lines))
    own = f"folder:{tmp_path}/own"
    detected = {"validation_loss", "detect_mean_iou", "detect_above_half"}
    assert train(tmp_path / "run", data=own)["metrics"].keys() == {"answer_exact_match", *detected}
    assert (tmp_path / "run" / "figures" / "boxes.png").exists()
    assert train(tmp_path / "detect", data=own, tasks=("detect",))["metrics"].keys() == detected
    with pytest.raises(UserError, match=r"own has nothing for --tasks caption: choose others"):
        train(tmp_path / "caption", data=own, tasks=("caption",))
    with pytest.raises(UserError, match=r"neither captions nor labels: .*--tower names one.*, --pretrain 0 does without"):
        train(tmp_path / "first", data=own, pretrain=1)


def test_the_tasks_of_a_scene_are_true():
    for number in range(20):
        things = scene(1, number).things
        tasks = paligemma.tasks(example(number), paligemma.Config(), ())
        (caption,) = (task for task in tasks if task.kind == "caption")
        assert caption.question == "caption en" and caption.answers[0] == example(number)["text"][0]
        detected = {task.question: boxes(task.answers[0]) for task in tasks if task.kind == "detect"}
        assert detected.keys() == {f"detect {thing.shape}" for thing in things}
        for question, (found, names) in detected.items():
            shape = question.removeprefix("detect ")
            those = [thing for thing in things if thing.shape == shape]
            assert names == [shape] * len(those)
            expected = [(t.y - t.radius, t.x - t.radius, t.y + t.radius, t.x + t.radius) for t in those]
            np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=1 / 1024)
        answers = {task.question: task.answers for task in tasks if task.kind == "answer"}
        assert all(question.startswith("answer en ") and question.endswith("?") for question in answers)


def test_every_kind_is_drawn_as_often_as_the_others():
    config, rng = paligemma.Config(), np.random.default_rng(0)
    kinds = [paligemma.draw_task(example(), rng, config=config, classes=())[1].kind for _ in range(600)]
    assert all(abs(kinds.count(kind) - 200) < 50 for kind in paligemma.KINDS)
    only = paligemma.Config(tasks=("detect",))
    assert {paligemma.draw_task(example(), rng, config=only, classes=())[1].kind for _ in range(20)} == {"detect"}


def test_an_example_without_a_task_is_a_mistake_in_the_data():
    with pytest.raises(UserError, match="an example of builtin:scenes has nothing for --tasks answer"):
        picture = {"image": example()["image"], "text": ("a ring",)}
        paligemma.draw_task(picture, np.random.default_rng(0), config=paligemma.Config(tasks=("answer",)), classes=())


def test_the_loss_is_that_of_the_answers_alone(tmp_path):
    config = paligemma.Config(**TINY)
    text = TextProcessor.extending(Tokenizer.train(["what color is the ring red blue circle"], 100), 4)
    module = paligemma.build(config, paligemma.begin(config).vision, text)
    process = paligemma.ImageProcessor.preset("siglip", 16)
    tasks = [paligemma.Task("answer", "what color is the ring", ("red",)), paligemma.Task("answer", "is", ("blue circle ring",))]
    rows = [paligemma.row(example()["image"], task, process=process, text=text, length=24) for task in tasks]
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    params = module.init(jax.random.key(0), batch["image"], batch["tokens"], batch["prefix"])["params"]
    value, _ = paligemma.loss(module, params, {}, batch, jax.random.key(0))
    logits = module.apply({"params": params}, batch["image"], batch["tokens"], batch["prefix"]).logits
    logits = np.asarray(logits, np.float64)
    expected = []
    for row, task in enumerate(tasks):
        wanted = [*text.model.encode(task.answers[0], add_special_tokens=False).ids, text.end]
        first = int(batch["prefix"][row])
        scores = logits[row, first - 1 : first - 1 + len(wanted)]
        chances = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        expected.append(-chances[np.arange(len(wanted)), wanted].mean())
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(paligemma.losses(module, {"params": params}, batch), expected, rtol=1e-5)
    other = dict(batch, tokens=jnp.where(jnp.arange(24) < batch["prefix"][:, None] + 6, batch["tokens"], 5))
    np.testing.assert_array_equal(paligemma.loss(module, params, {}, other, jax.random.key(0))[0], value)


def test_marks_are_those_that_one_would_give():
    task = paligemma.Task
    square = "<loc0000><loc0000><loc0512><loc0512> ring"
    exam = paligemma.Exam(
        [example()["image"]] * 6,
        [
            task("answer", "a?", ("red",)),
            task("answer", "b?", ("two",)),
            task("caption", "caption en", ("a red ring", "one ring")),
            task("detect", "detect ring", (square,)),
            task("detect", "detect ring", (f"{square} ; {square}",)),
            task("detect", "detect ring", (square,)),
        ],
    )
    most = "<loc0000><loc0000><loc0512><loc0384> ring"
    marks = exam.marks(["Red", "three", "one  ring", square, most, "nothing"])
    assert marks["answer_exact_match"] == 0.5 and marks["caption_exact_match"] == 1
    np.testing.assert_allclose(marks["detect_mean_iou"], (1 + 0.75 + 0 + 0) / 4, atol=1e-6)
    assert marks["detect_above_half"] == 0.5 and marks["caption_bleu"] < 100


def test_an_image_tower_of_a_run_of_siglip_is_where_it_begins_and_it_stays_while_it_is_frozen(tmp_path):
    tower = dict(resolution=16, patch=8, width=16, depth=1, num_heads=2)
    small = dict(text_width=16, text_depth=1, text_length=6, batch_size=4, eval_examples=4, vocabulary=300, steps=1)
    siglip.main(siglip.Config(**tower, **small), tmp_path / "siglip", Execution())
    begun = load_run(tmp_path / "siglip")[1]["params"]["vision"]
    train(tmp_path / "frozen", tower=str(tmp_path / "siglip"), freeze=1.0)
    train(tmp_path / "staged", tower=str(tmp_path / "siglip"), freeze=0.5)
    expected = flatten_dict({name: part for name, part in begun.items() if name != "head"})
    for name, same in (("frozen", True), ("staged", False)):
        found = flatten_dict(load_run(tmp_path / name)[1]["params"]["vision"])
        assert found.keys() == expected.keys()
        assert all((found[path] == expected[path]).all() for path in expected) is same
    with pytest.raises(UserError, match=r"is a run of experiments\.paligemma: give one of experiments\.siglip"):
        train(tmp_path / "other", tower=str(tmp_path / "frozen"))


def test_without_a_tower_a_run_of_siglip_makes_one_first(tmp_path):
    how = dict(pretrain=1, freeze=1.0, width=24, num_heads=3)
    first = train(tmp_path / "run", **how)
    tower = load_run(tmp_path / "run" / "tower")
    assert (tower[0]["experiment"], tower[0]["config"]["steps"], tower[0]["config"]["width"]) == ("siglip", 1, 24)
    found = load_run(tmp_path / "run")[1]["params"]["vision"]
    np.testing.assert_array_equal(found["positions"]["table"], tower[1]["params"]["vision"]["positions"]["table"])
    assert train(tmp_path / "run", **how)["parameters_sha256"] == first["parameters_sha256"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A small PaliGemma with random weights, in the files in which one is published."""
    directory, random = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    text = TextProcessor.extending(Tokenizer.train(["what color is the ring red blue circle"], 100), 4)
    text.save(directory)
    shapes = {"patches": (12, 3, 8, 8), "positions": (4, 12), "tokens": (text.vocabulary, 16)}
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
        intermediate_size=24, vocab_size=text.vocabulary,
    )  # fmt: skip
    config = dict(
        model_type="paligemma", projection_dim=16, image_token_index=text.image, vision_config=vision, text_config=decoder
    )
    (directory / "config.json").write_text(json.dumps(config))
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}, "image_seq_length": 4}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    return directory


def test_published_weights_answer_without_training(published, tmp_path):
    Image.fromarray(example()["image"]).save(tmp_path / "scene.png")
    flags = ["--preset=published", "--init", published, "--length=8", "--precision=f32"]
    done = run("--workdir", tmp_path / "run", *flags, "--ask", tmp_path / "scene.png", "what color is the ring?")
    assert done.returncode == 0, done.stderr
    assert "answer en what color is the ring?\n  → " in done.stdout


def test_published_weights_are_where_fine_tuning_begins(published, tmp_path):
    found = train(tmp_path / "run", init=str(published), freeze=1.0, length=48)
    assert np.isfinite(found["metrics"]["validation_loss"]) and not (tmp_path / "run" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(ask=("scene.png",)), "--ask wants an image file and at least one question"),
        (dict(steps=0), "--steps 0 trains nothing"),
        (dict(init="a", tower="b"), "give one of them"),
        (dict(init="/nowhere"), "there is no directory /nowhere"),
        (dict(tower="/nowhere"), "there is no directory /nowhere"),
        (dict(tasks=("detect",), data="builtin:digits"), "has nothing for --tasks detect"),
        (dict(length=4), r"give more \(--length\)"),
        (dict(num_heads=3), "cannot be split into 3 heads"),
        (dict(freeze=1.5), "--freeze"),
    ],
)
def test_bad_input_is_refused(tmp_path, how, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **how)


def test_an_image_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png does not exist"):
        train(tmp_path / "run", ask=("nowhere.png", "what is it?"))
    assert not (tmp_path / "run").exists()
