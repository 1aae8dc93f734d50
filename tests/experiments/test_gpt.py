"""The experiment on a text of a few hundred characters."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from published_siglip import write_published_siglip
from tiny_siglip import ROOT

from experiments import gpt
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.models.gpt2 import VARIANTS
from jaxdl.training import Execution, Layout, data_mesh, start

TINY = dict(steps=2, batch_size=4, length=16, width=16, depth=2, num_heads=2, evaluate_every=1, tokens=30)


@pytest.fixture
def book(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 800)))
    return f"folder:{file}"


def test_two_steps_leave_what_a_run_leaves_and_the_finished_model_answers_another_prompt(tmp_path, book):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "experiments.gpt", "--workdir", tmp_path / "run", "--data", book, *flags]

    def run(*more):
        return subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"].keys() == {"validation_loss", "bits_per_character"}
    assert np.isclose(result["metrics"]["bits_per_character"], result["metrics"]["validation_loss"] / np.log(2))
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*")}
    assert {"sample.txt", "tokenizer.json", "tokens.npy", "figures/attention.png", "figures/learning_curves.png"} <= files
    again = run("--prompt=abc abc", "--tokens=5")
    assert again.returncode == 0, again.stderr
    prompt, _, written = (tmp_path / "run" / "sample.txt").read_text().partition("\n--- written:\n")
    assert prompt == "abc abc" and written.removesuffix("\n") in again.stdout
    assert len(written) == 6 or (len(written) < 6 and "--- the end" in again.stdout)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["parameters_sha256"] == result["parameters_sha256"]


@pytest.mark.parametrize(
    "how", [dict(tokenizer="bytes", vocabulary=300), dict(scan_layers=True, attention="flash", optimizer="adamw")]
)
def test_it_runs_with_other_settings(tmp_path, book, how):
    result = gpt.main(gpt.Config(data=book, **TINY | how), tmp_path / "run", Execution())
    assert np.isfinite(result["metrics"]["validation_loss"])


def test_unread_text_costs_a_uniform_guess_what_it_must(tmp_path, book):
    """At a learning rate of almost 0 the logits are almost 0, and each of the characters is as likely."""
    result = gpt.main(gpt.Config(data=book, **TINY | dict(learning_rate=1e-9)), tmp_path / "run", Execution())
    assert np.isclose(result["metrics"]["validation_loss"], np.log(13), atol=0.05)  # Ten characters and three marks.


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(data="builtin:pithon"), "did you mean 'python'"),
        (dict(data=""), "there is no --data: name the text"),
        (dict(length=100), "80 tokens has no piece of 101"),
        (dict(num_heads=3), "cannot be split into 3 heads"),
        (dict(init="/nowhere"), "there is no directory /nowhere"),
        (dict(temperature=-1.0), "--temperature"),
    ],
)
def test_bad_input_is_refused(tmp_path, book, how, message):
    with pytest.raises(UserError, match=message):
        gpt.main(gpt.Config(**dict(data=book, **TINY) | how), tmp_path / "run", Execution())


def test_texts_that_say_nothing_are_no_prompt(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("abcdefgh "), 300))
    for name, written in {"train/a.py": text, "val/__init__.py": "", "val/b.py": "a", "val/c.py": text[::-1]}.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(written)
    gpt.main(gpt.Config(data=f"folder:{tmp_path / 'texts'}", **TINY), tmp_path / "run", Execution())
    prompt, *_ = (tmp_path / "run" / "sample.txt").read_text().partition("\n--- written:\n")
    assert prompt == text[::-1][:8]  # Half of the positions.


def test_no_more_of_the_held_out_text_is_measured_than_is_asked_for(tmp_path, book):
    with pytest.raises(UserError, match="10 tokens has no piece of 17"):
        gpt.main(gpt.Config(data=book, eval_characters=10, **TINY), tmp_path / "run", Execution())


@pytest.fixture
def published(tmp_path, book):
    """A small GPT-2 as it is published, nowhere near where training begins, and the model itself."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_positions=24, n_embd=16, n_layer=2, n_head=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "published")
    Tokenizer.of_bytes([read(book)], 300).save(tmp_path / "published")
    return tmp_path / "published", model.eval()


def read(book: str) -> str:
    with open(book.removeprefix("folder:")) as file:
        return file.read()


STILL = dict(learning_rate=1e-12, weight_decay=0.0)
"""Training that changes nothing."""


