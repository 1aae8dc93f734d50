"""CLIP: learning transferable visual models from natural language supervision (Radford et al. 2021, arXiv:2103.00020).

The experiment is that of `experiments/siglip.py`: data, processors, evaluation and pictures are the same, so that the two can be compared. Here are CLIP's own towers, its objective, in which all texts of a batch compete for an image and all images for a text, and its training.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from experiments import siglip
from jaxdl import launch
from jaxdl.data.text import Tokenizer
from jaxdl.losses import softmax_loss
from jaxdl.models.clip import CLIP, LENGTH, VARIANTS, VOCABULARY, TextTower, VisionTower
from jaxdl.training import OPTIMIZERS, Aux, Batch, Execution, matrices

LARGEST_SCALE = 100.0
"""Of cosine similarities (section 2.5)."""


@dataclasses.dataclass(frozen=True)
class Config(siglip.Config):
    """What this experiment computes."""

    variant: Literal[("", *VARIANTS)] = ""
    """A published size. Empty: the sizes that follow."""


# The paper's own training (section 2.5, tables 18 and 20): 32 epochs of 400 million pairs in batches of 32,768, of which 2,000 warm up. Its pictures are cut at random places; here the middle is taken.
_PAPER = Config(
    steps=390_625, batch_size=32_768, optimizer="adamw", learning_rate=5e-4, weight_decay=0.2, warmup=2000 / 390_625,
    precision="bf16", evaluate_every=10_000, eval_examples=1000, resolution=224, vocabulary=VOCABULARY, text_length=LENGTH,
    chunk_size=1024,
)  # fmt: skip

PRESETS = {
    **{name: Config(**vars(siglip.PRESETS[name])) for name in ("default", "digits", "photos")},
    "b32_224": dataclasses.replace(_PAPER, preset="b32_224", variant="B/32"),
    "b16_224": dataclasses.replace(_PAPER, preset="b16_224", variant="B/16"),
    "l14_224": dataclasses.replace(_PAPER, preset="l14_224", variant="L/14", learning_rate=4e-4),
    "finetune": Config(**vars(siglip.PRESETS["finetune"]) | dict(init="openai/clip-vit-large-patch14")),
}


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, draws, and returns what is in its `result.json`."""
    return siglip.train(FAMILY, config, workdir, execution)


def towers(config: Config, tokenizer: Tokenizer, **fields: Any) -> CLIP:
    """The published size that the config names, with the tokens of the tokenizer, or the sizes that it gives."""
    if config.variant:
        module = CLIP.variant(config.variant, **fields)
        return module.clone(text=module.text.clone(vocabulary=tokenizer.vocabulary, end=tokenizer.end))
    vision = dict(patch=config.patch, width=config.width, depth=config.depth, hidden=4 * config.width)
    text = dict(width=config.text_width, depth=config.text_depth, hidden=4 * config.text_width)
    fields |= dict(num_heads=config.num_heads, features=config.width)
    return CLIP(VisionTower(**vision, **fields), TextTower(tokenizer.vocabulary, end=tokenizer.end, **text, **fields))


def loss(
    module: CLIP,
    objective: Callable[..., Float[Array, ""]],
    params: PyTree,
    variables: dict[str, PyTree],
    batch: Batch,
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], Aux]:
    """The symmetric cross-entropy of a batch, with the scale of the logits (the inverse of the temperature) to look at."""
    out = module.apply({"params": params}, batch["image"], batch["tokens"], train=True, rngs={"dropout": key})
    value = objective(out.image_embeddings, out.text_embeddings, out.log_temperature)
    return value, Aux({"logit_scale": jnp.exp(out.log_temperature)})


def optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """That of the config, with the paper's β₂ and no decay of gains and biases (section 2.5, table 18), whose steps end at the largest scale.

    In the objective alone the limit would be a trap: one step beyond it, the scale would have no gradient any more.
    """
    inner = OPTIMIZERS[config.optimizer](schedule, config.weight_decay, b2=0.98, mask=matrices)

    def update(updates: PyTree, state: optax.OptState, params: PyTree) -> tuple[PyTree, optax.OptState]:
        updates, state = inner.update(updates, state, params)
        room = math.log(LARGEST_SCALE) - params["log_temperature"]
        return {**updates, "log_temperature": jnp.minimum(updates["log_temperature"], room)}, state

    return optax.GradientTransformation(inner.init, update)


FAMILY = siglip.Family("clip", CLIP, towers, softmax_loss, loss, optimizer)

EXPERIMENT = launch.Experiment(
    name="clip",
    summary="An image and a text tower learn which text of a batch belongs to which image, and which image to which text.",
    paper="Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, arXiv:2103.00020",
    result="recall@1 of 0.88 image to text and 0.87 text to image among 256 held-out pictures, zero-shot colour and shape of 1.00",
    minutes=2,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
