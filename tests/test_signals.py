"""A command that is told to stop ends soon, with one line and a status, whatever it is at, and the same command then ends with the bits of one that nobody stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxdl import signals
from jaxdl.training.logging import read_metrics

FLAGS = ("--steps", "40", "--evaluate-every", "15", "--checkpoint-every", "12", "--study-steps", "40")
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def command(workdir: Path, *flags: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "experiments.mlp", "--workdir", str(workdir), *FLAGS, *flags]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])


def result(workdir: Path) -> tuple:
    """What a run has found, and which evaluations it has logged."""
    found = json.loads((workdir / "result.json").read_text())
    rows = [row["step"] for row in read_metrics(workdir / "metrics.jsonl") if "eval/test_accuracy" in row]
    return found["parameters_sha256"], found["metrics"], sorted(set(rows))


def finished(workdir: Path) -> tuple:
    process = command(workdir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and not errors, errors
    return result(workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[tuple, float]:
    """The result of a run that nobody stopped, and its seconds."""
    begun = time.monotonic()
    return finished(tmp_path_factory.mktemp("whole")), time.monotonic() - begun


def stop(workdir: Path, sent: signal.Signals, seconds: float) -> bool:
    """Stops the command after so many seconds, and checks how it ends. Whether it had not ended before: a machine may be quicker than it was."""
    process = command(workdir)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        assert not errors, errors
        return False
    assert process.returncode == 128 + sent, (seconds, errors)
    assert len(errors.splitlines()) == 1 and errors.startswith(sent.name), (seconds, errors)
    return True


def moments(count: int, whole: tuple[tuple, float]) -> list[tuple[signal.Signals, float]]:
    """Signals and seconds, from the first imports of a run almost to its end: the machine may be quicker the next time."""
    drawn = random.Random(0)
    return [(STOPPING[i % 3], 0.3 + (i + drawn.random()) / count * 0.7 * (whole[1] - 0.3)) for i in range(count)]


def test_a_command_that_is_stopped_again_and_again_ends_with_the_same_bits(tmp_path, whole):
    assert any([stop(tmp_path, sent, seconds) for sent, seconds in moments(5, whole)])
    assert finished(tmp_path) == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
def test_a_command_that_is_stopped_at_any_moment_ends_with_the_same_bits(tmp_path, whole, number):
    stop(tmp_path, *moments(40, whole)[number])
    assert finished(tmp_path) == whole[0]


OWNER = """
import hashlib, os, signal, sys, time
from jaxdl import signals
signals.watch()
kind, *sent = sys.argv[1:]
if kind != "begin":
    signals.defer(float(kind))
print(flush=True)
data = bytes(2**24)
while True:  # The main thread is busy where no handler of Python's comes to.
    hashlib.pbkdf2_hmac("sha1", b"", b"", 30_000_000)
"""


def busy(grace: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, grace], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("grace", "sent", "status", "least"),
    [
        ("begin", ["SIGTERM"], 143, 0.0),  # Nothing is to be saved yet.
        ("inf", ["SIGINT", "SIGINT"], 130, signals.PATIENCE),  # Twice at once is once, and then it is meant.
        ("inf", ["SIGINT", "SIGTERM"], 143, 0.0),
        ("inf", ["SIGTERM", "SIGHUP"], 129, 0.0),
        ("0.5", ["SIGHUP"], 129, 0.5),  # All is saved, and nobody looks.
    ],
)  # fmt: skip
def test_a_main_thread_that_cannot_be_interrupted_is_ended(grace, sent, status, least):
    process = busy(grace)
    begun = time.monotonic()
    for name in sent:
        process.send_signal(signal.Signals[name])
        time.sleep(0.2)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == status and len(errors.splitlines()) == 1
    assert least <= time.monotonic() - begun < least + 3


def test_a_first_signal_waits_for_who_saves():
    process = busy("inf")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=signals.PATIENCE + 0.5)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("sent", STOPPING)
def test_in_a_program_of_somebody_else_handlers_come_back(sent):
    before = [signal.getsignal(number) for number in STOPPING]
    with pytest.raises(signals.Interrupted, match=sent.name) as interrupted, signals.listening():
        assert signals.received() is None
        os.kill(os.getpid(), sent)
        assert signals.received() == sent
    assert interrupted.value.signal_number == sent
    assert [signal.getsignal(number) for number in STOPPING] == before and signals.received() is None


def test_a_signal_that_nohup_ignores_stays_ignored():
    code = "import os, signal; from jaxdl import signals; signals.watch(); os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    shell = ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_a_forked_child_that_is_ended_does_not_end_its_parent():
    code = """
import os, signal, time
from jaxdl import signals
signals.watch()
child = os.fork()
if not child:
    time.sleep(60)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
status = os.waitpid(child, 0)[1]
time.sleep(0.3)
print(os.WTERMSIG(status), flush=True)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{int(signal.SIGTERM)}\n")
