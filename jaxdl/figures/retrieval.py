"""Which image belongs to which text."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxdl.figures.canvas import save, show, subplots


def similarity_matrix(similarity: Float[np.ndarray, "I J"], path: Path, *, title: str) -> None:
    """Images downwards, texts across: a good model shows a bright diagonal."""
    figure, (axis,) = subplots(1, 1, 5.6, 5)
    drawn = axis.imshow(similarity, cmap="viridis", interpolation="nearest")
    axis.set(xlabel="text", ylabel="image")
    axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axis, label="cosine similarity", shrink=0.8)
    save(figure, path)


def ranked_texts(
    images: Sequence[UInt8[np.ndarray, "_ _ _"]],
    texts: Sequence[str],
    similarity: Float[np.ndarray, "I J"],
    relevant: Sequence[int] | Int[np.ndarray, "_"],
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
    images: Sequence[UInt8[np.ndarray, "_ _ _"]],
    similarity: Float[np.ndarray, "J I"],
    relevant: Sequence[int] | Int[np.ndarray, "_"],
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
