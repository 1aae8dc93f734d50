"""SigLIP."""

import functools

from family import Family, Learner, Reference, descend, integers, normal

from experiments import siglip
from jaxdl.losses import sigmoid_loss
from jaxdl.models.siglip import SigLIP, TextTower, VisionTower
from jaxdl.tasks.image_text import objective

TINY = dict(
    resolution=16, patch_size=8, width=16, depth=1, num_heads=2, text_width=16, text_depth=1, text_length=6, batch_size=4,
    eval_examples=8, vocab_size=300, optimizer="adamw",
)  # fmt: skip
SIZES = dict(width=32, depth=1, num_heads=2, mlp_dim=64)
METRICS = {f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} | {
    f"zero_shot_accuracy{kind}" for kind in ("", "_color", "_shape")
}

FIGURES = {"similarity", "image_to_text", "text_to_image", "zero_shot_color", "zero_shot_shape"}

FAMILY = Family(
    siglip.EXPERIMENT,
    tiny=TINY,
    metrics=METRICS,
    figures=FIGURES,
    learner=Learner(
        SigLIP(VisionTower(patch_size=4, **SIZES), TextTower(vocab_size=20, features=32, **SIZES)),
        {"image": normal(8, 8, 3), "tokens": integers(20, 6)},
        lambda batch: (batch["image"], batch["tokens"]),
        lambda module, layout: [descend(functools.partial(objective, module, layout.shard_objective(sigmoid_loss)))],
        compares=True,
    ),
    reference=Reference(
        "AutoModel",
        lambda model, image, tokens: model(input_ids=tokens.long(), pixel_values=image.movedim(-1, 1)).logits_per_image,
    ),
    presets=dict(data="builtin:digits", vocab_size=300),
    refused=[(dict(num_heads=3), "cannot be split into 3 heads")],
)
