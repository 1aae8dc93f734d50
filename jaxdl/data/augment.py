"""Augmentation of training data: random geometry, which boxes, masks and points follow; two images mixed (mixup, CutMix); and random distortions (RandAugment)."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as Picture
from PIL import ImageEnhance, ImageOps

from jaxdl.data.elements import Image
from jaxdl.errors import UserError

Example = TypeVar("Example", bound=Image)


def random_flip(example: Example, rng: np.random.Generator) -> Example:
    """Left and right exchanged, or not, with equal chances. "left of" in a caption does not survive this."""
    return example.flip() if rng.random() < 0.5 else example


def random_shift(example: Example, rng: np.random.Generator, pixels: int) -> Example:
    """Moved by at most so many pixels up or down and left or right; what comes in is black (He et al. 2016, section 4.2)."""
    height, width = example.image.shape[:2]
    top, left = rng.integers(0, 2 * pixels, size=2, endpoint=True).tolist()
    return example.window(top - pixels, left - pixels, height, width)


def random_crop(example: Example, rng: np.random.Generator, size: tuple[int, int]) -> Example:
    """A window of a height and a width in pixels, every one of which is as likely. Where the image is smaller, the window is centred on it, and the rest is black."""
    spare = [have - want for have, want in zip(example.image.shape, size)]
    top, left = (int(rng.integers(0, room, endpoint=True)) if room > 0 else room // 2 for room in spare)
    return example.window(top, left, *size)


def random_resized_crop(
    example: Example,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Example:
    """A window with a share `scale` of the area and width : height in `ratio` (Szegedy et al. 2015, section 6), at its own size.

    An `ImageProcessor` that squashes resizes it. Area is drawn evenly, the ratio evenly in its logarithm. Where ten tries do not fit into the image, the largest centred window of an allowed ratio is taken.
    """
    height, width = example.image.shape[:2]
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(0, height - h, endpoint=True), rng.integers(0, width - w, endpoint=True)
            return example.window(int(top), int(left), h, w)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return example.window((height - h) // 2, (width - w) // 2, h, w)


def mixup(
    first: Float[np.ndarray, "H W C"], second: Float[np.ndarray, "H W C"], rng: np.random.Generator, alpha: float = 0.2
) -> tuple[Float[np.ndarray, "H W C"], float]:
    """`λ · first + (1 − λ) · second` with λ from Beta(α, α), and λ: targets are to be mixed by the same shares (Zhang et al. 2018, section 2).

    A small α leaves most images nearly whole. The default is that of the paper's ImageNet (section 3.1, from 0.1 to 0.4) and of Beyer et al. 2022.
    """
    share = rng.beta(alpha, alpha)
    return (share * first + (1 - share) * second).astype(first.dtype), share


def cutmix(
    first: Float[np.ndarray, "H W C"], second: Float[np.ndarray, "H W C"], rng: np.random.Generator, alpha: float = 1.0
) -> tuple[Float[np.ndarray, "H W C"], float]:
    """`first` with a rectangle of `second` in the same place, and the share of the area that is still `first`'s, by which targets are to be mixed (Yun et al. 2019, eq. 1 and 2).

    The rectangle has the picture's proportions and a share 1 − λ of its area, with λ from Beta(α, α), around a point drawn evenly. What of it lies outside is lost: the share is that of the pixels, as in the authors' code.
    """
    height, width = first.shape[:2]
    side = math.sqrt(1 - rng.beta(alpha, alpha))
    rows, columns = (_span(length, round(length * side), rng) for length in (height, width))
    mixed = first.copy()
    mixed[rows, columns] = second[rows, columns]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def _span(length: int, part: int, rng: np.random.Generator) -> slice:
    """So much around a point of a line, and no more than there is of it."""
    start = int(rng.integers(length)) - part // 2
    return slice(max(start, 0), min(start + part, length))


def rand_augment(
    image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator, *, count: int = 2, level: float = 10.0
) -> UInt8[np.ndarray, "H W C"]:
    """`count` of `DISTORTIONS`, each drawn evenly among all of them, one after the other (Cubuk et al. 2020, figure 2).

    `level` says how strong, from 0 to 10, where 10 is the end of AutoAugment's ranges; Beyer et al. 2022 have two of 10. (torchvision's magnitude m of 31 steps is a level of m/3.) Raises `UserError` for a level beyond.
    """
    if not 0 <= level <= 10:
        raise UserError(f"a level of {level}: distortions are from 0 to 10 strong")
    picture = Picture.fromarray(np.ascontiguousarray(image.squeeze(-1) if image.shape[-1] == 1 else image))
    for name in rng.choice(list(DISTORTIONS), count):
        sign = 1 if rng.random() < 0.5 else -1
        picture = DISTORTIONS[name](picture, level / 10, sign)
    return np.asarray(picture).reshape(image.shape)


_GREY = 128
"""What comes in from outside of the picture, as in the authors' code."""

_FAR = 150 / 331
"""Share of a side that is translated at most: AutoAugment's 150 pixels of the 331 that its networks saw."""


def _outside(picture: Picture.Image) -> int | tuple[int, ...]:
    return (_GREY,) * 3 if picture.mode == "RGB" else _GREY


def _moved(picture: Picture.Image, matrix: tuple[float, ...]) -> Picture.Image:
    """Takes the pixel (x, y) from (a x + b y + c, d x + e y + f)."""
    return picture.transform(picture.size, Picture.Transform.AFFINE, matrix, fillcolor=_outside(picture))


def _enhanced(enhancer: Callable[[Picture.Image], Any]) -> Callable[[Picture.Image, float, int], Picture.Image]:
    """By a factor from 0.1 to 1.9, where 1 changes nothing."""
    return lambda picture, strength, sign: enhancer(picture).enhance(1 + 0.9 * sign * strength)


DISTORTIONS: dict[str, Callable[[Picture.Image, float, int], Picture.Image]] = {
    "nothing": lambda picture, strength, sign: picture,
    "autocontrast": lambda picture, strength, sign: ImageOps.autocontrast(picture),
    "equalize": lambda picture, strength, sign: ImageOps.equalize(picture),
    "rotate": lambda picture, strength, sign: picture.rotate(30 * sign * strength, fillcolor=_outside(picture)),
    "solarize": lambda picture, strength, sign: ImageOps.solarize(picture, round(256 * (1 - strength))),
    "color": _enhanced(ImageEnhance.Color),
    "posterize": lambda picture, strength, sign: ImageOps.posterize(picture, 8 - round(4 * strength)),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda picture, strength, sign: _moved(picture, (1, 0.3 * sign * strength, 0, 0, 1, 0)),
    "shear_y": lambda picture, strength, sign: _moved(picture, (1, 0, 0, 0.3 * sign * strength, 1, 0)),
    "translate_x": lambda picture, strength, sign: _moved(picture, (1, 0, _FAR * sign * strength * picture.width, 0, 1, 0)),
    "translate_y": lambda picture, strength, sign: _moved(picture, (1, 0, 0, 0, 1, _FAR * sign * strength * picture.height)),
}
"""By name `(picture, strength from 0 to 1, sign)`: those of Cubuk et al. 2020, section 3.2, with the ranges of AutoAugment (Cubuk et al. 2019, table 6)."""
