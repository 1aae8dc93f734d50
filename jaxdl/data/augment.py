"""What is done to training pictures beside cropping and mirroring: two are mixed (mixup, CutMix), and one is distorted by chance (RandAugment)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance, ImageOps

from jaxdl.errors import UserError


def mixup(
    first: Float[np.ndarray, "H W C"], second: Float[np.ndarray, "H W C"], rng: np.random.Generator, alpha: float = 0.2
) -> tuple[Float[np.ndarray, "H W C"], float]:
    """`λ · first + (1 − λ) · second` with λ from Beta(α, α), and λ: targets are to be mixed by the same shares (Zhang et al. 2018, section 2).

    A small α leaves most pictures nearly whole. The default is that of the paper's ImageNet (section 3.1, from 0.1 to 0.4) and of Beyer et al. 2022.
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
    picture = Image.fromarray(np.ascontiguousarray(image.squeeze(-1) if image.shape[-1] == 1 else image))
    for name in rng.choice(list(DISTORTIONS), count):
        sign = 1 if rng.random() < 0.5 else -1
        picture = DISTORTIONS[name](picture, level / 10, sign)
    return np.asarray(picture).reshape(image.shape)


_GREY = 128
"""What comes in from outside of the picture, as in the authors' code."""

_FAR = 150 / 331
"""Share of a side that is translated at most: AutoAugment's 150 pixels of the 331 that its networks saw."""


def _outside(picture: Image.Image) -> int | tuple[int, ...]:
    return (_GREY,) * 3 if picture.mode == "RGB" else _GREY


def _moved(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Takes the pixel (x, y) from (a x + b y + c, d x + e y + f)."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, fillcolor=_outside(picture))


def _enhanced(enhancer: Callable[[Image.Image], Any]) -> Callable[[Image.Image, float, int], Image.Image]:
    """By a factor from 0.1 to 1.9, where 1 changes nothing."""
    return lambda picture, strength, sign: enhancer(picture).enhance(1 + 0.9 * sign * strength)


DISTORTIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
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
