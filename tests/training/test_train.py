"""What is measured and drawn in the course of training and at its end, and where it lands."""

import struct
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import STRATEGIES, on_one_device
from PIL import Image

from jaxdl import figures
from jaxdl.training import Aux, Execution, Layout, Run, Update, init_state, make_step, train
from jaxdl.training.logging import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*SwigPy.*:DeprecationWarning")


@dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 6
    evaluate_every: int = 2
    show_every: int = 3


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))[:, 0]


def objective(params, state, batch, key):
    x = 3 + jax.random.normal(key, (32, 2))
    out, updated = Network().apply({"params": params, **state.variables}, x, train=True, mutable=["batch_stats"])
    return jnp.mean((out - x.sum(1)) ** 2), Aux(variables=updated)


UPDATE = Update(objective, optax.sgd(0.1), ema=0.5)
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), np.uint8)


class Watcher:
    """What an experiment says about a model, and what it was asked."""

    def __init__(self):
        self.evaluated, self.keys, self.shown, self.concluded = [], [], 0, 0

    def evaluate(self, variables, key):
        mean = variables["batch_stats"]["BatchNorm_0"]["mean"]
        self.evaluated.append(float(mean.mean()))
        self.keys.append(jax.random.key_data(key).tolist())
        return {"mean": mean.mean(), "still": FRAMES[0], "absent": None, "grey/one": FRAMES[1, ..., :1]}

    def show(self, variables, key):
        self.shown += 1
        return {"film": figures.Animation(FRAMES, 5)}

    def conclude(self, variables, key):
        self.concluded += 1
        figure, axes = figures.subplots(1, 1, 2, 2)
        axes[0].plot([0, 1])
        return {"baseline": np.float32(0.25), "line": figure}


def run(directory: Path, execution: Execution = Execution(log_every=2), **options) -> tuple[dict, Watcher]:
    watcher = Watcher()
    with Run.open(directory, "watched", Config(), execution) as opened:
        init = lambda key: Network().init(key, jnp.zeros((1, 2)), train=True)
        state = init_state(init, [UPDATE], seed=0)
        parts = {"evaluate": watcher.evaluate, "show": watcher.show, "conclude": watcher.conclude}
        return train(opened, make_step(UPDATE), state, None, **parts | options), watcher


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict, Watcher]:
    directory = tmp_path_factory.mktemp("watched")
    return directory, *run(directory)


def test_evaluation_sees_statistics_of_the_moment_and_another_key_each_time(finished):
    _, result, watcher = finished
    assert len(watcher.evaluated) == 3 and watcher.evaluated == sorted(watcher.evaluated)
    np.testing.assert_allclose(watcher.evaluated, [3 * (1 - 0.5**steps) for steps in (2, 4, 6)], rtol=0.1)
    assert len(set(map(tuple, watcher.keys))) == 3 and watcher.shown == 2 and watcher.concluded == 1
    assert result["metrics"] == pytest.approx({"mean": watcher.evaluated[-1], "baseline": 0.25})


