"""CLIP's experiment: what it does not share with SigLIP's, whose tests hold the rest."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from published_siglip import write_published_siglip
from safetensors.numpy import save_file
from tiny_siglip import ROOT, TINY

from experiments import clip, siglip
from jaxdl import launch
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError

TOWER = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.clip", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def settings(workdir: Path, *flags: object) -> tuple:
    return launch.parse(clip.EXPERIMENT, ["--workdir", str(workdir), *map(str, flags)])[:3]


def write_published_clip(directory: Path) -> None:
    """A small CLIP with random weights, in the files in which one is published."""
    linear = lambda name, out, width, bias=True: {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})
    norm = lambda name: {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    shapes = {"logit_scale": (), "vision_model.embeddings.class_embedding": (8,)}
    shapes |= {"vision_model.embeddings.patch_embedding.weight": (8, 3, 4, 4)}
    shapes |= {"vision_model.embeddings.position_embedding.weight": (5, 8)}
    shapes |= {"text_model.embeddings.position_embedding.weight": (5, 8), "text_model.embeddings.token_embedding.weight": (20, 8)}
    shapes |= linear("visual_projection", 6, 8, bias=False) | linear("text_projection", 6, 8, bias=False)
    for name in ("vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm"):
        shapes |= norm(name)
    for block in ("vision_model.encoder.layers.0", "text_model.encoder.layers.0"):
        shapes |= norm(f"{block}.layer_norm1") | norm(f"{block}.layer_norm2")
        shapes |= linear(f"{block}.mlp.fc1", 12, 8) | linear(f"{block}.mlp.fc2", 8, 12)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{name}", 8, 8)
    random = np.random.default_rng(0)
    save_file(
        {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}, directory / "model.safetensors"
    )
    config = {
        "model_type": "clip",
        "projection_dim": 6,
        "vision_config": dict(TOWER, image_size=8, patch_size=4),
        "text_config": dict(TOWER, vocab_size=20, max_position_embeddings=5, eos_token_id=1),
    }
    (directory / "config.json").write_text(json.dumps(config))
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 8}, "crop_size": 8}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"do_center_crop": True}))
    Tokenizer.train(["a photo of a cat"], vocabulary=20).save(directory)
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 5}))


def test_help_starts_and_names_the_presets():
    done = run("--help")
    assert done.returncode == 0 and "l14_224" in done.stdout and "L/14@336" in done.stdout
    # What it has from siglip's config stands with its own.
    assert "--chunk-size" in done.stdout and "clip options" in done.stdout and "config options" not in done.stdout


def test_two_steps_leave_what_siglips_leave(tmp_path, caption_folder):
    done = run("--workdir", tmp_path / "run", "--data", f"folder:{caption_folder}", "--steps=2", "--evaluate-every=1", *TINY)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["experiment"] == "clip"
    assert found["metrics"].keys() == {f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    pictures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert pictures == {"learning_curves.png", "similarity.png", "image_to_text.png", "text_to_image.png"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scales = [value for row in rows for name, value in row.items() if name.endswith("logit_scale")]
    np.testing.assert_allclose(scales[0], 1 / 0.07, rtol=1e-5)


def test_published_weights_are_where_fine_tuning_starts(tmp_path, caption_folder):
    write_published_clip(tmp_path)
    flags = ["--preset=finetune", "--init", tmp_path, "--data", f"folder:{caption_folder}", "--steps=1", "--batch-size=4"]
    found = clip.main(*settings(tmp_path / "run", *flags, "--eval-examples=8"))
    assert found["preset"] == "finetune" and not (tmp_path / "run" / "tokenizer.json").exists()


def test_weights_of_the_other_family_are_refused_by_name(tmp_path, caption_folder):
    (tmp_path / "clip").mkdir()
    (tmp_path / "siglip").mkdir()
    write_published_clip(tmp_path / "clip")
    write_published_siglip(tmp_path / "siglip")
    flags = ["--data", f"folder:{caption_folder}", "--init"]
    with pytest.raises(UserError, match="siglip: the weights are those of a SigLIP: give those of a CLIP"):
        clip.main(*settings(tmp_path / "one", *flags, tmp_path / "siglip"))
    parsed = launch.parse(siglip.EXPERIMENT, ["--workdir", str(tmp_path / "two"), *flags, str(tmp_path / "clip")])
    with pytest.raises(UserError, match="clip: the weights are those of a CLIP: give those of a SigLIP"):
        siglip.main(*parsed[:3])


def test_a_text_of_the_untrained_model_ends_where_its_tokenizer_ends_it(tmp_path):
    tokenizer = Tokenizer.train(["a red circle", "a blue square"], vocabulary=300)
    for flags in ([], ["--variant=B/32"]):
        config, *_ = settings(tmp_path, *flags)
        text = clip.towers(config, tokenizer).text
        assert (text.vocabulary, text.end) == (tokenizer.vocabulary, tokenizer.end)


def test_no_step_leads_beyond_the_largest_scale_and_the_next_may_lead_back(tmp_path):
    config, *_ = settings(tmp_path, "--optimizer=adamw", "--learning-rate=0.5", "--warmup=0", "--weight-decay=0.1")
    optimizer = clip.optimizer(config, optax.constant_schedule(0.5))
    params = {"log_temperature": jnp.float32(math.log(100) - 0.1), "kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    state = optimizer.init(params)

    def step(slope: float) -> None:
        nonlocal params, state
        gradient = jax.tree.map(jnp.zeros_like, params) | {"log_temperature": jnp.float32(slope)}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)

    step(-1.0)
    np.testing.assert_allclose(params["log_temperature"], math.log(100), rtol=1e-6)
    assert (params["bias"] == 1).all() and (params["kernel"] < 1).all()  # What is no matrix does not decay.
    for _ in range(3):
        step(1.0)
    assert params["log_temperature"] < math.log(100) - 0.1


def test_its_settings_are_siglips_where_the_two_are_compared():
    for name in ("default", "digits", "photos"):
        assert vars(clip.PRESETS[name]) == vars(siglip.PRESETS[name])


def test_an_unknown_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="variant"):
        settings(tmp_path, "--variant=B/17")
