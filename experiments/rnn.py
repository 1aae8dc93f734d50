"""Recurrent networks: RNN, LSTM and GRU read names letter by letter (Elman 1990; Hochreiter and Schmidhuber 1997; Cho et al. 2014).

One network, a cell scanned over one-hot symbols and a linear map of its states, is put to four tasks, which are four ways to use it:

| `--task` | reads | answers |
|---|---|---|
| `classify` | a name | its language, from the last state (n:1) |
| `generate` | a language, then what it wrote itself | a name (1:n; trained as n:n on the next character) |
| `tag` | a name without its spaces | for each character whether a word begins there (n:n) |
| `copy` | symbols, a long pause | the symbols again (n:n): the gradient must cross the pause, which truncated backpropagation cannot |

The names are countries, languages and currencies in 18 languages (`builtin:names`), or lists of your own (`folder:PATH`).
"""

import abc
import collections
import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Lt
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdl import figures, launch
from jaxdl.data import train_batches
from jaxdl.data.names import Alphabet, Names, held_out_names, normalise, open_names
from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.metrics import accuracy
from jaxdl.metrics.counting import NGrams, naive_bayes
from jaxdl.nn import Recurrent, SequenceModel
from jaxdl.training import ASIDE, Aux, Batch, Execution, Layout, Run, fit, start
from jaxdl.training.logging import read_metrics
from jaxdl.training.processes import is_first

PACE = {"rnn_tanh": 0.25, "gru": 1.0, "lstm": 1.0}
"""What to multiply the learning rate by when cells are compared: at the one that suits gates, a vanilla network gets 0.39 of the default names right, at a quarter of it 0.68."""
CELLS = tuple(PACE)


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes."""

    data: str = "builtin:names"
    steps: Annotated[int, Ge(1)] = 1800
    batch_size: Annotated[int, Ge(1)] = 64
    learning_rate: Annotated[float, Gt(0)] = 0.02
    weight_decay: Annotated[float, Ge(0)] = 0.01
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.05
    evaluate_every: Annotated[int, Ge(1)] = 300
    task: Literal["classify", "generate", "tag", "copy"] = "classify"
    """A name's language; names of a language; where words begin; symbols repeated after a pause."""
    cell: Literal[*CELLS] = "lstm"
    """Vanilla, which wants a quarter of the learning rate, gated recurrent unit or long short-term memory."""
    hidden: Annotated[int, Ge(1)] = 128
    """Width of the state."""
    layers: Annotated[int, Ge(1)] = 1
    """Recurrent layers, each reading the one below."""
    bidirectional: bool = False
    """Read backwards too."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of activations that are dropped between two layers."""
    blank: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of characters that are read as unknown in training, so that unknown ones do no harm later."""
    truncate: Annotated[int, Ge(0)] = 0
    """Cut the gradient every so many characters (truncated backpropagation through time). 0: it goes all the way."""
    length: Annotated[int, Ge(2)] = 24
    """Characters of a name that are read; longer ones are cut."""
    temperature: Annotated[float, Gt(0)] = 0.8
    """Of generating: below 1 likely characters become likelier still."""
    lag: Annotated[int, Ge(1)] = 30
    """Of copying: blanks between the last symbol and the sign to repeat them."""
    copied: Annotated[int, Ge(1)] = 5
    """Of copying: how many symbols."""
    compare: bool = True
    """Afterwards train what the task is best compared with, each in a run of its own inside this one: the other cells, one direction only, a truncated gradient."""
    ask: tuple[str, ...] = dataclasses.field(default=(), metadata=ASIDE)
    """Names to classify when all is done. A finished run answers at once: give its command again with this flag."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ask and self.task != "classify":
            raise UserError(f"--ask is for --task classify, and not for {self.task}")
        if not all(name.strip() for name in self.ask):
            raise UserError("--ask wants names: an empty one has no language")
        if self.bidirectional and self.task == "generate":
            raise UserError("--bidirectional cannot generate: it would have to read the future")


