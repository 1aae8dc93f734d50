"""Numbers of several methods side by side: heat maps and bars."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from jaxdl.figures.canvas import legend_label, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heatmaps(
    values: Mapping[str, Float[np.ndarray, "_ _ _"]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    chosen: Mapping[str, Sequence[int] | Int[np.ndarray, "_"]] = {},
    depth: float = 0.06,
    xlabel: str = "",
    label: str = "",
    title: str = "",
) -> "Figure | None":
    """Scores `rows columns seeds` as one heat map for each panel: means over seeds, and half of their range. Of each row the `chosen` column is framed.

    Colours tell the last `depth` below the best mean apart; what is lower is dark in any case.
    """
    if not values:
        return None
    from matplotlib.patches import Rectangle

    best = max(np.nan_to_num(array.mean(2), nan=-np.inf).max() for array in values.values())
    figure, axes = subplots(1, len(values), 1.6 + 0.95 * len(columns), 1.0 + 0.5 * len(rows))
    for axis, (name, array) in zip(axes, values.items()):
        means, halves = array.mean(2), (array.max(2) - array.min(2)) / 2
        drawn = axis.imshow(means, vmin=best - depth, vmax=best, aspect="auto", cmap="viridis", interpolation="nearest")
        for (row, column), mean in np.ndenumerate(means):
            color = "black" if mean > best - depth / 2 else "white"
            text = f"{mean:.3f}\n± {halves[row, column]:.3f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        for row, column in enumerate(chosen.get(name, ())):
            axis.add_patch(Rectangle((column - 0.44, row - 0.42), 0.88, 0.84, fill=False, edgecolor="tab:red", linewidth=2))
        axis.set_xticks(range(len(columns)), columns, fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.set_title(name, fontsize=10)
    figure.colorbar(drawn, ax=list(axes), label=label, extend="min")
    figure.suptitle(title, fontsize=9)
    return figure


def timings(
    seconds: Mapping[str, Mapping[str, Sequence[float] | Float[np.ndarray, "_"]]],
    *,
    title: str = "",
    ylabel: str = "milliseconds",
) -> "Figure | None":
    """Bars of the least of several measured times, with lines at their medians: a group of bars for each method, in it one for each pass. Times are given in seconds and drawn in milliseconds."""
    if not seconds:
        return None
    passes = list(dict.fromkeys(name for times in seconds.values() for name in times))
    figure, (axis,) = subplots(1, 1, max(6.4, 0.9 * len(seconds) * len(passes)), 3.8)
    for number, name in enumerate(passes):
        each = [1e3 * np.asarray(times.get(name, [np.nan]), np.float64) for times in seconds.values()]
        places = np.arange(len(seconds)) + (number - (len(passes) - 1) / 2) * 0.8 / len(passes)
        axis.bar(places, [times.min() for times in each], 0.76 / len(passes), label=legend_label(name))
        axis.plot(places, [np.median(times) for times in each], "k_", markersize=28 / len(passes))
        for place, times in zip(places, each):
            if np.isfinite(times).all():
                above = dict(xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8)
                axis.annotate(f"{times.min():.3g}", (place, np.median(times)), **above)
    axis.set_xticks(range(len(seconds)), list(seconds), fontsize=9)
    axis.set(ylabel=ylabel)
    axis.margins(y=0.15)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
    return figure


def means_by_class(
    values: Mapping[str, Sequence[Float[np.ndarray, "_"]] | Float[np.ndarray, "_ _"]],
    labels: Sequence[int] | Int[np.ndarray, "_"],
    classes: Sequence[str],
    *,
    xlabel: str,
    title: str,
) -> "Figure":
    """For each class the mean of all values of its examples, a bar for each method; an example may have several, and NaN counts as none."""
    labels, width = np.asarray(labels), 0.8 / len(values)
    figure, (axis,) = subplots(1, 1, 6.5, 0.13 * len(classes) * max(len(values), 2) + 1.1)
    for number, (name, rows) in enumerate(values.items()):
        means = []
        for label in range(len(classes)):
            own = np.concatenate([np.ravel(rows[index]) for index in np.flatnonzero(labels == label)] or [np.zeros(0)])
            own = own[~np.isnan(own)]
            means.append(own.mean() if own.size else np.nan)
        places = np.arange(len(classes)) + (number - (len(values) - 1) / 2) * width
        axis.barh(
            places,
            means,
            width,
            label=legend_label(name),
            color="tab:blue" if number == 0 else str(0.55 + 0.3 * number / len(values)),
        )
    axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set_ylim(len(classes) - 0.4, -0.6)
    axis.set(xlabel=xlabel)
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=max(len(values), 1))
    return figure
