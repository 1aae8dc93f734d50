"""Counting on texts against probabilities by hand and scikit-learn's parts."""

import collections
import itertools

import numpy as np

from jaxdl.metrics import NGrams, naive_bayes

TEXTS = [f"{a}{b}{a}" for letters in ("abc", "xyz") for a in letters for b in letters]
LABELS = np.repeat([0, 1], 9)


def test_counted_probabilities_sum_to_one_and_know_their_class():
    counted = NGrams(TEXTS, LABELS, 3)
    letters = sorted(set("".join(TEXTS)))
    first = lambda label: [2 ** -counted.bits(letter, label)[0] for letter in letters]
    for label in (0, 1):  # The end and what was never seen have the rest.
        assert 0.8 < sum(first(label)) < 1
    assert sum(first(0)[:3]) > 0.6 > 0.4 > sum(first(0)[3:])
    assert counted.bits("aba", 0).shape == (3,) and counted.bits("ab", 0).shape == (3,)  # With the end, if it is not cut.
    assert counted.bits("aba", 0).sum() < counted.bits("aba", 0, order=1).sum()


def test_probabilities_of_all_texts_of_a_length_sum_to_one():
    """The symbols are three letters, the end, and one that was never seen."""
    counted = NGrams(["ab", "ba", "cab", "c"], [0, 0, 1, 1], 3)
    texts = ["".join(letters) for length in range(4) for letters in itertools.product("abc?", repeat=length)]
    for label, order in itertools.product((0, 1), (1, 2, 5)):
        assert np.isclose(sum(2 ** -counted.bits(text, label, order).sum() for text in texts), 1)


def test_without_a_history_counts_are_mixed_with_those_of_all_classes():
    """Witten and Bell's method C: `(count + T · p) / (N + T)`, of all texts and then of the class."""
    counted = NGrams(["aab", "b"], [0, 1], 9)
    uniform = 1 / 4
    everything, own = collections.Counter(a=2, b=2, end=2), collections.Counter(a=2, b=1, end=1)
    p = (everything["a"] + 3 * uniform) / (6 + 3)
    p = (own["a"] + 3 * p) / (4 + 3)
    np.testing.assert_allclose(counted.bits("a", 0, order=1)[0], -np.log2(p))


def test_naive_bayes_is_the_likeliest_class_by_its_runs_of_characters():
    model = naive_bayes(TEXTS, LABELS)
    counts = [collections.Counter(), collections.Counter()]
    runs = lambda text: [f" {text} "[i : i + n] for n in range(1, 5) for i in range(len(text) + 3 - n)]
    for text, label in zip(TEXTS, LABELS):
        counts[label].update(runs(text))
    known = set(counts[0]) | set(counts[1])

    def score(text: str, label: int) -> float:
        total = counts[label].total() + 0.1 * len(known)
        return sum(np.log((counts[label][run] + 0.1) / total) for run in runs(text) if run in known)

    tests = ["axa", "xax", "bb", "yyx", "cz", "zca"]
    assert model.predict(tests).tolist() == [int(score(text, 1) > score(text, 0)) for text in tests]
    assert naive_bayes(TEXTS, LABELS.tolist()).predict(TEXTS).tolist() == LABELS.tolist()
