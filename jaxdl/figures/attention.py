"""What attention looks at."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from jaxdl.figures.canvas import show, subplots
from jaxdl.figures.images import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_maps(weights: Float[np.ndarray, "L N T S"], tokens: Sequence[str], *, title: str) -> "Figure":
    """The attention weights of every head, across, of every block, downwards: from each token (a row of a map) to each token (its columns)."""
    blocks, heads = weights.shape[:2]
    figure, axes = subplots(blocks, heads, 2.9, 3.0)
    for place, (axis, map_) in enumerate(zip(axes, weights.reshape(-1, *weights.shape[2:]))):
        axis.imshow(map_, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(range(map_.shape[1]), tokens, fontsize=5, rotation=90)
        axis.set_yticks(range(map_.shape[0]), tokens, fontsize=5)
        axis.set_title(f"block {place // heads + 1}, head {place % heads + 1}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def cross_attention(
    weights: Float[np.ndarray, "L T S"],
    written: Sequence[str],
    read: Sequence[str],
    *,
    title: str = "where the decoder looks, mean over heads (bright: much)",
) -> "Figure":
    """The attention weights of each block of a decoder: from the tokens that are `written` next (rows) to those that are `read` (columns)."""
    figure, axes = subplots(1, len(weights), 1.4 + 0.22 * len(read), 2.2 + 0.22 * len(written))
    for block, (axis, map_) in enumerate(zip(axes, weights), 1):
        axis.imshow(map_, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(range(len(read)), read, fontsize=8, rotation=90)
        axis.set_yticks(range(len(written)), written, fontsize=8)
        axis.set_title(f"decoder block {block}", fontsize=10)
        axis.set_xlabel("source token that is looked at", fontsize=9)
    axes[0].set_ylabel("token that is written next", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def attention_rollout(weights: Float[np.ndarray, "L B N T T"]) -> Float[np.ndarray, "B T T"]:
    """How much of each input token (columns) has reached each output token (rows), were there nothing but attention and residual connections: `Π_l ½ (A_l + I)` of the means `A_l` over the heads of block l (Abnar and Zuidema 2020, eq. 1 and section 3).

    Rows sum to 1, as those of the weights must.
    """
    rollout = np.eye(weights.shape[-1])[None]
    for block in weights.astype(np.float64).mean(2):
        rollout = (0.5 * block + 0.5 * np.eye(block.shape[-1])) @ rollout
    return rollout


def rollout_maps(images: Images, shares: Float[np.ndarray, "I H W"], titles: Sequence[str]) -> "Figure | None":
    """Images, and below each how much of the answer comes from each of its parts; the `shares` of an image sum to 1."""
    if not len(images):
        return None
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
        "held-out images with the answers, and below each the parts that it was read from (attention rollout)", fontsize=10
    )
    return figure
