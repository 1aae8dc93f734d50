"""Names, read letter by letter: whose they are, how they are written, and where their words begin."""

import collections
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, PyTree

from jaxdl import figures
from jaxdl.data import LabelledText, Source, report_left_out
from jaxdl.data.names import Alphabet, normalise
from jaxdl.errors import UserError
from jaxdl.metrics import NGrams, accuracy, naive_bayes
from jaxdl.tasks.kept import kept
from jaxdl.tasks.sequences import Network, SequenceTask
from jaxdl.training import Report

DRAWN = 40
"""Languages that have a row in a figure, at most."""


class NamesTask(SequenceTask):
    """What tasks on names share: the alphabet, which is kept in the run, names in memory, and characters that are blanked."""

    def __init__(
        self, source: Source[LabelledText], held_out: Source[LabelledText], directory: Path, *, length: int, blank: float = 0.0
    ):
        """Names are read up to `length` characters, in training each of them as unknown with the probability `blank`. The alphabet is in `directory`, or is made of the source's names and put there."""
        self.source, self.length, self.blank = source, length, blank
        self.classes = source.info.classes
        self.names, self.labels = _columns(source)
        self.held_out, self.held_out_labels = _columns(held_out)
        file, read = "alphabet.json", lambda: (self.spelled(name)[:length] for name in self.names)
        save = lambda folder: Alphabet.of(read()).save(folder / file)
        self.alphabet = kept(directory, file, save, lambda: Alphabet.load(directory / file))
        self.num_symbols = len(self.alphabet)
        longer = np.mean([len(name) > length for name in self.names])
        told = "".join(f"\n{line}" for line in report_left_out(source, held_out))
        self.description = f"{len(self.names):,} names of {len(self.classes)} languages, {len(self.held_out):,} held out; {longer:.1%} are longer than {length} characters and cut{told}"

    def spelled(self, name: str) -> str:
        """A name as it is read."""
        return name

    def blanked(self, symbols: Int32[np.ndarray, "T"], rng: np.random.Generator) -> Int32[np.ndarray, "T"]:
        """Some symbols, at random, as unknown ones."""
        unknown = (symbols > 0) & (rng.random(len(symbols)) < self.blank)
        return np.where(unknown, np.int32(Alphabet.UNKNOWN), symbols)


def _columns(source: Source[LabelledText]) -> tuple[list[str], Int32[np.ndarray, "N"]]:
    examples = list(source)
    return [example.text for example in examples], np.array([example.label for example in examples], np.int32)


class Classify(NamesTask):
    """Whose name it is."""

    mode, score = "n:1", "test_accuracy"
    levels = {"naive_bayes_accuracy": "naive Bayes", "majority_accuracy": "always the most frequent"}

    def __init__(self, *sources: Source[LabelledText], directory: Path, length: int, blank: float):
        super().__init__(*sources, directory, length=length, blank=blank)
        self.num_answers = len(self.classes)
        self.rows = self.alphabet(self.held_out, length)

    def example(self, example: LabelledText, rng: np.random.Generator) -> dict[str, np.ndarray]:
        symbols = self.blanked(self.alphabet([example.text], self.length)[0], rng)
        return {"symbols": symbols, "targets": np.asarray(example.label, np.int32), "counts": np.asarray(True)}

    def measure(self, network: Network, variables: PyTree) -> dict[str, float]:
        scores = network(variables, self.rows)
        return {"test_accuracy": accuracy(scores, self.held_out_labels), "test_macro_f1": self._macro_f1(scores.argmax(1))}

    def _macro_f1(self, predictions: Int[np.ndarray, "N"]) -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(self.held_out_labels, predictions, average="macro", zero_division=0))

    def show(self, network: Network, variables: PyTree) -> Report:
        predictions = network(variables, self.rows).argmax(1)
        return {
            "confusion": figures.confusion_matrix(self.held_out_labels, predictions, self.classes, noun="names"),
            "reading": figures.prefix_predictions(
                *self.readings(network, variables),
                self.classes,
                title="the language, if the name ended there, in per cent (green: the right one)",
            ),
        }

    def simple_baselines(self) -> dict[str, float]:
        bayes = naive_bayes(self.names, self.labels).predict(self.held_out)
        return {
            "majority_accuracy": float((self.held_out_labels == np.bincount(self.labels).argmax()).mean()),
            "naive_bayes_accuracy": float((bayes == self.held_out_labels).mean()),
            "naive_bayes_macro_f1": self._macro_f1(bayes),
        }

    def readings(self, network: Network, variables: PyTree) -> tuple[list[str], list[Float[np.ndarray, "_ C"]], list[int]]:
        """Some held-out names of middling length, the probabilities of the languages after each of their characters, and their own languages."""
        # One of each language, in an order of its own: that of the source has all of them begin with an A.
        first: dict[int, int] = {}
        for index in np.random.default_rng(0).permutation(len(self.held_out)).tolist():
            if 6 <= len(self.held_out[index]) <= min(14, self.length):
                first.setdefault(int(self.held_out_labels[index]), index)
        chosen = list(first.values())[:8] or [0]
        names = [self.held_out[index] for index in chosen]
        prefixes = [name[:end] for name in names for end in range(1, 1 + len(name))]
        read = np.exp(network(variables, self.alphabet(prefixes, self.length)))
        ends = np.cumsum([len(name) for name in names])[:-1]
        return names, np.split(read, ends), [int(self.held_out_labels[index]) for index in chosen]

    def answers(self, network: Network, variables: PyTree, names: Sequence[str]) -> list[str]:
        """A line for each name: its three likeliest languages and their probabilities."""
        lines, names = [], [normalise(name) for name in names]
        for name, scores in zip(names, network(variables, self.alphabet(names, self.length))):
            likely = [f"{self.classes[label]} {np.exp(scores[label]):.2f}" for label in np.argsort(-scores)[:3]]
            unknown = sum(character not in self.alphabet.characters for character in name[: self.length])
            said = f" ({unknown} character{'s' * (unknown > 1)} unknown)" if unknown else ""
            lines.append(f"{name}{said}: {', '.join(likely)}")
        return lines


