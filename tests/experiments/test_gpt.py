"""The experiment on a text of a few hundred characters."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_siglip import ROOT

from experiments import gpt
from jaxdl.errors import UserError
from jaxdl.training import Execution

TINY = dict(steps=2, batch_size=4, length=16, width=16, depth=2, num_heads=2, evaluate_every=1, tokens=30)


@pytest.fixture
def book(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 800)))
    return f"folder:{file}"


def test_two_steps_leave_what_a_run_leaves_and_the_finished_model_answers_another_prompt(tmp_path, book):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "experiments.gpt", "--workdir", tmp_path / "run", "--data", book, *flags]

    def run(*more):
        return subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"].keys() == {"validation_loss", "bits_per_character"}
    assert np.isclose(result["metrics"]["bits_per_character"], result["metrics"]["validation_loss"] / np.log(2))
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*")}
    assert {"sample.txt", "tokenizer.json", "figures/attention.png", "figures/learning_curves.png"} <= files
    again = run("--prompt=abc abc", "--tokens=5")
    assert again.returncode == 0, again.stderr
    prompt, _, written = (tmp_path / "run" / "sample.txt").read_text().partition("\n--- written:\n")
    assert prompt == "abc abc" and len(written) == 6 and written.removesuffix("\n") in again.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["parameters_sha256"] == result["parameters_sha256"]


@pytest.mark.parametrize(
    "how", [dict(tokenizer="bytes", vocabulary=300), dict(scan_layers=True, attention="flash", optimizer="adamw")]
)
def test_it_runs_with_other_settings(tmp_path, book, how):
    result = gpt.main(gpt.Config(data=book, **TINY | how), tmp_path / "run", Execution())
    assert np.isfinite(result["metrics"]["validation_loss"])


def test_unread_text_costs_a_uniform_guess_what_it_must(tmp_path, book):
    """At a learning rate of almost 0 the logits are almost 0, and each of the characters is as likely."""
    result = gpt.main(gpt.Config(data=book, **TINY | dict(learning_rate=1e-9)), tmp_path / "run", Execution())
    assert np.isclose(result["metrics"]["validation_loss"], np.log(13), atol=0.05)  # Ten characters and three marks.


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(data="builtin:pithon"), "did you mean 'python'"),
        (dict(length=100), "80 tokens has no piece of 101"),
        (dict(num_heads=3), "cannot be split into 3 heads"),
        (dict(init="/nowhere"), "there is no directory /nowhere"),
        (dict(temperature=-1.0), "--temperature"),
    ],
)
def test_bad_input_is_refused(tmp_path, book, how, message):
    with pytest.raises(UserError, match=message):
        gpt.main(gpt.Config(**dict(data=book, **TINY) | how), tmp_path / "run", Execution())
