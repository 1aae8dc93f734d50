"""The experiment on a text of a few hundred characters: what it costs, what it begins with, what it hands on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from published_siglip import write_published_siglip

from experiments import gpt
from jaxdl import launch
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.models.gpt2 import VARIANTS
from jaxdl.training import Execution, TrainState

TINY = dict(steps=2, batch_size=4, length=16, width=16, depth=2, num_heads=2, evaluate_every=2, tokens=30)
TEXT = "".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 800))


def config(book, **values):
    return dataclasses.replace(gpt.PRESETS["default"], **dict(data=book, **TINY) | values)


def run(config, directory, **execution):
    return launch.run(gpt.EXPERIMENT, config, directory, Execution(**execution))


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    return f"folder:{tmp_path / 'book.txt'}"


def test_a_finished_run_continues_a_prompt_and_its_result_stays(tmp_path, book, capsys):
    first = run(config(book), tmp_path / "run")
    capsys.readouterr()
    again = run(config(book, prompt="abc abc", tokens=5), tmp_path / "run")
    out = capsys.readouterr().out
    assert again == first
    prompt, _, written = (tmp_path / "run" / "sample.txt").read_text().partition("\n--- written:\n")
    assert prompt == "abc abc" and f"--- it is given:\nabc abc\n--- and writes:\n{written.removesuffix(chr(10))}" in out
    assert len(written) == 6 or (len(written) < 6 and "--- the end" in out)


def test_unread_text_costs_a_uniform_guess_what_it_must(tmp_path, book):
    """Before the first step the logits are almost 0, and each of the characters is as likely."""
    result = run(config(book, steps=0), tmp_path / "run")
    assert np.isclose(result["metrics"]["validation_loss"], np.log(13), atol=0.05)  # Ten characters and three marks.
    assert np.isclose(result["metrics"]["bits_per_character"], np.log2(13), atol=0.07)


def test_the_objective_predicts_each_next_token():
    module = gpt.GPT(7, 5, 8, 1, 2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 6)), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), tokens[:, :-1])["params"]
    state = TrainState(0, {}, {}, {}, jax.random.key(0))
    value, _ = jax.jit(functools.partial(gpt.objective, module))(params, state, {"tokens": tokens}, jax.random.key(0))
    logits = np.asarray(jax.jit(module.apply)({"params": params}, tokens[:, :-1]).logits, np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = [scores[row, place, tokens[row, place + 1]] for row in range(3) for place in range(5)]
    np.testing.assert_allclose(value, -np.mean(each), rtol=1e-5)


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
    Tokenizer.of_bytes([TEXT], 300).save(tmp_path / "published")
    return tmp_path / "published", model.eval()


def loss_in_torch(model, tokenizer) -> tuple[float, int]:
    """The mean loss of the held-out text in windows of 16 tokens, and how many tokens it has."""
    torch = pytest.importorskip("torch")
    (tokens,) = tokenizer.encode([TEXT[-80:]])
    pieces = torch.tensor(np.stack([tokens[i : i + 17] for i in range(0, len(tokens) - 16, 16)]), dtype=torch.long)
    with torch.no_grad():
        logits = model(pieces[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten()).item(), len(tokens)


def test_fine_tuning_begins_with_published_weights_and_their_tokenizer(tmp_path, book, published):
    directory, model = published
    how = dict(init=str(directory), data=book, steps=0, length=16, tokens=30, precision="f32")
    found = run(dataclasses.replace(gpt.PRESETS["finetune"], **how), tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    expected, tokens = loss_in_torch(model, Tokenizer.load(directory))
    np.testing.assert_allclose(found["metrics"]["validation_loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(found["metrics"]["bits_per_character"], expected / np.log(2) * tokens / 80, rtol=1e-4)


def test_fine_tuning_begins_with_what_another_run_has_learned(tmp_path, book):
    """And a third with that: sizes, tokenizer and weights are handed on."""
    first = run(config(book, scan_layers=True), tmp_path / "first")
    for before, name, steps in (("first", "second", 1), ("second", "third", 0)):
        still = dict(learning_rate=1e-12, weight_decay=0.0, steps=steps)
        found = run(config(book, init=str(tmp_path / before), width=999, **still), tmp_path / name)
        np.testing.assert_allclose(found["metrics"]["validation_loss"], first["metrics"]["validation_loss"], rtol=1e-5)


def test_an_exported_run_is_read_by_transformers(tmp_path, book):
    transformers = pytest.importorskip("transformers")
    how = dict(tokenizer="bytes", vocab_size=300, scan_layers=True)
    found = run(config(book, **how), tmp_path / "run", export=str(tmp_path / "out"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected, _ = loss_in_torch(model, Tokenizer.load(tmp_path / "out"))
    np.testing.assert_allclose(found["metrics"]["validation_loss"], expected, rtol=1e-5)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT[:40])["input_ids"] == Tokenizer.load(tmp_path / "run").encode([TEXT[:40]])[0].tolist()


def test_what_does_not_belong_together_is_refused(tmp_path, book, published):
    (tmp_path / "siglip").mkdir()
    write_published_siglip(tmp_path / "siglip")
    with pytest.raises(UserError, match="a SigLIP: give .*a GPT"):
        run(config(book, init=str(tmp_path / "siglip")), tmp_path / "one")
    with pytest.raises(UserError, match="--length 25: .* has 24 positions"):
        run(config(book, init=str(published[0]), length=25), tmp_path / "two")
    Tokenizer.of_bytes(["abc " * 100, "🙂" * 90, TEXT * 3], 400).save(published[0])
    with pytest.raises(UserError, match="its tokenizer and its weights do not belong together"):
        run(config(book, init=str(published[0])), tmp_path / "three")


@pytest.mark.parametrize("preset", [name for name, config in gpt.PRESETS.items() if config.variant])
def test_a_published_size_is_trained_with_300_billion_tokens(preset):
    config = gpt.PRESETS[preset]
    assert preset == f"gpt2_{config.variant.lower()}" and set(VARIANTS) == {c.variant for c in gpt.PRESETS.values()} - {""}
    assert config.steps * config.batch_size * config.length == 294_912_000_000
    assert not config.data and config.batch_size % (8 * config.accumulate) == 0


def test_b2_is_that_of_adam():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    gradients = [jax.tree.map(lambda leaf: leaf * scale, params) for scale in (1.0, -0.1)]
    optimizer = functools.partial(gpt.optimizer, gpt.PRESETS["gpt2_124m"])

    def after(optimizer: optax.GradientTransformation) -> dict:
        state = optimizer.init(params)
        for each in gradients:
            updates, state = optimizer.update(each, state, params)
        return updates

    schedule = optax.constant_schedule(1e-3)
    wanted = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask={"kernel": True, "bias": False})
    jax.tree.map(np.testing.assert_array_equal, after(optimizer(schedule)), after(wanted))
