"""What the default runs promise, from the commands that a newcomer gives. Minutes each: pytest -m slow."""

import json
import subprocess
import sys

import pytest
from tiny_siglip import ROOT


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("experiment", "least", "most"),
    [
        ("vit", dict(test_accuracy=0.97), {}),
        ("clip", dict(image_to_text_recall_at_1=0.55, text_to_image_recall_at_1=0.55), {}),
        ("paligemma", dict(answer_exact_match=0.90), {}),
        ("gpt", {}, dict(validation_loss=1.65)),
        ("translation", dict(bleu=90.0), {}),
    ],
)
def test_a_default_run_reaches_what_it_promises(tmp_path, experiment, least, most):
    command = [sys.executable, "-m", f"experiments.{experiment}", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert all(found[name] >= bound for name, bound in least.items()), found
    assert all(found[name] <= bound for name, bound in most.items()), found
