"""Curves over the course of training, of one run or of several."""

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int

from jaxdl.figures.canvas import legend_label, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Steps = Int[np.ndarray, "_"] | Float[np.ndarray, "_"] | Sequence[float] | range
Values = Float[np.ndarray, "_"] | Float[np.ndarray, "_ _"] | Sequence[float]


def learning_curves(rows: Sequence[Mapping[str, float | int]]) -> "Figure | None":
    """One panel per metric of a `metrics.jsonl` that was measured more than once; evaluations are drawn with dots, in the panel of their family (`eval/NAME_at_1`, `_5`)."""
    skipped = ("step", "steps_per_second", "examples_per_second", "seconds_to_first_step")
    counts = collections.Counter(name for row in rows for name in row if name not in skipped)
    names = [name for name, count in counts.items() if count > 1 or len(rows) == 1]
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(name.partition("_at_")[0], []).append(name)
    if not panels:
        return None
    columns = min(len(panels), 4)
    figure, axes = subplots(-(-len(panels) // columns), columns, 3.2, 2.4)
    for axis, (title, members) in zip(axes, panels.items()):
        for name in members:
            steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row])
            axis.plot(
                steps,
                values,
                marker="." if name.startswith("eval/") else "",
                linewidth=1,
                label=legend_label(name.rpartition("_")[2]),
            )
        axis.set_title(title.removeprefix("eval/").replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if len(members) > 1:
            axis.legend(title="at", fontsize=7, title_fontsize=7)
        if title.startswith("eval/") and 0 <= min(axis.dataLim.intervaly) and max(axis.dataLim.intervaly) <= 1:
            axis.set_ylim(0, 1.02)
    return figure


def curves(
    panels: Mapping[str, Mapping[str, tuple[Steps, Values]]],
    *,
    levels: Mapping[str, float] = {},
    title: str = "",
    xlabel: str = "step",
    ylabel: str = "",
    log: bool = False,
    limits: tuple[float, float] | None = None,
    share_y: bool = False,
    band: Literal["range", "std"] = "range",
    final: bool = True,
) -> "Figure | None":
    """Named lines `(x, y)` in each panel, by its title, and dashed lines at the `levels`.

    Where `y` is `seeds x` the line is the mean over seeds and a band their range, or one standard deviation to either side. `final` writes the last mean into the legend.
    """
    if not panels:
        return None
    from matplotlib.transforms import ScaledTranslation

    entries = max(map(len, panels.values())) + len(levels)
    below = final and entries > 4  # As many names, with numbers, would cover the lines.
    figure, axes = subplots(1, len(panels), 6.0 if len(panels) == 1 else 4.2, 4.0 + 0.15 * entries * below)
    for axis, (name, lines) in zip(axes, panels.items()):
        for label, (x, y) in lines.items():
            runs = np.atleast_2d(np.asarray(y, np.float64))
            runs = np.where(np.isfinite(runs), runs, np.nan)  # What diverged is a gap in the line.
            mean = runs.mean(0)
            marker = "." if len(mean) <= 30 else ""
            text = f"{label}: {mean[-1]:.3g}" if final and len(mean) else label
            (line,) = axis.plot(x, mean, marker=marker, linewidth=1.3, label=legend_label(text))
            if len(runs) > 1:
                low, high = (runs.min(0), runs.max(0)) if band == "range" else (mean - runs.std(0), mean + runs.std(0))
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        for (label, level), grey in zip(levels.items(), np.linspace(0.3, 0.7, max(len(levels), 2))):
            axis.axhline(level, color=str(grey), linestyle="--", linewidth=1, label=legend_label(f"{label}: {level:.3g}"))
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
        axis.set_ylim(limits)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3, which="both")
        if (lines or levels) and (final or axis is axes[0]):
            place = axis.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)
            options = dict(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=place) if below else {}
            axis.legend(fontsize=7 if below else 8, title="at the end" if final else None, title_fontsize=7, **options)
    if share_y:
        low, high = zip(*[axis.get_ylim() for axis in axes])
        for axis in axes:
            axis.set_ylim(min(low), max(high))
    figure.suptitle(title, fontsize=11)
    return figure


def layer_curves(
    steps: Steps,
    panels: Mapping[str, Mapping[str, Float[np.ndarray, "_ _"]]],
    *,
    shares: Collection[str] = (),
    levels: Mapping[str, float] = {},
    title: str = "",
) -> "Figure | None":
    """A quantity of every layer over training: in each panel `layers steps`, dark for the first layer and bright for the last. Quantities are rows, models columns, both by name.

    A row has one logarithmic scale, or one from 0 to 1 if it is among `shares`; `levels` are dashed lines in a row.
    """
    if not panels or not len(steps):
        return None
    import matplotlib

    models = list(dict.fromkeys(model for row in panels.values() for model in row))
    figure, axes = subplots(len(panels), len(models), 2.0, 1.7)
    for number, (quantity, by_model) in enumerate(panels.items()):
        row = axes[number * len(models) : (number + 1) * len(models)]
        seen = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in by_model.values()])
        for axis, model in zip(row, models):
            layers = by_model.get(model, np.zeros((0, len(steps))))
            for index, values in enumerate(layers):
                axis.plot(steps, values, linewidth=1, color=matplotlib.colormaps["viridis"](index / max(len(layers) - 1, 1)))
            if quantity in shares:
                axis.set_ylim(-0.02, 1.02)
            else:
                axis.set_yscale("log")
                if seen.size:
                    axis.set_ylim(10 ** np.floor(np.log10(seen.min())), 10 ** (np.floor(np.log10(seen.max())) + 1))
            if quantity in levels:
                axis.axhline(levels[quantity], color="tab:red", linestyle="--", linewidth=1)
            axis.tick_params(which="both", labelsize=6, labelleft=model == models[0])
            axis.grid(alpha=0.3)
            if number == 0:
                axis.set_title(model, fontsize=10)
            if number == len(panels) - 1:
                axis.set_xlabel("step", fontsize=8)
        row[0].set_ylabel(quantity, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
