"""Pictures of environments, in numpy and Pillow."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Num, UInt8

Point = tuple[float, float]
Colour = tuple[int, int, int]

INK, WOOD, METAL, LIGHT, SIGNAL = (40, 44, 52), (202, 152, 101), (129, 132, 203), (196, 200, 206), (214, 69, 65)
"""Of lines, of poles, of joints, of the ground, of goals."""


class Canvas:
    """A white image on which one draws in units of the world, whose `y` goes up. Drawn twice as large and halved, so that edges are smooth."""

    def __init__(self, left: float, bottom: float, right: float, top: float, width: int = 240):
        from PIL import Image, ImageDraw

        self.left, self.top, self.scale = left, top, 2 * width / (right - left)
        self.image = Image.new("RGB", (2 * width, 2 * round(width * (top - bottom) / (right - left))), "white")
        self.draw = ImageDraw.Draw(self.image)

    def _at(self, point: Point) -> Point:
        return (point[0] - self.left) * self.scale, (self.top - point[1]) * self.scale

    def line(self, points: Sequence[Point], colour: Colour = INK, width: float = 0.02) -> None:
        """Through all points; `width` in units of the world."""
        self.draw.line([self._at(point) for point in points], fill=colour, width=max(1, round(width * self.scale)), joint="curve")

    def disc(self, centre: Point, radius: float, colour: Colour = METAL) -> None:
        x, y = self._at(centre)
        r = radius * self.scale
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def box(self, left: float, bottom: float, right: float, top: float, colour: Colour = INK) -> None:
        (x, y), (right, bottom) = self._at((left, top)), self._at((right, bottom))
        self.draw.rectangle((x, y, right, bottom), fill=colour)

    def pixels(self) -> UInt8[np.ndarray, "H W 3"]:
        """What was drawn."""
        return np.asarray(self.image.reduce(2))


def channels(image: Num[np.ndarray, "H W C"], colours: Sequence[Colour], side: int = 16) -> UInt8[np.ndarray, "h w 3"]:
    """An image of small pixels, each channel in a colour of its own, later ones above earlier ones, on black."""
    canvas = np.zeros((*image.shape[:2], 3), np.uint8)
    for channel, colour in enumerate(colours):
        canvas[image[..., channel] > 0] = colour
    return canvas.repeat(side, 0).repeat(side, 1)
