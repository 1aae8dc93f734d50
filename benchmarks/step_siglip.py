"""A training step of SigLIP beside that of transformers' `SiglipModel`."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import optax
import torch
import transformers

from benchmarks.training_step import training_step
from jaxdl.losses import sigmoid_loss
from jaxdl.models.siglip import SigLIP, TextTower, VisionTower
from jaxdl.tasks.image_text import objective

VOCABULARY = 128


@dataclasses.dataclass(frozen=True)
class Siglip:
    """Both do forward, sigmoid loss, backward and AdamW; torch with its scaled dot-product attention and its fused AdamW. The defaults are the sizes of the experiment's default run."""

    batch_size: int = 128
    resolution: int = 32
    patch_size: int = 8
    width: int = 64
    depth: int = 2
    num_heads: int = 4
    text_depth: int = 1
    text_length: int = 18

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        images = random.normal(size=(self.batch_size, self.resolution, self.resolution, 3)).astype(np.float32)
        return images, random.integers(0, VOCABULARY, (self.batch_size, self.text_length)).astype(np.int32)

    def jaxdl(self) -> Callable[[], None]:
        images, tokens = self.batch()
        shared = dict(num_heads=self.num_heads, width=self.width, mlp_dim=4 * self.width)
        module = SigLIP(
            VisionTower(patch_size=self.patch_size, depth=self.depth, **shared),
            TextTower(vocab_size=VOCABULARY, features=self.width, depth=self.text_depth, **shared),
        )
        optimizer = optax.adamw(1e-3, b2=0.95, weight_decay=1e-4)
        return training_step(
            functools.partial(objective, module, sigmoid_loss),
            optimizer,
            lambda key: module.init(key, images[:1], tokens[:1]),
            {"image": images, "tokens": tokens},
        )

    def torch(self) -> Callable[[], None]:
        images, tokens = self.batch()
        shared = dict(hidden_size=self.width, intermediate_size=4 * self.width, num_attention_heads=self.num_heads)
        config = transformers.SiglipConfig(
            vision_config=dict(image_size=self.resolution, patch_size=self.patch_size, num_hidden_layers=self.depth, **shared),
            text_config=dict(
                vocab_size=VOCABULARY,
                max_position_embeddings=self.text_length,
                num_hidden_layers=self.text_depth,
                projection_size=self.width,
                **shared,
            ),
        )
        model = transformers.SiglipModel(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
        pixels, ids = torch.tensor(images.transpose(0, 3, 1, 2)).contiguous(), torch.tensor(tokens, dtype=torch.long)

        def run() -> None:
            optimizer.zero_grad()
            model(pixel_values=pixels, input_ids=ids, return_loss=True).loss.backward()
            optimizer.step()

        return run
