"""ViT."""

import functools

from family import Family, Learner, Reference, descend, normal, one_hot

from experiments import vit
from jaxdl.models.vit import ViT

FAMILY = Family(
    vit.EXPERIMENT,
    tiny=dict(batch_size=4, patch_size=4, width=16, depth=1, num_heads=2, optimizer="adamw"),
    metrics={"test_accuracy"},
    figures={"attention_rollout", "confusion", "mistakes"},
    learner=Learner(
        ViT(patch_size=4, width=32, depth=1, num_heads=2, num_classes=4),
        {"image": normal(8, 8, 3), "target": one_hot(4)},
        lambda batch: (batch["image"],),
        lambda module, layout: [descend(functools.partial(vit.objective, module, 0.1))],
    ),
    reference=Reference("AutoModelForImageClassification", lambda model, image: model(image.movedim(-1, 1)).logits),
    refused=[
        (dict(patch_size=3), "8×8 cannot be cut into patches of 3"),
        (dict(num_heads=3), "cannot be split into 3 heads"),
    ],
)
