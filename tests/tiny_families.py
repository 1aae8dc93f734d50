"""A small model of each family of Transformers with the objective of its experiment and batches to train it on."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from experiments import clip, gpt, paligemma, translation, vit
from jaxdl.losses import softmax_loss
from jaxdl.models import clip as clip_models
from jaxdl.models.gemma import Gemma
from jaxdl.models.gpt2 import GPT
from jaxdl.models.marian import EncoderDecoder, Stack
from jaxdl.models.paligemma import PaliGemma
from jaxdl.models.siglip import VisionTower
from jaxdl.models.vit import ViT
from jaxdl.training import Frozen, Layout

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""From chance and the number of rows to one array of a batch."""


def integers(below: int, *shape: int) -> Draw:
    return lambda random, rows: random.integers(0, below, (rows, *shape)).astype(np.int32)


def normal(*shape: int) -> Draw:
    return lambda random, rows: random.standard_normal((rows, *shape), np.float32)


def the_same(*row: Any) -> Draw:
    return lambda random, rows: np.tile(np.array(row, bool if isinstance(row[0], bool) else np.int32), (rows, 1))


@dataclasses.dataclass(frozen=True)
class Family:
    module: nn.Module
    loss: Callable[[nn.Module, Layout], Callable[..., Any]]
    arrays: Mapping[str, Draw]
    inputs: Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, ...]]
    """Of a batch, what the module is called with."""
    frozen: Frozen | None = None
    compares: bool = False
    """Whether the objective compares examples with each other, so that parts of a batch have another one than the batch."""

    def batches(self, count: int, rows: int = 16) -> list[dict[str, np.ndarray]]:
        random = np.random.default_rng(0)
        return [{name: draw(random, rows) for name, draw in self.arrays.items()} for _ in range(count)]


_SIZES = dict(width=32, depth=1, num_heads=2)
_TOWER = dict(patch=4, hidden=64, **_SIZES)
_IMAGE = 23
"""The token for a patch."""

FAMILIES = {
    "gpt": Family(
        GPT(vocabulary=20, length=8, **_SIZES),
        lambda module, layout: functools.partial(gpt.loss, module),
        {"tokens": integers(20, 9)},
        lambda batch: (batch["tokens"][:, :-1],),
    ),
    "vit": Family(
        ViT(patch=4, classes=4, **_SIZES),
        lambda module, layout: functools.partial(vit.loss, module, 0.1),
        {"image": normal(8, 8, 1), "target": lambda random, rows: np.eye(4, dtype=np.float32)[random.integers(0, 4, rows)]},
        lambda batch: (batch["image"],),
    ),
    "translation": Family(
        EncoderDecoder(20, 32, Stack(1, 2, 64), Stack(1, 2, 64), length=8),
        lambda module, layout: functools.partial(translation.loss, module, 0.1, 7.0),
        {
            **dict.fromkeys(("source", "target", "labels"), integers(20, 8)),
            "source_segments": the_same(1, 1, 1, 2, 2, 2, 0, 0),
            "target_segments": the_same(1, 1, 1, 1, 2, 2, 2, 0),
        },
        lambda batch: (batch["source"], batch["target"]),
    ),
    # Its tower learns from the second step on.
    "paligemma": Family(
        PaliGemma(
            VisionTower(head=False, **_TOWER),
            Gemma(vocabulary=24, num_kv_heads=1, head_width=16, hidden=64, **_SIZES),
            image_token=_IMAGE,
        ),
        lambda module, layout: functools.partial(paligemma.loss, module),
        {
            "image": normal(8, 8, 3),
            "tokens": lambda random, rows: np.hstack([the_same(*4 * [_IMAGE])(random, rows), integers(_IMAGE, 6)(random, rows)]),
            "prefix": lambda random, rows: random.integers(5, 8, rows).astype(np.int32),
            "learned": the_same(*7 * [False], *3 * [True]),
        },
        lambda batch: (batch["image"], batch["tokens"], batch["prefix"]),
        frozen=Frozen("^vision/", steps=1),
    ),
    "clip": Family(
        clip_models.CLIP(
            clip_models.VisionTower(features=32, **_TOWER),
            clip_models.TextTower(vocabulary=20, features=32, hidden=64, end=19, **_SIZES),
        ),
        lambda module, layout: functools.partial(clip.loss, module, layout.over_batch(softmax_loss)),
        {"image": normal(8, 8, 3), "tokens": integers(20, 6)},
        lambda batch: (batch["image"], batch["tokens"]),
        compares=True,
    ),
}
