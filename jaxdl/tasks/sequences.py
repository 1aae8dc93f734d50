"""Sequences of symbols, of which something is to be told at their end or at every step: what such tasks share, and the copying task."""

import abc
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Key, PyTree

from jaxdl import figures
from jaxdl.data import Source
from jaxdl.nn import SequenceModel
from jaxdl.training import Layout, Report


def read(module: SequenceModel, width: int, params: PyTree, symbols: Int[Array, "B T"], **options: Any) -> Float[Array, "B ..."]:
    """Logits for sequences of symbols below `width`, each of which ends where its zeros begin."""
    ends = module.mode == "n:1" or module.core.bidirectional  # Elsewhere nothing before the end depends on what follows it.
    lengths = (symbols > 0).sum(-1) if ends else None
    return module.apply({"params": params}, jax.nn.one_hot(symbols, width), lengths=lengths, **options)[0]


class Network:
    """A `SequenceModel` of symbols below `width` as tasks see it: numpy in, numpy out."""

    def __init__(self, module: SequenceModel, width: int, layout: Layout):
        self.module, self.width, self.layout = module, width, layout
        scores = lambda variables, rows: jax.nn.log_softmax(read(module, width, variables["params"], rows))
        self._read = layout.inference(scores, 256)

    def __call__(self, variables: PyTree, rows: Iterable[Int[np.ndarray, "_"]]) -> Float[np.ndarray, "N ..."]:
        """Log-probabilities of the answers, at the end or at every step."""
        return self._read(variables, rows)

    def generate(
        self,
        variables: PyTree,
        first: Int[np.ndarray, "N"],
        steps: int,
        *,
        temperature: float,
        allowed: Sequence[int],
        seed: int,
    ) -> Int[np.ndarray, "N T"]:
        """Symbols drawn one after the other, each read before the next, after the `first` one. Only the `allowed` ones are drawn."""
        suppressed = np.full(self.width, -np.inf, np.float32)
        suppressed[np.asarray(allowed)] = 0

        def draw(logits: Float[Array, "N V"], key: Key[Array, ""]) -> Float[Array, "N V"]:
            drawn = jax.random.categorical(key, logits.astype(jnp.float32) / temperature + suppressed)
            return jax.nn.one_hot(drawn, self.width)

        writer = self.module.clone(mode="1:n", emit=draw)

        def write(variables: PyTree, first: Int[Array, "N 1"]) -> Int[Array, "N T"]:
            x = jax.nn.one_hot(first[:, 0], self.width)
            return writer.apply(variables, x, steps=steps, rngs={"emit": jax.random.key(seed)})[0].argmax(-1)

        return self.layout.inference(write, len(first))(variables, first[:, None])


class SequenceTask(abc.ABC):
    """What one loop is given: sequences of symbols from 1 on, 0 where they are over, and what is to be answered.

    A batch has `symbols` (`B T`), and as `targets` one answer for each (`B`) or one at every step (`B T`), of which those in `counts` count.
    """

    mode: Literal["n:1", "n:n"]
    score: str
    """The metric by which runs are compared."""
    levels: dict[str, str] = {}
    """Metrics of `simple_baselines` that are to be drawn beside it, and what these are called."""
    num_symbols: int
    """How many symbols there are to read, 0 among them."""
    num_answers: int
    """How many answers there are to choose between."""
    source: Source[Any]
    rows: Int32[np.ndarray, "N T"]
    """The symbols of the held-out sequences."""
    description: str

    @abc.abstractmethod
    def example(self, example: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """An element of the source as a row of a batch."""

    @abc.abstractmethod
    def measure(self, network: Network, variables: PyTree) -> dict[str, float]:
        """How good the answers to what is held out are."""

    @abc.abstractmethod
    def show(self, network: Network, variables: PyTree) -> Report:
        """Figures of what was learned, and what is measured on the way."""

    @abc.abstractmethod
    def simple_baselines(self) -> dict[str, float]:
        """What methods without a network reach."""


class RandomSymbols(Source[Int32[np.ndarray, "T"]]):
    """Random symbols from 1 to `kinds`, element for element a function of the seed."""

    def __init__(self, count: int, kinds: int, seed: int):
        self.count, self.kinds, self.seed = count, kinds, seed

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> Int32[np.ndarray, "T"]:
        return np.random.default_rng((self.seed, index)).integers(1, 1 + self.kinds, self.count, np.int32)


class Copy(SequenceTask):
    """Symbols, blanks, a sign, and then the symbols again (Hochreiter and Schmidhuber 1997; as in Arjovsky et al. 2016, section 5.1, which has 10 symbols and up to 500 blanks).

    A gradient that is cut in the pause cannot teach to keep the symbols. In a short pause an LSTM keeps them all the same, as its forget gates begin half open, and learns to read them: with 20 blanks and a cut every 10 steps it got 0.94 right.
    """

    mode, score = "n:n", "copy_accuracy"
    levels = {"chance_accuracy": "guessing"}
    KINDS = 8
    """Of symbols to copy."""
    BLANK, SIGN = 9, 10
    HELD_OUT = 500

    def __init__(self, count: int, lag: int):
        """`count` symbols are repeated after `lag` blanks."""
        self.lag, self.num_symbols, self.num_answers = lag, 11, 1 + self.KINDS
        self.source, held_out = (RandomSymbols(count, self.KINDS, seed) for seed in (0, 1))
        tests = [self.example(held_out[index], np.random.default_rng(0)) for index in range(self.HELD_OUT)]
        self.rows, self.targets = (np.stack([test[key] for test in tests]) for key in ("symbols", "targets"))
        self.description = f"{count} symbols of {self.KINDS} kinds, to be repeated after {lag} blanks"

    def example(self, example: Int32[np.ndarray, "T"], rng: np.random.Generator) -> dict[str, np.ndarray]:
        wait = np.full(self.lag, self.BLANK, np.int32)
        symbols = np.concatenate([example, wait, [self.SIGN], np.full(len(example) - 1, self.BLANK)]).astype(np.int32)
        targets = np.concatenate([np.zeros(len(example) + len(wait)), example]).astype(np.int32)
        return {"symbols": symbols, "targets": targets, "counts": targets > 0}

    def measure(self, network: Network, variables: PyTree) -> dict[str, float]:
        right: Bool[np.ndarray, "N T"] = network(variables, self.rows).argmax(-1) == self.targets
        return {"copy_accuracy": float(right[self.targets > 0].mean())}

    def show(self, network: Network, variables: PyTree) -> Report:
        probabilities = np.exp(network(variables, self.rows[:1])[0])
        signs = {self.BLANK: "·", self.SIGN: "!"}
        inputs = [signs.get(symbol, str(symbol)) for symbol in self.rows[0].tolist()]
        xlabel = "what is read, step by step ( · blank, ! repeat now)"
        return {"copy": figures.symbol_probabilities(probabilities, inputs, self.targets[0], xlabel=xlabel)}

    def simple_baselines(self) -> dict[str, float]:
        return {"chance_accuracy": 1 / self.KINDS}