PRESETS = {
    "default": Config(),
    # Give it --data folder:PATH with the classic lists.
    "surnames": Config(preset="surnames", data="folder:names", length=16),
    "generate": Config(preset="generate", task="generate", hidden=256, weight_decay=0.1, blank=0.0),
    "tag": Config(preset="tag", task="tag", bidirectional=True),
    "copy": Config(preset="copy", task="copy", learning_rate=0.01),
}


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, draws, and returns what is in its `result.json`."""
    with Run.open(workdir, "rnn", config, execution) as run:
        with run.first_process_first():
            task = TASKS[config.task](config, run.directory)
        run.say(task.described)
        batches = train_batches(task.source, task.example, batch_size=config.batch_size, seed=config.seed, **run.shard)
        core = Recurrent(
            config.hidden,
            config.cell,
            layers=config.layers,
            bidirectional=config.bidirectional,
            dropout=config.dropout,
            truncate=config.truncate or None,
            dtype=jnp.bfloat16 if config.precision == "bf16" else None,
        )
        module = SequenceModel(core, features=task.answers, mode=task.mode)
        example = task.example(task.source[0], np.random.default_rng(0))
        step, state = start(
            config,
            run.layout,
            functools.partial(loss, module, task.symbols),
            functools.partial(optax.adamw, weight_decay=config.weight_decay),
            lambda key: module.init(key, jax.nn.one_hot(example["symbols"][None], task.symbols)),
        )

        network = Network(module, task.symbols, run.layout)
        evaluate = lambda state: task.measure(network, state.measured)
        state = fit(step, state, batches, run, steps=config.steps, evaluate=evaluate, evaluate_every=config.evaluate_every)
        measured, concluded = evaluate(state), task.conclude(network, state.measured, run.figures)
        beside = compare(task, run, measured, concluded) if config.compare else {}
        result = run.finish(state, measured | beside | concluded)
        for line in task.answer(network, state.measured, config.ask):
            run.say(line)
        return result


def read(module: SequenceModel, width: int, params: PyTree, symbols: Int[Array, "B T"], **options: Any) -> Float[Array, "B ..."]:
    """Logits for sequences of symbols below `width`, each of which ends where its zeros begin."""
    ends = module.mode == "n:1" or module.core.bidirectional  # Elsewhere nothing before the end depends on what follows it.
    lengths = (symbols > 0).sum(-1) if ends else None
    return module.apply({"params": params}, jax.nn.one_hot(symbols, width), lengths=lengths, **options)[0]


def loss(
    module: SequenceModel, width: int, params: PyTree, variables: dict[str, PyTree], batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """Negative log-likelihood of the targets that count: the mean over each sequence, then over sequences, so that it is a mean over examples however they are spread."""
    logits = read(module, width, params, batch["symbols"], train=True, rngs={"dropout": key})
    counts, right = batch["counts"], logits.argmax(-1) == batch["targets"]
    one = lambda logits, targets, counts: cross_entropy(logits, targets, mask=counts)
    share = jax.vmap(lambda right, counts: (right & counts).sum() / counts.sum())(right, counts)
    return jax.vmap(one)(logits, batch["targets"], counts).mean(), Aux({"accuracy": share.mean()})


class Network:
    """A module on the host: numpy in, numpy out."""

    def __init__(self, module: SequenceModel, width: int, layout: Layout):
        self.module, self.width, self.layout = module, width, layout
        self._read = layout.inference(lambda params, rows: jax.nn.log_softmax(read(module, width, params, rows)), 256)

    def __call__(self, params: PyTree, rows: Iterable[Int[np.ndarray, "_"]]) -> Float[np.ndarray, "N ..."]:
        """Log-probabilities of the answers, at the end or at every step."""
        return self._read(params, rows)

    def generate(
        self, params: PyTree, first: Int[np.ndarray, "N"], steps: int, *, temperature: float, allowed: Sequence[int], seed: int
    ) -> Int[np.ndarray, "N T"]:
        """Symbols drawn one after the other, each read before the next, after the `first` one. Only the `allowed` ones are drawn."""
        barred = np.full(self.width, -np.inf, np.float32)
        barred[np.asarray(allowed)] = 0

        def draw(logits: Float[Array, "N V"], key: Key[Array, ""]) -> Float[Array, "N V"]:
            drawn = jax.random.categorical(key, logits.astype(jnp.float32) / temperature + barred)
            return jax.nn.one_hot(drawn, self.width)

        writer = self.module.clone(mode="1:n", emit=draw)

        def write(params: PyTree, first: Int[Array, "N 1"]) -> Int[Array, "N T"]:
            x = jax.nn.one_hot(first[:, 0], self.width)
            return writer.apply({"params": params}, x, steps=steps, rngs={"emit": jax.random.key(seed)})[0].argmax(-1)

        return self.layout.inference(write, len(first))(params, first[:, None])


class Task(abc.ABC):
    """What the one loop is given: sequences of symbols, 0 where they are over, and what is to be answered.

    A batch has `symbols` (`B T`), and as `targets` one answer for each (`B`) or one at every step (`B T`), of which those in `counts` count.
    """

    mode: Literal["n:1", "n:n"]
    score: str
    """The metric by which runs are compared."""
    simpler: dict[str, str] = {}
    """Metrics of simpler methods that are to be drawn beside it, and what these are called."""
    symbols: int
    """How many symbols there are to read."""
    answers: int
    """How many there are to choose between."""
    source: Any
    described: str

    def __init__(self, config: Config, directory: Path):
        self.config, self.directory = config, directory

    @abc.abstractmethod
    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """An example of the source as arrays."""

    @abc.abstractmethod
    def measure(self, network: Network, params: PyTree) -> dict[str, float]:
        """How good the answers to what is held out are."""

    @abc.abstractmethod
    def conclude(self, network: Network, params: PyTree, directory: Path) -> dict[str, float]:
        """Draws what was learned, and measures what is worth its time only once, such as what simpler methods reach."""

    @property
    def named(self) -> str:
        """What the run is called beside its rivals."""
        return "this run"

    def rivals(self) -> dict[str, Config]:
        """What to train for comparison, by names for the metrics."""
        return {}

    def answer(self, network: Network, params: PyTree, asked: Sequence[str]) -> list[str]:
        """Lines in answer to `--ask`."""
        return []

    def open_names(self) -> tuple[Names, Names]:
        """The names to learn from and those held out."""
        config = self.config
        source, held_out = open_names(config.data, "train"), held_out_names(config.data, config.eval_data)
        if source.classes != held_out.classes:
            raise UserError(f"{config.data} has the languages {', '.join(source.classes)}, and {config.eval_data} others")
        longer = np.mean([len(name) > config.length for name in source.names])
        self.described = f"{len(source):,} names of {len(source.classes)} languages, {len(held_out):,} held out; {longer:.1%} are longer than {config.length} characters and cut"
        return source, held_out

    def alphabet_of(self, names: Iterable[str]) -> Alphabet:
        """The run's own, made of the names where there is none yet."""
        path = self.directory / "alphabet.json"
        if not path.exists():
            Alphabet.of(name[: self.config.length] for name in names).save(path)
        return Alphabet.load(path)

    def blanked(self, symbols: Int[np.ndarray, "T"], rng: np.random.Generator) -> Int[np.ndarray, "T"]:
        """Some symbols, at random, as unknown ones."""
        hidden = (symbols > 0) & (rng.random(len(symbols)) < self.config.blank)
        return np.where(hidden, np.int32(Alphabet.UNKNOWN), symbols)


