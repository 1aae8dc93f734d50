"""Translation by an encoder and a decoder."""

import functools
from pathlib import Path

import numpy as np
from family import Family, Learner, Reference, descend, integers, repeated

from experiments import translation
from jaxdl.models.marian import EncoderDecoder, Stack

PAD = 19


def sentences(folder: Path) -> str:
    """Files of sentences and their translations, letter by letter."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 5)):
        lines = [" ".join(rng.choice(list("abcd"), rng.integers(1, 8))) for _ in range(count)]
        for language, text in (("en", "\n".join(lines)), ("de", "\n".join(lines).upper())):
            (folder / f"{split}.{language}").write_text(text)
    return f"folder:{folder}"


FAMILY = Family(
    translation.EXPERIMENT,
    tiny=dict(batch_size=2, length=24, width=16, depth=1, num_heads=2, vocab_size=270, beam=0, optimizer="adamw"),
    metrics={"validation_loss", "perplexity", "bleu", "exact_match"},
    figures={"cross_attention"},
    learner=Learner(
        EncoderDecoder(20, 32, Stack(1, 2, 64), Stack(1, 2, 64), length=8, pad=PAD),
        {
            **dict.fromkeys(("source", "target", "labels"), integers(PAD, 8)),
            "source_segments": repeated(1, 1, 1, 2, 2, 2, 0, 0),
            "target_segments": repeated(1, 1, 1, 1, 2, 2, 2, 0),
        },
        lambda batch: (batch["source"], batch["target"]),
        lambda module, layout: [descend(functools.partial(translation.objective, module, 0.1, 7.0))],
    ),
    reference=Reference(
        "AutoModelForSeq2SeqLM",
        lambda model, source, target: model(input_ids=source.long(), decoder_input_ids=target.long()).logits,
    ),
    presets=dict(test="", vocab_size=270),
    data=sentences,
    refused=[(dict(num_heads=3), "cannot be split into 3 heads"), (dict(ask=(" ",)), "nothing to translate")],
)
