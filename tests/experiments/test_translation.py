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
from jaxdl import launch
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
    assert "the dog sees a cat\n  → " in again.stdout and "bleu" not in again.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def test_it_runs_with_other_settings_and_counts_what_is_too_long(tmp_path, folder, capsys):
    for language in ("en", "de"):
        with (tmp_path / f"val.{language}").open("a") as file:
            file.write("\n" + "long " * 40)
    how = dict(norm_first=True, scan_layers=True, attention="flash", beam=0, optimizer="adamw", decay="inverse_sqrt")
    result = translation.main(translation.Config(data=folder, **TINY | how), tmp_path / "run", Execution())
    assert np.isfinite(result["metrics"]["validation_loss"])
    assert "are left out, and 1 of the 6 held-out ones, which are translated all the same" in capsys.readouterr().out
    assert (tmp_path / "run" / "translations.txt").read_text().count("\nhuman ") == 6


def test_the_loss_does_not_see_padding_and_smooths_the_rest():
    module = translation.EncoderDecoder(20, 8, translation.Stack(1, 2, 8), translation.Stack(1, 2, 8))
    random = np.random.default_rng(0)
    batch = {name: jnp.asarray(random.integers(1, 20, (2, 6))) for name in ("source", "target", "labels")}
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    batch |= dict(source_segments=segments, target_segments=segments)
    params = module.init(jax.random.key(0), batch["source"], batch["target"])["params"]
    loss = lambda batch: translation.loss(module, 0.1, 4.0, params, {}, batch, jax.random.key(0))[0]
    out = module.apply({"params": params}, batch["source"], batch["target"], source_segments=segments, target_segments=segments)
    logits = np.asarray(out.logits, np.float64)
    each = []
    for row in range(2):
        for place in range(6):
            if segments[row, place]:
                target = np.full(20, 0.1 / 20)
                target[batch["labels"][row, place]] += 0.9
                scores = logits[row, place]
                each.append(-(target * (scores - np.log(np.exp(scores).sum()))).sum())
    np.testing.assert_allclose(loss(batch), np.sum(each) / (2 * 4.0), rtol=1e-5)
    halves = [{name: values[row : row + 1] for name, values in batch.items()} for row in range(2)]
    np.testing.assert_allclose(np.mean([loss(half) for half in halves]), loss(batch), rtol=1e-6)
    hidden = dict(batch, labels=jnp.where(segments > 0, batch["labels"], 7), target=jnp.where(segments > 0, batch["target"], 7))
    np.testing.assert_array_equal(loss(hidden), loss(batch))
    assert translation.losses(module, {"params": params}, batch)[:, 1].tolist() == [5, 2]


def test_the_pictures_show_how_each_block_of_the_decoder_looks_at_the_source():
    """A query of zeros looks everywhere alike: in the cross-attention of one block, and in the picture of that block alone."""
    stacks = translation.Stack(2, 2, 8), translation.Stack(3, 2, 8)
    module = translation.EncoderDecoder(20, 8, *stacks)
    source, target = jnp.arange(1, 6)[None], jnp.arange(1, 5)[None]
    params = module.init(jax.random.key(0), source, target)["params"]
    for block in range(3):
        query = params["decoder"][f"block_{block}"]["cross_attention"]["query"]
        blind = {**params["decoder"][f"block_{block}"]["cross_attention"], "query": jax.tree.map(jnp.zeros_like, query)}
        decoder = {**params["decoder"], f"block_{block}": {**params["decoder"][f"block_{block}"], "cross_attention": blind}}
        shown = translation.cross_attention(module, {**params, "decoder": decoder}, source, target)
        assert shown.shape == (3, 1, 2, 4, 5)
        assert [bool(np.allclose(each, 1 / 5)) for each in shown] == [other == block for other in range(3)]


def test_a_variant_has_the_papers_dropout_unless_another_is_given():
    """Vaswani et al. 2017, table 3."""
    tokenizer = translation.Tokenizer.of_bytes([], 258)
    dropout = lambda **how: translation.build(translation.Config(**how), tokenizer)[0].dropout
    assert (dropout(variant="base"), dropout(variant="big"), dropout()) == (0.1, 0.3, 0.0)
    assert dropout(variant="big", dropout=0.0) == 0.0
    flags = ["--workdir=run", "--variant=big", "--dropout=0.2"]
    assert launch.parse(translation.EXPERIMENT, flags)[0].dropout == 0.2


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
        (dict(data="builtin:cldr", test="more"), "builtin:cldr has no part 'more'"),
        (dict(length=2), "none of 30 pairs"),
        (dict(num_heads=3), "cannot be split into 3 heads"),
        (dict(init="/nowhere"), "there is no directory /nowhere"),
        (dict(target="en"), "nothing to translate"),
        (dict(ask=(" ",)), "--ask wants sentences"),
        (dict(label_smoothing=1.0), "--label-smoothing"),
    ],
)
def test_bad_input_is_refused(tmp_path, folder, how, message):
    with pytest.raises(UserError, match=message):
        translation.main(translation.Config(**dict(data=folder, **TINY) | how), tmp_path / "run", Execution())


def test_what_is_learned_is_not_measured_on(tmp_path, folder):
    with pytest.raises(UserError, match=r"extra would be learned and measured on: .*--eval-data"):
        translation.main(translation.Config(data=f"{folder}/extra", **TINY), tmp_path / "run", Execution())
