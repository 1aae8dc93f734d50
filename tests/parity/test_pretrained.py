"""What other programs rely on: `pretrained.load` of every family, from the files that transformers writes."""

import re
import shlex
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxdl import pretrained
from jaxdl.errors import UserError

TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
IMAGE, TEXT = TOWER | dict(image_size=8, patch_size=4), TOWER | dict(vocab_size=30, max_position_embeddings=6)
GPT2 = dict(vocab_size=30, n_positions=8, n_embd=16, n_layer=2, n_head=2)
MARIAN = dict(
    vocab_size=30, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=12, activation_function="swish", scale_embedding=True,
    pad_token_id=29, eos_token_id=0, decoder_start_token_id=29, forced_eos_token_id=None,
)  # fmt: skip
GEMMA = TOWER | dict(model_type="gemma", num_key_value_heads=1, head_dim=8, vocab_size=30)
PALIGEMMA = dict(
    vision_config=IMAGE | dict(model_type="siglip_vision_model", vision_use_head=False), text_config=GEMMA, projection_dim=16,
    hidden_size=16, image_token_index=29,
)  # fmt: skip
CLIP = dict(vision_config=IMAGE, text_config=TEXT | dict(eos_token_id=28), projection_dim=12)

random = np.random.default_rng(0)
images = lambda count: random.standard_normal((count, 8, 8, 3), np.float32)
tokens = lambda *shape: random.integers(1, 28, shape, np.int32)
FAMILIES = {
    "vit": ("ViTForImageClassification", IMAGE | dict(num_labels=5), (images(2),), (2, 5)),
    "clip": ("CLIPModel", CLIP, (images(2), tokens(3, 6)), (2, 3)),
    "siglip": ("SiglipModel", dict(vision_config=IMAGE, text_config=TEXT), (images(2), tokens(3, 6)), (2, 3)),
    "gpt2": ("GPT2LMHeadModel", GPT2, (tokens(2, 7),), (2, 7, 30)),
    "marian": ("MarianMTModel", MARIAN, (tokens(2, 6), tokens(2, 4)), (2, 4, 30)),
    "paligemma": (
        "PaliGemmaForConditionalGeneration", PALIGEMMA,
        (images(2), np.concatenate([np.full((2, 4), 29, np.int32), tokens(2, 5)], 1), np.array([6, 5], np.int32)), (2, 9, 30),
    ),
}  # fmt: skip
"""By `model_type`: transformers' class and its settings, the inputs of a call, the shape of its logits."""


def publish(name: str, directory) -> None:
    kind, settings, *_ = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    model(model.config_class(**settings)).save_pretrained(directory)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_gives_a_module_and_its_parameters_and_a_call_gives_logits(name, tmp_path):
    *_, inputs, shape = FAMILIES[name]
    inputs = [jnp.asarray(each) for each in inputs]
    publish(name, tmp_path)
    module, params = pretrained.load(tmp_path)
    logits = jax.jit(module.apply)({"params": params}, *inputs).logits
    chex.assert_shape(logits, shape)
    chex.assert_tree_all_finite(logits)
    scanned, stacked = pretrained.load(tmp_path, type(module), scan=True)
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(params))
    np.testing.assert_allclose(jax.jit(scanned.apply)({"params": stacked}, *inputs).logits, logits, atol=1e-5)


def test_the_command_that_is_named_for_a_pickle_writes_what_is_read(tmp_path):
    """Where a directory is without safetensors, as older ones are on the hub."""
    publish("marian", tmp_path / "as published")
    publish("marian", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    state = transformers.MarianMTModel.from_pretrained(tmp_path / "as published").state_dict()
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle") as error:
        pretrained.load(tmp_path / "pickled")
    (command,) = re.findall(r'python (-c ".*")', str(error.value))
    subprocess.run([sys.executable, *shlex.split(command)], check=True, capture_output=True, timeout=300)
    chex.assert_trees_all_equal(pretrained.load(tmp_path / "pickled")[1], pretrained.load(tmp_path / "as published")[1])
