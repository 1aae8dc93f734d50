"""What was answered about pictures, and the boxes that were found in them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxdl.figures.canvas import save, show, subplots


def answers(
    images: Sequence[UInt8[np.ndarray, "_ _ _"]],
    questions: Sequence[str],
    said: Sequence[str],
    right: Sequence[str],
    path: Path,
    *,
    columns: int = 4,
) -> None:
    """Each picture with its question above and below it what was said: green where it is `right`, else red with what that is."""
    columns = min(columns, len(images))
    figure, axes = subplots(-(-len(images) // columns), columns, 2.3, 3.3)
    for axis, image, question, answer, truth in zip(axes, images, questions, said, right):
        show(axis, image)
        axis.set_title(_lines(question, 34), fontsize=8)
        color, note = ("tab:green", "") if answer == truth else ("tab:red", f"\n({_lines(truth, 34)})")
        axis.set_xlabel(_lines(answer or "(nothing)", 34) + note, fontsize=8, color=color)
    save(figure, path)


def boxes(
    images: Sequence[UInt8[np.ndarray, "_ _ _"]],
    titles: Sequence[str],
    found: Sequence[tuple[Float[np.ndarray, "_ 4"], Sequence[str]]],
    path: Path,
    *,
    true: Sequence[Float[np.ndarray, "_ 4"]] = (),
    columns: int = 4,
) -> None:
    """Pictures with the boxes `(top, left, bottom, right)`, in shares of the sides, that were found in each, and their names; those that are there are dashed."""
    columns = min(columns, len(images))
    figure, axes = subplots(-(-len(images) // columns), columns, 2.3, 2.6)
    for axis, image, title, (places, names), there in zip(axes, images, titles, found, true or [()] * len(images)):
        show(axis, image)
        axis.set_title(_lines(title, 34), fontsize=8)
        for box in there:
            _outline(axis, image, box, edgecolor="white", linewidth=1.2, linestyle="--")
        for box, name in zip(places, names):
            left, top = _outline(axis, image, box, edgecolor="gold", linewidth=1.6)
            axis.text(left, top, name, fontsize=7, va="bottom", bbox=dict(facecolor="gold", edgecolor="none", pad=0.8))
    save(figure, path)


def _outline(axis: Any, image: UInt8[np.ndarray, "H W C"], box: Float[np.ndarray, "4"], **style: Any) -> tuple[float, float]:
    """Draws a box, and returns where its top left corner is on the axis."""
    from matplotlib.patches import Rectangle  # Here, as matplotlib is in `subplots`.

    height, width = image.shape[:2]
    top, left, bottom, right = box * (height, width, height, width) - 0.5  # Pixels' centres are at whole numbers.
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))
    return left, top


def _lines(text: str, width: int) -> str:
    return textwrap.fill(textwrap.shorten(text, 4 * width, placeholder=" …"), width)
