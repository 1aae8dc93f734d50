"""Agents: that they resume with the worlds of other libraries, do the same on eight devices, and are refused where they make no sense."""

import dataclasses
import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ppo
from jaxdl import launch
from jaxdl.errors import UserError
from jaxdl.models.agents import ActorCritic
from jaxdl.training import Execution, load_run

TINY = {
    "ppo": dict(batch_size=32, horizon=8, epochs=2, steps=12, environments=8),
    "dqn": dict(batch_size=16, sync=4, steps=12, warm=32, memory=80, environments=8, n_step=2, prioritized=0.6),
    "sac": dict(batch_size=16, updates=2, steps=12, warm=32, memory=80, environments=8),
}
NAMES = list(TINY)


def experiment(name: str) -> launch.Experiment:
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def config(name: str, **changes):
    small = dict(seeds=2, episodes=4, width=16, evaluate_every=12)
    return dataclasses.replace(experiment(name).presets["default"], **small | TINY[name] | changes)


def untimed(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if not name.endswith("_per_second")}


@pytest.fixture(scope="module", params=NAMES)
def alone(request, tmp_path_factory):
    """A name, and the folder of its run on one device."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = jax.devices
    jax.devices = lambda *given: whole(*given)[:1]
    try:
        launch.run(experiment(request.param), config(request.param), folder)
    finally:
        jax.devices = whole
    return request.param, folder


@pytest.mark.eight_devices
def test_eight_devices_act_and_learn_as_one(alone, tmp_path):
    name, folder = alone
    parallel = "fsdp" if name == "dqn" else "jit"
    found = launch.run(experiment(name), config(name), tmp_path, Execution(parallel=parallel))["metrics"]
    wanted = json.loads((folder / "result.json").read_text())["metrics"]
    for metric, value in untimed(wanted).items():
        np.testing.assert_allclose(found[metric], value, rtol=1e-3, atol=1e-3, err_msg=metric)
    ours, theirs = (load_run(each).variables["params"] for each in (tmp_path, folder))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs)


@pytest.mark.eight_devices
def test_a_program_for_each_device_learns_from_its_own_environments(tmp_path):
    """Each shuffles its own rows, so that PPO learns from other minibatches; agents that draw from one memory refuse (tests/families)."""
    found = launch.run(experiment("ppo"), config("ppo", epochs=1), tmp_path, Execution(parallel="pmap"))
    assert np.isfinite(list(found["metrics"].values())).all()


@pytest.mark.eight_devices
def test_layouts_that_make_no_sense_are_one_line(tmp_path):
    with pytest.raises(UserError, match="--environments 4 cannot be shared out to 8 devices: choose a multiple of 8"):
        launch.run(experiment("ppo"), config("ppo", environments=4), tmp_path / "a")
    pytest.importorskip("gymnasium")
    with pytest.raises(UserError, match="runs on the host, beside one device; there are 8"):
        launch.run(experiment("ppo"), config("ppo", environment="gymnasium:CartPole-v1"), tmp_path / "b")


@pytest.mark.parametrize(("name", "world"), [("ppo", "gymnasium:CartPole-v1"), ("dqn", "gymnax:Catch-bsuite")])
def test_with_worlds_of_other_libraries_a_run_goes_on_to_the_same_bits(tmp_path, name, world):
    """A simulator that is gone is played again from its seed."""
    pytest.importorskip(world.partition(":")[0])
    short = config(name, environment=world, environments=4, seeds=1, episodes=1, batch_size=16)
    once = Execution(checkpoint_every=1, keep_checkpoints=100)
    whole = launch.run(experiment(name), short, tmp_path / "whole", once)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    steps = sorted(int(path.name) for path in (tmp_path / "cut" / "checkpoints").iterdir() if path.name.isdecimal())
    assert len(steps) > 2
    for step in steps[1:]:
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    again = launch.run(experiment(name), short, tmp_path / "cut", once)
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    assert untimed(again["metrics"]) == untimed(whole["metrics"])


def test_a_finished_run_plays_what_it_is_asked(alone, capsys):
    name, folder = alone
    before = (folder / "result.json").read_text()
    capsys.readouterr()
    launch.run(experiment(name), config(name, ask=("3", "5")), folder)
    said = capsys.readouterr().out
    assert "episode 3: return " in said and "episode 5: return " in said
    assert {"episode_3.gif", "episode_5.gif"} <= {path.name for path in (folder / "figures").iterdir()}
    assert (folder / "result.json").read_text() == before


def test_agents_that_learn_together_are_those_that_learn_alone(tmp_path):
    """A seed's agent does not depend on who is trained beside it, but for the order of sums."""
    together = launch.run(experiment("ppo"), config("ppo"), tmp_path / "two")
    launch.run(experiment("ppo"), config("ppo", seeds=1, seed=1), tmp_path / "one")
    two, one = (load_run(tmp_path / each).variables["params"] for each in ("two", "one"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b[0], rtol=1e-3, atol=1e-4), two, one)
    assert together["metrics"]["deviation_of_returns"] >= 0


def test_a_time_limit_is_bootstrapped_and_an_end_is_not():
    """Of rows whose values are all 10, advantages count what a cut-off episode would have had."""
    rows = {name: jnp.zeros((2, 1)) for name in ("drawn", "log_prob")}
    seen = rows | {"observation": jnp.zeros((2, 1, 4)), "next_observation": jnp.zeros((2, 1, 4)), "reward": jnp.ones((2, 1))}
    last, default = jnp.array([[False], [True]]), ppo.PRESETS["default"]

    class Tens(ActorCritic):
        def value(self, x):
            return jnp.full(x.shape[:-1], 10.0)

    def advantages(terminated):
        return np.asarray(ppo.judged(Tens(2, True), default, {}, seen | {"terminated": terminated, "ended": last})["advantage"])

    np.testing.assert_allclose(advantages(jnp.zeros((2, 1), bool))[1], 1 + 0.99 * 10 - 10, rtol=1e-5)
    np.testing.assert_allclose(advantages(last)[1], 1 - 10, rtol=1e-5)
