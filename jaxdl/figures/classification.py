"""What was taken for what."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jaxdl.data import Source
from jaxdl.figures.canvas import save, show, subplots


def confusion_matrix(
    labels: Int[np.ndarray, "B"],
    predictions: Int[np.ndarray, "B"],
    classes: Sequence[str],
    path: Path,
    *,
    things: str = "pictures",
) -> None:
    """What things are, downwards, and what they were taken for, across; a row is the shares of a class and sums to 1."""
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
    axis.set_title(f"{len(labels):,} held-out {things}, {np.mean(labels == predictions):.2%} right", fontsize=10)
    figure.colorbar(drawn, ax=axis, label="share of the row (numbers: per cent)", shrink=0.8)
    save(figure, path)


def mistakes(held_out: Source, scores: Float[np.ndarray, "B C"], labels: Int[np.ndarray, "B"], path: Path) -> None:
    """Those of the held-out pictures that were taken for something else with most conviction; nothing where all are right. `scores` are logits."""
    found = scores.argmax(1)
    chances = np.exp(scores - scores.max(1, keepdims=True))
    conviction = (chances / chances.sum(1, keepdims=True)).max(1)
    wrong = np.flatnonzero(found != labels)
    wrong = wrong[np.argsort(-conviction[wrong], kind="stable")][:24]
    if not len(wrong):
        return
    columns = min(8, max(len(wrong), 4))
    figure, axes = subplots(-(-len(wrong) // columns), columns, 1.35, 1.95)
    for axis, index in zip(axes, wrong):
        show(axis, held_out[int(index)]["image"])
        said, true = held_out.classes[found[index]], held_out.classes[labels[index]]
        axis.set_title(f"{said}, {conviction[index]:.0%} sure\nis {true}", fontsize=8)
    figure.suptitle("the surest mistakes", fontsize=10)
    save(figure, path)
