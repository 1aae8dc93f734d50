"""Texts and other sequences of symbols, and what was read in them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxdl.figures.canvas import subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prefix_predictions(
    texts: Sequence[str],
    probabilities: Sequence[Float[np.ndarray, "_ C"]],
    labels: Sequence[int] | Int[np.ndarray, "_"],
    classes: Sequence[str],
    *,
    title: str = "the class, if the text ended there, in per cent (green: the right one)",
) -> "Figure":
    """For each text the probabilities of its four likeliest classes after each character; the right class is marked."""
    figure, axes = subplots(-(-len(texts) // 2), 2, 5.5, 1.7)
    for axis, text, reading, label in zip(axes, texts, probabilities, labels):
        shown = list(np.argsort(-reading.max(0), kind="stable")[:4])
        shown = shown if label in shown else [*shown[:3], label]
        axis.imshow(reading[:, shown].T, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for (column, row), share in np.ndenumerate(reading[:, shown]):
            if share >= 0.1:
                color = "white" if share < 0.6 else "black"
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
        axis.set_xticks(range(len(text)), [character.replace(" ", "␣") for character in text], fontsize=9)
        axis.set_yticks(range(len(shown)), [classes[index] for index in shown], fontsize=8)
        for tick, index in zip(axis.get_yticklabels(), shown):
            tick.set(color="tab:green" if index == label else "0.3", fontweight="bold" if index == label else "normal")
    figure.suptitle(title, fontsize=10)
    return figure


def texts_by_class(
    texts: Sequence[str], marked: Bool[np.ndarray, "N"], classes: Sequence[str], *, title: str, shown: int = 5
) -> "Figure":
    """The first texts of each class in a row; `texts` are equally many of each, class by class. Marked ones are orange."""
    rows, orange = (np.reshape(each, (len(classes), -1))[:, :shown] for each in (texts, marked))
    columns = rows.shape[1]
    figure, (axis,) = subplots(1, 1, 2.1 * (columns + 0.6), 0.27 * len(classes) + 0.7)
    axis.set_axis_off()
    axis.set(xlim=(-0.6, columns), ylim=(len(classes), -0.5))
    for row, name in enumerate(classes):
        axis.text(-0.6, row, name, fontsize=9, fontweight="bold", va="center")
        for column, text in enumerate(rows[row]):
            color = "tab:orange" if orange[row, column] else "black"
            axis.text(column, row, text or "∅", fontsize=9, va="center", color=color)
    axis.set_title(title, fontsize=10)
    return figure


def segmentations(
    texts: Sequence[str], predicted: Int[np.ndarray, "N T"], true: Int[np.ndarray, "N T"], *, title: str, shown: int = 16
) -> "Figure":
    """Some of the texts of several words as they are read, as they were cut, and as they are right. Tags are 1 at the first character of a word, else 0; a text that was cut rightly is green."""
    chosen = [index for index in np.random.default_rng(0).permutation(len(true)).tolist() if true[index, 1:].any()][:shown]
    figure, (axis,) = subplots(1, 1, 9, 0.27 * len(chosen) + 0.9)
    axis.set_axis_off()
    axis.set(xlim=(0, 3), ylim=(len(chosen), -1.7))
    for column, head in enumerate(("what is read", "with the words found", "what was written")):
        axis.text(column, -1, head, fontsize=9, fontweight="bold", va="center")
    for row, index in enumerate(chosen):
        text = texts[index][: true.shape[1]]
        found, right = (
            "".join(" " * begin + c for c, begin in zip(text, tags)).strip() for tags in (predicted[index], true[index])
        )
        color = "tab:green" if found == right else "tab:red"
        for column, words in enumerate((text, found, right)):
            axis.text(column, row, words, fontsize=8, va="center", family="monospace", color=color if column == 1 else "black")
    axis.set_title(title, fontsize=10)
    return figure


def symbol_probabilities(
    probabilities: Float[np.ndarray, "T A"],
    inputs: Sequence[str],
    targets: Int[np.ndarray, "T"],
    *,
    title: str = "a sequence that was not trained on: circles are the symbols to give",
    xlabel: str = "what is read, step by step",
) -> "Figure":
    """The probability of each symbol at every step, with a circle around the one that is wanted. Symbol 0 stands for nothing wanted, and is not drawn."""
    figure, (axis,) = subplots(1, 1, max(6.0, 0.22 * len(inputs) + 1.6), 3.2)
    drawn = axis.imshow(
        probabilities[:, 1:].T, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest", origin="lower"
    )
    axis.set_xticks(range(len(inputs)), inputs, fontsize=8)
    axis.set_yticks(range(probabilities.shape[1] - 1), range(1, probabilities.shape[1]), fontsize=8)
    (wanted,) = np.nonzero(targets)
    axis.scatter(wanted, targets[wanted] - 1, s=50, facecolors="none", edgecolors="tab:red", label="wanted")
    axis.set(xlabel=xlabel, ylabel="answer")
    axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axis, label="probability")
    return figure
