"""The command line and its twin in Python: every flag is explained and checked, every mistake is one line with its mend, every end has its status."""

import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import pytest
from annotated_types import Ge

from jaxdl import launch, pretrained
from jaxdl.data import LABELLED_IMAGES, TABLES
from jaxdl.errors import RunError, UserError
from jaxdl.files import file_name, local_path
from jaxdl.launch.command_line import _field_help
from jaxdl.nn import ATTENTIONS
from jaxdl.training import Execution, Interrupted, Run, load_run
from jaxdl.training.saved import config_from_json


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Transformer, launch.Init, launch.Ask):
    """A toy."""

    width: Annotated[int, Ge(1)] = 16
    """Width of the toy."""
    widths: tuple[Annotated[int, Ge(1)], ...] = (3, 4)
    """Widths of its layers."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm of the toy."""


PRESETS = {
    "default": Config(data="builtin:toys", steps=7),
    "large": Config(data="tfds:toys", steps=7, width=512, attention="flash"),
}


def nothing(config, run):
    """Trains nothing."""
    return {}


def experiment(main=nothing, **fields) -> launch.Experiment:
    facts = dict(field="vision", summary="A toy.", paper="Nobody 2026, arXiv:2601.00001", minutes=1, expects={})
    return launch.Experiment(main, PRESETS, **facts | fields)


def parse(*arguments, directory="x"):
    return launch.parse(experiment(), ["--workdir", str(directory), *arguments])


def test_flags_presets_and_python_give_the_same_config(tmp_path):
    default, large = PRESETS.values()
    assert parse(directory=tmp_path) == ("default", default, tmp_path, Execution(), launch.Processes())
    assert parse("--preset", "large", "--steps", "3")[:2] == ("large", dataclasses.replace(large, steps=3))
    preset, config, *_ = parse("--preset=large", "--norm", "rms", "--learning_rate", "0.5", "--widths", "5", "6", "7")
    assert preset == "large" and config == dataclasses.replace(large, norm="rms", learning_rate=0.5, widths=(5, 6, 7))
    assert parse("--overwrite", "--log-every", "3")[3] == Execution(overwrite=True, log_every=3)


def test_the_flags_of_mixins_are_fields_of_the_config():
    *_, config, _, _, _ = parse("--attention", "flash", "--dropout", "0.25", "--remat", "--scan-layers", "--precision", "bf16")
    assert config.layer_fields() == {
        "attention": ATTENTIONS["flash"], "dropout": 0.25, "remat": True, "scan": True, "dtype": jnp.bfloat16,
    }  # fmt: skip
    assert PRESETS["default"].layer_fields()["dtype"] is None
    assert parse("--init", "runs/other")[1].init == "runs/other"
    assert parse("--ask", "one", "two words")[1].ask == ("one", "two words")


def test_a_config_comes_back_from_its_file_as_it_was(tmp_path):
    """Tuples too; a question is no part of what a run computes, and may be asked of the same run."""
    config = dataclasses.replace(PRESETS["large"], widths=(5, 6, 7), learning_rate=3e-4)
    for asked in ((), ("one",)):
        launch.run(experiment(), dataclasses.replace(config, ask=asked), tmp_path / "run", preset="large")
        written = json.loads((tmp_path / "run" / "config.json").read_text())
        assert (written["experiment"], written["preset"]) == ("test_launch", "large") and "ask" not in written["config"]
        assert config_from_json(written["config"], Config, tmp_path) == config
    with pytest.raises(UserError, match=r"learning_rate: 0.0003 → 0.001"):
        launch.run(experiment(), dataclasses.replace(config, learning_rate=1e-3), tmp_path / "run")
    for changed, message in (({"width": 0}, "width"), ({"height": 1}, "height"), ({"norm": "batch"}, "norm")):
        with pytest.raises(UserError, match=message):
            config_from_json(written["config"] | changed, Config, tmp_path)


