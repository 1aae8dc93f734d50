"""The multi-layer perceptron."""

import functools

from family import Family, Learner, descend, integers, normal

from experiments import mlp
from jaxdl.models.mlp import MLP

FAMILY = Family(
    mlp.EXPERIMENT,
    tiny=dict(batch_size=8, hidden=(8, 6), study_steps=4, study_examples=20),
    metrics={"test_accuracy"}
    | {f"test_accuracy_of_20/{recipe.replace(' ', '_')}" for recipe in mlp.recipes(mlp.PRESETS["default"])},
    figures={"confusion", "mistakes", "left_out"},
    learner=Learner(
        MLP((32,), 4, dropout=0.0, backward="hand"),
        {"image": normal(8, 8, 1), "label": integers(4)},
        lambda batch: (batch["image"],),
        lambda module, layout: [descend(functools.partial(mlp.objective, module))],
    ),
)
