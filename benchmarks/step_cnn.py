"""A training step of the small convolutional network beside the same in torch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import optax
import torch

from benchmarks.training_step import training_step
from experiments.cnn import objective
from jaxdl.models.lenet import LeNet


@dataclasses.dataclass(frozen=True)
class Cnn:
    """Both do forward, cross-entropy, backward and AdamW, without dropout; torch with its fused AdamW, in its own order of axes. The defaults are those of the experiment's MNIST preset."""

    batch_size: int = 128
    side: int = 28
    colors: int = 1
    channels: tuple[int, ...] = (16, 32)
    hidden: tuple[int, ...] = (128,)
    kernel_size: int = 5
    method: Literal["fastest", "taps", "unfold", "lax"] = "fastest"

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        images = random.normal(size=(self.batch_size, self.side, self.side, self.colors)).astype(np.float32)
        return images, random.integers(0, 10, self.batch_size).astype(np.int32)

    def jaxdl(self) -> Callable[[], None]:
        images, labels = self.batch()
        module = LeNet(self.channels, self.hidden, 10, self.kernel_size, method=self.method)
        optimizer = optax.adamw(1e-3, weight_decay=1e-4)
        return training_step(
            functools.partial(objective, module),
            optimizer,
            lambda key: module.init(key, images[:1]),
            {"image": images, "label": labels},
        )

    def torch(self) -> Callable[[], None]:
        images, labels = self.batch()
        layers, inputs, side = [], self.colors, self.side
        for width in self.channels:
            layers += [torch.nn.Conv2d(inputs, width, self.kernel_size, padding="same"), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
            inputs, side = width, side // 2
        layers, inputs = [*layers, torch.nn.Flatten()], inputs * side**2
        for width in self.hidden:
            layers += [torch.nn.Linear(inputs, width), torch.nn.ReLU()]
            inputs = width
        model = torch.nn.Sequential(*layers, torch.nn.Linear(inputs, 10))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4, fused=True)
        pixels, classes = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(), torch.tensor(labels, dtype=torch.long)

        def run() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels), classes).backward()
            optimizer.step()

        return run
