"""GPT."""

import functools
from pathlib import Path

import numpy as np
from family import Family, Learner, Reference, descend, integers

from experiments import gpt
from jaxdl.models.gpt2 import GPT


def letters(folder: Path) -> str:
    """A text that is longer than every context."""
    (folder / "book.txt").write_text("".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 20_000)))
    return f"folder:{folder / 'book.txt'}"


FAMILY = Family(
    gpt.EXPERIMENT,
    tiny=dict(batch_size=4, length=16, width=16, depth=1, num_heads=2, optimizer="adamw", eval_characters=2000, tokens=8),
    metrics={"validation_loss", "bits_per_character"},
    figures={"attention"},
    learner=Learner(
        GPT(vocab_size=20, length=8, width=32, depth=1, num_heads=2),
        {"tokens": integers(20, 9)},
        lambda batch: (batch["tokens"][:, :-1],),
        lambda module, layout: [descend(functools.partial(gpt.objective, module))],
    ),
    reference=Reference("AutoModelForCausalLM", lambda model, tokens: model(input_ids=tokens.long()).logits),
    presets=dict(tokenizer="characters"),
    data=letters,
    refused=[(dict(num_heads=3), "cannot be split into 3 heads")],
)
