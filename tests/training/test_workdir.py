"""Working directories as people have them: what no run has written is neither changed nor deleted, what a run has left is resumed or refused in a line whose advice works."""

import ast
import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxdl.errors import UserError
from jaxdl.training import NOT_IDENTITY, Execution, Run, TrainState
from jaxdl.training.workdir import FILES, FOLDERS, KEPT, RUN_FOLDERS, strangers

ANEW = Execution(overwrite=True)


@dataclass(frozen=True)
class Config:
    seed: int = 0
    data: str = "builtin:toys"
    init: str = ""
    ask: tuple[str, ...] = field(default=(), metadata=NOT_IDENTITY)


def state(step: int) -> TrainState:
    return TrainState(jnp.asarray(step, jnp.int32), {"w": jnp.ones(2)}, {}, {}, jnp.zeros(2, jnp.uint32))


def begin(
    directory: Path, config: Config = Config(), execution: Execution = Execution(), *, step: int = 0, name: str = "toy"
) -> list[int]:
    """Opens a run, and leaves a checkpoint if a step is given. Returns the steps of the checkpoints that it finds."""
    with Run.open(directory, name, config, execution) as run:
        found = [run.checkpoints.latest()] if run.checkpoints.latest() else []
        if step:
            run.checkpoints.save(state(step), {}, 1.0)
        return found


def refused(directory: Path, config: Config = Config(), execution: Execution = Execution(), *, name: str = "toy") -> str:
    """Why it cannot be opened: one line."""
    with pytest.raises(UserError) as error:
        begin(directory, config, execution, name=name)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(directory: Path) -> dict[str, bytes | str]:
    """Everything in a folder, but for a lock, which may come and go."""
    found: dict[str, bytes | str] = {}
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
    return {name: content for name, content in found.items() if content or name != ".lock"}


def write(directory: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())


IDENTITY = {"experiment": "toy", "preset": "default", "config": {"seed": 0, "data": "builtin:toys", "init": ""}}
FOREIGN: dict[str, dict[str, str | bytes]] = {
    "a published model": {"config.json": '{"model_type": "gpt2", "n_layer": 12}', "model.safetensors": b"weights", "tokenizer.json": "{}"},
    "a clone of one": {"config.json": '{"model_type": "gpt2"}', ".git/HEAD": "ref: refs/heads/main", "pytorch_model.bin": b"weights"},
    "a config of another program": {"config.json": '{"experiment": "ablation", "config": {"lr": 0.1}}', "checkpoints/1/model.pt": b"weights"},
    "a config that is a list": {"config.json": "[1, 2]", "figures/curve.png": b"years of work"},
    "a config that is a number": {"config.json": "3"},
    "a config that is a text": {"config.json": "experiment = toy"},
    "an empty config": {"config.json": "", "checkpoints/best.ckpt": b"weights"},
    "a config that is no text": {"config.json": b"\xff\xfe\x00", "metrics.jsonl": "{}"},
    "a config that is a folder": {"config.json/a": "b"},
    "a config with more in it": {"config.json": json.dumps(IDENTITY | {"author": "somebody"})},
    "a config of another form": {"config.json": json.dumps(IDENTITY | {"config": [1]})},
    "a config that is very deep": {"config.json": "[" * 100_000},
    "a lock with something in it": {".lock": "pid 7"},
    "a lock that is a folder": {".lock/x": "y"},
    "a part of another config": {"config.json.tmp": '{"model_type": '},
    "figures": {"figures/curve.png": b"years of work"},
    "a tokenizer": {"tokenizer.json": "{}", "tokenizer_config.json": "{}"},
}  # fmt: skip


@pytest.mark.parametrize("execution", [Execution(), ANEW], ids=["", "overwrite"])
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_run_is_left_alone_and_nobody_is_told_to_delete_it(tmp_path, files, execution):
    write(tmp_path, files)
    before = contents(tmp_path)
    said = refused(tmp_path, execution=execution)
    assert (contents(tmp_path) == before and not (tmp_path / ".lock").is_file()) or ".lock" in files
    assert "--overwrite" not in said and "--workdir" in said and str(tmp_path) in said


