"""The convolutional network."""

import functools

from family import Family, Learner, descend, integers, normal

from experiments import cnn
from jaxdl.models.lenet import LeNet

FAMILY = Family(
    cnn.EXPERIMENT,
    tiny=dict(batch_size=8, channels=(2, 2), hidden=(8,), timing_rounds=1),
    metrics={"test_accuracy"},
    figures={"confusion", "mistakes", "filters", "feature_maps", "methods"},
    learner=Learner(
        LeNet((8, 16), (16,), 4, dropout=0.0),
        {"image": normal(8, 8, 1), "label": integers(4)},
        lambda batch: (batch["image"],),
        lambda module, layout: [descend(functools.partial(cnn.objective, module))],
    ),
    refused=[(dict(channels=(2, 2, 2, 2)), "8×8")],
)
