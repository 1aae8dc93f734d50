"""CLIP: learning transferable visual models from natural language supervision (Radford et al. 2021, arXiv:2103.00020).

All texts of a batch compete for an image, and all images for a text. What happens to data, and what is measured, is in `jaxdl.tasks.image_text`, as for SigLIP, so that the two can be compared.
"""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import PyTree

from jaxdl import launch
from jaxdl.data import CaptionedImage, Source
from jaxdl.losses import softmax_loss
from jaxdl.models.clip import CLIP, LENGTH, VARIANTS, VOCABULARY, TextTower, VisionTower, image_processor
from jaxdl.tasks.image_text import SETTINGS, Towers, TwoTowers, load_towers, new_inputs, open_pairs, train_towers
from jaxdl.training import OPTIMIZERS, Run, decay_mask

LARGEST_SCALE = 100.0
"""Of cosine similarities (section 2.5)."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Transformer, launch.Init, launch.Ask, TwoTowers):
    """What this experiment computes."""

    variant: Literal[("", *VARIANTS)] = ""
    """A published size. Empty: the sizes that the other flags say."""


# The paper's own training (section 2.5, tables 18 and 20): 32 epochs of 400 million pairs in batches of 32,768, of which 2,000 warm up. Its images are cut at random places; here the middle is taken.
_PAPER = Config(
    data="builtin:scenes", steps=390_625, batch_size=32_768, optimizer="adamw", learning_rate=5e-4, weight_decay=0.2,
    warmup=2000 / 390_625, precision="bf16", evaluate_every=10_000, eval_examples=1000, resolution=224, vocab_size=VOCABULARY,
    text_length=LENGTH, chunk_size=1024,
)  # fmt: skip

PRESETS = {
    "default": Config(**SETTINGS["default"]),
    "digits": Config(**SETTINGS["digits"]),
    "photos": Config(**SETTINGS["photos"]),
    "b32_224": dataclasses.replace(_PAPER, variant="B/32"),
    "b16_224": dataclasses.replace(_PAPER, variant="B/16"),
    "l14_224": dataclasses.replace(_PAPER, variant="L/14", learning_rate=4e-4),
    "finetune": Config(**SETTINGS["finetune"], init="openai/clip-vit-large-patch14"),
}


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    source, held_out = open_pairs(run)
    with run.first_process_first():
        towers = build(config, source, run)
    # The paper's β₂, and no decay of gains and biases (section 2.5, table 18).
    optimizer = lambda schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay, b2=0.98, mask=decay_mask)
    return train_towers(run, source, held_out, towers, softmax_loss, optimizer, config.ask, project=limit_scale)


def build(config: Config, source: Source[CaptionedImage], run: Run) -> Towers:
    """The towers that `--init` names, of a published size with the tokens of the tokenizer, or of the sizes that the config gives."""
    fields = config.layer_fields()
    if config.init:
        return load_towers(config.init, CLIP, **fields)
    inputs = new_inputs(run, source, image_processor(config.resolution))
    tokens = dict(vocab_size=inputs.tokenizer.vocab_size, end=inputs.tokenizer.end)
    if config.variant:
        module = CLIP.variant(config.variant, **fields)
        return Towers(module.clone(text=module.text.clone(**tokens)), None, inputs)
    vision = VisionTower(features=config.width, **config.vision_fields(), **fields)
    return Towers(CLIP(vision, TextTower(**tokens, **config.text_fields(), **fields)), None, inputs)


def limit_scale(params: PyTree) -> PyTree:
    """Brings the scale of the similarities back to the largest one after each step.

    In the objective alone the limit would be a trap: one step beyond it, the scale would have no gradient any more.
    """
    return {**params, "log_temperature": jnp.minimum(params["log_temperature"], math.log(LARGEST_SCALE))}


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="vision and language",
    summary="An image and a text tower learn which text of a batch belongs to which image, and which image to which text.",
    paper="Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, arXiv:2103.00020",
    minutes=2,
    expects={
        "image_to_text_recall_at_1": (0.7, None),
        "text_to_image_recall_at_1": (0.7, None),
        "zero_shot_accuracy": (0.98, None),
    },
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
