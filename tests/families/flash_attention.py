"""Attention, which is measured and not trained."""

from family import Family

from experiments import flash_attention

FAMILY = Family(
    flash_attention.EXPERIMENT,
    tiny=dict(cases=("causal",), lengths=(64,), widths=(16,), tokens=64, features=32, repeats=2, milliseconds=0),
    metrics=(),
    figures={"time_16", "memory_16"},
    refused=[(dict(features=24), "--features 24 are no whole number of heads of --widths 16")],
)
