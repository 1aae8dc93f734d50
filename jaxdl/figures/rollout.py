"""What a vision Transformer's answer was read from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from jaxdl.figures.canvas import save, show, subplots


def attention_rollout(weights: Float[np.ndarray, "L B N T T"]) -> Float[np.ndarray, "B T T"]:
    """How much of each place at the bottom (columns) has come to each place at the top (rows), were there nothing but attention and residual connections: `Π_l ½ (A_l + I)` of the means `A_l` over the heads of block l (Abnar and Zuidema 2020, eq. 1 and section 3).

    Rows sum to 1, as those of the weights must.
    """
    rollout = np.eye(weights.shape[-1])[None]
    for block in weights.astype(np.float64).mean(2):
        rollout = (0.5 * block + 0.5 * np.eye(block.shape[-1])) @ rollout
    return rollout


def looked_at(
    images: Sequence[UInt8[np.ndarray, "_ _ _"]], shares: Float[np.ndarray, "I H W"], titles: Sequence[str], path: Path
) -> None:
    """Pictures, and below each how much of the answer comes from each of its parts; `shares` of a picture sum to 1."""
    columns = min(len(images), 10)
    rows = -(-len(images) // columns)
    figure, axes = subplots(2 * rows, columns, 1.35, 1.5)
    times = shares * shares[0].size
    most = times.max()
    for place, (image, seen, title) in enumerate(zip(images, times, titles)):
        row, column = divmod(place, columns)
        above, below = axes[2 * row * columns + column], axes[(2 * row + 1) * columns + column]
        show(above, image)
        above.set_title(title, fontsize=8)
        drawn = below.imshow(seen, cmap="inferno", vmin=0, vmax=most, interpolation="nearest")
        below.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=list(axes), shrink=0.6, pad=0.01, label="times an even share of the attention")
    figure.suptitle(
        "held-out pictures with the answers, and below each the parts that it was read from (attention rollout)", fontsize=10
    )
    save(figure, path)
