"""Images: from files to arrays (`decode`), from arrays to what a model was trained on, and back to pictures."""

import dataclasses
import functools
import itertools
import numbers
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxdl.data.image_files import decode as decode
from jaxdl.data.processor_config import LARGEST_SIDE, RESAMPLES, SMALLEST_STD, read_fields
from jaxdl.errors import UserError, unknown

ResizeMode = Literal["stretch", "crop"]
Resample = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
GivenImage = UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 1"] | Any
"""What others hand in is looked at, and refused in words, where it is no such array."""


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Brings images to the size, range and normalisation that a model was trained on: `(image / 255 − mean) / std`.

    `symmetric` maps to −1 … 1, `fit` measures mean and deviation of a training set, `from_pretrained` reads those of a Hugging Face directory; the published ones stand beside their models. One mean and one deviation keep grey images grey; with three of each they become RGB.
    """

    size: tuple[int, int]
    """Height and width of the result."""
    mean: tuple[float, ...]
    """Of each channel: three, or one for images that are grey and stay so."""
    std: tuple[float, ...]
    resample: Resample | str = "bicubic"
    """The filter of PIL, which widens it when an image shrinks (antialiasing)."""
    resize_mode: ResizeMode | str = "stretch"
    """`stretch` changes the aspect ratio; `crop` scales both sides alike and cuts out the centre."""
    shorter_side: int | None = None
    """What `crop` scales the shorter side to, as published processors say it. Where it is None, an image is scaled until it just covers `size`, which for a square is the same as its side."""

    def __post_init__(self) -> None:
        _check_sides("size", self.size, 2)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not all(isinstance(value, numbers.Real) and abs(value) <= 1e6 for value in values):  # A NaN is not.
                raise UserError(f"{name} {values}: give a number for each channel, for images from 0 to 1")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise UserError(f"means {self.mean} and deviations {self.std}: give three of each, or one of each for grey images")
        if min(self.std) < SMALLEST_STD:
            raise UserError(f"deviations {self.std}: images are divided by them, give numbers above 0")
        if self.resample not in RESAMPLES:
            raise unknown("resample", str(self.resample), RESAMPLES)
        if self.resize_mode not in get_args(ResizeMode):
            raise unknown("resize_mode", str(self.resize_mode), get_args(ResizeMode))
        if self.shorter_side is not None:
            _check_sides("shorter_side", (self.shorter_side,), 1)
            if self.shorter_side < max(self.size):
                raise UserError(f"a shorter side of {self.shorter_side} leaves nothing to crop {self.size} from: make it larger")
        if self.size == (self.shorter_side, self.shorter_side):  # Said twice: equal processors shall compare as equal.
            object.__setattr__(self, "shorter_side", None)

    @classmethod
    def symmetric(cls, size: int | tuple[int, int], **changes: Any) -> "ImageProcessor":
        """The processor that maps RGB images to −1 … 1; `size` is a side or (height, width), `changes` are fields."""
        return cls(_height_width(size), **{**dict(mean=(0.5,) * 3, std=(0.5,) * 3), **changes})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "ImageProcessor":
        """Reads `preprocessor_config.json` (or the newer `processor_config.json`) of transformers' classes for CLIP, SigLIP and ViT, whose defaults hold for what it leaves out. Raises `UserError` for another class, and for what it asks for and is not done here."""
        path, fields = read_fields(Path(directory))
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def fit(cls, images: Iterable[GivenImage], size: int | tuple[int, int], **changes: Any) -> "ImageProcessor":
        """The processor of which `images`, brought to `size`, come out with mean 0 and deviation 1 in each channel: those of a training set, as grey or as coloured as its first. `changes` are fields.

        A channel that is the same everywhere is given the deviation of one grey level. Raises `UserError` if there are no images, and for a coloured one after a grey first.
        """
        images = iter(images)
        try:
            first = next(images)
        except StopIteration as error:
            raise UserError("there are no images to take mean and deviation of: the data set is empty") from error
        channels = _pixels(first).shape[-1]
        process = cls(_height_width(size), **{**dict(mean=(0.0,) * channels, std=(1.0,) * channels), **changes})
        count, total, squares = 0, np.zeros(channels, np.int64), np.zeros(channels, np.int64)
        for image in itertools.chain([first], images):
            pixels = process.resize(image).reshape(-1, channels).astype(np.int64)  # Sums of whole numbers have no rounding.
            count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1))
        return dataclasses.replace(process, mean=tuple((mean / 255).tolist()), std=tuple((std / 255).tolist()))

    def __call__(self, image: GivenImage) -> Float[np.ndarray, "h w C"]:
        """To `size` and float32, with as many channels as there are means. Raises `UserError` for a coloured image where that is one, and for what is no image of whole numbers from 0 to 255, (H, W, 3) or (H, W, 1)."""
        scale, offset = self._affine
        return self.resize(image) * scale + offset

    def resize(self, image: GivenImage) -> UInt8[np.ndarray, "h w C"]:
        """To `size`, still from 0 to 255. An image that has the size already is not touched."""
        image = _pixels(image)
        if image.shape[-1] > len(self.mean):
            raise UserError(
                "a coloured image came to a processor for grey ones: give it three means and deviations, or images of one kind"
            )
        if image.shape[-1] < len(self.mean):
            image = np.repeat(image, 3, axis=-1)
        if self.resize_mode == "stretch":
            return _resize(image, self.size, self.resample)
        height, width = image.shape[:2]
        if self.shorter_side:
            up, down = self.shorter_side, min(height, width)
        else:
            up, down = max(zip(self.size, (height, width)), key=lambda sides: sides[0] / sides[1])
        # The other side is rounded down, as torchvision and Hugging Face do; the integer division keeps it exact.
        scaled = (up * height // down, up * width // down)
        if scaled[0] * scaled[1] > LARGEST_SIDE**2:
            raise UserError(f"an image of {height}×{width} pixels would be scaled to {scaled[0]}×{scaled[1]}: leave it out")
        image = _resize(image, scaled, self.resample)
        top, left = ((have - want) // 2 for have, want in zip(image.shape, self.size))
        return image[top : top + self.size[0], left : left + self.size[1]]

    def to_config(self) -> dict[str, Any]:
        """The entries of a `preprocessor_config.json` that `from_pretrained` and transformers read, but for the name of transformers' class. Raises `UserError` for a crop to another shape than a square that has no `shorter_side`: it cannot be said there."""
        height, width = self.size
        config = dict(do_resize=True, resample=int(Image.Resampling[self.resample.upper()]))
        if self.resize_mode == "stretch":
            config |= dict(size=dict(height=height, width=width), do_center_crop=False)
        elif self.shorter_side is None and height != width:
            raise UserError(f"a crop to {height}×{width} is written down with a shorter_side only: give the image processor one")
        else:
            config |= dict(size=dict(shortest_edge=self.shorter_side or height), do_center_crop=True)
            config |= dict(crop_size=dict(height=height, width=width))
        config |= dict(do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=len(self.mean) == 3)
        return config | dict(image_mean=list(self.mean), image_std=list(self.std))

    def unprocess(self, image: Float[np.ndarray, "*batch H W C"]) -> UInt8[np.ndarray, "*batch H W C"]:
        """The picture that a processed image shows, from 0 to 255: the inverse of the normalisation, not of the resizing."""
        scale, offset = self._affine
        return np.clip(np.rint((np.asarray(image, np.float32) - offset) / scale), 0, 255).astype(np.uint8)

    @functools.cached_property
    def _affine(self) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
        """The normalisation as one multiplication and one addition."""
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


IMAGENET: dict[str, Any] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resample="bilinear", resize_mode="crop")
"""Fields of `ImageProcessor`: mean and deviation of the ImageNet training set, after github.com/pytorch/examples, imagenet/main.py."""


def _resize(image: UInt8[np.ndarray, "H W C"], size: tuple[int, int], resample: Resample | str) -> UInt8[np.ndarray, "h w C"]:
    if image.shape[:2] == size:
        return image
    height, width = size
    picture = Image.fromarray(np.ascontiguousarray(image.squeeze(-1) if image.shape[-1] == 1 else image))
    return np.asarray(picture.resize((width, height), Image.Resampling[resample.upper()])).reshape(*size, -1)


def _pixels(image: GivenImage) -> UInt8[np.ndarray, "H W C"]:
    """The image that was given. Raises `UserError` where it is none, or empty."""
    if not isinstance(image, np.ndarray):
        raise UserError(f"a {type(image).__name__} is no image: give an array of uint8, (height, width, 3) or (height, width, 1)")
    if image.dtype != np.uint8:
        raise UserError(f"an image of {image.dtype} came: give whole numbers from 0 to 255, as uint8")
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or 0 in image.shape:
        raise UserError(f"an image of shape {image.shape} came: give (height, width, 3), or (height, width, 1) for a grey one")
    return image


def _check_sides(field: str, sides: Any, count: int) -> None:
    fits = isinstance(sides, tuple) and len(sides) == count
    whole = fits and all(isinstance(side, (int, np.integer)) and not isinstance(side, bool) for side in sides)
    if not whole or not all(0 < side <= LARGEST_SIDE for side in sides):
        raise UserError(f"{field} is {sides}: give whole numbers of pixels from 1 to {LARGEST_SIDE}")


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)