def test_pictures_are_drawn_in_the_course_of_training_and_at_its_end(finished):
    directory, _, _ = finished
    names = {path.name for path in (directory / "figures").iterdir()}
    assert names == {
        *(f"{name}{step}.png" for name in ("still", "grey_one") for step in ("_000002", "_000004", "")),
        *("film_000003.gif", "film.gif", "line.png", "learning_curves.png"),
    }
    np.testing.assert_array_equal(np.asarray(Image.open(directory / "figures" / "still_000002.png")), FRAMES[0])
    with Image.open(directory / "figures" / "film_000003.gif") as film:
        assert film.n_frames == len(FRAMES) and film.info["duration"] == 200
    rows = read_metrics(directory / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/mean" in row] == [2, 4, 6]
    assert all(len(row) > 1 for row in rows)  # Pictures alone are no row.


def events(directory: Path) -> list:
    """The records of TensorBoard's files: a length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir()):
        raw, place = path.read_bytes(), 0
        while place < len(raw):
            (size,) = struct.unpack_from("<Q", raw, place)
            found.append(Event.FromString(raw[place + 12 : place + 12 + size]))
            place += 16 + size
    return found


def test_tensorboard_is_given_the_numbers_and_the_pictures_as_they_are(finished):
    directory, _, watcher = finished
    shown = [(event.step, value) for event in events(directory / "tensorboard") for value in event.summary.value]
    images = {(step, value.tag): value.image for step, value in shown if value.HasField("image")}
    assert {tag for _, tag in images} == {"still", "grey/one", "film", "line", "learning_curves"}
    for (step, tag), file in {
        (4, "still"): "still_000004.png",
        (3, "film"): "film_000003.gif",
        (6, "film"): "film.gif",
        (6, "line"): "line.png",
    }.items():
        assert images[step, tag].encoded_image_string == (directory / "figures" / file).read_bytes()
    assert (images[3, "film"].height, images[3, "film"].width) == (12, 10)
    means = {step: value.simple_value for step, value in shown if value.tag == "eval/mean"}
    np.testing.assert_allclose([means[step] for step in (2, 4, 6)], watcher.evaluated, rtol=1e-6)


def test_a_finished_run_answers_and_keeps_its_result(finished, monkeypatch):
    directory, result, _ = finished
    answers = []
    again, watcher = run(directory, answer=lambda variables: answers.append(variables.keys()))
    assert again == result and not watcher.evaluated and not watcher.concluded
    assert answers == [{"params", "batch_stats"}]


def test_what_is_asked_of_a_run_that_has_not_ended_is_answered_at_its_end(tmp_path):
    answers = []
    result, watcher = run(tmp_path, answer=answers.append, show=None, conclude=None)
    assert len(answers) == 1 and result["steps"] == 6 and len(watcher.evaluated) == 3


def test_weights_and_biases_is_given_numbers_and_pictures(tmp_path, monkeypatch):
    logged = []
    recorder = types.SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("finished"))
    fake = types.SimpleNamespace(
        init=lambda **options: recorder, Image=lambda file: ("image", file), Video=lambda file, format: (format, file)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(tmp_path, Execution(log_every=2, wandb=True))
    assert logged.pop() == "finished" and all(row for _, row in logged)
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)
    assert (3, {"film": ("gif", str(tmp_path / "figures" / "film_000003.gif"))}) in logged
    assert (6, {"line": ("image", str(tmp_path / "figures" / "line.png"))}) in logged
    assert any("eval/mean" in row for _, row in logged) and any("loss" in row for _, row in logged)


def sampler(layout: Layout, batch_size: int):
    """A chain of five noisy steps from a start that is given, with a matrix that was learned."""

    def one(variables, key, start):
        for part in range(5):
            noise = jax.random.normal(jax.random.fold_in(key, part), start.shape)
            start = jnp.tanh((variables["scale"] * start).sum(-1, keepdims=True) + 0.3 * noise)
        return {"end": start, "coin": jax.random.bernoulli(key)}

    draw = lambda variables, keys, start: jax.vmap(one, in_axes=(None, 0, 0))(variables, keys, start)
    return layout.sample(draw, batch_size)


@pytest.mark.eight_devices
def test_samples_are_the_same_bits_whatever_the_batch_and_the_devices():
    variables, key = {"scale": np.float32([0.5, -1, 2])}, jax.random.key(3)
    start = np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)
    expected = sampler(on_one_device(), 21)(variables, key, 21, start=start)
    assert expected["end"].shape == (21, 3) and len(np.unique(expected["end"][:, 0])) == 21 and 0 < expected["coin"].sum() < 21
    for layout, batch_size in [(on_one_device(), 4), *((Layout(strategy), size) for strategy in STRATEGIES for size in (16, 5))]:
        found = sampler(layout, batch_size)(variables, key, 21, start=start)
        np.testing.assert_array_equal(found["end"], expected["end"])
        np.testing.assert_array_equal(found["coin"], expected["coin"])
    coins = [bool(jax.random.bernoulli(jax.random.fold_in(key, row))) for row in range(21)]
    assert expected["coin"].tolist() == coins
    few = sampler(Layout("jit"), 8)(variables, key, 6, start=start[:6])
    np.testing.assert_array_equal(few["end"], expected["end"][:6])
