"""The experiment with names: what each task asks and measures, what a run leaves, questions to a finished run, bad input."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_siglip import ROOT

from experiments import rnn
from experiments.rnn import PRESETS, TASKS, Config, Copy, Network, Tag, joined, loss, main, read
from jaxdl import launch
from jaxdl.data.names import Alphabet, Names
from jaxdl.errors import UserError
from jaxdl.metrics.counting import NGrams
from jaxdl.nn import Recurrent, SequenceModel
from jaxdl.training import Layout, start

TINY = dict(hidden=8, batch_size=8, steps=2, evaluate_every=1, length=8, lag=4, copied=2, compare=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two languages that differ in their vowels."""
    root, random = tmp_path_factory.mktemp("names"), np.random.default_rng(0)
    word = lambda vowels: "".join(random.choice(list("bdk")) + random.choice(list(vowels)) for _ in range(3))
    for language, vowels in (("Aish", "aå"), ("Oish", "oö")):
        names = [f"{word(vowels)} {word(vowels)}" if index % 2 else word(vowels) for index in range(60)]
        (root / f"{language}.txt").write_text("\n".join(names), encoding="utf-8")
    return root


def tiny(folder, **changes):
    return Config(data=f"folder:{folder}", **TINY | changes)


def task_of(folder, directory, **changes):
    config = tiny(folder, **changes)
    return TASKS[config.task](config, directory)


def run(*arguments):
    command = [sys.executable, "-m", "experiments.rnn", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_starts_and_names_the_tasks():
    done = run("--help")
    assert done.returncode == 0 and "surnames" in done.stdout and "--ask" in done.stdout


def test_two_steps_and_a_question_leave_what_a_run_leaves(tmp_path, folder):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "compare"]
    done = run("--workdir", tmp_path / "run", "--data", f"folder:{folder}", *flags, "--ask", "badå", "Ж")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "badå: " in done.stdout and "Ж (1 character unknown): " in done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    scores = {"test_accuracy", "test_macro_f1"}
    assert set(result["metrics"]) == {
        *scores, *(f"{cell}_{score}" for cell in ("gru", "rnn_tanh") for score in scores),
        "majority_accuracy", "naive_bayes_accuracy", "naive_bayes_macro_f1",
    }  # fmt: skip
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    pictures = {f"figures/{name}.png" for name in ("confusion", "reading", "beside", "learning_curves")}
    assert {"config.json", "metrics.jsonl", "alphabet.json", "beside/gru/result.json", *pictures} <= files
    assert "ask" not in json.loads((tmp_path / "run" / "config.json").read_text())["config"]


@pytest.mark.parametrize("task", ["generate", "tag", "copy"])
def test_the_other_tasks_run_and_draw(tmp_path, folder, task):
    found = main(tiny(folder, task=task), tmp_path)["metrics"]
    assert any(name.startswith(TASKS[task].score) for name in found) and all(np.isfinite(list(found.values())))
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 2


def test_a_finished_run_answers_and_its_result_stays(tmp_path, folder, capsys):
    config = tiny(folder, steps=60, learning_rate=0.03)
    first = main(config, tmp_path)
    assert first["metrics"]["test_accuracy"] > 0.9  # The vowels tell.
    capsys.readouterr()
    again = main(dataclasses.replace(config, ask=("bada", "Doko", "bado")), tmp_path)
    out = capsys.readouterr().out
    assert again["parameters_sha256"] == first["parameters_sha256"] and again["metrics"] == first["metrics"]
    lines = {line.partition(":")[0]: line for line in out.splitlines() if " 0." in line or " 1.0" in line}
    assert lines["bada"].startswith("bada: Aish") and lines["Doko (1 character unknown)"].startswith(
        "Doko (1 character unknown): Oish"
    )
    with pytest.raises(UserError, match="another config.*hidden: 8 → 9"):
        main(dataclasses.replace(config, hidden=9), tmp_path)


def test_questions_come_from_the_command_line_as_they_are():
    config = launch.parse(rnn.EXPERIMENT, ["--workdir", "x", "--ask", "de la Cruz", "Müller"])[0]
    assert config == dataclasses.replace(PRESETS["default"], ask=("de la Cruz", "Müller"))


def test_what_is_compared_is_trained_once_and_kept(tmp_path, folder, monkeypatch):
    config = tiny(folder, task="copy", compare=True)
    first = main(config, tmp_path)["metrics"]
    assert {"copy_accuracy", "truncated_copy_accuracy"} <= set(first)
    inner = json.loads((tmp_path / "beside" / "truncated" / "config.json").read_text())["config"]
    assert (inner["truncate"], inner["compare"]) == (2, False)  # Half the pause.
    monkeypatch.setattr(rnn, "start", lambda *args: (pytest.fail, start(*args)[1]))  # No step is made any more.
    assert main(config, tmp_path)["metrics"] == first


