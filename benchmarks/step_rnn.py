"""A training step of a recurrent classifier of names beside that of torch's `nn.LSTM`, `nn.GRU` and `nn.RNN`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
import optax
import torch

from benchmarks.training_step import training_step
from experiments.rnn import objective
from jaxdl.nn import Recurrent, SequenceModel

SYMBOLS, LANGUAGES = 134, 18
"""Of `builtin:names`."""


@dataclasses.dataclass(frozen=True)
class Rnn:
    """Both read one-hot characters, classify by the state after each name's last one, clip the gradient's norm at 1 and update by AdamW, torch by its fused one. Torch runs over the padding too, and picks each name's last output. The defaults are the sizes of the experiment's default run."""

    cell: Literal["rnn_tanh", "lstm", "gru"] = "lstm"
    batch_size: int = 64
    length: int = 24
    hidden: int = 128
    packed: bool = False
    """Torch does not run over the padding."""

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(0)
        symbols = random.integers(1, SYMBOLS, (self.batch_size, self.length)).astype(np.int32)
        ends = random.integers(4, self.length + 1, self.batch_size)
        symbols[np.arange(self.length) >= ends[:, None]] = 0
        return symbols, random.integers(0, LANGUAGES, self.batch_size).astype(np.int32)

    def jaxdl(self) -> Callable[[], None]:
        symbols, labels = self.batch()
        module = SequenceModel(Recurrent(self.hidden, self.cell), LANGUAGES, "n:1")
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-3))
        return training_step(
            functools.partial(objective, module, SYMBOLS),
            optimizer,
            lambda key: module.init(key, jax.nn.one_hot(symbols, SYMBOLS)),
            {"symbols": symbols, "targets": labels, "counts": np.ones(self.batch_size, bool)},
        )

    def torch(self) -> Callable[[], None]:
        symbols, labels = (torch.tensor(array, dtype=torch.long) for array in self.batch())
        build = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN}[self.cell]
        core, head = build(SYMBOLS, self.hidden, batch_first=True), torch.nn.Linear(self.hidden, LANGUAGES)
        parameters = [*core.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, 2e-3, fused=True)
        rows = torch.arange(self.batch_size)

        def run() -> None:
            optimizer.zero_grad()
            x = torch.nn.functional.one_hot(symbols, SYMBOLS).float()
            lengths = (symbols > 0).sum(1)
            if self.packed:
                packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                state = core(packed)[1]
                last = (state[0] if self.cell == "lstm" else state)[-1]
            else:
                last = core(x)[0][rows, lengths - 1]
            torch.nn.functional.cross_entropy(head(last), labels).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return run