class Classify(Task):
    """Whose name it is."""

    mode, score = "n:1", "test_accuracy"
    simpler = {"naive_bayes_accuracy": "naive Bayes", "majority_accuracy": "always the most frequent"}

    def __init__(self, config: Config, directory: Path):
        super().__init__(config, directory)
        self.source, self.held_out = self.open_names()
        self.alphabet = self.alphabet_of(self.source.names)
        self.symbols, self.answers = len(self.alphabet), len(self.source.classes)
        self.rows = self.alphabet(self.held_out.names, config.length)

    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        symbols = self.blanked(self.alphabet([example["name"]], self.config.length)[0], rng)
        return {"symbols": symbols, "targets": np.asarray(example["label"], np.int32), "counts": np.asarray(True)}

    def measure(self, network: Network, params: PyTree) -> dict[str, float]:
        from sklearn.metrics import f1_score

        scores, labels = network(params, self.rows), self.held_out.labels
        macro = f1_score(labels, scores.argmax(1), average="macro", zero_division=0)
        return {"test_accuracy": accuracy(scores, labels), "test_macro_f1": float(macro)}

    def conclude(self, network: Network, params: PyTree, directory: Path) -> dict[str, float]:
        from sklearn.metrics import f1_score

        labels, classes = self.held_out.labels, self.source.classes
        guessed = network(params, self.rows).argmax(1)
        figures.confusion_matrix(labels, guessed, classes, directory / "confusion.png", things="names")
        figures.readings(*self.readings(network, params), classes, directory / "reading.png")
        bayes = naive_bayes(self.source).predict(self.held_out.names)
        majority = np.bincount(self.source.labels).argmax()
        return {
            "majority_accuracy": float((labels == majority).mean()),
            "naive_bayes_accuracy": float((bayes == labels).mean()),
            "naive_bayes_macro_f1": float(f1_score(labels, bayes, average="macro", zero_division=0)),
        }

    @property
    def named(self) -> str:
        return self.config.cell

    def rivals(self) -> dict[str, Config]:
        rate = self.config.learning_rate / PACE[self.config.cell]
        others = [cell for cell in CELLS if cell != self.config.cell]
        return {cell: dataclasses.replace(self.config, cell=cell, learning_rate=rate * PACE[cell]) for cell in others}

    def readings(self, network: Network, params: PyTree) -> tuple[list[str], list[Float[np.ndarray, "_ C"]], list[int]]:
        """Some held-out names of middling length, the probabilities of the languages after each of their characters, and their own languages."""
        # One of each language, in an order of its own: that of the source has all of them begin with an A.
        first: dict[int, int] = {}
        for index in np.random.default_rng(0).permutation(len(self.held_out)).tolist():
            if 6 <= len(self.held_out.names[index]) <= min(14, self.config.length):
                first.setdefault(int(self.held_out.labels[index]), index)
        chosen = list(first.values())[:8] or [0]
        names = [self.held_out.names[index] for index in chosen]
        prefixes = [name[:end] for name in names for end in range(1, 1 + len(name))]
        read = np.exp(network(params, self.alphabet(prefixes, self.config.length)))
        ends = np.cumsum([len(name) for name in names])[:-1]
        return names, np.split(read, ends), [int(self.held_out.labels[index]) for index in chosen]

    def answer(self, network: Network, params: PyTree, asked: Sequence[str]) -> list[str]:
        lines, asked = [], [normalise(name) for name in asked]
        for name, scores in zip(asked, network(params, self.alphabet(asked, self.config.length)) if asked else ()):
            likely = [f"{self.source.classes[label]} {np.exp(scores[label]):.2f}" for label in np.argsort(-scores)[:3]]
            unknown = sum(character not in self.alphabet.characters for character in name[: self.config.length])
            said = f" ({unknown} character{'s' * (unknown > 1)} unknown)" if unknown else ""
            lines.append(f"{name}{said}: {', '.join(likely)}")
        return lines


