"""What must not be lost is not lost: checkpoints, resuming, signals, and the guard against what is not finite."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl import signals
from jaxdl.data import Source, train_batches
from jaxdl.errors import RunError, UserError
from jaxdl.training import (
    NOT_IDENTITY,
    Aux,
    Execution,
    Frozen,
    Interrupted,
    Mean,
    Run,
    TrainState,
    Update,
    fit,
    init_state,
    load_run,
    make_step,
    over_seeds,
    parameters_sha256,
)
from jaxdl.training.logging import read_metrics


@dataclass(frozen=True)
class Config:
    seed: int = 0
    sizes: tuple[int, ...] = (3,)
    spans: tuple[tuple[float, str], ...] = ((0.5, "half"), (1, "whole"))
    question: str = field(default="", metadata=NOT_IDENTITY)


class Line(Source):
    """Points on a noisy line."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict:
        return {"x": np.float32(index / 50)}


def transform(example: dict, rng: np.random.Generator) -> dict:
    return {"x": example["x"], "y": np.float32(2 * example["x"] + rng.normal())}


def loss(params, state, batch, key):
    dropped = jax.random.bernoulli(key, 0.9, batch["x"].shape) * batch["x"]
    return jnp.mean((params["slope"] * dropped + params["bias"] - batch["y"]) ** 2), Aux()


LEARN = Update(loss, optax.adam(0.05))


def train(
    directory: Path, steps: int = 30, execution: Execution = Execution(checkpoint_every=7), step=None, **options
) -> TrainState:
    with Run.open(directory, "line", Config(), execution) as run:
        init = lambda key: {"params": {"slope": jnp.zeros(()), "bias": jax.random.normal(key, ())}}
        batches = train_batches(Line(), transform, batch_size=8, seed=0)
        return fit(step or make_step(LEARN), init_state(init, [LEARN], seed=0), batches, run, steps=steps, **options)