def test_python_and_the_command_line_run_the_same(tmp_path):
    """The result of `launch.run` is what `main` returns; it sees the config, and the run that is open."""
    seen, set_up = [], []

    def main(config, run):
        seen.append((config, run.directory, run.preset, run.execution, run.experiment))
        assert isinstance(run, Run) and run.config == config
        return {"metrics": {"width": config.width}}

    execution, config = Execution(log_every=3), dataclasses.replace(PRESETS["large"], steps=2)
    toy = experiment(main, set_up=set_up.append)
    assert launch.run(toy, config, tmp_path / "a", execution, preset="large") == {"metrics": {"width": 512}}
    assert not set_up  # Settings of a process are its owner's.
    with pytest.raises(SystemExit) as ended:
        launch.launch(toy, ["--workdir", str(tmp_path / "b"), "--preset", "large", "--steps", "2", "--log-every", "3"])
    assert ended.value.code == 0 and set_up == [config]
    (first, second) = seen
    assert first == (config, tmp_path / "a", "large", execution, "test_launch")
    assert second == (config, tmp_path / "b", "large", execution, "test_launch")


def test_an_experiment_has_the_name_of_its_file_run_as_a_module_or_imported(monkeypatch):
    import sys
    import types

    assert experiment().name == "test_launch"
    module = types.ModuleType("__main__")
    module.__spec__ = types.SimpleNamespace(name="experiments.toy")
    monkeypatch.setitem(sys.modules, "__main__", module)
    main = lambda config, run: {}
    main.__module__ = "__main__"
    assert experiment(main).name == "toy"


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (0.1, "half a minute"), (0.5, "half a minute"), (0.74, "half a minute"), (0.8, "about a minute"), (1, "about a minute"),
        (1.3, "about 1.5 minutes"), (1.5, "about 1.5 minutes"), (2, "about 2 minutes"), (11.8, "about 12 minutes"),
    ],
)  # fmt: skip
def test_minutes_in_words(minutes, words):
    assert experiment(minutes=minutes).duration == words


@pytest.mark.parametrize(
    ("expects", "promise", "outcome"),
    [
        ({}, "", "about a minute on two cores"),
        ({"accuracy": (0.97, None)}, "accuracy ≥ 0.97", "accuracy ≥ 0.97, about a minute on two cores"),
        ({"loss": (None, 1.65), "fid": (2, 30.5)}, "loss ≤ 1.65, 2 ≤ fid ≤ 30.5", "loss ≤ 1.65, 2 ≤ fid ≤ 30.5, about a minute on two cores"),
    ],
)  # fmt: skip
def test_a_promise_in_words(expects, promise, outcome, capsys):
    toy = experiment(expects=expects)
    assert (toy.promise, toy.outcome) == (promise, outcome)
    with pytest.raises(SystemExit):
        launch.parse(toy, ["--help"])
    assert f"By default: {outcome}." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("metrics", "missed"),
    [
        ({"accuracy": 0.97, "loss": 1.0}, []),
        ({"accuracy": 0.97, "loss": 2.0}, []),
        ({"accuracy": 0.96, "loss": 0.9}, ["accuracy is 0.96", "loss is 0.9"]),
        ({"accuracy": 1.0, "loss": 2.1}, ["loss is 2.1"]),
        ({"accuracy": float("nan"), "loss": 1.5}, ["accuracy is nan"]),
        ({"loss": 1.5, "other": 0.0}, ["accuracy is nan"]),
    ],
)
def test_what_is_missed_of_a_promise(metrics, missed):
    found = experiment(expects={"accuracy": (0.97, None), "loss": (1.0, 2.0)}).missed(metrics)
    assert [line.partition(",")[0] for line in found] == missed


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
        parse("--help")
    assert not ended.value.code
    text = capsys.readouterr().out
    _, *parts = re.split(r"^\W*([\w-]+) options\W*$", text, flags=re.MULTILINE)
    groups = dict(zip(parts[::2], parts[1::2]))
    classes = {
        "data": launch.Data, "training": launch.Training, "transformer": launch.Transformer, "init": launch.Init, "ask": launch.Ask,
        "test-launch": Config, "execution": Execution, "processes": launch.Processes,
    }  # fmt: skip
    assert set(groups) == set(classes)
    for group, cls in classes.items():
        own = {"width", "widths", "norm"} if cls is Config else {field.name for field in dataclasses.fields(cls)}
        flags = {flag.replace("-", "_") for flag in re.findall(r"^\W{1,4}--([\w-]+)", groups[group], re.MULTILINE)}
        assert flags == own, group
        for name in own:
            assert len(_field_help(cls)[name].split()) >= 3, f"{name} is not explained"