class Generate(Task):
    """Names of a language. The first symbol says which, each further one is what was written before it."""

    mode, score = "n:n", "generation_bits"

    def __init__(self, config: Config, directory: Path):
        super().__init__(config, directory)
        self.source, self.held_out = self.open_names()
        self.alphabet = self.alphabet_of(self.source.names)
        # Languages are symbols too. They are never to be written, but what is written must be of the width of what is read.
        self.symbols = self.answers = len(self.alphabet) + len(self.source.classes)
        tests = [self.arrays(self.held_out[index]) for index in range(len(self.held_out))]
        self.rows, self.targets = (np.stack([test[key] for test in tests]) for key in ("symbols", "targets"))

    def arrays(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        (written,) = self.alphabet([example["name"]], self.config.length + 1)
        symbols = np.concatenate([[np.int32(len(self.alphabet) + example["label"])], written[:-1]])
        return {"symbols": symbols, "targets": written, "counts": symbols > 0}

    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        arrays = self.arrays(example)
        return arrays | {"symbols": np.append(arrays["symbols"][:1], self.blanked(arrays["symbols"][1:], rng))}

    def bits(self, network: Network, params: PyTree) -> Float[np.ndarray, "N T"]:
        """−log₂ of the probability of each held-out character, and of the end; NaN after it."""
        scores = np.take_along_axis(network(params, self.rows), self.targets[..., None], axis=-1)[..., 0]
        return np.where(self.rows > 0, -scores / np.log(2), np.nan)

    def measure(self, network: Network, params: PyTree) -> dict[str, float]:
        return {"generation_bits": float(np.nanmean(self.bits(network, params)))}

    def conclude(self, network: Network, params: PyTree, directory: Path) -> dict[str, float]:
        classes, config = self.source.classes, self.config
        labels = np.repeat(np.arange(len(classes)), GENERATED)
        symbols = network.generate(
            params,
            (len(self.alphabet) + labels).astype(np.int32),
            config.length + 1,
            temperature=config.temperature,
            allowed=[Alphabet.END, *range(2, len(self.alphabet))],
            seed=config.seed,
        )
        names = [self.alphabet.decode(row) for row in symbols]
        known = set(self.source.names)
        new = np.array([name not in known for name in names])
        recognised = naive_bayes(self.source).predict(names) == labels
        counted = NGrams(self.source, config.length + 1)
        held_out = list(zip(self.held_out.names, self.held_out.labels.tolist()))
        by_counting = [counted.bits(name, label) for name, label in held_out]
        alone = [counted.bits(name, label, order=1) for name, label in held_out]
        figures.written_names(names, new, classes, directory / "names.png", temperature=config.temperature)
        figures.bits_by_class(
            self.bits(network, params), by_counting, self.held_out.labels, classes, directory / "bits.png", order=NGrams.ORDER
        )
        return {
            "ngram_bits": float(np.mean(np.concatenate(by_counting))),
            "unigram_bits": float(np.mean(np.concatenate(alone))),
            "generation_novelty": float(new.mean()),
            "generation_distinct": len(set(zip(names, labels.tolist()))) / len(names),
            "generation_recognised": float(recognised.mean()),
        }


GENERATED = 56
"""Names that are written of each language: 1,008 of eighteen."""


class Tag(Task):
    """Where words begin in a name that is written without spaces and capitals."""

    mode, score = "n:n", "tagging_f1"
    simpler = {"counting_f1": "counting"}

    def __init__(self, config: Config, directory: Path):
        super().__init__(config, directory)
        self.source, self.held_out = self.open_names()
        if not any(" " in name for name in self.held_out.names):
            raise UserError(f"no held-out name of {config.data} has two words: there is nothing to tag")
        self.alphabet = self.alphabet_of(joined(name)[0] for name in self.source.names)
        self.symbols, self.answers = len(self.alphabet), 2
        self.rows = self.alphabet([joined(name)[0] for name in self.held_out.names], config.length)
        self.tags = np.stack([self.tagged(name) for name in self.held_out.names])

    def tagged(self, name: str) -> Int[np.ndarray, "T"]:
        """For each character that is read 1 if a word begins there, else 0."""
        begins = joined(name)[1][: self.config.length]
        return np.pad(begins, (0, self.config.length - len(begins)))

    def counts(self, symbols: Int[np.ndarray, "... T"]) -> Any:
        """All characters but the first, where a word begins in any case."""
        return (symbols > 0) & (np.arange(symbols.shape[-1]) > 0)

    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        (symbols,) = self.alphabet([joined(example["name"])[0]], self.config.length)
        return {"symbols": self.blanked(symbols, rng), "targets": self.tagged(example["name"]), "counts": self.counts(symbols)}

    def measure(self, network: Network, params: PyTree) -> dict[str, float]:
        return self.scores(network(params, self.rows).argmax(-1), "tagging")

    def scores(self, guessed: Int[np.ndarray, "N T"], name: str) -> dict[str, float]:
        """Accuracy over characters, F1 of the beginnings, and how many names of several words are whole again."""
        from sklearn.metrics import f1_score

        counts = self.counts(self.rows)
        several = (self.tags * counts).any(1)
        whole = ((guessed == self.tags) | ~counts).all(1)[several]
        return {
            f"{name}_accuracy": float((guessed == self.tags)[counts].mean()),
            f"{name}_f1": float(f1_score(self.tags[counts], guessed[counts], zero_division=0)),
            f"{name}_names_restored": float(whole.mean()),
        }

    def conclude(self, network: Network, params: PyTree, directory: Path) -> dict[str, float]:
        guessed = network(params, self.rows).argmax(-1)
        figures.words_found([joined(name)[0] for name in self.held_out.names], guessed, self.tags, directory / "words.png")
        majority = float(1 - self.tags[self.counts(self.rows)].mean())
        return {"majority_accuracy": majority} | self.scores(self.by_counting(), "counting")

    def by_counting(self) -> Int[np.ndarray, "N T"]:
        """What the two characters before and the two after a place say, or one each where those were never seen, or nothing."""
        seen: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        around = lambda text, index: (text[index - 2 : index + 2], text[index - 1 : index + 1])
        framed = lambda text: f"\0\0{text}\0\0"
        for name in self.source.names:
            text, begins = joined(name)
            for index in range(1, len(text)):
                for context in around(framed(text), index + 2):
                    seen[context][begins[index]] += 1
        guessed = np.zeros_like(self.tags)
        for row, name in zip(guessed, self.held_out.names):
            text = joined(name)[0]
            for index in range(1, min(len(text), len(row))):
                found = next((seen[context] for context in around(framed(text), index + 2) if context in seen), (1, 0))
                row[index] = found[1] > found[0]
        return guessed

    @property
    def named(self) -> str:
        return "both directions" if self.config.bidirectional else "forwards"

    def rivals(self) -> dict[str, Config]:
        return {"forwards_only": dataclasses.replace(self.config, bidirectional=False)} if self.config.bidirectional else {}


def joined(name: str) -> tuple[str, Int[np.ndarray, "T"]]:
    """A name in small letters without its spaces, and 1 for each character where a word begins, else 0."""
    words = name.lower().split()
    return "".join(words), np.array([int(index == 0) for word in words for index in range(len(word))], np.int32)


class Copy(Task):
    """Symbols, blanks, a sign, and then the symbols again (Hochreiter and Schmidhuber 1997; as in Arjovsky et al. 2016, section 5.1, which has 10 symbols and up to 500 blanks).

    A gradient that is cut in the pause cannot teach to keep the symbols. In a short pause an LSTM keeps them all the same, as its forget gates begin half open, and learns to read them: with 20 blanks and a cut every 10 steps it got 0.94 right.
    """

    mode, score = "n:n", "copy_accuracy"
    simpler = {"chance_accuracy": "chance"}
    VALUES = 8
    BLANK, SIGN = 9, 10

    def __init__(self, config: Config, directory: Path):
        super().__init__(config, directory)
        self.symbols, self.answers = 11, 1 + self.VALUES
        self.source, held_out = Sequences(config.copied, 0), Sequences(config.copied, 1)
        tests = [self.example(held_out[index], np.random.default_rng(0)) for index in range(500)]
        self.rows, self.targets = (np.stack([test[key] for test in tests]) for key in ("symbols", "targets"))
        self.described = f"{config.copied} symbols of {self.VALUES} kinds, to be repeated after {config.lag} blanks"

    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        values = example["values"]
        wait = np.full(self.config.lag, self.BLANK, np.int32)
        symbols = np.concatenate([values, wait, [self.SIGN], np.full(len(values) - 1, self.BLANK)]).astype(np.int32)
        targets = np.concatenate([np.zeros(len(values) + len(wait)), values]).astype(np.int32)
        return {"symbols": symbols, "targets": targets, "counts": targets > 0}

    def measure(self, network: Network, params: PyTree) -> dict[str, float]:
        right = network(params, self.rows).argmax(-1) == self.targets
        return {"copy_accuracy": float(right[self.targets > 0].mean())}

    def conclude(self, network: Network, params: PyTree, directory: Path) -> dict[str, float]:
        figures.copied(
            np.exp(network(params, self.rows[:1])[0]),
            self.rows[0],
            self.targets[0],
            directory / "copy.png",
            signs={self.BLANK: "·", self.SIGN: "!"},
        )
        return {"chance_accuracy": 1 / self.VALUES}

    @property
    def named(self) -> str:
        return f"gradient cut every {self.config.truncate} steps" if self.config.truncate else "full gradient"

    def rivals(self) -> dict[str, Config]:
        config = self.config
        window = config.lag // 2
        return {} if config.truncate or not window else {"truncated": dataclasses.replace(config, truncate=window)}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Random symbols from 1 to `Copy.VALUES`, example for example a function of the seed."""

    count: int
    seed: int
    classes = ()

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> dict[str, Any]:
        values = np.random.default_rng((self.seed, index)).integers(1, 1 + Copy.VALUES, self.count, np.int32)
        return {"values": values}


TASKS: dict[str, type[Task]] = {"classify": Classify, "generate": Generate, "tag": Tag, "copy": Copy}


def compare(task: Task, run: Run, measured: dict[str, float], concluded: dict[str, float]) -> dict[str, float]:
    """What is `measured` of the task's rivals, each trained in a run of its own below this one, and a picture of how all came to it."""
    metrics: dict[str, float] = {}
    logs = {task.named: run.directory}
    for name, config in task.rivals().items():
        logs[name] = run.directory / "beside" / name
        finished = logs[name] / "result.json"
        if finished.exists():
            result = json.loads(finished.read_text(encoding="utf-8"))
        else:
            run.say(f"\nbeside it, {name.replace('_', ' ')}, in {logs[name]}:")
            result = main(dataclasses.replace(config, compare=False, ask=()), logs[name], run.execution)
        metrics |= {f"{name}_{metric}": result["metrics"][metric] for metric in measured}
    if metrics and is_first():
        curves = {
            name: [row for row in read_metrics(log / "metrics.jsonl") if f"eval/{task.score}" in row]
            for name, log in logs.items()
        }
        curves[task.named].append({"step": run.config.steps, f"eval/{task.score}": measured[task.score]})
        levels = {label: concluded[metric] for metric, label in task.simpler.items()}
        figures.beside(curves, task.score, levels, run.figures / "beside.png")
    return metrics


EXPERIMENT = launch.Experiment(
    name="rnn",
    summary="RNN, LSTM and GRU read names letter by letter: they tell languages apart, write names, part words, and copy.",
    paper="Hochreiter and Schmidhuber 1997, Long Short-Term Memory, Neural Computation 9(8); Cho et al. 2014, arXiv:1406.1078",
    result="of held-out names in 18 languages an LSTM gets 0.81 right, a vanilla network 0.68, naive Bayes 0.72",
    minutes=1,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