def ours(directory: Path, **config) -> Path:
    """A run with a checkpoint and with what runs have beside it."""
    begin(directory, Config(**config), step=3)
    for name, content in {
        "metrics.jsonl": '{"step": 3, "loss": 1}\n', "result.json": '{"metrics": {}}', "figures/curve.png": b"a", "sample.txt": "a",
        "tensorboard/events.out.tfevents.1": b"a", "model/config.json": "{}", "test_2016_translations.txt": "a", "wandb/run-1/a": "b",
        "metrics.jsonl.tmp": "a", ".unfinished-x1/tokenizer.json": "{}",
    }.items():  # fmt: skip
        write(directory, {name: content})
    for nested in ("tower", "beside/gru"):
        begin(directory / nested, step=2)
    return directory


def link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        elsewhere = path.parents[1] / target
        if path.exists():
            path.rename(elsewhere)
        else:
            elsewhere.mkdir()
        path.symlink_to(elsewhere)

    return make


STRANGERS: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda path: path.write_text("mine"),
    ".git": lambda path: path.mkdir(),
    "model.safetensors": lambda path: path.write_text("mine"),
    "figures/mine.svg": lambda path: path.write_text("mine"),
    "checkpoints/best": lambda path: path.mkdir(),
    "model/.git": lambda path: path.mkdir(),
    "beside/paper": lambda path: write(path, {"config.json": "{}"}),
    "beside/notes.txt": lambda path: path.write_text("mine"),
    "tower/notes.txt": lambda path: path.write_text("mine"),
    "notes.json.tmp": lambda path: path.write_text("mine"),
    "checkpoints": link("large disk"),
    "figures": link("other figures"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_run_with_other_things_in_it_is_resumed_and_not_overwritten(tmp_path, name):
    directory = ours(tmp_path / "run")
    STRANGERS[name](directory / name)
    before = contents(tmp_path)
    assert f"holds {name}" in (said := refused(directory, Config(seed=1), ANEW)) and "move it away" in said
    assert "--overwrite" not in refused(directory, Config(seed=1))  # It could not be followed.
    assert contents(tmp_path) == before
    assert begin(directory) == [3]
    moved = directory / name
    moved.rename(tmp_path / "moved")
    assert begin(directory, Config(seed=1), ANEW) == []


def test_overwriting_removes_all_that_a_run_writes(tmp_path):
    directory = ours(tmp_path / "run")
    assert strangers(directory) == []
    assert begin(directory, Config(seed=1), ANEW) == []
    assert sorted(path.name for path in directory.iterdir()) == [".ended", ".lock", "checkpoints", "config.json", "figures"]
    assert not list((directory / "figures").iterdir()) and not list((directory / "checkpoints").iterdir())


def names_beside_checkpoints() -> set[str]:
    """What modules write in a run's directory: `run.directory / "name"` and `directory / "name"`."""
    root = Path(__file__).parents[2]
    found: set[str] = set()
    for file in [
        *(root / "experiments").glob("*.py"),
        *(root / "jaxdl" / "tasks").glob("*.py"),
        *(root / "jaxdl" / "training").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and ast.unparse(node.left).endswith("run.directory"):
                text = node.right
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                found.add("".join(part.value if isinstance(part, ast.Constant) else "x_" for part in parts))
    return found - {"x_"}


def test_every_file_that_an_experiment_writes_is_known_to_be_a_runs():
    import fnmatch

    names = names_beside_checkpoints()
    assert {"sample.txt", "answers.txt", "x_translations.txt", "profile", "tower", "sweep.json"} <= names
    known = (*FILES, *FOLDERS, *RUN_FOLDERS)
    assert [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known)] == []


def test_a_run_that_made_no_step_gives_way_to_another(tmp_path):
    """As after a mistyped --data: the corrected command begins, with nothing of the data of before."""
    for config, name in ((Config(data="folder:typo"), "toy"), (Config(), "toy"), (Config(seed=4), "other"), (Config(), "other")):
        with pytest.raises(RuntimeError), Run.open(tmp_path, name, config) as run:
            assert not any((tmp_path / kept).exists() for kept in KEPT)
            write(tmp_path, dict.fromkeys((*KEPT, "tokens.part", ".unfinished-a/tokenizer.json"), b"of other data"))
            with contextlib.suppress(ValueError), Run.open(tmp_path / "tower", "tower", config):
                raise ValueError("there is nothing for a tower to learn")
            raise RuntimeError(f"the data of {run.config} are not there")
        assert json.loads((tmp_path / "config.json").read_text())["config"]["data"] == config.data
    (tmp_path / "notes.txt").write_text("mine")
    begin(tmp_path, step=1, name="toy")
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "tokens.npy").exists()


