"""Which image belongs to which text."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from jaxdl.figures.canvas import show, subplots
from jaxdl.figures.images import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def retrieval(images: Images, texts: Sequence[str], similarity: Float[np.ndarray, "I I"]) -> "dict[str, Figure]":
    """Figures of pairs of which the i-th image belongs to the i-th text: `similarity` of the first 64, and for the first 8 what was found from `image_to_text` and from `text_to_image`."""
    shown = range(min(8, len(texts)))
    return {
        "similarity": similarity_matrix(similarity[:64, :64], title="held-out images and texts"),
        "image_to_text": ranked_texts([images[i] for i in shown], texts, similarity[shown], shown),
        "text_to_image": ranked_images([texts[i] for i in shown], images, similarity.T[shown], shown),
    }


def similarity_matrix(similarity: Float[np.ndarray, "I J"], *, title: str) -> "Figure":
    """Images downwards, texts across: a good model shows a bright diagonal."""
    figure, (axis,) = subplots(1, 1, 5.6, 5)
    drawn = axis.imshow(similarity, cmap="viridis", interpolation="nearest")
    axis.set(xlabel="text", ylabel="image")
    for line in (axis.xaxis, axis.yaxis):
        line.get_major_locator().set_params(integer=True)
    axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axis, label="cosine similarity", shrink=0.8)
    return figure


def ranked_texts(
    images: Images,
    texts: Sequence[str],
    similarity: Float[np.ndarray, "I J"],
    relevant: Sequence[int] | Int[np.ndarray, "_"],
    *,
    k: int = 5,
) -> "Figure":
    """For each image the k most similar texts, the right one, `relevant[i]`, in green."""
    figure, axes = subplots(len(images), 2, 1.5, 1.5, width_ratios=(1, 5))
    for image, scores, right, picture, words in zip(images, similarity, relevant, axes[::2], axes[1::2]):
        show(picture, image)
        words.set_axis_off()
        for place, index in enumerate(np.argsort(-scores, kind="stable")[:k]):
            text = textwrap.shorten(texts[index], 100, placeholder=" …")
            color = "tab:green" if index == right else "0.4"
            words.text(0, 0.92 - place / k, f"{scores[index]:.2f}  {text}", color=color, fontsize=9, va="top")
    return figure


def ranked_images(
    texts: Sequence[str],
    images: Images,
    similarity: Float[np.ndarray, "J I"],
    relevant: Sequence[int] | Int[np.ndarray, "_"],
    *,
    k: int = 6,
) -> "Figure":
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
    return figure
