"""Checkpoints and logs that were damaged, copied, or belong to other data: one line each, and nothing is lost."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.data import Source
from jaxdl.data.sources import Info
from jaxdl.errors import UserError
from jaxdl.training import Aux, Execution, Run, TrainState, Update, init_state, make_step, train
from jaxdl.training.logging import read_metrics

# TensorStore's threads go on after Orbax has given up on a file, and find its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 6
    evaluate_every: int = 6
    show_every: int = 0


def objective(params, state, batch, key):
    return (params["w"] ** 2).sum(), Aux()


UPDATE = Update(objective, optax.adam(0.1))


def run(directory: Path, *, width: int = 2, dtype=jnp.float32, config: Config = Config(), name: str = "line", **parts) -> dict:
    """Six steps, with a checkpoint every second one."""
    with Run.open(directory, name, config, Execution(checkpoint_every=2, log_every=2)) as opened:
        state = init_state(lambda key: {"params": {"w": jnp.ones(width, dtype)}}, [UPDATE], seed=config.seed)
        return train(opened, make_step(UPDATE), state, None, **parts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    run(directory)
    return directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"width": 3}, "params/w: float32[2] → float32[3]"), ({"dtype": jnp.bfloat16}, "params/w: float32[2] → bfloat16[2]")],
    ids=["a class more", "another precision"],
)
def test_of_other_arrays_than_the_checkpoints_it_is_said_which_and_none_is_lost(copied, changes, said):
    before = files(copied / "checkpoints")
    with pytest.raises(UserError) as refused:
        run(copied, **changes)
    assert said in str(refused.value) and "bring back" in str(refused.value) and "\n" not in str(refused.value)
    assert files(copied / "checkpoints") == before
    assert run(copied)["steps"] == 6  # As it is advised.


@pytest.mark.parametrize(
    ("other", "said"),
    [({"config": Config(seed=1)}, "seed: 1 → 0"), ({"name": "curve"}, "experiment: curve → line")],
    ids=["another config", "another experiment"],
)
def test_a_checkpoint_of_another_run_is_refused_and_not_lost(copied, tmp_path, other, said):
    run(tmp_path / "other", **other)
    foreign = shutil.copytree(tmp_path / "other" / "checkpoints" / "6", copied / "checkpoints" / "8")
    before = files(copied / "checkpoints")
    with pytest.raises(UserError) as refused:
        run(copied)
    assert said in str(refused.value) and str(foreign) in str(refused.value) and files(copied / "checkpoints") == before
    foreign.rename(tmp_path / "moved")
    assert run(copied)["steps"] == 6  # As it is advised.


LINES = {
    "cut short": b'{"step": 6, "lo',
    "zeros": bytes(100),
    "no text": b"\xff\xfe\x80\n",
    "a number": b"3\n",
    "a list": b"[1, 2]\n",
    "nothing": b"\n\n",
    "no step": b'{"loss": 1.0}\n',
    "a step that is no number": b'{"step": "six", "loss": 1.0}\n',
    "too deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("at", ["beginning", "end"])
def test_damaged_lines_of_the_log_are_left_out_and_the_others_kept(copied, line, at):
    log = copied / "metrics.jsonl"
    rows = read_metrics(log)
    whole = log.read_bytes()
    log.write_bytes(line + (b"\n" * (not line.endswith(b"\n"))) + whole if at == "beginning" else whole + line)
    assert read_metrics(log) == rows
    run(copied)
    assert read_metrics(log)[: len(rows)] == rows
    assert all(isinstance(json.loads(line)["step"], int) for line in log.read_text().splitlines())


@pytest.mark.parametrize("content", [b"", b'{"experiment": ', bytes(50), b"\xff", b"[1]", b"null", b"{}", None])
def test_a_damaged_result_is_made_again_of_the_last_checkpoint(copied, content):
    whole = json.loads((copied / "result.json").read_text())
    (copied / "result.json").unlink() if content is None else (copied / "result.json").write_bytes(content)
    answers = []
    again = run(copied, answer=answers.append)
    assert answers and again["parameters_sha256"] == whole["parameters_sha256"]
    assert json.loads((copied / "result.json").read_text())["metrics"] == whole["metrics"]


def test_files_that_may_not_be_read_are_named_and_kept(copied, monkeypatch):
    """As root one may read everything, so it is asked as if by another."""
    import os

    closed = copied / "checkpoints" / "6" / "progress" / "metadata"
    allowed = os.access
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: Path(path) != closed and allowed(path, mode))
        with pytest.raises(UserError, match=f"{closed} may not be read: change its permissions"):
            run(copied)
    assert closed.exists() and run(copied)["steps"] == 6


class Numbers(Source):
    def __init__(self, digest: str):
        self.info = Info(spec="folder:numbers", digest=digest)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        return {"x": np.float32(index)}


def says(directory: Path, capsys, digest: str = "a" * 16, step: int = 0) -> str:
    with Run.open(directory, "numbers", Config()) as opened:
        opened.batches(Numbers(digest), lambda row, rng: row, batch_size=2)
        opened.reads(Numbers("held out"))
        opened.start_logging(step)
        if step == 0:
            state = TrainState(jnp.asarray(3, jnp.int32), {"w": jnp.ones(2)}, {}, {}, jnp.zeros(2, jnp.uint32))
            opened.checkpoints.save(state, {}, 0.0)
    return capsys.readouterr().out.strip()


def test_what_has_changed_since_a_run_began_is_said_in_a_line_and_it_goes_on(tmp_path, capsys, monkeypatch):
    assert says(tmp_path, capsys) == ""
    recorded = json.loads((tmp_path / "environment.json").read_text())
    assert recorded == {
        "jax": jax.__version__, "jax_enable_x64": False, "jax_default_matmul_precision": None,
        "data": {"a" * 16: "folder:numbers", "held out": "folder:numbers"},
    }  # fmt: skip
    assert says(tmp_path, capsys, step=3) == ""
    assert "the data of folder:numbers are others" in (said := says(tmp_path, capsys, "b" * 16, step=3)) and "\n" not in said
    with (
        jax.default_matmul_precision("highest"),
        jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(),
    ):
        said = says(tmp_path, capsys, step=3)
    assert "jax_enable_x64: False → True" in said and "jax_default_matmul_precision: None → highest" in said
    monkeypatch.setattr(jax, "__version__", "99.0")
    assert f"jax: {recorded['jax']} → 99.0" in says(tmp_path, capsys, step=3)
    for content in ("", "[]", "{}", "\0"):
        (tmp_path / "environment.json").write_text(content)
        assert says(tmp_path, capsys, step=3) == ""


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40])
def test_seeds_that_would_be_taken_for_others_are_refused(seed):
    with pytest.raises(UserError, match=f"the seed {seed} has no 32 bits: give one from 0 to 4294967295"):
        init_state(lambda key: {"params": {"w": jnp.ones(2)}}, [UPDATE], seed=seed)


def test_the_greatest_seeds_are_seeds_of_their_own():
    init = lambda key: {"params": {"w": jax.random.normal(key, (2,))}}
    first = [init_state(init, [UPDATE], seed=seed).params["w"].tolist() for seed in (0, 2**31, 2**32 - 2, 2**32 - 1)]
    assert len({tuple(each) for each in first}) == 4
    assert init_state(init, [UPDATE], seed=2**32 - 2, seeds=2).params["w"].tolist() == first[2:]