@pytest.mark.parametrize("work", ["", "checkpoint", "metrics.jsonl", "layers.jsonl", "result.json", "tiles.json", "tower"])
def test_a_run_that_computed_something_does_not(tmp_path, work):
    with contextlib.suppress(RuntimeError), Run.open(tmp_path, "toy", Config()) as run:
        if work == "checkpoint":
            run.checkpoints.save(state(1), {}, 1.0)
        if work:
            raise RuntimeError("it failed then")
    if work == "tower":
        begin(tmp_path / work, step=1)
    elif work not in ("", "checkpoint"):
        write(tmp_path, {work: '{"step": 1}\n'})
    before = contents(tmp_path)
    assert "seed: 0 → 1" in refused(tmp_path, Config(seed=1)) and "experiment: toy → other" in refused(tmp_path, name="other")
    assert contents(tmp_path) == before
    begin(tmp_path)
    begin(tmp_path, Config(seed=1), ANEW)


@pytest.mark.parametrize("end", ["killed", "failed", "well", "with a checkpoint"])
def test_what_a_process_made_of_the_data_is_made_anew_if_it_failed_before_there_was_a_checkpoint(tmp_path, end):
    with contextlib.suppress(RuntimeError), Run.open(tmp_path, "toy", Config()) as run:
        if end == "with a checkpoint":
            run.checkpoints.save(state(1), {}, 1.0)
        raise RuntimeError("the data are not there")
    if end == "killed":
        write(tmp_path, dict.fromkeys(KEPT, b"half of"))
    else:
        with contextlib.suppress(RuntimeError), Run.open(tmp_path, "toy", Config()):
            write(tmp_path, dict.fromkeys(KEPT, b"whole"))
            if end != "well":
                raise RuntimeError("the data are not there")
    begin(tmp_path)
    assert [(tmp_path / name).exists() for name in KEPT] == [end in ("well", "with a checkpoint")] * len(KEPT)


class Killed(BaseException):
    """As by SIGKILL: nothing is done after it."""


@pytest.mark.parametrize("moment", range(24))
def test_overwriting_that_is_cut_off_is_done_by_the_same_command(tmp_path, monkeypatch, moment):
    directory, moments = ours(tmp_path / "run"), iter(range(100))

    def killed_at(function):
        def call(*given, **more):
            if next(moments) == moment:
                raise Killed
            return function(*given, **more)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed_at(Path.rename))
        patched.setattr(shutil, "rmtree", killed_at(shutil.rmtree))
        patched.setattr(shutil, "copyfile", killed_at(shutil.copyfile))
        patched.setattr(os, "fsync", killed_at(os.fsync))
        with pytest.raises(Killed):
            begin(directory, Config(seed=1), ANEW)
            raise Killed  # After fewer moments.
    assert (directory / "config.json").is_file()
    again = tmp_path / "again"
    shutil.copytree(directory, again)
    assert begin(directory, Config(seed=1), ANEW) == []
    try:  # Without that flag there is either the old run, with all that it had, or the new one.
        assert begin(again) == [3] and {"result.json", "sample.txt", "tower/config.json"} <= contents(again).keys()
    except UserError:
        assert begin(again, Config(seed=1)) == []


