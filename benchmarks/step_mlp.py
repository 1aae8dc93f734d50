"""A training step of the multi-layer perceptron beside the same in torch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import optax
import torch

from benchmarks.training_step import training_step
from experiments.mlp import objective
from jaxdl.models.mlp import MLP, sgd


@dataclasses.dataclass(frozen=True)
class Mlp:
    """Both do forward, cross-entropy, backward and plain SGD with weight decay; torch with its fused SGD. The defaults are those of the experiment's MNIST preset, without dropout."""

    batch_size: int = 128
    inputs: int = 784
    hidden: tuple[int, ...] = (256, 128)
    backward: Literal["hand", "jax"] = "hand"
    """Ours: whose gradients."""
    dropout: float = 0.0

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        images = random.normal(size=(self.batch_size, self.inputs)).astype(np.float32)
        return images, random.integers(0, 10, self.batch_size).astype(np.int32)

    def jaxdl(self) -> Callable[[], None]:
        images, labels = self.batch()
        module = MLP(self.hidden, 10, self.dropout, self.backward)
        optimizer = sgd(optax.constant_schedule(0.1), 1e-4)
        return training_step(
            functools.partial(objective, module),
            optimizer,
            lambda key: module.init(key, images[:1]),
            {"image": images, "label": labels},
        )

    def torch(self) -> Callable[[], None]:
        images, labels = self.batch()
        layers, inputs = [], self.inputs
        for width in self.hidden:
            layers += [torch.nn.Linear(inputs, width), torch.nn.ReLU(), torch.nn.Dropout(self.dropout)]
            inputs = width
        model = torch.nn.Sequential(*layers, torch.nn.Linear(inputs, 10))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1e-4, fused=True)
        pixels, classes = torch.tensor(images), torch.tensor(labels, dtype=torch.long)

        def run() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels), classes).backward()
            optimizer.step()

        return run
