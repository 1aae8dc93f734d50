"""The experiment as a person runs it: a process with flags, a working directory, an exit status."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from published_siglip import write_published_siglip
from tiny_siglip import ROOT, TINY

from experiments import siglip
from jaxdl import launch
from jaxdl.errors import UserError


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "experiments.siglip", *map(str, arguments)]


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def result(workdir: Path) -> dict:
    return json.loads((workdir / "result.json").read_text())


def test_help_starts_and_names_the_presets():
    done = run("--help")
    assert done.returncode == 0 and "so400m_14_224" in done.stdout and "--init" in done.stdout


def test_the_list_of_experiments_names_it():
    done = subprocess.run([sys.executable, "-m", "experiments"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "siglip" in done.stdout and "arXiv:2303.15343" in done.stdout


def test_two_steps_leave_what_a_run_leaves(tmp_path, caption_folder):
    done = run("--workdir", tmp_path / "run", "--data", f"folder:{caption_folder}", "--steps=2", "--evaluate-every=1", *TINY)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = result(tmp_path / "run")
    assert found.keys() == {"experiment", "preset", "steps", "metrics", "parameters_sha256", "seconds", "versions", "device"}
    assert {f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} <= found["metrics"].keys()
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"config.json", "metrics.jsonl", "tokenizer.json"} <= files
    assert {
        "figures/learning_curves.png",
        "figures/similarity.png",
        "figures/image_to_text.png",
        "figures/text_to_image.png",
    } <= files
    assert any(name.startswith("tensorboard/") for name in files)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("step" in row for row in rows) and any("eval/image_to_text_recall_at_1" in row for row in rows)


def test_labelled_data_is_described_by_templates(tmp_path):
    done = run("--workdir", tmp_path, "--preset=digits", "--steps=2", *TINY)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path)["metrics"].keys() == {"zero_shot_accuracy"} and result(tmp_path)["preset"] == "digits"


def test_published_weights_are_where_fine_tuning_starts(tmp_path, caption_folder):
    write_published_siglip(tmp_path)
    flags = [
        "--preset=finetune",
        "--init",
        tmp_path,
        "--data",
        f"folder:{caption_folder}",
        "--steps=2",
        "--batch-size=4",
        "--eval-examples=8",
    ]
    done = run("--workdir", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["preset"] == "finetune" and not (tmp_path / "run" / "tokenizer.json").exists()


def test_without_tensorflow_the_whole_experiment_runs(tmp_path, shared):
    """A `tensorflow` that refuses to be imported stands in front of one that may be installed."""
    (tmp_path / "tensorflow.py").write_text("raise ImportError('TensorFlow is not to be imported')")
    flags = ["--data=tfds:mnist", "--data-dir", shared / "tfds", "--steps=2", *TINY]
    done = run("--workdir", tmp_path / "run", *flags, env=os.environ | {"PYTHONPATH": f"{tmp_path}"})
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["metrics"].keys() == {"zero_shot_accuracy"}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path, caption_folder, seed):
    """A checkpoint is written after every step, so that most kills fall into one; the moments are drawn from a seed."""
    flags = [
        "--data",
        f"folder:{caption_folder}",
        "--steps=100",
        "--evaluate-every=1000",
        "--augment=crop",
        "--dropout=0.1",
        *TINY,
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("--workdir", whole, *flags).returncode == 0
    chance = random.Random(seed)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            command("--workdir", cut, *flags, "--checkpoint-every=1"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for line in process.stdout:
            if line.startswith(b"first step"):
                break
        time.sleep(chance.uniform(0, 1.5))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    done = run("--workdir", cut, *flags)
    assert kills >= 1 and done.returncode == 0, done.stderr
    assert result(cut)["parameters_sha256"] == result(whole)["parameters_sha256"]


def test_ctrl_c_saves_and_says_so(tmp_path, caption_folder):
    flags = ["--workdir", tmp_path, "--data", f"folder:{caption_folder}", "--steps=100000", *TINY]
    process = subprocess.Popen(command(*flags), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("first step"):
            break
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "SIGINT: saved at step" in errors and "Traceback" not in errors
    assert any((tmp_path / "checkpoints").iterdir())


def test_bad_input_ends_with_one_line_and_status_2(tmp_path):
    done = run("--workdir", tmp_path, "--presett=default")
    assert done.returncode == 2, done.stderr
    assert "Unrecognized options: --presett" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data builtin:scene", "did you mean 'scenes'"),
        ("--data folder:/nowhere", "there is no folder /nowhere"),
        ("--eval-data folder:/nowhere", "there is no folder /nowhere"),
        ("--resolution 6", "patch"),
        ("--num-heads 3", "cannot be split into 3 heads"),
        ("--init /nowhere/at/all", "/nowhere/at/all"),
        ("--tokenizer /nowhere/tokenizer.json", "/nowhere/tokenizer.json"),
        ("--variant B/17", "B/16"),
    ],
)
def test_bad_input_says_what_is_wrong_and_what_is_accepted(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        config, workdir, execution, _ = launch.parse(siglip.EXPERIMENT, ["--workdir", str(tmp_path / "run"), *flags.split()])
        siglip.main(config, workdir, execution)


def test_pictures_without_a_caption_are_left_out(tmp_path, caption_folder, capsys):
    """In a folder for several experiments some have questions only."""
    shutil.copytree(caption_folder, tmp_path / "data")
    for split in ("train", "val"):
        with (tmp_path / "data" / split / "metadata.jsonl").open("a") as file:
            for _ in range(8):
                file.write('{"file_name": "0.png", "questions": [["what is it?", "noise"]]}\n')
    flags = ["--workdir", str(tmp_path / "run"), "--data", f"folder:{tmp_path / 'data'}", "--steps=1", *TINY]
    config, workdir, execution, _ = launch.parse(siglip.EXPERIMENT, flags)
    assert siglip.main(config, workdir, execution)["metrics"]["image_to_text_recall_at_10"] == 1  # There are eight.
    assert "8 of 16 pictures have no caption and are left out" in capsys.readouterr().out


def test_a_corrupt_image_in_mid_run_is_named(tmp_path, caption_folder):
    shutil.copytree(caption_folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "3.png").write_bytes(b"no picture")
    done = run("--workdir", tmp_path / "run", "--data", f"folder:{tmp_path / 'data'}", "--steps=4", *TINY)
    assert done.returncode == 2 and "3.png" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow  # It races a filling disk against a run, and needs leave to mount.
def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, caption_folder):
    """The working directory is a small file system of its own, which something else fills while the run goes on."""
    disk = tmp_path / "disk"
    start = shlex.join(
        command("--workdir", disk / "run", "--data", f"folder:{caption_folder}", "--steps=300", "--checkpoint-every=4", *TINY)
    )
    script = f"""
        mkdir {disk} && mount -t tmpfs -o size=8m tmpfs {disk} || exit 77
        {start} &
        until ls {disk}/run/checkpoints 2>/dev/null | grep -qx '[0-9]*'; do sleep 0.1; done
        dd if=/dev/zero of={disk}/filler bs=1k 2>/dev/null
        wait $!; echo "full: $?"
        rm {disk}/filler
        {start}; echo "free: $?"
    """
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert "full: 1" in done.stdout and "resuming at step" in done.stdout and "free: 0" in done.stdout, done
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: no space is left on the disk")
