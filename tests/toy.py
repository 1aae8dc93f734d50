"""The smallest experiment that trains, measures and draws, for what happens to a run as a process: `python -m tests.toy`."""

import dataclasses
import time

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxdl import figures, launch
from jaxdl.data import TABLES
from jaxdl.losses import cross_entropy
from jaxdl.metrics import accuracy
from jaxdl.training import Aux, Run, configured, setup_training, train


class Classifier(nn.Module):
    """A hidden layer, with dropout so that a run has randomness of its own."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Dense(256)(x))
        return nn.Dense(3)(nn.Dropout(0.2, deterministic=not train)(x))


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """The fields that all experiments have, and one."""

    pause: float = 0.0
    """Seconds before each step, so that what happens from outside happens between two steps."""


class Unhurried:
    """Batches that take their time."""

    def __init__(self, batches, seconds: float):
        self.batches, self.seconds = batches, seconds
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        time.sleep(self.seconds)
        return next(self.batches)


def main(config: Config, run: Run) -> dict:
    module, (source, held_out) = Classifier(), TABLES.open(config.data)
    features, labels = np.stack([row.features for row in held_out]), np.array([int(row.target) for row in held_out])
    scores = run.layout.inference(module.apply)

    def objective(params, state, batch, key):
        logits = module.apply({"params": params}, batch["features"], train=True, rngs={"dropout": key})
        return cross_entropy(logits, batch["label"]), Aux()

    def transform(row, rng):
        noise = 0.1 * rng.standard_normal(row.features.shape)
        return {"features": (row.features + noise).astype(np.float32), "label": np.int32(row.target)}

    def evaluate(variables: PyTree, key):
        return {"test_accuracy": accuracy(scores(variables, features), labels)}

    def show(variables: PyTree, key):
        return {"confusion": figures.confusion_matrix(labels, scores(variables, features).argmax(1), source.info.classes)}

    step, state = setup_training(
        config,
        run.layout,
        configured(config, objective, optax.adam),
        init=lambda key: module.init(key, jnp.asarray(features[:1])),
    )
    batches = Unhurried(run.batches(source, transform), config.pause)
    return train(run, step, state, batches, evaluate=evaluate, show=show)


PRESETS = {"default": Config(data="builtin:iris", steps=120, batch_size=16, learning_rate=0.01, evaluate_every=60)}
EXPERIMENT = launch.Experiment(main, PRESETS, field="first principles", summary="A toy.", paper="None.", minutes=1, expects={})

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
