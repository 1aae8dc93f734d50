"""Normalisations, compared in a sweep whose step is its own."""

from family import Family

from experiments import normalization

_SIZES = dict(batch_size=4, small_batch=4, seeds=1, factors=(1.0,), width=4, depth=1)
_CELLS = [f"{norm}/batch_4" for norm in normalization.NORMS]

FAMILY = Family(
    normalization.EXPERIMENT,
    tiny=_SIZES,
    metrics={f"{part}_accuracy/{cell}" for part in ("test", "validation") for cell in _CELLS},
    figures={"accuracy", "validation", "inside_by_normalization"}
    | {f"layer_{what}" for what in ("stats", "updates", "activations", "gradients")},
    refused=[
        (dict(small_batch=3), "--small-batch 3 does not divide --batch-size 4"),
        (dict(width=6), "cannot be split into 4 groups"),
    ],
)
