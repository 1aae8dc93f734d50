"""Recurrent networks."""

import functools

import jax
import numpy as np
from family import Family, Learner, descend, integers, repeated

from experiments import rnn
from jaxdl.nn import Recurrent, SequenceModel

SYMBOLS = 9


def symbols(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Sequences that end at one of the last places."""
    return np.where(np.arange(6) < rng.integers(3, 7, (rows, 1)), rng.integers(1, SYMBOLS, (rows, 6)), 0).astype(np.int32)


FAMILY = Family(
    rnn.EXPERIMENT,
    tiny=dict(hidden=8, batch_size=8, length=8, compare=False),
    metrics={"test_accuracy", "majority_accuracy", "naive_bayes_accuracy", "test_macro_f1", "naive_bayes_macro_f1"},
    figures={"confusion", "reading"},
    learner=Learner(
        SequenceModel(Recurrent(32, "lstm"), features=5, mode="n:n"),
        {"symbols": symbols, "targets": integers(5, 6), "counts": repeated(True, True, False, True, True, True)},
        lambda batch: (np.asarray(jax.nn.one_hot(batch["symbols"], SYMBOLS)),),
        lambda module, layout: [descend(functools.partial(rnn.objective, module, SYMBOLS))],
    ),
    refused=[
        (dict(bidirectional=True, task="generate"), "--bidirectional cannot generate"),
        (dict(task="copy", ask=("a",)), "--ask is for --task classify"),
    ],
)
