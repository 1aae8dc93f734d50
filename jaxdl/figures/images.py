"""Sheets of images: samples, reconstructions, interpolations."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from jaxdl.errors import UserError
from jaxdl.figures.canvas import DPI

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images = UInt8[np.ndarray, "_ _ _ _"] | Sequence[UInt8[np.ndarray, "_ _ _"]]
"""Images `height width channels` of 1, 3 or 4 channels: an array, or a sequence in which sizes may differ."""

GAP, LINE, LETTER = 6, 15, 6.4
"""In pixels: between images, the height of a line of text, the mean width of a letter."""


def grid(images: Images, columns: int | None = None, titles: Sequence[str] = (), *, title: str = "") -> "Figure | None":
    """Images row by row, each with a thin border and, if given, a title above it; nothing where there are none. Pixels of small images are enlarged, all alike, and stay sharp."""
    if not len(images):
        return None
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    if columns < 1 or (titles and len(titles) != len(images)):
        raise UserError(f"{len(titles)} titles in {columns} columns for {len(images)} images: one title each, one column or more")
    cut = lambda given: [given[start : start + columns] for start in range(0, len(given), columns)]
    return _sheet(cut(list(images)), cut(list(titles)), [], [], title)


def image_rows(rows: Mapping[str, Images], columns: Sequence[str] = (), *, title: str = "") -> "Figure | None":
    """A row of images for each label, which stands at its left, with the names of the columns above: what goes in and what comes out, steps of an interpolation."""
    if not any(map(len, rows.values())):
        return None
    return _sheet([list(images) for images in rows.values()], [], list(rows), columns, title)


def rgb(image: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W 3"]:
    """A grey, RGB or RGBA image in RGB, what is transparent on white."""
    match image.shape[-1]:
        case 1:
            return np.repeat(image, 3, axis=-1)
        case 3:
            return image
        case 4:
            alpha = image[..., 3:] / 255.0
            return (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    raise UserError(f"an image of shape {image.shape}: images are height, width and 1, 3 or 4 channels")


def _sheet(
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ _"]]],
    titles: Sequence[Sequence[str]],
    labels: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> "Figure":
    """All images in one array at the pixels of the screen, and texts beside them: an axes for each image would take seconds."""
    import matplotlib.figure

    tiles = [[_sized(rgb(image)) for image in row] for row in rows]
    factor = max(1, 96 // max(max(tile.shape[:2]) for row in tiles for tile in row))
    tiles = [[tile.repeat(factor, 0).repeat(factor, 1) for tile in row] for row in tiles]
    height = max(tile.shape[0] for row in tiles for tile in row) + 2
    width = max(tile.shape[1] for row in tiles for tile in row) + 2
    across, letters = max(map(len, tiles)), max(int((width + GAP) / LETTER), 5)
    titles = [[_lines(text, letters) for text in row] for row in titles]
    columns, labels = [_lines(text, letters) for text in columns], [_lines(text, 22) for text in labels]
    above = LINE * max((_height(text) for row in titles for text in row), default=0)
    head = LINE * max(map(_height, columns), default=0) + GAP
    left = int(LETTER * max((len(line) for text in labels for line in text.split("\n")), default=0)) + 2 * GAP

    canvas = np.full((head + (above + height + GAP) * len(tiles), left + (width + GAP) * across, 3), 255, np.uint8)
    middles = [left + (width + GAP) * column + width / 2 for column in range(across)]
    places = [head + (above + height + GAP) * row + above for row in range(len(tiles))]
    for row, top in zip(tiles, places):
        for column, tile in enumerate(row):
            x, y = left + (width + GAP) * column, top
            down, right = (height - tile.shape[0]) // 2, (width - tile.shape[1]) // 2
            framed = np.pad(tile, ((1, 1), (1, 1), (0, 0)), constant_values=170)
            y, x = y + down - 1, x + right - 1
            canvas[y : y + framed.shape[0], x : x + framed.shape[1]] = framed

    room = 2 * LINE if title else 0
    needed = max(canvas.shape[1], int(1.15 * LETTER * len(title)) if title else 0)
    figure = matplotlib.figure.Figure(figsize=(needed / DPI, (canvas.shape[0] + room) / DPI))
    whole = canvas.shape[0] + room
    axis = figure.add_axes((0, 0, canvas.shape[1] / needed, canvas.shape[0] / whole))
    axis.imshow(canvas, interpolation="nearest", aspect="auto", extent=(0, canvas.shape[1], canvas.shape[0], 0))
    axis.set_axis_off()
    for row, top in zip(titles, places):
        for text, middle in zip(row, middles):
            axis.text(middle, top - 3, text, fontsize=8, ha="center", va="bottom")
    for text, middle in zip(columns, middles):
        axis.text(middle, head - 3, text, fontsize=8, ha="center", va="bottom")
    for text, top in zip(labels, places):
        axis.text(left - GAP, top + height / 2, text, fontsize=8, ha="right", va="center")
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.35 * room / whole, va="center")
    return figure


def _sized(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    """Sides of 256 pixels at most, by the mean of blocks."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).reduce(-(-max(image.shape[:2]) // 256)))


def _lines(text: str, letters: int) -> str:
    """At most three lines of so many letters."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, letters) or [""]]
    return "\n".join([*lines[:2], *([lines[2][: letters - 1] + "…"] if len(lines) > 3 else lines[2:])])


def _height(text: str) -> int:
    return text.count("\n") + 1 if text else 0