def test_fine_tuning_begins_with_published_weights_and_their_tokenizer(tmp_path, book, published):
    directory, model = published
    how = dict(init=str(directory), data=book, steps=2, batch_size=4, accumulate=2, length=16, tokens=30, precision="f32")
    config = dataclasses.replace(gpt.PRESETS["finetune"], **how, **STILL)
    found = gpt.main(config, tmp_path / "run", Execution())
    assert not (tmp_path / "run" / "tokenizer.json").exists()

    torch = pytest.importorskip("torch")
    (tokens,) = Tokenizer.load(directory).encode([read(book)[-80:]])
    pieces = torch.tensor(np.stack([tokens[i : i + 17] for i in range(0, len(tokens) - 16, 16)]), dtype=torch.long)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(pieces[:, :-1]).logits.flatten(0, 1), pieces[:, 1:].flatten()).item()
    np.testing.assert_allclose(found["metrics"]["validation_loss"], expected, rtol=1e-4)
    bits = expected / np.log(2) * len(tokens) / 80
    np.testing.assert_allclose(found["metrics"]["bits_per_character"], bits, rtol=1e-4)


def test_fine_tuning_begins_with_what_another_run_has_learned(tmp_path, book):
    first = gpt.main(gpt.Config(data=book, scan_layers=True, **TINY), tmp_path / "first", Execution())
    how = TINY | STILL | dict(width=999, data=book)  # Sizes are those of the run.
    second = gpt.main(gpt.Config(init=str(tmp_path / "first"), **how), tmp_path / "second", Execution())
    np.testing.assert_allclose(*(run["metrics"]["validation_loss"] for run in (first, second)), rtol=1e-5)
    begun, gone_on = (gpt.learned(str(tmp_path / name)) for name in ("first", "second"))
    assert begun[0].clone(scan=False) == gone_on[0].clone(scan=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), begun[1], gone_on[1])


def test_what_is_no_gpt_and_a_tokenizer_of_another_one_are_refused(tmp_path, book, published):
    (tmp_path / "siglip").mkdir()
    write_published_siglip(tmp_path / "siglip")
    how = dict(data=book, **TINY)
    with pytest.raises(UserError, match="those of a SigLIP: give those of a GPT"):
        gpt.main(gpt.Config(init=str(tmp_path / "siglip"), **how), tmp_path / "one", Execution())
    Tokenizer.of_bytes(["abc " * 100, "🙂" * 90, read(book) * 3], 400).save(published[0])
    with pytest.raises(UserError, match="its tokenizer and its weights do not belong together"):
        gpt.main(gpt.Config(init=str(published[0]), **how), tmp_path / "two", Execution())


@pytest.mark.parametrize("preset", [name for name, config in gpt.PRESETS.items() if not config.init])
def test_a_step_of_every_preset_can_be_made(preset):
    """With shapes alone. Blocks are scanned, which changes nothing about them, so that one of them is traced."""
    config = dataclasses.replace(gpt.PRESETS[preset], scan_layers=True)
    vocabulary = 50_257 if config.variant else 100
    module = gpt.build(config, vocabulary)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.length + 1), jnp.int32)

    def first_step(tokens):
        layout = Layout("jit", data_mesh(jax.devices()[:1]))
        init = lambda key: module.init(key, tokens[:1, :-1])
        step, state = start(config, layout, functools.partial(gpt.loss, module), functools.partial(gpt.optimizer, config), init)
        return step(state, {"tokens": tokens})

    state, metrics = jax.eval_shape(first_step, tokens)
    assert metrics["loss"].shape == () and state.params["positions"].shape == (config.length, module.width)
    if config.variant:
        row = dataclasses.asdict(VARIANTS[config.variant])
        assert row == {name: getattr(module, name) for name in row}
        assert config.steps * config.batch_size * config.length == 294_912_000_000
        assert not config.data and config.batch_size % (8 * config.accumulate) == 0


def test_b2_is_that_of_adam():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    gradients = [jax.tree.map(lambda leaf: leaf * scale, params) for scale in (1.0, -0.1)]
    config = gpt.PRESETS["gpt2_124m"]

    def after(optimizer: optax.GradientTransformation) -> dict:
        state = optimizer.init(params)
        for each in gradients:
            updates, state = optimizer.update(each, state, params)
        return updates

    schedule = optax.constant_schedule(1e-3)
    wanted = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask={"kernel": True, "bias": False})
    jax.tree.map(np.testing.assert_array_equal, after(gpt.optimizer(config, schedule)), after(wanted))
