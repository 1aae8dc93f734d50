"""The command line: every flag is explained and checked, every mistake is one line with its mend."""

import dataclasses
import errno
import os
import signal
from typing import Annotated, Literal

import pytest
from annotated_types import Ge

from jaxdl import launch
from jaxdl.errors import RunError, UserError
from jaxdl.training import Execution


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """A toy."""

    steps: Annotated[int, Ge(1)] = 7
    width: Annotated[int, Ge(1)] = 16
    """Width of the toy."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm of the toy."""


def experiment(main=lambda config, workdir, execution: {}) -> launch.Experiment:
    presets = {"default": Config(), "large": Config(preset="large", width=512)}
    return launch.Experiment("toy", "A toy.", "Nobody 2026", "nothing", 1, presets, main)


def test_flags_presets_and_python_give_the_same_config(tmp_path):
    parse = lambda *arguments: launch.parse(experiment(), ["--workdir", str(tmp_path), *arguments])
    assert parse() == (Config(), tmp_path, Execution(), launch.Processes())
    assert parse("--preset", "large", "--steps", "3")[0] == Config(preset="large", width=512, steps=3)
    assert parse("--preset=large", "--norm", "rms", "--learning_rate", "0.5")[0] == Config(
        preset="large", width=512, norm="rms", learning_rate=0.5
    )
    assert parse("--overwrite", "--log-every", "3")[2] == Execution(overwrite=True, log_every=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir"),
        (["--workdir", "x", "--widht", "3"], r"Unrecognized options: --widht.*--width"),
        (["--workdir", "x", "--width", "wide"], r"--width: invalid literal for int\(\).*'wide'"),
        (["--workdir", "x", "--width", "0"], "--width 0: it should be greater than or equal to 1"),
        (["--workdir", "x", "--learning-rate", "nan"], "--learning-rate nan: it should be a finite number"),
        (["--workdir", "x", "--norm", "batch"], r"'batch'.*--norm.*\('layer', 'rms'\)"),
        (["--workdir", "x", "--preset", "lrge"], "no preset 'lrge': did you mean 'large'\\? choose one of default, large"),
        (
            ["--workdir", "x", "--batch-size", "9", "--accumulate", "2"],
            "a batch of 9 cannot be cut into 2 equal parts: choose --accumulate",
        ),
        (
            ["--workdir", "x", "--distributed", "--process-id", "0"],
            "--coordinator, --num-processes and --process-id belong together",
        ),
        (["--workdir", "x", "--num-processes", "2"], "are for --distributed runs"),
        (
            ["--workdir", "x", "--distributed", "--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2 of --num-processes 2: they are numbered from 0",
        ),
        (["--workdir", "x", "--log-every", "0"], "--log-every 0: it should be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_accepted(arguments, message, capsys):
    with pytest.raises(UserError, match=message):
        launch.parse(experiment(), arguments)
    with pytest.raises(SystemExit) as ended:
        launch.launch(experiment(), arguments)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "values", [{"width": "3"}, {"width": 0}, {"norm": "batch"}, {"learning_rate": float("inf")}, {"steps": 1.5}]
)
def test_a_config_made_in_python_is_checked_too(values):
    with pytest.raises(UserError, match=f"--{next(iter(values)).replace('_', '-')} "):
        Config(**values)


def test_help_explains_every_flag_in_its_group(capsys):
    with pytest.raises(SystemExit) as ended:
        launch.parse(experiment(), ["--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    for group in ("data options", "training options", "toy options", "execution options"):
        assert group in text
    for cls in (Config, Execution):
        documented = launch._field_help(cls)
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')}" in text
            assert len(documented[field.name].split()) >= 3, f"{field.name} is not explained"


def raising(error: BaseException):
    def main(config, workdir, execution):
        raise error

    return main


def no_space() -> RuntimeError:
    error = RuntimeError("a write failed")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such thing:\n choose another"), 2, "error: no such thing: choose another"),
        (RunError("it broke"), 1, "error: it broke"),
        (KeyboardInterrupt(), 130, "interrupted; what was saved stands"),
        (no_space(), 1, "error: no space is left on the disk; the last whole checkpoint stands"),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device"), 1, "error: no space is left on the disk"),
    ],
)
def test_every_end_has_its_status_and_its_line(error, status, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.launch(experiment(raising(error)), ["--workdir", str(tmp_path)])
    assert ended.value.code == status
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(line)


def test_a_termination_outside_of_training_ends_with_143(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.launch(experiment(lambda *_: os.kill(os.getpid(), signal.SIGTERM)), ["--workdir", str(tmp_path)])
    assert ended.value.code == 143 and "SIGTERM" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        launch.launch(experiment(lambda *_: 1 / 0), ["--workdir", str(tmp_path)])


@pytest.mark.parametrize("given", ["", "--xla_dump_to=a", "--xla_cpu_prefer_vector_width=128"])
def test_xla_takes_wide_vectors_unless_its_flags_say_otherwise(given, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", given)
    launch.take_wide_vectors()
    wanted = given if "vector" in given else f"{given} --xla_cpu_prefer_vector_width=512".strip()
    assert os.environ["XLA_FLAGS"] == wanted
