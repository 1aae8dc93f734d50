"""Images: from files to arrays (`decode`), from arrays to what a model was trained on, and back to pictures."""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jaxdl.data.image_files import decode as decode
from jaxdl.errors import UserError

ResizeMode = Literal["stretch", "crop"]
Resample = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


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
    resample: Resample = "bicubic"
    """The filter of PIL, which widens it when an image shrinks (antialiasing)."""
    resize_mode: ResizeMode = "stretch"
    """`stretch` changes the aspect ratio; `crop` scales both sides alike and cuts out the centre."""
    shorter_side: int | None = None
    """What `crop` scales the shorter side to, as published processors say it. Where it is None, an image is scaled until it just covers `size`, which for a square is the same as its side."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(f"means {self.mean} and deviations {self.std}: give three of each, or one of each for grey images")
        if self.shorter_side is not None and self.shorter_side < max(self.size):
            raise ValueError(f"a shorter side of {self.shorter_side} leaves nothing to crop {self.size} from: make it larger")
        if self.size == (self.shorter_side, self.shorter_side):  # Said twice: equal processors shall compare as equal.
            object.__setattr__(self, "shorter_side", None)

    @classmethod
    def symmetric(cls, size: int | tuple[int, int], **changes: Any) -> "ImageProcessor":
        """The processor that maps RGB images to −1 … 1; `size` is a side or (height, width), `changes` are fields."""
        return cls(_height_width(size), **{**dict(mean=(0.5,) * 3, std=(0.5,) * 3), **changes})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "ImageProcessor":
        """Reads `preprocessor_config.json` (or the newer `processor_config.json`). Raises `UserError` for a step that is not known here."""
        path, config = _read_config(Path(directory))
        try:
            return cls(**_fields(config))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{path} describes no image processor that is known here ({reason}): give `mean` and `std` yourself"
            ) from error

    @classmethod
    def fit(cls, images: Iterable[UInt8[np.ndarray, "_ _ _"]], size: int | tuple[int, int], **changes: Any) -> "ImageProcessor":
        """The processor of which `images`, brought to `size`, come out with mean 0 and deviation 1 in each channel: those of a training set, as grey or as coloured as its first. `changes` are fields.

        A channel that is the same everywhere is given the deviation of one grey level. Raises `UserError` if there are no images, and for a coloured one after a grey first.
        """
        images = iter(images)
        first = next(images, None)
        if first is None:
            raise UserError("there are no images to take mean and deviation of: the data set is empty")
        channels = first.shape[-1]
        process = cls(_height_width(size), **{**dict(mean=(0.0,) * channels, std=(1.0,) * channels), **changes})
        count, total, squares = 0, np.zeros(channels, np.int64), np.zeros(channels, np.int64)
        for image in itertools.chain([first], images):
            pixels = process.resize(image).reshape(-1, channels).astype(np.int64)  # Sums of whole numbers have no rounding.
            count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1))
        return dataclasses.replace(process, mean=tuple((mean / 255).tolist()), std=tuple((std / 255).tolist()))

    def __call__(self, image: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 1"]) -> Float[np.ndarray, "h w C"]:
        """To `size` and float32, with as many channels as there are means. Raises `UserError` for a coloured image where that is one."""
        scale, offset = self._affine
        return self.resize(image) * scale + offset

    def resize(self, image: UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 1"]) -> UInt8[np.ndarray, "h w C"]:
        """To `size`, still from 0 to 255. An image that has the size already is not touched."""
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
        image = _resize(image, (up * height // down, up * width // down), self.resample)
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


def _resize(image: UInt8[np.ndarray, "H W C"], size: tuple[int, int], resample: Resample) -> UInt8[np.ndarray, "h w C"]:
    if image.shape[:2] == size:
        return image
    height, width = size
    picture = Image.fromarray(np.ascontiguousarray(image.squeeze(-1) if image.shape[-1] == 1 else image))
    return np.asarray(picture.resize((width, height), Image.Resampling[resample.upper()])).reshape(*size, -1)


def _read_config(directory: Path) -> tuple[Path, dict]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := directory / name).is_file():
            try:
                config = json.loads(path.read_text("utf-8"))
                return path, config.get("image_processor", config)
            except (ValueError, AttributeError) as error:
                raise UserError(f"{path} is no JSON object ({error}): fetch it again") from error
    raise UserError(
        f"{directory} holds no preprocessor_config.json: give a published model's directory, or `mean` and `std` yourself"
    )


def _fields(config: dict) -> dict[str, Any]:
    """Fields of `ImageProcessor` for those of Hugging Face. Raises `KeyError` or `ValueError` for what has no equal here."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(step, True):
            raise ValueError(f"{step} is off")
    if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError(f"rescale_factor is {config['rescale_factor']}, not 1/255")
    resample = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)).name.lower()
    fields = dict(mean=tuple(config["image_mean"]), std=tuple(config["image_std"]), resample=resample)
    size = config["size"]
    if config.get("do_center_crop", False):  # A bare number is the oldest form: the shorter side, the side of a square.
        shorter_side = size["shortest_edge"] if isinstance(size, dict) else size
        return dict(size=_height_width(config["crop_size"]), resize_mode="crop", shorter_side=shorter_side, **fields)
    return dict(size=_height_width(size), resize_mode="stretch", **fields)


def _height_width(size: int | tuple[int, int] | dict[str, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return (size["height"], size["width"]) if isinstance(size, dict) else size
