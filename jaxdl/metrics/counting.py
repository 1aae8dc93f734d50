"""What counting reaches on names, beside which a network has to show what it is good for."""

import collections
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxdl.data.names import Names


def naive_bayes(source: Names) -> Any:
    """What counting does: naive Bayes over all runs of one to four characters inside words, fitted to a source."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    counted = CountVectorizer(analyzer="char_wb", ngram_range=(1, 4), lowercase=False)
    return make_pipeline(counted, MultinomialNB(alpha=0.1)).fit(source.names, source.labels)


class NGrams:
    """Probabilities of characters by counting what followed the last few: of a language, or else of all (interpolated; Witten and Bell 1991, method C).

    With `N` followers counted, `T` of them distinct, `p = (count + T · p of the next shorter history) / (N + T)`; the shortest history is none, below it all symbols are alike. At each length the counts of all languages come before those of the one.
    """

    ORDER = 5
    """Of the histories four characters long. Longer ones gain nothing here."""

    def __init__(self, source: Names, length: int):
        """Names are cut after `length` characters, their end counted as one."""
        self.length = length
        self.symbols = len(set().union(*source.names)) + 2
        self.followers: dict[tuple, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for name, label in zip(source.names, source.labels.tolist()):
            for history, character in self._steps(name):
                for start in range(len(history) + 1):
                    for scope in (None, label):
                        self.followers[scope, history[start:]][character] += 1

    def _steps(self, name: str) -> Iterable[tuple[str, str]]:
        """Each character, the end last, and those before it."""
        written = "\0" * (self.ORDER - 1) + name + "\0"
        for index in range(self.ORDER - 1, min(len(written), self.length + self.ORDER - 1)):
            yield written[index - self.ORDER + 1 : index], written[index]

    def bits(self, name: str, label: int, order: int = ORDER) -> Float[np.ndarray, "T"]:
        """−log₂ of the probability of each character of a name, and of its end."""
        probabilities = []
        for history, character in self._steps(name):
            probability = 1 / self.symbols
            for start in range(len(history), len(history) - order, -1):
                for scope in (None, label):
                    if seen := self.followers.get((scope, history[start:])):
                        probability = (seen[character] + len(seen) * probability) / (seen.total() + len(seen))
            probabilities.append(probability)
        return -np.log2(probabilities)
