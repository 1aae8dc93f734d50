"""PaliGemma."""

import functools

import numpy as np
from family import Draw, Family, Learner, Reference, descend, integers, normal, repeated

from experiments import paligemma
from families.siglip import SIZES
from jaxdl.models.gemma import Gemma
from jaxdl.models.paligemma import PaliGemma
from jaxdl.models.siglip import VisionTower
from jaxdl.training import Frozen

IMAGE = 23
"""The token for a patch."""


def prompts(rng: np.random.Generator, rows: int) -> np.ndarray:
    return np.hstack([repeated(*4 * [IMAGE])(rng, rows), integers(IMAGE, 6)(rng, rows)])


prefixes: Draw = lambda rng, rows: rng.integers(5, 8, rows).astype(np.int32)


def logits(model, image, tokens, prefix):
    import torch

    answer = (torch.arange(tokens.shape[1]) >= prefix[:, None]).long()
    given = dict(pixel_values=image.movedim(-1, 1), token_type_ids=answer, attention_mask=torch.ones_like(answer))
    return model(input_ids=tokens.long(), labels=tokens.long(), **given).logits


TINY = dict(
    batch_size=4, resolution=16, patch_size=8, width=16, depth=1, num_heads=2, text_width=16, text_depth=1, text_heads=2,
    head_width=8, eval_examples=4, pretrain=0, optimizer="adamw",
)  # fmt: skip

FAMILY = Family(
    paligemma.EXPERIMENT,
    tiny=TINY,
    metrics={
        "validation_loss",
        "answer_exact_match",
        "caption_exact_match",
        "detect_mean_iou",
        "detect_above_half",
    },
    figures={"answers", "boxes"},
    # The tower learns from the second step on.
    learner=Learner(
        PaliGemma(
            VisionTower(patch_size=4, head=False, **SIZES),
            Gemma(vocab_size=24, num_kv_heads=1, head_width=16, **SIZES),
            image_token=IMAGE,
        ),
        {"image": normal(8, 8, 3), "tokens": prompts, "prefix": prefixes, "learned": repeated(*7 * [False], *3 * [True])},
        lambda batch: (batch["image"], batch["tokens"], batch["prefix"]),
        lambda module, layout: [descend(functools.partial(paligemma.objective, module), frozen=Frozen("^vision/", steps=1))],
    ),
    reference=Reference("AutoModelForImageTextToText", logits),
    presets=dict(pretrain=0, steps=2, eval_examples=4),
    refused=[(dict(num_heads=3), "cannot be split into 3 heads"), (dict(ask=("a.png",)), "at least one question")],
)
