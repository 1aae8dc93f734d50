"""Distributions in the plane."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from jaxdl.errors import UserError
from jaxdl.figures.canvas import legend_label, subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def scatter(
    points: Mapping[str, Float[np.ndarray, "_ 2"]],
    *,
    labels: Mapping[str, Int[np.ndarray, "_"]] = {},
    classes: Sequence[str] = (),
    density: Mapping[str, Float[np.ndarray, "_ _"]] = {},
    extent: tuple[float, float, float, float] | None = None,
    title: str = "",
) -> "Figure | None":
    """Points in the plane, a panel for each name, all with the same limits: coloured by their `labels`, over the `density` of that name.

    A density is `rows columns` over the `extent` (left, right, bottom, top), its first row at the bottom, drawn as colours with contour lines. Without an extent the limits are those of the points. Raises `UserError` for a density without an extent.
    """
    panels = list(dict.fromkeys([*points, *density]))
    if not panels:
        return None
    if density and extent is None:
        raise UserError("a density without an extent: give (left, right, bottom, top) of its grid")
    left, right, bottom, top = extent or _limits(list(points.values()))
    columns = min(len(panels), 4)
    height = min(max(3.0 * (top - bottom) / (right - left), 1.2), 9.0) + 0.9
    figure, axes = subplots(-(-len(panels) // columns), columns, 3.4, height)
    groups = sorted({int(label) for array in labels.values() for label in np.unique(array)})
    for axis, name in zip(axes, panels):
        if name in density:
            _contours(axis, density[name], (left, right, bottom, top))
        places = points.get(name, np.zeros((0, 2)))
        size = min(max(60 / math.sqrt(max(len(places), 1)), 1.0), 16.0)
        for group in groups if name in labels else [None]:
            own = places if group is None else places[labels[name] == group]
            color = ("black" if name in density else "tab:blue") if group is None else f"C{groups.index(group) % 10}"
            text = None if group is None else classes[group] if classes else str(group)
            if len(own):
                axis.scatter(
                    *own.T, s=size, color=color, linewidths=0, alpha=0.7, label=text if text is None else legend_label(text)
                )
        axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
        axis.tick_params(labelsize=7)
        axis.set_title(name, fontsize=10)
    if groups and len(groups) <= 12:
        handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
        figure.legend(handles.values(), handles, fontsize=8, loc="outside lower center", ncols=6, markerscale=2)
    figure.suptitle(title, fontsize=10)
    return figure


def _contours(axis: "Axes", values: Float[np.ndarray, "H W"], extent: tuple[float, float, float, float]) -> None:
    left, right, bottom, top = extent
    axis.imshow(values, origin="lower", extent=extent, cmap="Blues", vmin=0, aspect="auto", interpolation="bilinear")
    if values.min() < values.max():
        x = np.linspace(left, right, 2 * values.shape[1] + 1)[1::2]  # Centres of the cells.
        y = np.linspace(bottom, top, 2 * values.shape[0] + 1)[1::2]
        axis.contour(x, y, values, levels=6, colors="tab:blue", linewidths=0.6)


def _limits(points: Sequence[Float[np.ndarray, "_ 2"]]) -> tuple[float, float, float, float]:
    """Of all points and 5 % beyond; a square, so that panels are equal."""
    finite = np.concatenate([array[np.isfinite(array).all(1)] for array in points])
    if not len(finite):
        return -1.0, 1.0, -1.0, 1.0
    middle = (finite.min(0) + finite.max(0)) / 2
    half = 0.55 * float((finite.max(0) - finite.min(0)).max()) or 1.0
    x, y = map(float, middle)
    return x - half, x + half, y - half, y + half
