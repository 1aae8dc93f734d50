"""The experiment with names: what it learns, what it answers, and what it compares itself with."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import rnn
from experiments.rnn import PRESETS, Config, baselines, build, objective, open_task
from jaxdl import launch
from jaxdl.errors import UserError
from jaxdl.training import TrainState

TINY = dict(hidden=8, batch_size=8, steps=2, evaluate_every=2, length=8, lag=4, copied=2, compare=False)


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
    return dataclasses.replace(PRESETS["default"], **dict(data=f"folder:{folder}", **TINY) | changes)


def run(config, directory):
    return launch.run(rnn.EXPERIMENT, config, directory)


FIGURES = {"generate": {"names", "bits"}, "tag": {"words"}, "copy": {"copy"}}


@pytest.mark.parametrize("task", FIGURES)
def test_the_other_tasks_run_and_draw(tmp_path, folder, task):
    found = run(tiny(folder, task=task), tmp_path)["metrics"]
    assert open_task(tiny(folder, task=task), tmp_path).score in found and all(np.isfinite(list(found.values())))
    assert {path.stem for path in (tmp_path / "figures").iterdir()} - {"learning_curves"} == FIGURES[task]


def test_a_finished_run_answers_and_its_result_stays(tmp_path, folder, capsys):
    config = tiny(folder, steps=60, learning_rate=0.03)
    first = run(config, tmp_path)
    assert first["metrics"]["test_accuracy"] > 0.9  # The vowels tell.
    capsys.readouterr()
    assert run(dataclasses.replace(config, ask=("bada", "Doko", "bado", "Ж")), tmp_path) == first
    lines = {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines() if " 0." in line or " 1.0" in line}
    assert lines["bada"].startswith("bada: Aish") and "Oish" in lines["Doko (1 character unknown)"].split()[4]
    assert "Ж (1 character unknown)" in lines
    assert "ask" not in json.loads((tmp_path / "config.json").read_text())["config"]
    with pytest.raises(UserError, match="another config.*hidden: 8 → 9"):
        run(dataclasses.replace(config, hidden=9), tmp_path)


def test_what_is_compared_is_trained_once_and_kept(tmp_path, folder, monkeypatch):
    config = tiny(folder, task="copy", compare=True)
    first = run(config, tmp_path)["metrics"]
    assert {"copy_accuracy", "truncated_copy_accuracy"} <= set(first)
    inner = json.loads((tmp_path / "beside" / "truncated" / "config.json").read_text())
    assert (inner["config"]["truncate"], inner["config"]["compare"]) == (2, False)  # Half the pause.
    assert inner["experiment"] == "rnn" and (tmp_path / "figures" / "beside.png").exists()
    monkeypatch.setattr(
        launch,
        "run",
        lambda *given, launch_run=launch.run, **how: launch_run(*given, **how) if given[2] == tmp_path else pytest.fail(),
    )
    assert run(config, tmp_path)["metrics"] == first


def test_each_task_is_compared_with_what_it_should_be_better_than():
    name, others = baselines(PRESETS["default"])
    assert name == "lstm" and {cell: other.learning_rate for cell, other in others.items()} == {"gru": 0.02, "rnn_tanh": 0.005}
    assert all(dataclasses.replace(other, cell="lstm", learning_rate=0.02) == PRESETS["default"] for other in others.values())
    slow = baselines(dataclasses.replace(PRESETS["default"], cell="rnn_tanh", learning_rate=0.005))[1]
    assert {other.learning_rate for other in slow.values()} == {0.02}
    assert baselines(PRESETS["tag"])[1] == {"forwards_only": dataclasses.replace(PRESETS["tag"], bidirectional=False)}
    assert baselines(PRESETS["copy"])[1] == {"truncated": dataclasses.replace(PRESETS["copy"], truncate=15)}
    assert baselines(PRESETS["generate"])[1] == {}
    assert baselines(dataclasses.replace(PRESETS["copy"], lag=1))[1] == {}  # A pause of one cannot be cut in the middle.


@pytest.mark.parametrize("task", ["classify", "generate", "tag", "copy"])
def test_what_follows_the_end_of_a_sequence_is_not_read(tmp_path, folder, task):
    """Padding is as long as one likes: the loss is that of the sequences one by one, without any."""
    config = tiny(folder, task=task, length=20, bidirectional=task == "tag")
    made = open_task(config, tmp_path)
    module = build(config, made)
    arrays = [made.example(made.source[index], np.random.default_rng(0)) for index in (0, 1)]
    batch = {key: jnp.stack([array[key] for array in arrays]) for key in arrays[0]}
    params = module.init(jax.random.key(0), jax.nn.one_hot(batch["symbols"], made.num_symbols))["params"]
    state = TrainState(0, {}, {}, {}, jax.random.key(0))
    value, aux = objective(module, made.num_symbols, params, state, batch, jax.random.key(0))
    single = []
    for array in arrays:
        symbols = array["symbols"][array["symbols"] > 0]
        x = jax.nn.one_hot(symbols, made.num_symbols)[None]
        scores = np.asarray(jax.nn.log_softmax(module.apply({"params": params}, x)[0][0]), np.float64)
        if task == "classify":
            single.append(-scores[array["targets"]])
        else:
            counts, targets = (array[key][: len(symbols)] for key in ("counts", "targets"))
            single.append(-np.mean([row[target] for row, target, count in zip(scores, targets, counts) if count]))
            assert not array["counts"][len(symbols) :].any()
    np.testing.assert_allclose(value, np.mean(single), rtol=1e-5)
    assert 0 <= aux.metrics["accuracy"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(task="generate", ask=("a",)), "--ask is for --task classify, and not for generate"),
        (dict(ask=("a", " ")), "an empty one has no language"),
        (dict(task="generate", bidirectional=True), "it would have to read the future"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**changes)