@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt, Killed])
@pytest.mark.parametrize("config", [Config(), Config(seed=1)], ids=["same config", "another config"])
def test_the_old_run_is_there_again_if_the_new_one_fails_before_its_first_step(tmp_path, monkeypatch, config, end):
    directory = ours(tmp_path / "run")
    before = contents(directory)
    with pytest.raises(end), monkeypatch.context() as patched, Run.open(directory, "toy", config, ANEW):
        write(directory, dict.fromkeys((*KEPT, "target.txtpb"), "new") | {"tower/config.json": json.dumps(IDENTITY)})
        if end is Killed:  # Nothing is done then, and a later process finds it.
            patched.setattr("jaxdl.training.workdir._settle", lambda directory: None)
        raise end
    assert begin(directory) == [3]
    after = contents(directory)
    assert {name: after.get(name) for name in before if name != "metrics.jsonl.tmp"} == {
        name: content for name, content in before.items() if name != "metrics.jsonl.tmp"
    }
    assert after.keys() - before.keys() <= {"environment.json"}


def test_the_old_run_is_deleted_when_the_new_one_makes_a_step(tmp_path):
    directory = ours(tmp_path / "run")
    with pytest.raises(RuntimeError), Run.open(directory, "toy", Config(seed=1), ANEW) as run:
        run.start_logging(0)
        assert not any(path.name.startswith((".aside", ".discarded")) for path in directory.iterdir())
        run.log(1, {"loss": 1.0})
        raise RuntimeError("it failed then")
    assert "seed: 1 → 0" in refused(directory)


INPUTS: dict[str, Callable[[Path], dict]] = {
    "itself": lambda run: {"init": str(run)},
    "its model": lambda run: {"init": f"{run}/model"},
    "a folder of data": lambda run: {"data": f"folder:{run}/figures"},
    "an image": lambda run: {"ask": ("what is it?", f"{run}/figures/curve.png")},
    "through a link": lambda run: {"init": f"{run.parent}/link/tower"},
}


@pytest.mark.parametrize("named", INPUTS)
def test_overwriting_does_not_delete_what_the_command_reads(tmp_path, named):
    directory = ours(tmp_path / "run")
    (tmp_path / "link").symlink_to(directory)
    before = contents(directory)
    config = INPUTS[named](directory)
    said = refused(directory, Config(**config), ANEW)
    assert f"--{next(iter(config))} " in said and "would be deleted" in said and contents(directory) == before
    begin(tmp_path / "another", Config(**config), ANEW)  # As it is advised.


PLACES: dict[str, Callable[[Path], str]] = {
    "missing parents": lambda root: f"{root}/a/b/c",
    "a slash at the end": lambda root: f"{root}/run/",
    "over a folder that is not there": lambda root: f"{root}/none/../run",
    "spaces": lambda root: f"{root}/my run",
    "letters": lambda root: f"{root}/Übung ü 試験 ✓",
    "a link": lambda root: f"{root}/link",
    "an empty folder": lambda root: f"{root}/large disk",
    "[brackets] and stars": lambda root: f"{root}/[a]*?",
}


@pytest.mark.parametrize("place", PLACES)
def test_places_that_people_give_are_used_and_found_again(tmp_path, place):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "link").symlink_to("large disk")
    directory = PLACES[place](tmp_path)
    for found in ([], [2]):
        assert begin(Path(directory), step=2) == found
    assert "seed: 0 → 1" in refused(Path(directory), Config(seed=1))
    assert begin(Path(directory), Config(seed=1), ANEW) == []
    assert not (tmp_path / "none").exists()


def no_folder(root: Path) -> Path:
    (root / "file").write_text("mine")
    return root / "file"


NO_PLACES: dict[str, Callable[[Path], Path]] = {
    "a file": no_folder,
    "below a file": lambda root: no_folder(root) / "run",
    "a link to nothing": lambda root: (root / "link").symlink_to("nowhere") or root / "link",
    "the root": lambda root: Path("/"),
    "a name that is too long": lambda root: root / ("a" * 300),
    "a name that is no Unicode": lambda root: root / os.fsdecode(b"caf\xe9"),
    "of the system": lambda root: Path("/proc/1/run"),
}


