"""SigLIP: sigmoid loss for language–image pre-training (Zhai et al. 2023, arXiv:2303.15343).

An image tower and a text tower learn to say of every image and every text of a batch whether they belong together. Then each finds the other among hundreds, and an image is classified by texts that name the classes. What happens to data, and what is measured, is in `jaxdl.tasks.image_text`.
"""

import dataclasses
from typing import Any, Literal

from jaxdl import launch
from jaxdl.data import CaptionedImage, Source
from jaxdl.losses import sigmoid_loss
from jaxdl.models.siglip import VARIANTS, SigLIP, image_processor
from jaxdl.tasks.image_text import SETTINGS, Towers, TwoTowers, load_towers, new_inputs, new_siglip, open_pairs, train_towers
from jaxdl.training import OPTIMIZERS, Run


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Transformer, launch.Init, launch.Ask, TwoTowers):
    """What this experiment computes."""

    variant: Literal[("", *VARIANTS)] = ""
    """A published size. Empty: the sizes that the other flags say."""


# The paper's own training: batches of 32k, β2 = 0.95, learning rate 1e-3, weight decay 1e-4, 40 billion examples seen.
_PAPER = Config(
    data="builtin:scenes", steps=1_220_703, batch_size=32_768, optimizer="adamw", learning_rate=1e-3, weight_decay=1e-4,
    warmup=0.01, precision="bf16", evaluate_every=10_000, eval_examples=1000, vocab_size=32_000, text_length=64, chunk_size=1024,
)  # fmt: skip

PRESETS = {
    "default": Config(**SETTINGS["default"]),
    "digits": Config(**SETTINGS["digits"]),
    "photos": Config(**SETTINGS["photos"]),
    "b16_224": dataclasses.replace(_PAPER, variant="B/16", resolution=224),
    "b16_256": dataclasses.replace(_PAPER, variant="B/16", resolution=256),
    "l16_256": dataclasses.replace(_PAPER, variant="L/16", resolution=256),
    "so400m_14_224": dataclasses.replace(_PAPER, variant="So400m/14", resolution=224, text_length=16),
    "finetune": Config(**SETTINGS["finetune"], init="google/siglip-base-patch16-224"),
}


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    source, held_out = open_pairs(run)
    with run.first_process_first():
        towers = build(config, source, run)
    optimizer = lambda schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay)
    return train_towers(run, source, held_out, towers, sigmoid_loss, optimizer, config.ask)


def build(config: Config, source: Source[CaptionedImage], run: Run) -> Towers:
    """The towers that `--init` names, of a published size with the vocabulary of the tokenizer, or of the sizes that the config gives."""
    fields = config.layer_fields()
    if config.init:
        return load_towers(config.init, SigLIP, **fields)
    inputs = new_inputs(run, source, image_processor(config.resolution))
    vocab_size = inputs.tokenizer.vocab_size
    if not config.variant:
        return Towers(new_siglip(config, vocab_size, **fields), None, inputs)
    module = SigLIP.variant(config.variant, **fields)
    return Towers(module.clone(text=module.text.clone(vocab_size=vocab_size)), None, inputs)


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="vision and language",
    summary="An image and a text tower learn which images and texts belong together, pair by pair.",
    paper="Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343",
    minutes=2,
    expects={
        "image_to_text_recall_at_1": (0.65, None),
        "text_to_image_recall_at_1": (0.65, None),
        "zero_shot_accuracy": (0.98, None),
    },
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
