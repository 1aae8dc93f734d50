"""A small model of every family that transformers writes, with its inputs and how transformers is called with them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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
GEMMA_2 = GEMMA | dict(
    model_type="gemma2", sliding_window=4, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
)
KINDS = FAMILIES | {"paligemma 2": (FAMILIES["paligemma"][0], PALIGEMMA | dict(text_config=GEMMA_2), *FAMILIES["paligemma"][2:])}
"""With both decoders. A window ends within the rows, and caps bend."""


def publish(name: str, directory: Path) -> None:
    """The files that transformers writes of it, with biases and scales that are not those of the start."""
    kind, settings, *_ = KINDS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)
    model = model(model.config_class(**copy.deepcopy(settings)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "embed_positions" not in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)


def call(name: str, model: Any, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    """Transformers' logits for the inputs of our module."""
    pixels = lambda given: torch.tensor(np.moveaxis(given, -1, 1).copy())
    first, *rest = inputs
    with torch.no_grad():
        if name == "vit":
            return model(pixel_values=pixels(first)).logits.numpy()
        if name in ("clip", "siglip"):
            return model(input_ids=torch.tensor(rest[0]).long(), pixel_values=pixels(first)).logits_per_image.numpy()
        if name == "gpt2":
            return model(input_ids=torch.tensor(first).long()).logits.numpy()
        if name == "marian":
            return model(input_ids=torch.tensor(first).long(), decoder_input_ids=torch.tensor(rest[0]).long()).logits.numpy()
        row, prefix = rest
        answer = torch.tensor(np.arange(row.shape[1]) >= prefix[:, None]).long()
        row = torch.tensor(row).long()
        mask = torch.ones_like(row)
        return model(
            input_ids=row, pixel_values=pixels(first), attention_mask=mask, token_type_ids=answer, labels=row
        ).logits.numpy()
