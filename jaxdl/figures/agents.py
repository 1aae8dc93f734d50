"""How agents come to what they can."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxdl.figures.canvas import subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Interval = tuple[float, float, float]
"""The low end, the middle, and the high end."""


def interval_curve(
    x: Sequence[float],
    lines: Mapping[str, Sequence[Interval]],
    *,
    levels: Mapping[str, float] = {},
    title: str = "",
    xlabel: str = "environment steps",
    ylabel: str = "return",
) -> "Figure":
    """Named lines with a band around each, and dashed ones at the `levels`."""
    figure, (axis,) = subplots(1, 1, 6.0, 4.0)
    for name, intervals in lines.items():
        low, middle, high = zip(*intervals)
        (line,) = axis.plot(x, middle, marker="." if len(x) <= 30 else "", linewidth=1.3, label=f"{name}: {middle[-1]:.4g}")
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for (name, level), grey in zip(levels.items(), ("0.3", "0.5", "0.7")):
        axis.axhline(level, color=grey, linestyle="--", linewidth=1, label=f"{name}: {level:.4g}")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="at the end", title_fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure
