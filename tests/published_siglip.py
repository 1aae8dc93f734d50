"""A small SigLIP with random weights, in the files in which one is published."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxdl.data.text import Tokenizer

TOWER = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
CONFIG = {
    "model_type": "siglip",
    "vision_config": dict(TOWER, image_size=8, patch_size=4),
    "text_config": dict(TOWER, vocab_size=20, max_position_embeddings=5),
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the small model above, under their published names."""
    linear = lambda name, out, width: {f"{name}.weight": (out, width), f"{name}.bias": (out,)}
    norm = lambda name: {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    head = "vision_model.head"
    shapes = {"logit_scale": (1,), "logit_bias": (1,), f"{head}.probe": (1, 1, 8)}
    shapes |= {
        "vision_model.embeddings.patch_embedding.weight": (8, 3, 4, 4),
        "vision_model.embeddings.patch_embedding.bias": (8,),
    }
    shapes |= {
        "vision_model.embeddings.position_embedding.weight": (4, 8),
        "text_model.embeddings.position_embedding.weight": (5, 8),
    }
    shapes |= {"text_model.embeddings.token_embedding.weight": (20, 8), **linear("text_model.head", 8, 8)}
    shapes |= {f"{head}.attention.in_proj_weight": (24, 8), f"{head}.attention.in_proj_bias": (24,)}
    shapes |= linear(f"{head}.attention.out_proj", 8, 8) | norm(f"{head}.layernorm")
    shapes |= norm("vision_model.post_layernorm") | norm("text_model.final_layer_norm")
    for block in ("vision_model.encoder.layers.0", "text_model.encoder.layers.0", head):
        shapes |= linear(f"{block}.mlp.fc1", 12, 8) | linear(f"{block}.mlp.fc2", 8, 12)
    for block in ("vision_model.encoder.layers.0", "text_model.encoder.layers.0"):
        shapes |= norm(f"{block}.layer_norm1") | norm(f"{block}.layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{name}", 8, 8)
    return shapes


def write_published_siglip(directory: Path) -> None:
    """Writes config.json, model.safetensors, preprocessor_config.json and a tokenizer for texts of five tokens."""
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape, np.float32) for name, shape in published_shapes().items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 8, "width": 8}}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    Tokenizer.train(["a photo of a cat"], vocab_size=20).save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 5}))