@pytest.mark.parametrize("execution", [Execution(), ANEW], ids=["", "overwrite"])
@pytest.mark.parametrize("place", NO_PLACES)
def test_places_that_cannot_be_used_are_refused(tmp_path, place, execution):
    directory = NO_PLACES[place](tmp_path)
    before = contents(tmp_path)
    assert "--workdir" in (said := refused(directory, execution=execution)) and said.encode()
    assert contents(tmp_path) == before


def test_a_folder_where_a_process_was_killed_before_it_had_a_config_is_used(tmp_path):
    for number, part in enumerate(("", json.dumps(IDENTITY, indent=2)[:40])):
        write(tmp_path / str(number), {"config.json.tmp": part, ".lock": ""})
        (tmp_path / str(number) / "figures").mkdir()
        begin(tmp_path / str(number), step=1)
        assert "config.json.tmp" not in contents(tmp_path / str(number))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "zeros": lambda path: path.write_bytes(bytes(200)),
    "no text": lambda path: path.write_bytes(b"\xff\x00\xfe"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_config_is_known_from_the_checkpoints(tmp_path, damage):
    directory = ours(tmp_path / "run")
    whole = (directory / "config.json").read_bytes()
    DAMAGES[damage](directory / "config.json")
    assert "seed: 0 → 1" in refused(directory, Config(seed=1)) and "experiment: toy → other" in refused(directory, name="other")
    assert begin(directory) == [3] and (directory / "config.json").read_bytes() == whole
    DAMAGES[damage](directory / "config.json")
    assert begin(directory, Config(seed=1), ANEW) == []


def test_a_config_that_an_editor_has_saved_is_the_same(tmp_path):
    begin(tmp_path, step=1)
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(IDENTITY), encoding="utf-8")
    assert begin(tmp_path) == [1]


KINDS = (
    ["figures", "tensorboard", "checkpoints", "model", "profile"],
    ["metrics.jsonl", "layers.jsonl", "result.json", "tokens.npy", ".lock"],
)


@pytest.mark.parametrize("name", [*KINDS[0], *KINDS[1]])
def test_a_file_in_the_place_of_a_folder_is_named_and_the_other_way_round(tmp_path, name):
    begin(tmp_path)
    path = tmp_path / name
    path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    path.write_text("mine") if name in KINDS[0] else path.mkdir()
    assert str(path) in (said := refused(tmp_path)) and "move it away" in said
    path.rename(tmp_path / "moved")
    begin(tmp_path)


@dataclass(frozen=True)
class Later(Config):
    """The config of a later version."""

    widths: tuple[int, ...] = (3, 4)


def test_a_field_that_was_added_later_has_its_default_in_older_runs(tmp_path):
    begin(tmp_path, step=1)
    assert "widths: [3, 4] → [5]" in (said := refused(tmp_path, Later(widths=(5,)))) and "give the same flags" in said
    assert begin(tmp_path, Later(widths=(3, 4))) == [1]  # As it is advised; in its config.json there is the field now.
    assert "widths" in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "changes", [{"depth": 3}, {"seed": "four"}], ids=["a field that is no more", "a value that is not accepted"]
)
def test_of_a_run_of_another_version_nobody_is_told_to_give_the_same_flags(tmp_path, changes):
    begin(tmp_path / "run", step=1)
    config = {"config": IDENTITY["config"] | changes}
    (tmp_path / "run" / "config.json").write_text(json.dumps(IDENTITY | config))
    said = refused(tmp_path / "run")
    assert f"{next(iter(changes))}: " in said and "another version" in said and "same flags" not in said
    begin(tmp_path / "another")
    assert begin(tmp_path / "run", execution=ANEW) == []


def test_two_processes_do_not_share_a_directory_and_the_second_changes_nothing(tmp_path):
    with Run.open(tmp_path, "toy", Config()):
        before = contents(tmp_path)
        assert "another process is training" in refused(tmp_path, Config(seed=1), ANEW)
        assert contents(tmp_path) == before
