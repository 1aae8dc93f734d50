"""Two processes on one machine, as they are started on a cluster, train as one does, and none waits for ever for one that is gone."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 240
# A process that dies while the other waits for it at a checkpoint is found by its heartbeat, and jax ends the other: the pause is there so that it dies between two steps.
FLAGS = [
    f"--steps={STEPS}",
    "--pause=0.02",
    "--evaluate-every=120",
    "--checkpoint-every=20",
    "--keep-checkpoints=20",
    "--log-every=5",
]
PATIENCE = 20


def start(workdir: Path, *flags: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.toy", "--workdir", workdir, *FLAGS, *flags]
    return subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_two(workdir: Path, *flags: object) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--distributed", f"--coordinator=127.0.0.1:{port}", "--num-processes=2", f"--patience={PATIENCE}"]
    return [start(workdir, *meeting, f"--process-id={number}", *flags) for number in range(2)]


def finish(process: subprocess.Popen, within: float = 300) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


def rows(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def reached(workdir: Path) -> int:
    return max((row["step"] for row in rows(workdir)), default=0)


def between_checkpoints(workdir: Path) -> bool:
    """Whether the last checkpoint is whole and the next one some steps away: in the middle of one, jax itself ends what waits for a dead process."""
    step = reached(workdir)
    return step >= 30 and step % 20 == 10 and (workdir / "checkpoints" / str(step - 10)).is_dir()


def losses(workdir: Path) -> np.ndarray:
    return np.array([row["loss"] for row in rows(workdir) if "loss" in row])


def params(workdir: Path, step: int) -> dict:
    """Those of a checkpoint, whichever processes wrote it, on this process' one device."""
    manager = ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(), item_handlers={"state": ocp.StandardCheckpointHandler()}
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
    abstract = jax.tree.map(place, manager.item_metadata(step)["state"].tree)
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]["params"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("two")
    first, second = start_two(workdir)
    status, out, err = finish(first)
    assert status == 0, err
    assert f"after {STEPS} steps" in out
    status, out, err = finish(second)
    assert status == 0, err
    assert "loss" not in out and "after" not in out  # The first process talks.
    assert {path.name for path in (workdir / "figures").iterdir()} == {"confusion.png", "learning_curves.png"}
    return workdir


def test_two_processes_train_as_one(two, tmp_path):
    status, _, err = finish(start(tmp_path))
    assert status == 0, err
    # Each row is the mean of five steps.
    np.testing.assert_allclose(losses(two)[:4], losses(tmp_path)[:4], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params(two, 20), params(tmp_path, 20))


def test_when_one_is_killed_the_other_says_so_and_the_run_goes_on_with_two_or_with_one(two, tmp_path):
    workdir = tmp_path / "run"
    first, second = start_two(workdir)
    while not between_checkpoints(workdir):
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    second.kill()
    killed = time.monotonic()
    status, _, err = finish(first, within=2 * PATIENCE + 30)
    assert time.monotonic() - killed < 2 * PATIENCE + 30
    assert status == 1, err
    assert "another process of this run ended" in err and "Traceback" not in err
    second.communicate()
    assert not (workdir / "result.json").exists()

    shutil.copytree(workdir, tmp_path / "alone")
    for process in start_two(workdir):
        status, out, err = finish(process)
        assert status == 0, err
    digest = lambda where: json.loads((where / "result.json").read_text())["parameters_sha256"]
    assert digest(workdir) == digest(two)

    status, out, err = finish(start(tmp_path / "alone"))
    assert status == 0, err
    assert "resuming at step" in out
    np.testing.assert_allclose(losses(tmp_path / "alone")[-4:], losses(two)[-4:], rtol=1e-2)


def test_a_signal_to_one_process_stops_and_saves_all(two, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(workdir)
    while reached(workdir) < 30:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.01)
    processes[1].terminate()
    for process in processes:
        status, _, err = finish(process)
        assert status == 143, err
        assert "saved at step" in err
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == reached(workdir) < STEPS


def test_a_mistake_in_the_flags_ends_every_process(tmp_path):
    (tmp_path / "something").write_text("")
    first, second = start_two(tmp_path)
    for process, said in (
        (first, "holds something and is no run"),
        (second, "the first process cannot use the working directory"),
    ):
        status, _, err = finish(process)
        assert status == 2 and said in err


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_is_alone_does_not_wait_for_ever(tmp_path, number):
    flags = ["--distributed", "--coordinator=127.0.0.1:9", "--num-processes=2", "--patience=2", f"--process-id={number}"]
    if number == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            flags[1] = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    status, _, err = finish(start(tmp_path / "run", *flags), within=120)
    assert status == 2
    assert err.strip().splitlines()[-1].startswith("error: waited 2 s for the other processes")


def test_jax_is_asked_where_the_others_are_and_may_not_know(tmp_path):
    status, _, err = finish(start(tmp_path / "run", "--distributed"))
    assert status == 2 and err.startswith("error: jax does not find the other processes here")