def interrupt_at(number: int, sent: int = signal.SIGTERM):
    """The step, and a signal to this process once it was called `number` times."""
    calls = 0

    def evaluate(variables: dict, key: jax.Array) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), sent)
        return {}

    return {"evaluate": evaluate, "evaluate_every": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    """A run that nothing disturbed, and its directory."""
    directory = tmp_path_factory.mktemp("whole")
    return train(directory), directory


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(tmp_path, whole, sent):
    with pytest.raises(Interrupted) as stopped:
        train(tmp_path / "cut", **interrupt_at(11, sent))
    assert stopped.value.signal_number == sent and "saved at step 12 of 30" in str(stopped.value)
    assert parameters_sha256(train(tmp_path / "cut").params) == parameters_sha256(whole[0].params)
    logged = [
        [row["step"] for row in read_metrics(directory / "metrics.jsonl") if "loss" in row]
        for directory in (whole[1], tmp_path / "cut")
    ]
    assert logged[0][-1] == logged[1][-1] == 30 and sorted(logged[1]) == logged[1]


def test_a_run_that_is_complete_is_not_trained_again(tmp_path):
    first = train(tmp_path)
    second = train(tmp_path, step=lambda state, batch: pytest.fail("a step was made"))
    assert parameters_sha256(first.params) == parameters_sha256(second.params)


def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(tmp_path, whole):
    code = f"import test_loop; test_loop.train(test_loop.Path({str(tmp_path)!r}) / 'cut', **test_loop.interrupt_at(11, 9))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-3000:]
    assert parameters_sha256(train(tmp_path / "cut").params) == parameters_sha256(whole[0].params)


def test_what_a_run_has_learned_can_be_read_without_its_code(tmp_path):
    state = train(tmp_path)
    saved = load_run(tmp_path)
    assert saved.experiment == "line" and saved.config == {"seed": 0, "sizes": [3], "spans": [[0.5, "half"], [1, "whole"]]}
    assert saved.variables.keys() == {"params"}
    for name, leaf in saved.variables["params"].items():
        assert type(leaf) is np.ndarray and leaf == state.params[name]


def test_a_config_is_read_back_as_it_was_and_what_does_not_fit_is_one_line(tmp_path):
    with Run.open(tmp_path, "line", Config(seed=4, sizes=(5, 6), question="which?")) as run:
        run.checkpoints.save(init_state(lambda key: {"params": {"w": jnp.zeros(3)}}, [LEARN], seed=0), {}, 0.0)
    config = load_run(tmp_path, Config).config
    assert config == Config(seed=4, sizes=(5, 6)) and hash(config) == hash(Config(seed=4, sizes=(5, 6)))
    written = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (
        ({"depth": 3, "width": 2}, "config.json has depth, width, which test_loop does not know"),
        ({"sizes": ["many"]}, "config.json, sizes.0: "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(written | {"config": written["config"] | changes}))
        with pytest.raises(UserError) as refused:
            load_run(tmp_path, Config)
        said = str(refused.value).replace(Config.__module__, "test_loop")
        assert message in said and "give a run of" in said and "\n" not in said


def test_of_a_run_with_an_average_that_is_what_is_read(tmp_path):
    init = lambda key: {"params": {"actor": jnp.zeros(3), "critic": jnp.ones(2)}, "batch_stats": {"mean": jnp.ones(2)}}
    averaged = Update(loss, optax.adam(0.05), of="actor", ema=0.9), Update(loss, optax.adam(0.05), of="critic")
    with Run.open(tmp_path, "line", Config(), Execution()) as run:
        state = init_state(init, averaged, seed=0)
        run.checkpoints.save(state.replace(ema={"actor": jnp.full(3, 5.0)}), {}, 0.0)
    variables = load_run(tmp_path).variables
    assert jax.tree.map(np.ndarray.tolist, variables) == {
        "params": {"actor": [5, 5, 5], "critic": [1, 1]},
        "batch_stats": {"mean": [1, 1]},
    }


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
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, whole, victim, damage, capsys):
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", **interrupt_at(20))
    for path in (tmp_path / "cut" / "checkpoints" / "21").glob(victim):
        damage(path)
    resumed = train(tmp_path / "cut")
    gc.collect()
    said = capsys.readouterr().out
    assert "the checkpoint of step 21 cannot be read" in said and "going on from step 14" in said
    assert parameters_sha256(resumed.params) == parameters_sha256(whole[0].params)


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
    def breaks(params, state, batch, key):
        value, _ = loss(params, state, batch, key)
        return value + jnp.where(state.step == 16, jnp.nan, 0.0) * params["slope"], Aux()

    update = Update(breaks, optax.adam(0.05))

    with Run.open(tmp_path, "line", Config(), Execution(checkpoint_every=7)) as run:
        init = lambda key: {"params": {"slope": jnp.ones(()), "bias": jnp.zeros(())}}
        batches = train_batches(Line(), transform, batch_size=8, seed=0)
        with pytest.raises(
            RunError,
            match=r"at step 17 gradient_norm, loss is not finite; the gradients of slope are not finite; the checkpoint of step 14 stands",
        ):
            fit(make_step(update), init_state(init, [update], seed=0), batches, run, steps=30)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [7, 14]


def test_of_several_updates_and_seeds_the_parameters_that_went_wrong_are_named(tmp_path):
    breaks = lambda params, state, batch, key: (params["w"].sum() + params["v"] * jnp.log(state.step - 1.0), Aux())
    fine = lambda params, state, batch, key: ((params**2).sum(), Aux())
    updates = Update(fine, optax.sgd(0.1), of="actor"), Update(breaks, optax.sgd(0.1), of="critic", frozen=Frozen("^w$"))
    init = lambda key: {"params": {"actor": jnp.ones(2), "critic": {"w": jnp.ones(3), "v": jnp.ones(())}}}
    for seeds in (None, 2):
        step = make_step(*updates) if seeds is None else over_seeds(make_step(*updates), seeds)
        with Run.open(tmp_path / str(seeds), "actor", Config()) as run, pytest.raises(RunError) as ended:
            fit(step, init_state(init, updates, seed=0, seeds=seeds), None, run, steps=4)
        assert "at step 1 critic/" in str(ended.value) and "the gradients of critic/v are not finite" in str(ended.value)


def test_another_config_is_refused_with_the_difference_and_overwritten_on_demand(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match=r"seed: 0 → 1.*--overwrite"), Run.open(tmp_path, "line", Config(seed=1)):
        pass
    with pytest.raises(UserError, match=r"experiment: line → curve"), Run.open(tmp_path, "curve", Config()):
        pass
    with Run.open(tmp_path, "line", Config(question="another?")):
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


def logged(directory: Path) -> list[dict]:
    return read_metrics(directory / "metrics.jsonl")


def test_a_step_may_be_a_scan_of_many_without_batches_and_without_a_loss(tmp_path):
    """Training that makes its own data on the device, four updates in one program."""

    def own_data(params, state, batch, key):
        assert batch is None
        x = jax.random.normal(key, (16,))
        return jnp.mean((params["slope"] * x - 2 * x) ** 2), Aux({"slope": params["slope"]})

    update = Update(own_data, optax.sgd(0.02))
    single = make_step(update)

    def four(state, batch):
        state, metrics = jax.lax.scan(lambda state, _: single(state, batch), state, length=4)
        return state, {"slope": metrics["slope"].mean()}

    def run(directory: Path, steps: int, step) -> TrainState:
        with Run.open(directory, "scan", Config(), Execution(checkpoint_every=6, log_every=8, keep_checkpoints=9)) as opened:
            state = init_state(lambda key: {"params": {"slope": jnp.zeros(())}}, [update], seed=0)
            seen.clear()
            evaluate = lambda variables, key: seen.append(float(variables["params"]["slope"])) or {}
            return fit(step, state, None, opened, steps=steps, evaluate=evaluate, evaluate_every=10)

    seen: list[float] = []
    whole = run(tmp_path / "whole", 30, four)
    assert int(whole.step) == 32  # Called as often as it takes.
    assert len(seen) == 2  # After steps 12 and 20; at the end another evaluates.
    assert sorted(int(path.name) for path in (tmp_path / "whole" / "checkpoints").iterdir()) == [8, 12, 20, 24, 32]
    rows = [row for row in logged(tmp_path / "whole") if "slope" in row]
    assert [row["step"] for row in rows] == [
        8,
        12,
        16,
        20,
        24,
        32,
    ]  # Every eight steps, and where something is saved or evaluated.
    assert "loss" not in rows[-1] and "examples_per_second" not in rows[-1]
    singles = run(tmp_path / "singles", 32, single)
    np.testing.assert_allclose(whole.params["slope"], singles.params["slope"], rtol=1e-5)
    run(tmp_path / "cut", 12, four)
    assert parameters_sha256(run(tmp_path / "cut", 30, four).params) == parameters_sha256(whole.params)


def test_steps_per_second_are_steps_and_not_calls(tmp_path, monkeypatch):
    now = iter(range(10_000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    update = Update(lambda params, state, batch, key: (params["slope"] ** 2, Aux()), optax.sgd(0.1))
    single = make_step(update)
    five = lambda state, batch: (jax.lax.fori_loop(0, 5, lambda i, state: single(state, batch)[0], state), {})
    with Run.open(tmp_path, "scan", Config(), Execution(log_every=1)) as opened:
        state = init_state(lambda key: {"params": {"slope": jnp.ones(())}}, [update], seed=0)
        fit(five, state, None, opened, steps=20)
    speeds = [row["steps_per_second"] for row in logged(tmp_path) if "steps_per_second" in row]
    assert len(speeds) == 4 and speeds[-1] == 5  # The clock that is asked once for each row goes on by one.


def test_what_a_mean_has_nothing_to_say_of_is_not_in_the_log(tmp_path):
    """Episodes end at steps 1, 2 and 7, with returns 4; 1 and 1; 6."""
    ends, returns = jnp.array([1, 2, 0, 0, 0, 0, 1, 0]), jnp.array([4.0, 2, 0, 0, 0, 0, 6, 0])

    def episodes(params, state, batch, key):
        return params["slope"] ** 2, Aux({"return": Mean(returns[state.step], ends[state.step])})

    update = Update(episodes, optax.sgd(0.1))
    with Run.open(tmp_path, "episodes", Config(), Execution(log_every=2)) as opened:
        state = init_state(lambda key: {"params": {"slope": jnp.ones(())}}, [update], seed=0)
        fit(make_step(update), state, None, opened, steps=8)
    found = {row["step"]: row.get("return") for row in logged(tmp_path) if "loss" in row}
    assert found == {2: 2.0, 4: None, 6: None, 8: 6.0}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


class Room:
    """On the host: a policy that pulls its position towards zero, and the noise of a room that knows where it is."""

    def __init__(self):
        self.position, self.random = 1.0, np.random.default_rng(0)

    def next_batch(self, state: TrainState) -> dict:
        before = self.position
        self.position += float(state.params["slope"]) * before + 0.1 * self.random.normal()
        self.seen = int(state.step)
        return {"moves": (np.full(4, before, np.float32), {"after": np.full((4, 1), self.position, np.float32)})}

    def get_state(self) -> dict:
        return {"position": self.position, "random": self.random.bit_generator.state}

    def set_state(self, state: dict) -> None:
        self.position, self.random.bit_generator.state = state["position"], state["random"]


def test_environments_on_the_host_act_with_what_was_learned_and_go_on_where_they_were(tmp_path):
    """Their batches are trees, as graphs are."""

    def follow(params, state, batch, key):
        before, after = batch["moves"]
        return jnp.mean((before + params["slope"] * before + after["after"][:, 0]) ** 2), Aux()

    update = Update(follow, optax.sgd(0.05))

    def run(directory: Path, steps: int) -> tuple[TrainState, Room]:
        room = Room()
        with Run.open(directory, "room", Config(), Execution()) as opened:
            state = init_state(lambda key: {"params": {"slope": jnp.full((), -0.5)}}, [update], seed=0)
            return fit(make_step(update), state, room, opened, steps=steps), room

    whole, room = run(tmp_path / "whole", 9)
    assert room.seen == 8
    slope, hand = -0.5, Room()
    for _ in range(9):
        before, _ = hand.next_batch(whole.replace(params={"slope": np.float32(slope)}))["moves"]
        x = float(before[0])
        slope -= 0.05 * 2 * x * (x + slope * x + hand.position)
    np.testing.assert_allclose(whole.params["slope"], slope, rtol=1e-4)
    run(tmp_path / "cut", 4)
    again, resumed = run(tmp_path / "cut", 9)
    assert parameters_sha256(again.params) == parameters_sha256(whole.params) and resumed.position == room.position


def test_a_stop_in_the_last_step_comes_before_what_follows_it(tmp_path, whole):
    """The next command goes on with the evaluation."""
    with pytest.raises(Interrupted, match="saved at step 30 of 30"):
        train(tmp_path / "cut", **interrupt_at(29))
    resumed = train(tmp_path / "cut", step=lambda state, batch: pytest.fail("a step was made"))
    assert parameters_sha256(resumed.params) == parameters_sha256(whole[0].params)


def test_an_evaluation_that_was_stopped_is_made_when_the_run_goes_on(tmp_path):
    seen = []

    def evaluate(variables: dict, key: jax.Array) -> dict[str, float]:
        seen.append(float(variables["params"]["slope"]))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            signals.look()  # As it is between batches.
        return {"slope": seen[-1]}

    with pytest.raises(Interrupted, match="saved at step 20 of 30"):
        train(tmp_path / "cut", evaluate=evaluate, evaluate_every=10)
    train(tmp_path / "cut", evaluate=evaluate, evaluate_every=10)
    assert len(seen) == 3 and seen[1] == seen[2]
    rows = read_metrics(tmp_path / "cut" / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/slope" in row] == [10, 20]


@pytest.mark.parametrize("damage", ["a file", "read-only"])
def test_checkpoints_that_cannot_be_written_are_refused_before_training(tmp_path, damage, monkeypatch):
    if damage == "a file":
        (tmp_path / "config.json").write_text(json.dumps({"experiment": "line", "preset": "default", "config": load_config()}))
        (tmp_path / "checkpoints").write_text("")
    else:

        def refuse(*given, **options):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr("jaxdl.training.checkpoint.tempfile.TemporaryDirectory", refuse)
    with pytest.raises(UserError, match="is no folder, and a run keeps its checkpoints|checkpoints cannot be written to .*: mend that"):
        train(tmp_path, step=lambda state, batch: pytest.fail("a step was made"))


def load_config() -> dict:
    return {"seed": 0, "sizes": [3], "spans": [[0.5, "half"], [1, "whole"]]}


def test_a_checkpoint_that_cannot_be_written_in_mid_run_is_one_line_and_a_quick_end(tmp_path):
    """In a process of its own, which must not wait for the threads of Orbax: those wait for minutes."""
    code = f"""
import os, sys
import test_loop
from jaxdl.launch.command_line import _set_up_libraries
from jaxdl.launch.exits import exit_statuses, own_process

def evaluate(variables, key):
    os.rename({str(tmp_path)!r} + "/run/checkpoints", {str(tmp_path)!r} + "/gone")  # At once, whatever is being written there.
    open({str(tmp_path)!r} + "/run/checkpoints", "w")
    return {{}}

own_process()
_set_up_libraries()
with exit_statuses():
    test_loop.train(test_loop.Path({str(tmp_path)!r}) / "run", evaluate=evaluate, evaluate_every=10)
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=60)
    assert done.returncode == 1 and len(done.stderr.decode().splitlines()) == 1, done.stderr.decode()[-2000:]
    assert "error: a checkpoint cannot be written to" in done.stderr.decode()


def test_other_ends_of_lines_within_a_row_end_no_row(tmp_path):
    rows = [{"step": 1, f"eval/{name}": 1.0} for name in ("a\u2028b", "a\u2029b", "a\x85b", "a\x0cb", "a\x1eb")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"step": 2, "cu', "utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
