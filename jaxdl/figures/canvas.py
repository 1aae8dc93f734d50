"""The sheet that all pictures are drawn on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8


def subplots(
    rows: int, columns: int, width: float, height: float, width_ratios: Sequence[float] | None = None
) -> tuple[Any, np.ndarray]:
    """A figure with a flat array of axes, each `width` by `height` inches, without a global pyplot state."""
    import matplotlib.figure  # Here, so that a command line that draws nothing does not wait for it.

    total = width * (sum(width_ratios) if width_ratios else columns)
    figure = matplotlib.figure.Figure(figsize=(total, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": width_ratios}).ravel()
    return figure, axes


def show(axis: Any, image: UInt8[np.ndarray, "H W C"]) -> None:
    """A picture, grey where it has one channel, with sharp pixels and no ticks."""
    axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def save(figure: Any, path: Path) -> None:
    """Writes the picture; axes without anything in them are not drawn."""
    for axis in figure.axes:
        if not axis.has_data() and not axis.texts:
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
