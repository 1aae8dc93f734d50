"""A training step of ViT beside that of transformers' `ViTForImageClassification`."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import optax
import torch
import transformers

from benchmarks.training_step import training_step
from experiments.vit import objective
from jaxdl.models.vit import ViT
from jaxdl.nn import ATTENTIONS

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Vit:
    """Both do forward, cross-entropy with soft targets, backward and AdamW; torch with its scaled dot-product attention and its fused AdamW. The defaults are the sizes of the experiment's default run; those of its CIFAR-10 preset are --side 32 --colors 3 --patch-size 4 --width 128 --depth 6."""

    batch_size: int = 64
    side: int = 8
    colors: int = 1
    patch_size: int = 2
    width: int = 64
    depth: int = 4
    num_heads: int = 4
    attention: str = "plain"

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        images = random.normal(size=(self.batch_size, self.side, self.side, self.colors)).astype(np.float32)
        return images, np.eye(CLASSES, dtype=np.float32)[random.integers(0, CLASSES, self.batch_size)]

    def jaxdl(self) -> Callable[[], None]:
        images, targets = self.batch()
        module = ViT(self.patch_size, self.width, self.depth, self.num_heads, CLASSES, attention=ATTENTIONS[self.attention])
        optimizer = optax.adamw(1e-3, b2=0.999, weight_decay=0.1)
        return training_step(
            functools.partial(objective, module, 0.0),
            optimizer,
            lambda key: module.init(key, images[:1]),
            {"image": images, "target": targets},
        )

    def torch(self) -> Callable[[], None]:
        images, targets = self.batch()
        config = transformers.ViTConfig(
            image_size=self.side, patch_size=self.patch_size, num_channels=self.colors, hidden_size=self.width,
            num_hidden_layers=self.depth, num_attention_heads=self.num_heads, intermediate_size=4 * self.width, num_labels=CLASSES,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.999), weight_decay=0.1, fused=True)
        pixels, wanted = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(), torch.tensor(targets)

        def run() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, wanted).backward()
            optimizer.step()

        return run
