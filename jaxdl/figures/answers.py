"""What was answered about images."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxdl.figures.canvas import show, subplots
from jaxdl.figures.images import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def answers(
    images: Images, questions: Sequence[str], said: Sequence[str], right: Sequence[str], *, columns: int = 4
) -> "Figure | None":
    """Each image with its question above and below it what was said: green where it is `right`, else red with what that is."""
    if not len(images):
        return None
    columns = min(columns, len(images))
    figure, axes = subplots(-(-len(images) // columns), columns, 2.3, 3.3)
    for axis, image, question, answer, truth in zip(axes, images, questions, said, right):
        show(axis, image)
        axis.set_title(_lines(question), fontsize=8)
        color, note = ("tab:green", "") if answer == truth else ("tab:red", f"\n({_lines(truth)})")
        axis.set_xlabel(_lines(answer or "(nothing)") + note, fontsize=8, color=color)
    return figure


def _lines(text: str) -> str:
    return textwrap.fill(textwrap.shorten(text, 136, placeholder=" …"), 34)
