"""What convolutions have learned."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from jaxdl.figures.canvas import show, subplots
from jaxdl.figures.images import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def filters(kernel: Float[np.ndarray, "h w I O"]) -> "Figure":
    """The first 32 kernels of a convolution as images: in colour where it reads three channels, else the mean over channels."""
    count = min(kernel.shape[-1], 32)
    columns = min(count, 8)
    figure, axes = subplots(-(-count // columns), columns, 1.1, 1.1)
    weights = kernel if kernel.shape[2] == 3 else kernel.mean(2)
    largest = max(float(np.abs(weights).max()), 1e-12)
    for axis, index in zip(axes, range(count)):
        if weights.ndim == 4:
            axis.imshow(0.5 + weights[..., index] / (2 * largest), interpolation="nearest")
        else:
            drawn = axis.imshow(weights[..., index], cmap="coolwarm", vmin=-largest, vmax=largest, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
    figure.suptitle("kernels of the first convolution", fontsize=10)
    if weights.ndim == 3:
        figure.colorbar(drawn, ax=list(axes), shrink=0.8, label="weight")
    return figure


def feature_maps(images: Images, maps: Sequence[Float[np.ndarray, "_ _ _ _"]], *, channels: int = 6) -> "Figure":
    """Images, and beside each what the first channels of every convolution see in it: `maps` are `images height width channels`, one for each convolution; a channel has one scale over all images."""
    columns = 1 + sum(min(channels, values.shape[-1]) for values in maps)
    figure, axes = subplots(len(images), columns, 0.95, 1.05)
    for number, image in enumerate(images):
        row = iter(axes[number * columns : (number + 1) * columns])
        show(next(row), image)
        for layer, values in enumerate(maps):
            for channel in range(min(channels, values.shape[-1])):
                axis = next(row)
                seen = np.asarray(values[..., channel], np.float32)
                axis.imshow(seen[number], cmap="magma", vmin=0, vmax=max(float(seen.max()), 1e-6), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                if number == 0:
                    axis.set_title(f"conv {layer + 1}\nchannel {channel + 1}", fontsize=7)
    axes[0].set_title("image\n", fontsize=7)
    figure.suptitle("what channels see: dark is nothing, bright is much", fontsize=10)
    return figure
