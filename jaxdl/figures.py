"""Pictures that experiments share."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8


def learning_curves(rows: Sequence[dict[str, float | int]], path: Path) -> None:
    """One panel per metric of a `metrics.jsonl`; evaluations are drawn with dots, in the panel of their family (`eval/NAME_at_1`, `_5`)."""
    skipped = ("step", "steps_per_second", "examples_per_second", "seconds_to_first_step")
    names = list(dict.fromkeys(name for row in rows for name in row if name not in skipped))
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(name.partition("_at_")[0], []).append(name)
    if not panels:
        return
    columns = min(len(panels), 4)
    figure, axes = subplots(-(-len(panels) // columns), columns, 3.2, 2.4)
    for axis, (title, members) in zip(axes, panels.items()):
        for name in members:
            steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row])
            axis.plot(steps, values, marker="." if name.startswith("eval/") else "", linewidth=1, label=name.rpartition("_")[2])
        axis.set_title(title.removeprefix("eval/").replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if len(members) > 1:
            axis.legend(title="at", fontsize=7, title_fontsize=7)
        if title.startswith("eval/"):
            axis.set_ylim(0, 1.02)
    save(figure, path)


def similarity_matrix(similarity: Float[np.ndarray, "I J"], path: Path, *, title: str) -> None:
    """Images downwards, texts across: a good model shows a bright diagonal."""
    figure, (axis,) = subplots(1, 1, 5.6, 5)
    drawn = axis.imshow(similarity, cmap="viridis", interpolation="nearest")
    axis.set(xlabel="text", ylabel="image")
    axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axis, label="cosine similarity", shrink=0.8)
    save(figure, path)


def ranked_texts(
    images: Sequence[UInt8[np.ndarray, "H W C"]],
    texts: Sequence[str],
    similarity: Float[np.ndarray, "I J"],
    relevant: Sequence[int],
    path: Path,
    *,
    k: int = 5,
) -> None:
    """For each image the k most similar texts, the right one, `relevant[i]`, in green."""
    figure, axes = subplots(len(images), 2, 1.5, 1.5, width_ratios=(1, 5))
    for image, scores, right, picture, words in zip(images, similarity, relevant, axes[::2], axes[1::2]):
        show(picture, image)
        words.set_axis_off()
        for place, index in enumerate(np.argsort(-scores, kind="stable")[:k]):
            text = textwrap.shorten(texts[index], 100, placeholder=" …")
            color = "tab:green" if index == right else "0.4"
            words.text(0, 0.92 - place / k, f"{scores[index]:.2f}  {text}", color=color, fontsize=9, va="top")
    save(figure, path)


def ranked_images(
    texts: Sequence[str],
    images: Sequence[UInt8[np.ndarray, "H W C"]],
    similarity: Float[np.ndarray, "J I"],
    relevant: Sequence[int],
    path: Path,
    *,
    k: int = 6,
) -> None:
    """For each text the k most similar images, the right one, `relevant[j]`, framed in green."""
    figure, axes = subplots(len(texts), k, 1.5, 1.6)
    for text, scores, right, row in zip(texts, similarity, relevant, axes.reshape(-1, k)):
        row[0].set_title(" ", fontsize=9)  # Keeps the height of a line; a long title would widen the first column.
        caption = textwrap.shorten(text, 120, placeholder=" …")
        row[0].text(0, 1.05, caption, transform=row[0].transAxes, fontsize=9, va="bottom").set_in_layout(False)
        for axis, index in zip(row, np.argsort(-scores, kind="stable")):
            show(axis, images[index])
            axis.set_xlabel(f"{scores[index]:.2f}", fontsize=7, labelpad=2)
            for side in axis.spines.values():
                side.set(color="tab:green", linewidth=3) if index == right else side.set(color="0.8")
    save(figure, path)


def confusion_matrix(
    labels: Int[np.ndarray, "B"], predictions: Int[np.ndarray, "B"], classes: Sequence[str], path: Path, *, title: str
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
    axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axis, label="share of the row (numbers: per cent)", shrink=0.8)
    save(figure, path)


def show(axis: Any, image: UInt8[np.ndarray, "H W C"]) -> None:
    """A picture, grey where it has one channel, with sharp pixels and no ticks."""
    axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def subplots(
    rows: int, columns: int, width: float, height: float, width_ratios: Sequence[float] | None = None
) -> tuple[Any, np.ndarray]:
    """A figure with a flat array of axes, each `width` by `height` inches, without a global pyplot state."""
    import matplotlib.figure  # Here, so that a command line that draws nothing does not wait for it.

    total = width * (sum(width_ratios) if width_ratios else columns)
    figure = matplotlib.figure.Figure(figsize=(total, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": width_ratios}).ravel()
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Writes the picture; axes without anything in them are not drawn."""
    for axis in figure.axes:
        if not axis.has_data() and not axis.texts:
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