@pytest.mark.parametrize("task", ["classify", "generate", "tag", "copy"])
def test_what_follows_the_end_of_a_sequence_is_not_read(tmp_path, folder, task):
    """Padding is as long as one likes: the loss is that of the sequences one by one, without any."""
    made = task_of(folder, tmp_path, task=task, length=20, bidirectional=task == "tag")
    module = SequenceModel(Recurrent(5, bidirectional=task == "tag"), made.answers, made.mode)
    arrays = [made.example(made.source[index], np.random.default_rng(0)) for index in range(4)]
    batch = {key: jnp.stack([array[key] for array in arrays]) for key in arrays[0]}
    params = module.init(jax.random.key(0), jax.nn.one_hot(batch["symbols"], made.symbols))["params"]
    value, aux = loss(module, made.symbols, params, {}, batch, jax.random.key(0))
    single = []
    for array in arrays:
        symbols = array["symbols"][array["symbols"] > 0]
        x = jax.nn.one_hot(symbols, made.symbols)[None]
        scores = np.asarray(jax.nn.log_softmax(module.apply({"params": params}, x)[0][0]), np.float64)
        if task == "classify":
            single.append(-scores[array["targets"]])
        else:
            counts, targets = (array[key][: len(symbols)] for key in ("counts", "targets"))
            single.append(-np.mean([row[target] for row, target, count in zip(scores, targets, counts) if count]))
            assert not array["counts"][len(symbols) :].any()
    np.testing.assert_allclose(value, np.mean(single), rtol=1e-5)
    assert 0 <= aux.metrics["accuracy"] <= 1


def test_cut_and_blanked_names_are_what_is_learned_from(tmp_path, folder):
    made = task_of(folder, tmp_path, blank=0.5, length=6)
    rng = np.random.default_rng(0)
    rows = np.stack([made.example({"name": "badadakakada", "label": 1}, rng)["symbols"] for _ in range(400)])
    plain = made.alphabet(["badada"], 6)[0]
    assert rows.shape == (400, 6) and np.all((rows == plain) | (rows == Alphabet.UNKNOWN))
    np.testing.assert_allclose((rows == Alphabet.UNKNOWN).mean(), 0.5, atol=0.05)


def test_generating_reads_the_language_and_tells_the_end(tmp_path, folder):
    made = task_of(folder, tmp_path, task="generate", blank=0.0, length=4)
    arrays = made.example({"name": "bada", "label": 1}, np.random.default_rng(0))
    written = made.alphabet(["bada"], 5)[0]
    np.testing.assert_array_equal(arrays["symbols"], [len(made.alphabet) + 1, *written[:-1]])
    np.testing.assert_array_equal(arrays["targets"], written)
    assert arrays["targets"][-1] == Alphabet.END and arrays["counts"].all()
    longer = made.example({"name": "badaba", "label": 0}, np.random.default_rng(0))
    assert (longer["targets"] != Alphabet.END).all()  # A name that was cut has no end.


def test_drawn_symbols_follow_the_networks_probabilities_at_any_temperature():
    module, width = SequenceModel(Recurrent(4, "gru"), 5, "n:n"), 5
    params = module.init(jax.random.key(0), jnp.zeros((1, 2, 5)))["params"]
    params["head"]["bias"] = jnp.log(jnp.asarray([0.1, 0.2, 0.3, 0.2, 0.2]))
    network, first = Network(module, width, Layout()), np.full(4000, 4, np.int32)
    drawn = network.generate(params, first, 2, temperature=0.5, allowed=[0, 1, 2], seed=0)
    assert drawn.shape == (4000, 2) and set(drawn.ravel().tolist()) == {0, 1, 2}
    logits = np.asarray(read(module, width, params, jnp.asarray([[4]])))[0, 0, :3] / 0.5
    np.testing.assert_allclose(np.bincount(drawn[:, 0]) / 4000, np.exp(logits) / np.exp(logits).sum(), atol=0.03)
    following = np.asarray(read(module, width, params, jnp.asarray([[4, 2]])))[0, 1, :3] / 0.5
    after = np.bincount(drawn[drawn[:, 0] == 2, 1], minlength=3)
    np.testing.assert_allclose(after / after.sum(), np.exp(following) / np.exp(following).sum(), atol=0.05)
    assert (drawn != network.generate(params, first, 2, temperature=0.5, allowed=[0, 1, 2], seed=1)).any()


