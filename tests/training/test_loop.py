"""What must not be lost is not lost: checkpoints, resuming, signals, and the guard against what is not finite."""

import gc
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.data import train_batches
from jaxdl.errors import RunError, UserError
from jaxdl.training import (
    Aux,
    Execution,
    Interrupted,
    Run,
    TrainState,
    fit,
    init_state,
    load_run,
    make_step,
    parameters_sha256,
)
from jaxdl.training.logging import read_metrics

OPTIMIZER = optax.adam(0.05)


@dataclass(frozen=True)
class Config:
    preset: str = "default"
    seed: int = 0
    sizes: tuple[int, ...] = (3,)


class Line:
    """Points on a noisy line."""

    classes = ()

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict:
        return {"x": np.float32(index / 50)}


def transform(example: dict, rng: np.random.Generator) -> dict:
    return {"x": example["x"], "y": np.float32(2 * example["x"] + rng.normal())}


def loss(params, variables, batch, key):
    dropped = jax.random.bernoulli(key, 0.9, batch["x"].shape) * batch["x"]
    return jnp.mean((params["slope"] * dropped + params["bias"] - batch["y"]) ** 2), Aux()


def train(
    directory: Path, steps: int = 30, execution: Execution = Execution(checkpoint_every=7), step=None, **options
) -> TrainState:
    with Run.open(directory, "line", Config(), execution) as run:
        state = init_state(
            lambda key: {"params": {"slope": jnp.zeros(()), "bias": jax.random.normal(key, ())}}, OPTIMIZER, seed=0
        )
        batches = train_batches(Line(), transform, batch_size=8, seed=0)
        return fit(step or make_step(loss, OPTIMIZER), state, batches, run, steps=steps, **options)


def interrupt_at(number: int, sent: int = signal.SIGTERM):
    """The step, and a signal to this process once it was called `number` times."""
    calls = 0

    def evaluate(state: TrainState) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), sent)
        return {}

    return {"evaluate": evaluate, "evaluate_every": 1}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(tmp_path, sent):
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted) as stopped:
        train(tmp_path / "cut", **interrupt_at(11, sent))
    assert stopped.value.signal_number == sent and "saved at step 12 of 30" in str(stopped.value)
    assert parameters_sha256(train(tmp_path / "cut").params) == parameters_sha256(whole.params)
    logged = [
        [row["step"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in ("whole", "cut")
    ]
    assert logged[0][-1] == logged[1][-1] == 30 and sorted(logged[1]) == logged[1]


def test_a_run_that_is_complete_is_not_trained_again(tmp_path):
    first = train(tmp_path)
    second = train(tmp_path, step=lambda state, batch: pytest.fail("a step was made"))
    assert parameters_sha256(first.params) == parameters_sha256(second.params)


def test_what_a_run_has_learned_can_be_read_without_its_code(tmp_path):
    state = train(tmp_path)
    told, variables = load_run(tmp_path)
    assert told == {"experiment": "line", "config": {"preset": "default", "seed": 0, "sizes": [3]}}
    assert variables.keys() == {"params"}
    for name, leaf in variables["params"].items():
        assert type(leaf) is np.ndarray and leaf == state.params[name]


def test_of_a_run_with_an_average_that_is_what_is_read(tmp_path):
    with Run.open(tmp_path, "line", Config(), Execution()) as run:
        init = lambda key: {"params": {"w": jnp.zeros(3)}, "batch_stats": {"mean": jnp.ones(2)}}
        state = init_state(init, OPTIMIZER, seed=0, ema=True)
        run.checkpoints.save(state.replace(ema={"w": jnp.full(3, 5.0)}), {}, 0.0)
    _, variables = load_run(tmp_path)
    assert variables["params"]["w"].tolist() == [5, 5, 5] and variables["batch_stats"]["mean"].tolist() == [1, 1]


def test_what_is_no_run_or_has_no_checkpoint_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="is no run: give the --workdir"):
        load_run(tmp_path)
    with Run.open(tmp_path, "line", Config(), Execution()):
        pass
    with pytest.raises(UserError, match="there is no checkpoint in"):
        load_run(tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)


# TensorStore's threads go on after Orbax has given up on a file, and find its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("victim", ["state/manifest.ocdbt", "state/_METADATA", "progress/metadata", "state/d/*"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, victim, damage, capsys):
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", **interrupt_at(20))
    for path in (tmp_path / "cut" / "checkpoints" / "21").glob(victim):
        damage(path)
    resumed = train(tmp_path / "cut")
    gc.collect()
    said = capsys.readouterr().out
    assert "the checkpoint of step 21 cannot be read" in said and "going on from step 14" in said
    assert parameters_sha256(resumed.params) == parameters_sha256(whole.params)


def test_when_no_checkpoint_can_be_read_the_run_says_so(tmp_path):
    train(tmp_path)
    for path in (tmp_path / "checkpoints").glob("*/state/_METADATA"):
        path.write_text("{")
    with pytest.raises(RunError, match="none of the checkpoints .* can be read .*--overwrite"):
        train(tmp_path)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(tmp_path, execution=Execution(checkpoint_every=5, keep_checkpoints=3))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [20, 25, 30]


def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_parameters(tmp_path):
    def breaks(params, variables, batch, key):
        value, _ = loss(params, variables, batch, key)
        return value + jnp.where(variables["count"] == 16, jnp.nan, 0.0) * params["slope"], Aux(
            variables={"count": variables["count"] + 1}
        )

    with Run.open(tmp_path, "line", Config(), Execution(checkpoint_every=7)) as run:
        init = lambda key: {"params": {"slope": jnp.ones(()), "bias": jnp.zeros(())}, "count": jnp.zeros((), jnp.int32)}
        batches = train_batches(Line(), transform, batch_size=8, seed=0)
        with pytest.raises(
            RunError,
            match=r"at step 17 gradient_norm, loss is not finite; the gradients of slope are not finite; the checkpoint of step 14 stands",
        ):
            fit(make_step(breaks, OPTIMIZER), init_state(init, OPTIMIZER, seed=0), batches, run, steps=30)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [7, 14]


def test_another_config_is_refused_with_the_difference_and_overwritten_on_demand(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match=r"seed: 0 → 1.*--overwrite"), Run.open(tmp_path, "line", Config(seed=1)):
        pass
    with pytest.raises(UserError, match=r"experiment: line → curve"), Run.open(tmp_path, "curve", Config()):
        pass
    with Run.open(tmp_path, "line", Config(seed=1), Execution(overwrite=True)) as run:
        assert run.checkpoints.latest() is None
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 1


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(UserError, match="thesis.tex and is no run"),
        Run.open(tmp_path, "line", Config(), Execution(overwrite=True)),
    ):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_two_processes_do_not_write_one_run(tmp_path):
    with Run.open(tmp_path, "line", Config()):
        with pytest.raises(UserError, match="another process is training"), Run.open(tmp_path, "line", Config()):
            pass


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write to the working directory .*file"),
        Run.open(tmp_path / "file", "line", Config()),
    ):
        pass


def test_the_log_has_one_object_a_line_and_survives_a_line_cut_short(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, **interrupt_at(20))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "loss": 1.0}\n{"step": 26, "lo')
    train(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 30
    assert {"loss", "gradient_norm", "steps_per_second", "examples_per_second"} <= rows[-1].keys()


def test_a_profile_is_a_trace_of_some_steps(tmp_path):
    train(tmp_path, execution=Execution(profile=True))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
