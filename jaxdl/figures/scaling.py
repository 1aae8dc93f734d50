"""What a method costs, over the size of what it is given."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from jaxdl.figures.canvas import legend_label, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def scaling(
    panels: Mapping[str, Mapping[str, tuple[Sequence[int], Float[np.ndarray, "_"] | Float[np.ndarray, "3 _"]]]],
    *,
    columns: int,
    xlabel: str,
    ylabel: str,
) -> "Figure":
    """Named lines of sizes and costs in each panel, by its title, in rows of `columns`; both scales are logarithmic. Three costs for each size are a low one, the line, and a high one, with a band between them. A name has the same colour everywhere."""
    import matplotlib.ticker

    names = dict.fromkeys(name for lines in panels.values() for name in lines)
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    ticks = sorted({size for lines in panels.values() for sizes, _ in lines.values() for size in sizes})
    figure, axes = subplots(-(-len(panels) // columns), columns, 2.9, 2.6)
    for axis, (title, lines) in zip(axes, panels.items()):
        for name, (sizes, costs) in lines.items():
            if not len(sizes):
                continue
            low, middle, high = costs if costs.ndim == 2 else (None, costs, None)
            axis.plot(sizes, middle, marker=".", color=colors[name], label=legend_label(name))
            if low is not None:
                axis.fill_between(sizes, low, high, color=colors[name], alpha=0.2, linewidth=0)
        axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
        axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
        axis.minorticks_off()
        # A decade has three ticks, since what is drawn may lie within one.
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="y", labelsize=7)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    if axes[0].lines:
        axes[0].legend(fontsize=7)
    return figure