class Generate(NamesTask):
    """Names of a language. The first symbol says which, each further one is what was written before it."""

    mode, score = "n:n", "generation_bits"
    WRITTEN = 56
    """Names of each language: 1,008 of eighteen."""

    def __init__(self, *sources: Source[LabelledText], directory: Path, length: int, blank: float, temperature: float, seed: int):
        super().__init__(*sources, directory, length=length, blank=blank)
        self.temperature, self.seed = temperature, seed
        # Languages are symbols too. They are never to be written, but what is written must be of the width of what is read.
        self.num_symbols = self.num_answers = len(self.alphabet) + len(self.classes)
        tests = [self.arrays(name, label) for name, label in zip(self.held_out, self.held_out_labels.tolist())]
        self.rows, self.targets = (np.stack([test[key] for test in tests]) for key in ("symbols", "targets"))

    def arrays(self, name: str, label: int) -> dict[str, np.ndarray]:
        """A row of a batch, with no character blanked."""
        (written,) = self.alphabet([name], self.length + 1)
        symbols = np.concatenate([[np.int32(len(self.alphabet) + label)], written[:-1]])
        return {"symbols": symbols, "targets": written, "counts": symbols > 0}

    def example(self, example: LabelledText, rng: np.random.Generator) -> dict[str, np.ndarray]:
        arrays = self.arrays(example.text, example.label)
        return arrays | {"symbols": np.append(arrays["symbols"][:1], self.blanked(arrays["symbols"][1:], rng))}

    def bits(self, network: Network, variables: PyTree) -> Float[np.ndarray, "N T"]:
        """−log₂ of the probability of each held-out character, and of the end; NaN after it."""
        scores = np.take_along_axis(network(variables, self.rows), self.targets[..., None], axis=-1)[..., 0]
        return np.where(self.rows > 0, -scores / np.log(2), np.nan)

    def measure(self, network: Network, variables: PyTree) -> dict[str, float]:
        return {"generation_bits": float(np.nanmean(self.bits(network, variables)))}

    def show(self, network: Network, variables: PyTree) -> Report:
        names, labels = self.write(network, variables)
        drawn, known = self.classes[:DRAWN], set(self.names)
        first = f" of the first {DRAWN} languages" if len(self.classes) > DRAWN else ""
        own = np.flatnonzero(self.held_out_labels < len(drawn))
        counted = self.counted[NGrams.ORDER]
        new = np.array([name not in known for name in names])
        return {
            "generation_novelty": float(new.mean()),
            "generation_distinct": len(set(zip(names, labels.tolist()))) / len(names),
            "generation_recognised": float((self._bayes.predict(names) == labels).mean()),
            "names": figures.texts_by_class(
                names[: self.WRITTEN * len(drawn)],
                ~new[: self.WRITTEN * len(drawn)],
                drawn,
                title=f"names{first} that the network wrote, at temperature {self.temperature:g} (orange: also among those it read)",
            ),
            "bits": figures.means_by_class(
                {
                    "network": self.bits(network, variables)[own],
                    f"counting {NGrams.ORDER} characters at a time": [counted[index] for index in own],
                },
                self.held_out_labels[own],
                drawn,
                xlabel="bits per character (less is better)",
                title=f"how surprising held-out names{first} are",
            ),
        }

    def write(self, network: Network, variables: PyTree) -> tuple[list[str], Int[np.ndarray, "N"]]:
        """Names and the languages that they are to be of."""
        labels = np.repeat(np.arange(len(self.classes)), self.WRITTEN)
        symbols = network.generate(
            variables,
            (len(self.alphabet) + labels).astype(np.int32),
            self.length + 1,
            temperature=self.temperature,
            allowed=[Alphabet.END, *range(2, len(self.alphabet))],
            seed=self.seed,
        )
        return [self.alphabet.decode(row) for row in symbols], labels

    def simple_baselines(self) -> dict[str, float]:
        mean = lambda bits: float(np.mean(np.concatenate(bits)))
        return {"ngram_bits": mean(self.counted[NGrams.ORDER]), "unigram_bits": mean(self.counted[1])}

    @functools.cached_property
    def counted(self) -> dict[int, list[Float[np.ndarray, "_"]]]:
        """As `bits` those of each held-out name, from what was counted in the names that are learned from: of so many characters together, or of single ones."""
        counted, pairs = NGrams(self.names, self.labels, self.length + 1), list(zip(self.held_out, self.held_out_labels.tolist()))
        return {order: [counted.bits(name, label, order) for name, label in pairs] for order in (NGrams.ORDER, 1)}

    @functools.cached_property
    def _bayes(self) -> Any:
        return naive_bayes(self.names, self.labels)


