"""What attention looks at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxdl.figures.canvas import save, subplots


def attention_maps(weights: Float[np.ndarray, "L N T S"], tokens: Sequence[str], path: Path, *, title: str) -> None:
    """What each place (a row of a map) looks at (its columns), for every head, across, of every block, downwards."""
    blocks, heads = weights.shape[:2]
    figure, axes = subplots(blocks, heads, 2.9, 3.0)
    for place, (axis, map_) in enumerate(zip(axes, weights.reshape(-1, *weights.shape[2:]))):
        axis.imshow(map_, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(range(map_.shape[1]), tokens, fontsize=5, rotation=90)
        axis.set_yticks(range(map_.shape[0]), tokens, fontsize=5)
        axis.set_title(f"block {place // heads + 1}, head {place % heads + 1}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
