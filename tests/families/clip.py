"""CLIP."""

import functools

import numpy as np
from family import Family, Learner, Reference, descend, normal

from experiments import clip
from families.siglip import FIGURES, METRICS, SIZES, TINY
from jaxdl.losses import softmax_loss
from jaxdl.models.clip import CLIP, TextTower, VisionTower
from jaxdl.tasks.image_text import objective

END = 19


def texts(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Tokens with an end at one of the last three places, and padding by it."""
    tokens = rng.integers(0, END, (rows, 6)).astype(np.int32)
    return np.where(np.arange(6) >= rng.integers(3, 6, (rows, 1)), np.int32(END), tokens)


FAMILY = Family(
    clip.EXPERIMENT,
    tiny=TINY,
    metrics=METRICS,
    figures=FIGURES,
    learner=Learner(
        CLIP(VisionTower(patch_size=4, features=32, **SIZES), TextTower(vocab_size=20, features=32, end=END, **SIZES)),
        {"image": normal(8, 8, 3), "tokens": texts},
        lambda batch: (batch["image"], batch["tokens"]),
        lambda module, layout: [descend(functools.partial(objective, module, layout.shard_objective(softmax_loss)))],
        compares=True,
    ),
    reference=Reference(
        "AutoModel",
        lambda model, image, tokens: model(input_ids=tokens.long(), pixel_values=image.movedim(-1, 1)).logits_per_image,
    ),
    presets=dict(data="builtin:digits", vocab_size=300),
    refused=[(dict(num_heads=3), "cannot be split into 3 heads")],
)
