"""Of every family: the newcomer's command leaves what it should, a run that is killed goes on to the same bits, and each mistake is one line."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from family import Family

import jaxdl.training.setup
from jaxdl import launch, training
from jaxdl.training import load_run
from jaxdl.training.saved import config_from_json

ROOT = Path(__file__).parents[2]
TWO_STEPS = dict(steps=2, evaluate_every=2)


@pytest.fixture(scope="module")
def smallest(family, tmp_path_factory) -> dict[str, Any]:
    """Values of a config with which a run takes no time, beside those of the family."""
    if not family.trains:
        return {}
    return dict(TWO_STEPS, data=family.some_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def run(family, smallest, tmp_path_factory) -> Path:
    """The folder of the newcomer's command, with so few steps and so small a model that it takes no time."""
    workdir = tmp_path_factory.mktemp(family.name)
    flags = family.flags(**smallest, **dict(checkpoint_every=1) if family.trains else {})
    command = [sys.executable, "-m", f"experiments.{family.name}", "--workdir", str(workdir), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return workdir


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    """Without what says how fast it went."""
    return {name: value for name, value in metrics.items() if not name.endswith("_per_second")}


def result(workdir: Path) -> dict:
    return json.loads((workdir / "result.json").read_text())


def test_the_command_leaves_its_metrics_and_its_figures(family, run):
    found = result(run)
    assert found["experiment"] == family.name
    assert found.get("metrics", {}).keys() == set(family.metrics)
    curves, left = ({"learning_curves"}, {"metrics.jsonl", "checkpoints", "tensorboard"}) if family.trains else (set(), set())
    assert {path.stem for path in (run / "figures").iterdir()} == {*family.figures, *curves}
    assert {"config.json", *left} <= {path.name for path in run.iterdir()}


@pytest.mark.needs("trains")
def test_a_run_that_is_killed_goes_on_and_ends_with_the_bits_of_one_that_is_not(family, smallest, run, tmp_path):
    """As a kill after the first of its two checkpoints would have left it. Runs that are really killed are in tests/training."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()
    for later in ("checkpoints/2", "figures", "tensorboard"):
        shutil.rmtree(tmp_path / later)
    found = launch.run(family.experiment, family.config(**smallest), tmp_path)
    wanted = result(run)
    assert found["parameters_sha256"] == wanted["parameters_sha256"]
    assert untimed(found["metrics"]) == untimed(wanted["metrics"])
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(rows) and rows[-1] == 2


@pytest.mark.needs("trains")
def test_a_saved_run_tells_the_config_that_it_was_begun_with(family, smallest, run):
    saved = load_run(run, family.experiment.config_class)
    config = family.config(**smallest)
    questions = {field.name: field.default for field in dataclasses.fields(config) if not field.metadata.get("identity", True)}
    assert (saved.experiment, saved.config) == (family.name, dataclasses.replace(config, **questions))
    assert jax.tree.leaves(saved.variables["params"])


def test_every_presets_config_comes_back_from_json(family):
    for config in family.experiment.presets.values():
        values = json.loads(json.dumps(dataclasses.asdict(config)))
        assert config_from_json(values, type(config), Path("config.json")) == config


class Built(Exception):
    """Carries the abstract state out of an experiment that has built its model."""


@pytest.mark.needs("trains")
def test_every_preset_builds_its_model(family, smallest, tmp_path, monkeypatch):
    """As far as the state at step 0, of which only shapes are made: the largest takes no memory."""
    init_state = training.init_state

    def abstract(init, updates, *, shardings=None, constants=None, **given):
        raise Built(jax.eval_shape(lambda: init_state(init, updates, **given)))

    for owner in (jaxdl.training.setup, sys.modules[family.experiment.main.__module__]):
        if hasattr(owner, "init_state"):
            monkeypatch.setattr(owner, "init_state", abstract)
    for name, config in family.experiment.presets.items():
        with pytest.raises(Built) as built:
            launch.run(family.experiment, here(family, config, smallest["data"]), tmp_path / name)
        assert jax.tree.leaves(built.value.args[0].params), name


def here(family: Family, config, data: str):
    """A preset's config with a few data and no weights from elsewhere, its blocks in a scan, of which one is traced however many there are."""
    changes = dict(data=data, data_dir="", eval_data="", init="", scan_layers=True) | family.presets
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if hasattr(config, name)})


def test_help_names_every_flag_and_every_preset(family, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.launch(family.experiment, ["--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    flags = [field.name.replace("_", "-") for field in dataclasses.fields(family.experiment.config_class)]
    assert [flag for flag in flags if f"--{flag}" not in text] == []
    assert [preset for preset in family.experiment.presets if preset not in text] == []


def mistakes(family: Family, smallest: dict[str, Any]) -> list[tuple[list[str], str]]:
    """Arguments, and a part of what is said about them."""
    found = [
        (["--seeed", "3"], "--seed"),
        (["--seed", "-1"], "--seed -1: it should be greater than or equal to"),
        (["--seed", "many"], "--seed"),
        (["--preset", "defualt"], "did you mean 'default'"),
    ]
    if smallest.get("data"):
        found += [(["--data", "folder:/nowhere/at/all"], "/nowhere/at/all"), (["--data", "builtin:nothing"], "'nothing'")]
    return found + [(family.flags(**{**smallest, **refused}), said) for refused, said in family.refused]


def test_a_mistake_ends_with_one_line_and_status_2(family, smallest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch.Experiment, "set_up", lambda experiment, config: None)
    for number, (arguments, said) in enumerate(mistakes(family, smallest)):
        with pytest.raises(SystemExit) as ended:
            launch.launch(family.experiment, ["--workdir", str(tmp_path / str(number)), *arguments])
        error = capsys.readouterr().err.strip()
        assert ended.value.code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1, error
        assert said in error, error
