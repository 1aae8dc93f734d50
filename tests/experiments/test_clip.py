"""CLIP's experiment: what it does not share with SigLIP's, whose tests hold the rest."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from published_siglip import write_published_siglip
from safetensors.numpy import save_file
from tiny_siglip import SIZES

from experiments import clip, siglip
from jaxdl import launch, pretrained
from jaxdl.data import CAPTIONED_IMAGES
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.training import OPTIMIZERS, Aux, Execution, Run, Update, decay_mask, init_state, load_run, make_step

TOWER = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)


def train(workdir: Path, execution: Execution = Execution(), **values) -> dict:
    config = dataclasses.replace(clip.PRESETS["default"], **SIZES | dict(steps=2, evaluate_every=1) | values)
    return launch.run(clip.EXPERIMENT, config, workdir, execution)


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
    Tokenizer.train(["a photo of a cat"], vocab_size=20).save(directory)
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 5}))


def test_its_scale_begins_where_the_paper_has_it_and_the_run_is_exported(tmp_path, caption_folder):
    train(tmp_path / "run", Execution(export=str(tmp_path / "published"), log_every=1), data=f"folder:{caption_folder}")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scales = [row["logit_scale"] for row in rows if "logit_scale" in row]
    np.testing.assert_allclose(scales[0], 1 / 0.07, rtol=1e-5)
    module, params = pretrained.load(tmp_path / "published", clip.CLIP)
    tokenizer = Tokenizer.load(tmp_path / "run")
    assert (module.text.vocab_size, module.text.end) == (tokenizer.vocab_size, tokenizer.end)
    jax.tree.map(np.testing.assert_array_equal, params, load_run(tmp_path / "run").variables["params"])


def test_published_weights_are_where_fine_tuning_starts(tmp_path, caption_folder):
    write_published_clip(tmp_path)
    train(tmp_path / "run", init=str(tmp_path), data=f"folder:{caption_folder}", steps=1, learning_rate=1e-9)
    found, published = load_run(tmp_path / "run").variables["params"], pretrained.load(tmp_path)[1]
    # Its scale was beyond the largest one, or was not: it is not now.
    expected = min(float(published["log_temperature"]), math.log(100))
    np.testing.assert_allclose(found["log_temperature"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["text"]["tokens"]["embedding"], published["text"]["tokens"]["embedding"], atol=1e-6)


def test_weights_of_the_other_family_are_refused_by_name(tmp_path, caption_folder):
    (tmp_path / "clip").mkdir()
    (tmp_path / "siglip").mkdir()
    write_published_clip(tmp_path / "clip")
    write_published_siglip(tmp_path / "siglip")
    data = f"folder:{caption_folder}"
    with pytest.raises(UserError, match="siglip: the weights are those of a SigLIP: give those of a CLIP"):
        train(tmp_path / "one", data=data, init=str(tmp_path / "siglip"))
    config = dataclasses.replace(siglip.PRESETS["default"], data=data, init=str(tmp_path / "clip"))
    with pytest.raises(UserError, match="clip: the weights are those of a CLIP: give those of a SigLIP"):
        launch.run(siglip.EXPERIMENT, config, tmp_path / "two")


@pytest.mark.parametrize("variant", ["", "B/32"])
def test_a_text_of_the_untrained_model_ends_where_its_tokenizer_ends_it(tmp_path, caption_folder, variant):
    source, _ = CAPTIONED_IMAGES.open(f"folder:{caption_folder}")
    config = dataclasses.replace(clip.PRESETS["default"], variant=variant)
    with Run.open(tmp_path, "clip", config) as run:
        module, _, inputs = clip.build(config, source, run)
    assert (module.text.vocab_size, module.text.end) == (inputs.tokenizer.vocab_size, inputs.tokenizer.end)


def test_no_step_leads_beyond_the_largest_scale_and_the_next_may_lead_back():
    """The slope of the scale is what the batch says; all else has none, and only decays."""
    params = {"log_temperature": jnp.float32(math.log(100) - 0.1), "kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}

    def slope(params, state, batch, key):
        return batch * params["log_temperature"] + 0 * params["kernel"].sum() + 0 * params["bias"].sum(), Aux()

    optimizer = OPTIMIZERS["adamw"](optax.constant_schedule(0.5), 0.1, b2=0.98, mask=decay_mask)
    update = Update(slope, optimizer, project=clip.limit_scale)
    step, state = make_step(update), init_state(lambda key: {"params": params}, [update], seed=0)
    state, _ = step(state, jnp.float32(-1))
    np.testing.assert_allclose(state.params["log_temperature"], math.log(100), rtol=1e-6)
    assert (state.params["bias"] == 1).all() and (state.params["kernel"] < 1).all()  # What is no matrix does not decay.
    for _ in range(3):
        state, _ = step(state, jnp.float32(1))
    assert state.params["log_temperature"] < math.log(100) - 0.1


def test_its_settings_are_siglips_where_the_two_are_compared():
    for name in ("default", "digits", "photos"):
        assert dataclasses.asdict(clip.PRESETS[name]) == dataclasses.asdict(siglip.PRESETS[name])
