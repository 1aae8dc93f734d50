"""The experiment on a few sentences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import translation
from jaxdl import launch
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.metrics import bleu
from jaxdl.training import Execution, TrainState, load_model

TINY = dict(steps=2, batch_size=2, length=24, width=16, depth=1, num_heads=2, evaluate_every=2, vocab_size=270, beam=2)
WORDS = {"a": "ein", "dog": "Hund", "cat": "Kater", "sees": "sieht", "the": "den", "and": "und"}


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 5), ("extra", 4)):
        chosen = [random.choice(list(WORDS), random.integers(1, 5)) for _ in range(count)]
        (tmp_path / f"{split}.en").write_text("\n".join(" ".join(words) for words in chosen))
        (tmp_path / f"{split}.de").write_text("\n".join(" ".join(WORDS[word] for word in words) for words in chosen))
    return f"folder:{tmp_path}"


def config(folder, **values):
    return dataclasses.replace(translation.PRESETS["default"], **dict(data=folder, **TINY) | values)


def run(config, directory, **execution):
    return launch.run(translation.EXPERIMENT, config, directory, Execution(**execution))


def test_a_finished_run_translates_what_it_is_asked_and_its_result_stays(tmp_path, folder, capsys):
    """It is measured on a further part too, and another run begins with it."""
    first = run(config(folder, test="extra"), tmp_path / "run")
    metrics = first["metrics"]
    assert metrics.keys() == {"validation_loss", "perplexity", "bleu", "exact_match", "extra_bleu", "extra_exact_match"}
    assert np.isclose(metrics["perplexity"], np.exp(metrics["validation_loss"]))
    written = (tmp_path / "run" / "translations.txt").read_text()
    assert "tok:13a" in written.splitlines()[0] and written.count("\nhuman ") == 5
    assert (tmp_path / "run" / "extra_translations.txt").read_text().count("\nhuman ") == 4
    capsys.readouterr()
    assert run(config(folder, test="extra", ask=("the dog sees a cat",)), tmp_path / "run") == first
    out = capsys.readouterr().out
    assert "the dog sees a cat\n  → " in out and "bleu" not in out

    second = run(config(folder, init=str(tmp_path / "run"), steps=0, width=999, beam=0), tmp_path / "second")
    np.testing.assert_allclose(second["metrics"]["validation_loss"], metrics["validation_loss"], rtol=1e-5)


def test_it_runs_with_other_settings_and_counts_what_is_too_long(tmp_path, folder, capsys):
    for language in ("en", "de"):
        with (tmp_path / f"val.{language}").open("a") as file:
            file.write("\n" + "long " * 40)
    how = dict(steps=1, norm_first=True, attention="flash", beam=0, optimizer="adamw", decay="inverse_sqrt")
    result = run(config(folder, **how), tmp_path / "run")
    assert np.isfinite(result["metrics"]["validation_loss"])
    assert "are left out, and 1 of the 6 held-out ones, which are translated all the same" in capsys.readouterr().out
    assert (tmp_path / "run" / "translations.txt").read_text().count("\nhuman ") == 6


def test_an_exported_run_is_read_by_transformers(tmp_path, folder):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    run(config(folder), tmp_path / "run", export=str(tmp_path / "out"))
    model = transformers.MarianMTModel.from_pretrained(tmp_path / "out").eval()
    module, params = load_model(str(tmp_path / "run"))
    source, target = np.random.default_rng(0).integers(3, 260, (2, 3, 9)).astype(np.int32)
    ours = jax.jit(module.apply)({"params": params}, source, target).logits
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target)).logits
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_a_pre_norm_model_has_no_published_layout(tmp_path, folder):
    """Which is said before it is trained."""
    with pytest.raises(UserError, match="cannot be exported: norm_first is True"):
        run(config(folder, norm_first=True, steps=10**6), tmp_path / "run", export=str(tmp_path / "out"))


def test_the_objective_does_not_see_padding_and_smooths_the_rest():
    module = translation.EncoderDecoder(20, 8, translation.Stack(1, 2, 8), translation.Stack(1, 2, 8))
    random = np.random.default_rng(0)
    batch = {name: jnp.asarray(random.integers(1, 20, (2, 6))) for name in ("source", "target", "labels")}
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    batch |= dict(source_segments=segments, target_segments=segments)
    params = jax.jit(module.init)(jax.random.key(0), batch["source"], batch["target"])["params"]
    state = TrainState(0, {}, {}, {}, jax.random.key(0))
    loss = jax.jit(lambda batch: translation.objective(module, 0.1, 4.0, params, state, batch, jax.random.key(0))[0])
    given = dict(source=batch["source"], target=batch["target"], source_segments=segments, target_segments=segments)
    out = jax.jit(lambda: module.apply({"params": params}, **given))()
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
    assert jax.jit(functools.partial(translation.losses, module))({"params": params}, batch)[:, 1].tolist() == [5, 2]


def test_the_figure_shows_how_each_block_of_the_decoder_looks_at_the_source():
    """A query of zeros looks everywhere alike: in the cross-attention of one block, and in the map of that block alone."""
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


def test_the_papers_base_model_has_its_dropout():
    """Vaswani et al. 2017, table 3."""
    tokenizer = Tokenizer.of_bytes([], 258)
    module, _ = translation.build(translation.PRESETS["paper_base"], tokenizer)
    variant = translation.EncoderDecoder.variant("base", tokenizer.vocab_size)
    assert module.dropout == variant.dropout == 0.1
    assert (module.width, module.encoder_stack, module.decoder_stack) == (512, variant.encoder_stack, variant.decoder_stack)


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
        (dict(test="more"), "there is no file .*more.en"),
        (dict(length=2), "none of 30 pairs"),
        (dict(target="en"), "nothing to translate"),
        (dict(ask=(" ",)), "--ask wants sentences"),
    ],
)
def test_bad_input_is_refused(tmp_path, folder, how, message):
    with pytest.raises(UserError, match=message):
        run(config(folder, **how), tmp_path / "run")