class Tag(NamesTask):
    """Where words begin in a name that is written without spaces and capitals."""

    mode, score = "n:n", "tagging_f1"
    levels = {"counting_f1": "counting"}

    def __init__(self, *sources: Source[LabelledText], directory: Path, length: int, blank: float):
        super().__init__(*sources, directory, length=length, blank=blank)
        if not any(" " in name for name in self.held_out):
            raise UserError("no held-out name has two words, so there is nothing to tag: give names of several words")
        self.num_answers = 2
        self.rows = self.alphabet([self.spelled(name) for name in self.held_out], length)
        self.tags = np.stack([self.tagged(name) for name in self.held_out])

    def spelled(self, name: str) -> str:
        return joined(name)[0]

    def tagged(self, name: str) -> Int32[np.ndarray, "T"]:
        """For each character that is read 1 if a word begins there, else 0."""
        begins = joined(name)[1][: self.length]
        return np.pad(begins, (0, self.length - len(begins)))

    def counts(self, symbols: Int32[np.ndarray, "*batch T"]) -> Bool[np.ndarray, "*batch T"]:
        """All characters but the first, where a word begins in any case."""
        return (symbols > 0) & (np.arange(symbols.shape[-1]) > 0)

    def example(self, example: LabelledText, rng: np.random.Generator) -> dict[str, np.ndarray]:
        (symbols,) = self.alphabet([self.spelled(example.text)], self.length)
        return {"symbols": self.blanked(symbols, rng), "targets": self.tagged(example.text), "counts": self.counts(symbols)}

    def measure(self, network: Network, variables: PyTree) -> dict[str, float]:
        return self.scores(network(variables, self.rows).argmax(-1), "tagging")

    def scores(self, predicted: Int[np.ndarray, "N T"], name: str) -> dict[str, float]:
        """Accuracy over characters, F1 of the beginnings, and how many names of several words are whole again."""
        from sklearn.metrics import f1_score

        counts = self.counts(self.rows)
        several = (self.tags * counts).any(1)
        whole = ((predicted == self.tags) | ~counts).all(1)[several]
        return {
            f"{name}_accuracy": float((predicted == self.tags)[counts].mean()),
            f"{name}_f1": float(f1_score(self.tags[counts], predicted[counts], zero_division=0)),
            f"{name}_names_restored": float(whole.mean()),
        }

    def show(self, network: Network, variables: PyTree) -> Report:
        texts, predicted = [self.spelled(name) for name in self.held_out], network(variables, self.rows).argmax(-1)
        title = "words found again in held-out names of several words (green: all of them right)"
        return {"words": figures.segmentations(texts, predicted, self.tags, title=title)}

    def simple_baselines(self) -> dict[str, float]:
        majority = float(1 - self.tags[self.counts(self.rows)].mean())
        return {"majority_accuracy": majority} | self.scores(self.by_counting(), "counting")

    def by_counting(self) -> Int[np.ndarray, "N T"]:
        """What the two characters before and the two after a place say, or one each where those were never seen, or nothing."""
        seen: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        around = lambda text, index: (text[index - 2 : index + 2], text[index - 1 : index + 1])
        framed = lambda text: f"\0\0{text}\0\0"
        for name in self.names:
            text, begins = joined(name)
            for index in range(1, len(text)):
                for context in around(framed(text), index + 2):
                    seen[context][begins[index]] += 1
        predicted = np.zeros_like(self.tags)
        for row, name in zip(predicted, self.held_out):
            text = self.spelled(name)
            for index in range(1, min(len(text), len(row))):
                found = next((seen[context] for context in around(framed(text), index + 2) if context in seen), (1, 0))
                row[index] = found[1] > found[0]
        return predicted


def joined(name: str) -> tuple[str, Int32[np.ndarray, "T"]]:
    """A name in small letters without its spaces, and 1 for each character where a word begins, else 0."""
    words = name.lower().split()
    return "".join(words), np.array([int(index == 0) for word in words for index in range(len(word))], np.int32)