def test_the_bits_of_a_network_are_those_of_its_parts(tmp_path, folder):
    made = task_of(folder, tmp_path, task="generate")
    module = SequenceModel(Recurrent(6), made.answers, "n:n")
    params = module.init(jax.random.key(0), jnp.zeros((1, 2, made.symbols)))["params"]
    bits = made.bits(Network(module, made.symbols, Layout()), params)
    name, label = made.held_out.names[0], made.held_out.labels[0]
    read_so_far = [len(made.alphabet) + label]
    assert len(name) > 9  # Cut: its last symbol is no end.
    for place, target in enumerate(made.alphabet([name], 9)[0]):
        scores = module.apply({"params": params}, jax.nn.one_hot(jnp.asarray([read_so_far]), made.symbols))[0][0, -1]
        np.testing.assert_allclose(bits[0, place], -jax.nn.log_softmax(scores)[target] / np.log(2), rtol=1e-4)
        read_so_far.append(target)
    short = min(range(len(made.held_out)), key=lambda index: len(made.held_out.names[index]))
    assert np.isfinite(bits[short, :7]).all() and np.isnan(bits[short, 7:]).all()


def test_counted_probabilities_sum_to_one_and_know_their_language():
    entries = [(f"{a}{b}{a}", language) for language, letters in (("A", "abc"), ("B", "xyz")) for a in letters for b in letters]
    source = Names(entries, "train")
    counted = NGrams(source, 3)
    letters = sorted(set("".join(source.names)))
    first = lambda label: [2 ** -counted.bits(letter, label)[0] for letter in letters]
    for label in (0, 1):  # The end and what was never seen have the rest.
        assert 0.8 < sum(first(label)) < 1
    assert sum(first(0)[:3]) > 0.6 > 0.4 > sum(first(0)[3:])
    assert counted.bits("aba", 0).shape == (3,) and counted.bits("ab", 0).shape == (3,)  # With the end, if it is not cut.
    assert counted.bits("aba", 0).sum() < counted.bits("aba", 0, order=1).sum()


def test_words_are_joined_and_their_beginnings_told():
    text, begins = joined("Isole  Åland x")
    assert text == "isoleålandx"
    np.testing.assert_array_equal(np.flatnonzero(begins), [0, 5, 10])


def test_tags_are_scored_without_the_first_character(tmp_path, folder):
    made = task_of(folder, tmp_path, task="tag", length=14)
    assert isinstance(made, Tag)
    perfect = made.scores(made.tags, "x")
    assert perfect == {"x_accuracy": 1, "x_f1": 1, "x_names_restored": 1}
    spoiled = made.tags.copy()
    spoiled[:, 0] ^= 1
    assert made.scores(spoiled, "x") == perfect
    never = made.scores(np.zeros_like(made.tags), "x")
    assert never["x_f1"] == never["x_names_restored"] == 0 and 0.5 < never["x_accuracy"] < 1
    assert made.scores(made.by_counting(), "x")["x_accuracy"] >= never["x_accuracy"] - 0.02


def test_copying_asks_for_the_symbols_after_the_sign(tmp_path, folder):
    made = task_of(folder, tmp_path, task="copy", copied=3, lag=4)
    arrays = made.example({"values": np.asarray([5, 1, 8], np.int32)}, np.random.default_rng(0))
    b, s = Copy.BLANK, Copy.SIGN
    assert arrays["symbols"].tolist() == [5, 1, 8, b, b, b, b, s, b, b]
    assert arrays["targets"].tolist() == [0] * 7 + [5, 1, 8] and arrays["counts"].tolist() == [False] * 7 + [True] * 3
    np.testing.assert_array_equal(made.source[7]["values"], made.source[7]["values"])
    assert made.source[7]["values"].tolist() != made.source[8]["values"].tolist()


def test_a_gradient_cut_in_the_pause_does_not_reach_the_symbols(tmp_path, folder):
    made = task_of(folder, tmp_path, task="copy", copied=2, lag=6)
    symbols = made.rows[:3]

    def answers(x, truncate):
        module = SequenceModel(Recurrent(4, truncate=truncate), made.answers)
        params = module.init(jax.random.key(0), x)["params"]
        return module.apply({"params": params}, x)[0][:, -2:].sum()

    x = jax.nn.one_hot(symbols, made.symbols)
    full, cut = (np.abs(jax.grad(answers)(x, truncate)).sum((0, 2)) for truncate in (None, 4))
    assert (full > 0).all() and (cut[:8] == 0).all() and (cut[8:] > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(task="generate", ask=("a",)), "--ask is for --task classify, and not for generate"),
        (dict(ask=("a", " ")), "an empty one has no language"),
        (dict(task="generate", bidirectional=True), "it would have to read the future"),
        (dict(truncate=-1), "--truncate -1"),
        (dict(blank=1.0), "--blank 1.0"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**changes)


def test_data_that_does_not_serve_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="no data set of names"):
        main(Config(data="tfds:mnist"), tmp_path / "a")
    for language in ("A", "B"):
        (tmp_path / f"{language}.txt").write_text("\n".join(f"{language}{index}" for index in range(20)))
    with pytest.raises(UserError, match="no held-out name of .* has two words"):
        main(tiny(tmp_path, task="tag"), tmp_path / "b")
    with pytest.raises(UserError, match="has the languages Aish, Oish, and .* others"):
        main(tiny(folder, eval_data=f"folder:{tmp_path}"), tmp_path / "c")
