"""What was found in images: boxes and masks."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from jaxdl.errors import UserError
from jaxdl.figures.canvas import show, subplots
from jaxdl.figures.images import Images, rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def boxes(
    images: Images,
    titles: Sequence[str],
    found: Sequence[tuple[Float[np.ndarray, "_ 4"], Sequence[str]]],
    *,
    true: Sequence[Float[np.ndarray, "_ 4"]] = (),
    columns: int = 4,
) -> "Figure | None":
    """Images with the boxes that were found in each and their names; those that are there are dashed. A box is (left, top, right, bottom), from 0 to 1."""
    if not len(images):
        return None
    columns = min(columns, len(images))
    figure, axes = subplots(-(-len(images) // columns), columns, 2.3, 2.6)
    for axis, image, title, (places, names), there in zip(axes, images, titles, found, true or [()] * len(images)):
        show(axis, image)
        axis.set_title(textwrap.fill(textwrap.shorten(title, 136, placeholder=" …"), 34), fontsize=8)
        for box in there:
            _outline(axis, image, box, edgecolor="white", linewidth=1.2, linestyle="--")
        for box, name in zip(places, names):
            left, top = _outline(axis, image, box, edgecolor="gold", linewidth=1.6)
            label = axis.text(left, top, name, fontsize=7, va="bottom", bbox=dict(facecolor="gold", edgecolor="none", pad=0.8))
            label.set_in_layout(False)  # A long name would make its image small.
    return figure


def _outline(axis: "Axes", image: UInt8[np.ndarray, "H W C"], box: Float[np.ndarray, "4"], **style: Any) -> tuple[float, float]:
    """Draws a box, and returns where its top left corner is on the axis."""
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    left, top, right, bottom = box * (width, height, width, height) - 0.5  # Pixels' centres are at whole numbers.
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))
    return left, top


def masks(
    images: Images,
    masks: Sequence[Bool[np.ndarray, "_ _ _"]],
    names: Sequence[Sequence[str]] = (),
    titles: Sequence[str] = (),
    *,
    columns: int = 4,
) -> "Figure | None":
    """Images with the masks `instances height width` of each laid over it, every instance in a colour of its own with a line around it, and its name in its middle."""
    if not len(images):
        return None
    columns = min(columns, len(images))
    figure, axes = subplots(-(-len(images) // columns), columns, 2.3, 2.5)
    for index, (axis, image, instances) in enumerate(zip(axes, images, masks)):
        show(axis, overlay(image, instances))
        if titles:
            axis.set_title(textwrap.fill(textwrap.shorten(titles[index], 136, placeholder=" …"), 34), fontsize=8)
        for mask, name in zip(instances, names[index] if names else ()):
            if mask.any():
                y, x = _middle(mask)
                box = dict(facecolor="white", edgecolor="none", alpha=0.7, pad=0.8)
                axis.text(x, y, name, fontsize=7, ha="center", va="center", bbox=box).set_in_layout(False)
    return figure


def overlay(
    image: UInt8[np.ndarray, "H W C"], masks: Bool[np.ndarray, "N h w"], opacity: float = 0.45
) -> UInt8[np.ndarray, "H W 3"]:
    """An image in RGB with each mask in its colour; later masks lie on earlier ones. Raises `UserError` where the sizes differ."""
    import matplotlib

    if masks.shape[1:] != image.shape[:2]:
        raise UserError(f"masks of {masks.shape[1:]} pixels on an image of {image.shape[:2]}: they must have the image's size")
    painted = rgb(image).astype(np.float64)
    colors = 255 * np.array(matplotlib.colormaps["tab10"].colors)
    for index, mask in enumerate(masks):
        color = colors[index % len(colors)]
        padded = np.pad(mask, 1)
        inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        painted[mask] = (1 - opacity) * painted[mask] + opacity * color
        painted[mask & ~inside] = color
    return painted.round().astype(np.uint8)


def _middle(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int]:
    """The pixel of a mask that is nearest to its centre of mass, which may lie outside."""
    places = np.argwhere(mask)
    y, x = places[((places - places.mean(0)) ** 2).sum(1).argmin()]
    return int(y), int(x)
