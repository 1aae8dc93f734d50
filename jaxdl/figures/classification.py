"""Which classes were taken for which."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxdl.figures.canvas import show, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX, CONFUSIONS = 40, 20
"""More classes than this are no matrix that could be read; so many confusions are listed instead."""


def confusion_matrix(
    labels: Int[np.ndarray, "B"], predictions: Int[np.ndarray, "B"], classes: Sequence[str], *, noun: str = "images"
) -> "Figure":
    """Row-normalised confusion matrix: what things are, downwards, and what they were taken for, across.

    Of more than 40 classes, the distribution of their accuracies and the 20 most frequent confusions.
    """
    title = f"{len(labels):,} held-out {noun}, {(labels == predictions).mean() if len(labels) else 0:.2%} right"
    if len(classes) > MATRIX:
        return _confusions(labels, predictions, classes, title)
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.0, 0.36 * len(classes) + 1.6)
    figure, (axis,) = subplots(1, 1, side + 0.6, side)
    drawn = axis.imshow(shares, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for row, column in zip(*np.nonzero(shares >= 0.005)):
        color = "white" if shares[row, column] < 0.6 else "black"
        axis.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set(xlabel="taken for", ylabel="is")
    axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axis, label="share of the row (numbers: per cent)", shrink=0.8)
    return figure


def _confusions(labels: Int[np.ndarray, "B"], predictions: Int[np.ndarray, "B"], classes: Sequence[str], title: str) -> "Figure":
    sizes = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels[labels == predictions], minlength=len(classes))
    accuracies = right[sizes > 0] / sizes[sizes > 0]
    figure, (histogram, table) = subplots(1, 2, 4.0, 4.6, width_ratios=(1, 1.4))
    histogram.hist(accuracies, bins=np.linspace(0, 1, 21), color="tab:blue", edgecolor="white")
    if len(accuracies):
        histogram.axvline(accuracies.mean(), color="tab:red", linestyle="--", label=f"mean {accuracies.mean():.3f}")
        histogram.legend(fontsize=8)
    histogram.set(xlim=(0, 1), xlabel="accuracy of a class", ylabel="classes")
    histogram.set_title(f"{len(accuracies):,} classes", fontsize=9)

    wrong = labels != predictions
    pairs, counts = np.unique(labels[wrong].astype(np.int64) * len(classes) + predictions[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:CONFUSIONS]
    lines = [(*divmod(int(pairs[index]), len(classes)), counts[index]) for index in order]
    table.set_axis_off()
    table.set(xlim=(0, 1), ylim=(CONFUSIONS + 0.5, -1.5))
    short = lambda name: name if len(name) <= 26 else name[:25] + "…"
    for x, head in zip((0, 0.42, 0.84), ("is", "taken for", "how often")):
        table.text(x, -1, head, fontsize=8, fontweight="bold", va="center")
    for row, (true, said, count) in enumerate(lines):
        for x, text in zip((0, 0.42, 0.84), (short(classes[true]), short(classes[said]), f"{count:,} of {sizes[true]:,}")):
            table.text(x, row, text, fontsize=7, va="center")
    table.set_title(f"the {len(lines)} most frequent confusions" if lines else "nothing was confused", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def mistakes(
    image: Callable[[int], UInt8[np.ndarray, "_ _ _"]],
    logits: Float[np.ndarray, "B C"],
    labels: Int[np.ndarray, "B"],
    classes: Sequence[str],
) -> "Figure | None":
    """The 24 mistakes of highest confidence, `image(i)` being the i-th image; nothing where all answers are right."""
    confidence = _softmax(logits).max(1)
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")][:24]
    if not len(wrong):
        return None
    columns = min(8, max(len(wrong), 4))
    figure, axes = subplots(-(-len(wrong) // columns), columns, 1.35, 1.95)
    for axis, index, title in zip(axes, wrong, verdicts(logits[wrong], labels[wrong], classes)):
        show(axis, image(int(index)))
        axis.set_title(title, fontsize=8)
    figure.suptitle("mistakes of highest confidence", fontsize=10)
    return figure


def verdicts(logits: Float[np.ndarray, "B C"], labels: Int[np.ndarray, "B"], classes: Sequence[str]) -> list[str]:
    """For each row the likeliest class and its probability, and on a second line the right class where that is another: "cat 98%\\nis dog"."""
    probabilities = _softmax(logits)
    return [
        f"{classes[row.argmax()]} {row.max():.0%}" + ("" if row.argmax() == label else f"\nis {classes[label]}")
        for row, label in zip(probabilities, labels)
    ]


def _softmax(logits: Float[np.ndarray, "B C"]) -> Float[np.ndarray, "B C"]:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
