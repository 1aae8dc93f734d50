"""The experiment on a few sentences."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_siglip import ROOT

from experiments import translation
from jaxdl.errors import UserError
from jaxdl.metrics import bleu
from jaxdl.training import Execution

TINY = dict(steps=2, batch_size=2, length=24, width=16, depth=1, num_heads=2, evaluate_every=1, vocabulary=270, beam=2)
WORDS = {"a": "ein", "dog": "Hund", "cat": "Kater", "sees": "sieht", "the": "den", "and": "und"}


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 5), ("extra", 4)):
        chosen = [random.choice(list(WORDS), random.integers(1, 5)) for _ in range(count)]
        (tmp_path / f"{split}.en").write_text("\n".join(" ".join(words) for words in chosen))
        (tmp_path / f"{split}.de").write_text("\n".join(" ".join(WORDS[word] for word in words) for words in chosen))
    return f"folder:{tmp_path}"


def test_two_steps_leave_what_a_run_leaves_and_the_finished_model_answers(tmp_path, folder):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "experiments.translation", "--workdir", tmp_path / "run", "--data", folder, *flags]

    def run(*more):
        return subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = run("--test=extra")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics.keys() == {"validation_loss", "perplexity", "bleu", "exact_match", "extra_bleu", "extra_exact_match"}
    assert np.isclose(metrics["perplexity"], np.exp(metrics["validation_loss"]))
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*")}
    assert {"tokenizer.json", "translations.txt", "extra_translations.txt", "figures/cross_attention.png"} <= files
    written = (tmp_path / "run" / "translations.txt").read_text()
    assert "tok:13a" in written.splitlines()[0] and written.count("\nhuman ") == 5
    again = run("--test=extra", "--ask", "the dog sees a cat")
    assert again.returncode == 0, again.stderr
    assert "the dog sees a cat\n  → " in again.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["parameters_sha256"] == result["parameters_sha256"]


def test_it_runs_with_other_settings(tmp_path, folder):
    how = dict(norm_first=True, scan_layers=True, attention="flash", beam=0, optimizer="adamw", decay="inverse_sqrt")
    result = translation.main(translation.Config(data=folder, **TINY | how), tmp_path / "run", Execution())
    assert np.isfinite(result["metrics"]["validation_loss"])


def test_the_loss_does_not_see_padding_and_smooths_the_rest():
    config = translation.Config(**TINY)
    module = translation.EncoderDecoder(20, 8, translation.Stack(1, 2, 8), translation.Stack(1, 2, 8))
    random = np.random.default_rng(0)
    batch = {name: jnp.asarray(random.integers(1, 20, (2, 6))) for name in ("source", "target", "labels")}
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    batch |= dict(source_segments=segments, target_segments=segments)
    params = module.init(jax.random.key(0), batch["source"], batch["target"])["params"]
    value, _ = translation.loss(module, 0.1, params, {}, batch, jax.random.key(0))
    out = module.apply({"params": params}, batch["source"], batch["target"], source_segments=segments, target_segments=segments)
    logits = np.asarray(out.logits, np.float64)
    expected = []
    for row in range(2):
        each = []
        for place in range(6):
            if segments[row, place]:
                target = np.full(20, 0.1 / 20)
                target[batch["labels"][row, place]] += 0.9
                scores = logits[row, place]
                each.append(-(target * (scores - np.log(np.exp(scores).sum()))).sum())
        expected.append(np.mean(each))
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)
    hidden = dict(batch, labels=jnp.where(segments > 0, batch["labels"], 7), target=jnp.where(segments > 0, batch["target"], 7))
    np.testing.assert_array_equal(translation.loss(module, 0.1, params, {}, hidden, jax.random.key(0))[0], value)
    assert translation.losses(module, {"params": params}, batch)[:, 1].tolist() == [5, 2]
    assert config.smoothing == 0.1


def test_the_learning_rate_follows_the_paper():
    """Eq. 3 with a width of 512 and 4,000 steps of warm-up."""
    peak = (512 * 4000) ** -0.5
    schedule = translation.Config(decay="inverse_sqrt", learning_rate=peak, steps=100_000, warmup=0.04).schedule()
    for step in (1, 100, 4000, 50_000):
        np.testing.assert_allclose(schedule(step - 1), 512**-0.5 * min(step**-0.5, step * 4000**-1.5), rtol=1e-5)


def test_bleu_is_that_of_its_definition():
    """Four-gram precisions 4/5, 2/4, 1/3 and 0/2, which counts as 1/(2·2) (sacrebleu's exp smoothing), and no brevity penalty."""
    score, signature = bleu(["the cat sat down there"], ["the cat sat up there"])
    np.testing.assert_allclose(score, 100 * (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25, rtol=1e-6)
    assert "tok:13a" in signature and "version:" in signature


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(data="builtin:cldrr"), "did you mean 'cldr'"),
        (dict(test="more"), "there is no file .*more.en"),
        (dict(data="builtin:cldr", test="more"), "give --data folder:PATH"),
        (dict(length=2), "none of 30 pairs"),
        (dict(num_heads=3), "cannot be split into 3 heads"),
        (dict(init="/nowhere"), "there is no directory /nowhere"),
        (dict(target="en"), "nothing to translate"),
        (dict(ask=(" ",)), "--ask wants sentences"),
        (dict(smoothing=1.0), "--smoothing"),
    ],
)
def test_bad_input_is_refused(tmp_path, folder, how, message):
    with pytest.raises(UserError, match=message):
        translation.main(translation.Config(**dict(data=folder, **TINY) | how), tmp_path / "run", Execution())
