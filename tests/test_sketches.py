"""An adversary, an agent and a graph network: each is a short experiment, and has all that experiments have."""

import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import chex
import jax
import numpy as np
import pytest

from jaxdl import launch
from jaxdl.training import Execution, load_run

TESTS = Path(__file__).parent
STEPS = 12
TINY = {
    "gan": dict(steps=STEPS, batch_size=80, evaluate_every=4, show_every=6),
    "gcn": dict(steps=STEPS, nodes=80, evaluate_every=4, show_every=6),
    "ppo": dict(steps=STEPS, batch_size=32, horizon=8, evaluate_every=4, show_every=6),
}
NAMES = list(TINY)


def sketch(name: str):
    return importlib.import_module(f"sketches.{name}")


def tiny(name: str):
    return dataclasses.replace(sketch(name).PRESETS["default"], **TINY[name])


@pytest.fixture(scope="module", params=NAMES)
def whole(request, tmp_path_factory):
    """A name, the directory of a run on one device that nothing interrupted, and its result."""
    name, directory = request.param, tmp_path_factory.mktemp(request.param) / "whole"
    with mock.patch.object(jax, "devices", lambda *given, devices=jax.devices: devices(*given)[:1]):
        return name, directory, launch.run(sketch(name).EXPERIMENT, tiny(name), directory, Execution(log_every=1))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short(name):
    assert len((TESTS / "sketches" / f"{name}.py").read_text().splitlines()) <= 120


def test_it_draws_in_the_course_of_training(whole):
    _, directory, _ = whole
    drawn = {path.name for path in (directory / "figures").iterdir()}
    (name,) = {path.rpartition("_")[0] for path in drawn if path.endswith("_000006.png")}
    assert f"{name}.png" in drawn and "learning_curves.png" in drawn


def test_every_row_of_the_log_is_made_of_numbers(whole):
    _, directory, result = whole
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert np.isfinite(list(result["metrics"].values())).all()


def test_killed_it_goes_on_and_ends_with_the_same_bits(whole, tmp_path):
    name, _, result = whole
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in (TINY[name] | {"steps": STEPS}).items()]
    command = [
        sys.executable,
        "-m",
        f"sketches.{name}",
        "--workdir",
        str(tmp_path / "run"),
        "--checkpoint-every=2",
        "--log-every=1",
        *flags,
    ]
    process = subprocess.Popen(command, cwd=TESTS, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("[0-9]*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = launch.run(sketch(name).EXPERIMENT, tiny(name), tmp_path / "run", Execution(log_every=1, checkpoint_every=2))
    assert again["parameters_sha256"] == result["parameters_sha256"]
    assert again["metrics"] == result["metrics"]


@pytest.mark.eight_devices
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_eight_devices_do_what_one_does(whole, tmp_path, parallel):
    """Under `pmap` the adversary's noise is drawn on each device, and is another."""
    name, _, result = whole
    if (name, parallel) == ("gan", "pmap"):
        pytest.skip("noise is another draw on each device")
    found = launch.run(sketch(name).EXPERIMENT, tiny(name), tmp_path, Execution(parallel=parallel, log_every=1))
    assert found["metrics"].keys() == result["metrics"].keys()
    for metric, value in result["metrics"].items():
        np.testing.assert_allclose(found["metrics"][metric], value, rtol=1e-4, err_msg=metric)
    alone, together = (load_run(directory).variables["params"] for directory in (whole[1], tmp_path))
    chex.assert_trees_all_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [10, 11, 12])
def test_it_learns(name, seed, tmp_path):
    experiment = sketch(name).EXPERIMENT
    result = launch.run(experiment, dataclasses.replace(sketch(name).PRESETS["default"], seed=seed), tmp_path)
    assert experiment.missed(result["metrics"]) == []


def environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
