"""SigLIP's experiment: where it may begin, what it leaves to others, and what happens to it as a process: killed, interrupted, on a full disk."""

import dataclasses
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

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_siglip import write_published_siglip
from tiny_siglip import ROOT, SIZES, TINY

from experiments import siglip
from jaxdl import launch, pretrained
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.training import Execution, Run, load_model, load_run


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "experiments.siglip", *map(str, arguments)]


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def train(workdir: Path, execution: Execution = Execution(), **values) -> dict:
    config = dataclasses.replace(siglip.PRESETS["default"], **SIZES | dict(steps=2, evaluate_every=1) | values)
    return launch.run(siglip.EXPERIMENT, config, workdir, execution)


def result(workdir: Path) -> dict:
    return json.loads((workdir / "result.json").read_text())


def test_labelled_data_is_described_by_templates(tmp_path):
    assert train(tmp_path, data="builtin:digits")["metrics"].keys() == {"zero_shot_accuracy"}
    assert (tmp_path / "figures" / "zero_shot_class.png").exists()


def test_published_weights_are_where_fine_tuning_starts(tmp_path, caption_folder):
    write_published_siglip(tmp_path)
    train(tmp_path / "run", init=str(tmp_path), data=f"folder:{caption_folder}", learning_rate=1e-9)
    found, published = load_run(tmp_path / "run").variables["params"], pretrained.load(tmp_path)[1]
    np.testing.assert_allclose(found["text"]["tokens"]["embedding"], published["text"]["tokens"]["embedding"], atol=1e-6)
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_what_a_run_has_learned_is_exported_and_is_where_another_begins(tmp_path, caption_folder):
    data = dict(data=f"folder:{caption_folder}")
    train(tmp_path / "first", Execution(export=str(tmp_path / "published")), scan_layers=True, **data)
    models = load_model(str(tmp_path / "first")), pretrained.load(tmp_path / "published")
    process, tokenizer = pretrained.load_processors(tmp_path / "published")
    images = jnp.asarray(process(np.full((20, 30, 3), 200, np.uint8)))[None]
    tokens = jnp.asarray(tokenizer(["a red picture", "something blue"], 6))
    logits = [jax.jit(module.apply)({"params": params}, images, tokens).logits for module, params in models]
    np.testing.assert_array_equal(*logits)
    ours = Tokenizer.load(tmp_path / "first")(["a red picture", "something blue"], 6)
    np.testing.assert_array_equal(tokens, ours)
    metrics = train(tmp_path / "second", init=str(tmp_path / "first"), steps=0, **data)["metrics"]
    assert metrics == result(tmp_path / "first")["metrics"]


def test_a_published_size_has_the_vocabulary_of_the_tokenizer(tmp_path, caption_folder):
    values = SIZES | dict(variant="B/16", data=f"folder:{caption_folder}")
    with Run.open(tmp_path, "siglip", dataclasses.replace(siglip.PRESETS["default"], **values)) as opened:
        source, _ = siglip.open_pairs(opened)
        module, params, inputs = siglip.build(opened.config, source, opened)
    assert params is None and module.text.vocab_size == inputs.tokenizer.vocab_size < 32_000 and module.vision.width == 768


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(data="builtin:scene"), "did you mean 'scenes'"),
        (dict(eval_data="folder:/nowhere"), "there is no folder /nowhere"),
        (dict(init="/nowhere/at/all"), "/nowhere/at/all"),
        (dict(tokenizer="/nowhere/tokenizer.json"), "/nowhere/tokenizer.json"),
        (dict(chunk_size=3), "4 texts cannot be cut into chunks of 3"),
    ],
)
def test_bad_input_says_what_is_wrong_and_what_is_accepted(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **values)


def test_images_without_a_caption_are_left_out(tmp_path, caption_folder, capsys):
    """In a folder for several experiments some have questions only."""
    shutil.copytree(caption_folder, tmp_path / "data")
    for split in ("train", "val"):
        with (tmp_path / "data" / split / "metadata.jsonl").open("a") as file:
            for _ in range(8):
                file.write('{"file_name": "0.png", "questions": [["what is it?", "noise"]]}\n')
    metrics = train(tmp_path / "run", data=f"folder:{tmp_path / 'data'}", steps=1)["metrics"]
    assert metrics["image_to_text_recall_at_10"] == 1  # There are eight.
    assert "8 of 16 have no caption and are left out" in capsys.readouterr().out


def test_a_corrupt_image_in_mid_run_is_named(tmp_path, caption_folder):
    shutil.copytree(caption_folder, tmp_path / "data")
    (tmp_path / "data" / "train" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3\.png"):
        train(tmp_path / "run", data=f"folder:{tmp_path / 'data'}", steps=4)


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
    flags = [f"--data=folder:{caption_folder}", "--steps=100", "--evaluate-every=1000", "--augment=crop", "--dropout=0.1", *TINY]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("--workdir", whole, *flags).returncode == 0
    moments = random.Random(seed)
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(
            command("--workdir", cut, *flags, "--checkpoint-every=1"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for line in process.stdout:
            if line.startswith(b"first step"):
                break
        time.sleep(moments.uniform(0, 1.5))
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