def test_a_config_without_the_fields_of_training_has_none_of_their_flags(capsys):
    @dataclasses.dataclass(frozen=True)
    class Measure:
        """What is measured."""

        length: Annotated[int, Ge(1)] = 8
        """Length of what is measured."""

        def __post_init__(self) -> None:
            launch.check(self)

    toy = launch.Experiment(nothing, {"default": Measure()}, "kernels", "Measures.", "Nobody 2026, arXiv:2601.00001", 1, {})
    preset, config, *_ = launch.parse(toy, ["--workdir", "x", "--length", "9"])
    assert (preset, config) == ("default", Measure(9))
    with pytest.raises(UserError, match="--length 0"):
        launch.parse(toy, ["--workdir", "x", "--length", "0"])
    with pytest.raises(UserError, match="Unrecognized options: --steps"):
        launch.parse(toy, ["--workdir", "x", "--steps", "3"])


def raising(error: BaseException):
    def main(config, run):
        raise error

    return main


def no_space(error: Exception | None = None) -> Exception:
    error = error or RuntimeError("a write failed")
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
        (no_space(RunError("a checkpoint cannot be written")), 1, "error: no space is left on the disk"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nMore of it"),
            1,
            "error: the memory of this machine is full (RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.); the last whole checkpoint stands: "
            "give a smaller --batch-size, cut the batch into parts (--accumulate)",
        ),
        (MemoryError("Unable to allocate 9 TiB"), 1, "error: the memory of this machine is full (Unable to allocate 9 TiB)"),
        (Interrupted("SIGHUP: saved", signal.SIGHUP), 129, "SIGHUP: saved"),
    ],
)
def test_every_end_has_its_status_and_its_line(error, status, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        launch.launch(experiment(raising(error)), ["--workdir", str(tmp_path / "run")])
    assert ended.value.code == status
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(line)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_of_training_ends_with_its_status(tmp_path, capsys, sent):
    with pytest.raises(SystemExit) as ended:
        launch.launch(experiment(lambda *_: os.kill(os.getpid(), sent)), ["--workdir", str(tmp_path / "run")])
    assert ended.value.code == 128 + sent and sent.name in capsys.readouterr().err


def command(code: str, *arguments: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess:
    """A program of ours as a shell runs it; its stdout and stderr are read but for what `redirect` says."""
    line = f"{shlex.quote(sys.executable)} {code} {shlex.join(arguments)} {redirect}"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment
    return subprocess.run(["bash", "-c", line], capture_output=True, env=env, timeout=120)


SAYING = """
import sys
from jaxdl.streams import mend_streams
mend_streams()
for number in range(20_000):
    print("accuracy ≥ 0.97, 3 × 4 – \\ud800", number)
print("≥ \\ud800", file=sys.stderr)
open(sys.argv[1], "w").write("whole")
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("redirect", ["", "| head -1; exit ${PIPESTATUS[0]}", ">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full"])
def test_streams_that_lack_a_reader_or_characters_end_no_program(tmp_path, redirect, encoding):
    done = command("-c", SAYING, str(tmp_path / "file"), redirect=redirect, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and b"Error" not in done.stderr
    assert (tmp_path / "file").read_text() == "whole"  # No stream is mistaken for it.
    if "head" in redirect:
        assert len(done.stdout.splitlines()) == 1
    if redirect in ("", "| head -1; exit ${PIPESTATUS[0]}", "> /dev/full", ">&-"):
        assert done.stderr.decode(encoding) == ("≥ ?\n" if encoding == "utf-8" else "? ?\n")


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "error: JAX_PLATFORMS=cuda: jax cannot compute on that here"),
        ({"JAX_PLATFORMS": "tpu"}, "error: JAX_PLATFORMS=tpu: jax cannot compute on that here"),
        ({"JAX_PLATFORMS": "abacus"}, "error: JAX_PLATFORMS=abacus: jax cannot compute on that here"),
        ({"XLA_FLAGS": "--xla_nonsense=1"}, "error: XLA_FLAGS='--xla_nonsense=1': this version of XLA refuses them"),
        ({"XLA_FLAGS": "nonsense"}, "error: XLA_FLAGS='nonsense': this version of XLA refuses them"),
    ],
)
def test_what_jax_cannot_compute_on_is_one_line_before_anything_else(tmp_path, environment, line):
    done = command("-m", "experiments.mlp", "--workdir", str(tmp_path / "run"), **environment)
    (said,) = done.stderr.decode().splitlines()
    assert done.returncode == 2 and said.startswith(line) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("columns", [1, 2, 10])
def test_a_terminal_of_few_columns_has_help_too(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--workdir" in capsys.readouterr().out and os.environ["COLUMNS"] == str(columns)


URLS = ["gs://bucket/run", "s3://bucket/run", "hdfs://host/run", "file:///tmp/run", "https://host/run"]


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_no_path(url, tmp_path, monkeypatch):
    """Wherever a path may be given, and as a `Path` too, which has one slash less."""
    monkeypatch.chdir(tmp_path)
    for given in (url, Path(url)):
        for read in (
            local_path,
            lambda given: launch.run(experiment(), PRESETS["default"], given),
            lambda given: launch.run(experiment(), PRESETS["default"], "run", Execution(export=str(given))),
            load_run,
            pretrained.load,
            lambda given: TABLES.open(f"folder:{given}"),
            lambda given: LABELLED_IMAGES.open("tfds:mnist", data_dir=str(given)),
        ):
            with pytest.raises(UserError, match="is a URL, and files are read and written on this machine"):
                read(given)
    with pytest.raises(UserError, match="is a URL"):
        parse("--workdir", url)
    assert not list(tmp_path.iterdir())


def test_a_home_is_found_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a") == tmp_path / "a" and local_path("a:b/c") == Path("a:b/c")
    launch.run(experiment(), PRESETS["default"], "~/run")
    assert (tmp_path / "run" / "config.json").is_file()
    assert launch.parse(experiment(), ["--workdir", "~/run"])[2] == tmp_path / "run"
    for given in ("~nobody-of-that-name/run", "a\0b"):
        with pytest.raises(UserError):
            local_path(given)


@pytest.mark.parametrize("name", ["a/b", "../../a", "/etc/a", "a\0b", ".hidden", "..", "", "x" * 500, "漢" * 300, "a\nb", "\ud800", "a\\b"])
def test_any_name_is_one_part_of_a_path(name, tmp_path):
    kept = file_name(name)
    (tmp_path / f"{kept}_000001.png").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == [f"{kept}_000001.png"]


def test_a_bug_keeps_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError):
        launch.launch(experiment(lambda *_: 1 / 0), ["--workdir", str(tmp_path / "run")])


@pytest.mark.parametrize("given", ["", "--xla_dump_to=a", "--xla_cpu_prefer_vector_width=128"])
def test_xla_takes_wide_vectors_unless_its_flags_say_otherwise(given, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", given)
    launch.take_wide_vectors()
    wanted = given if "vector" in given else f"{given} --xla_cpu_prefer_vector_width=512".strip()
    assert os.environ["XLA_FLAGS"] == wanted
