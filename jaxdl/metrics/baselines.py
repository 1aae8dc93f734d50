"""What counting reaches on texts: baselines beside which a network has to show what it is good for."""

import collections
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


def naive_bayes(texts: Sequence[str], labels: Sequence[int] | Int[np.ndarray, "_"]) -> "Pipeline":
    """Multinomial naive Bayes over all runs of one to four characters inside words, fitted to texts and their classes: `.predict(texts)` gives classes."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    counted = CountVectorizer(analyzer="char_wb", ngram_range=(1, 4), lowercase=False)
    return make_pipeline(counted, MultinomialNB(alpha=0.1)).fit(texts, labels)


class NGrams:
    """Probabilities of characters from what followed the last few in the texts of a class, or else in all (interpolated; Witten and Bell 1991, method C).

    With `N` followers counted, `T` of them distinct, `p = (count + T · p of the next shorter history) / (N + T)`; the shortest history is none, below it all symbols are alike. At each length the counts of all classes come before those of the one.
    """

    ORDER = 5
    """Characters that are counted together: histories are four long. Longer ones gain nothing on names."""

    def __init__(self, texts: Sequence[str], labels: Sequence[int] | Int[np.ndarray, "_"], length: int):
        """Texts are cut after `length` characters, their end counted as one."""
        self.length = length
        self.symbols = len(set().union(*texts)) + 2
        self.followers: dict[tuple, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for text, label in zip(texts, np.asarray(labels).tolist(), strict=True):
            for history, character in self._steps(text):
                for start in range(len(history) + 1):
                    for scope in (None, label):
                        self.followers[scope, history[start:]][character] += 1

    def _steps(self, text: str) -> Iterable[tuple[str, str]]:
        """Each character, the end last, and those before it."""
        written = "\0" * (self.ORDER - 1) + text + "\0"
        for index in range(self.ORDER - 1, min(len(written), self.length + self.ORDER - 1)):
            yield written[index - self.ORDER + 1 : index], written[index]

    def bits(self, text: str, label: int, order: int = ORDER) -> Float[np.ndarray, "T"]:
        """−log₂ of the probability of each character of a text of class `label`, and of its end, from the `order - 1` characters before."""
        probabilities = []
        for history, character in self._steps(text):
            probability = 1 / self.symbols
            for start in range(len(history), len(history) - order, -1):
                for scope in (None, label):
                    if seen := self.followers.get((scope, history[start:])):
                        probability = (seen[character] + len(seen) * probability) / (seen.total() + len(seen))
            probabilities.append(probability)
        return -np.log2(probabilities)
