"""Images: from files to arrays, from arrays to what a model was trained on, and back to pictures."""

import dataclasses
import functools
import io
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from jaxdl.errors import UserError, unknown

Fit = Literal["squash", "crop"]
Resample = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]

_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What PIL raises for a file that is no image, cut short, or absurdly large."""


def decode(image: str | os.PathLike | bytes) -> UInt8[np.ndarray, "H W 3"]:
    """An image file, or the bytes of one, as RGB from 0 to 255, turned the way its EXIF orientation says.

    Raises `UserError` for what PIL cannot read, naming the file.
    """
    given = f"an image of {len(image)} bytes" if isinstance(image, bytes) else str(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            picture = ImageOps.exif_transpose(picture)
            if "transparency" in picture.info:  # A palette with transparent entries has a way to RGBA, none to RGB.
                picture = picture.convert("RGBA")
            return np.array(picture.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"{given} does not exist: check the path") from error
    except _BROKEN as error:
        raise UserError(f"{given} cannot be read as an image ({error}): repair or remove it") from error


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Brings images to the size, range and normalisation that a model was trained on: `(image / 255 − mean) / std`.

    `preset` gives the published normalisations by name, `from_pretrained` reads that of a Hugging Face directory, `standardising` measures that of a training set. One mean and one deviation keep grey images grey; with three of each they become RGB.
    """

    size: tuple[int, int]
    """Height and width of the result."""
    mean: tuple[float, ...]
    """Of each channel: three, or one for images that are grey and stay so."""
    std: tuple[float, ...]
    resample: Resample = "bicubic"
    """The filter of PIL, which widens it when an image shrinks (antialiasing)."""
    fit: Fit = "squash"
    """`squash` changes the aspect ratio; `crop` scales both sides alike and cuts out the centre."""
    shorter_side: int | None = None
    """What `crop` scales the shorter side to, as published processors say it; where it is not given, an image is scaled until it just covers `size`."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(f"means {self.mean} and deviations {self.std}: give three of each, or one of each for grey images")
        if self.shorter_side is not None and self.shorter_side < max(self.size):
            raise ValueError(f"a shorter side of {self.shorter_side} leaves nothing to crop {self.size} from: make it larger")

    @classmethod
    def preset(cls, name: str, size: int | tuple[int, int], **changes: Any) -> "ImageProcessor":
        """The processor `name` of `PRESETS` for images of `size`, a side or (height, width); `changes` are fields."""
        if name not in PRESETS:
            raise unknown("image preset", name, PRESETS)
        return cls((size, size) if isinstance(size, int) else size, **{**PRESETS[name], **changes})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "ImageProcessor":
        """Reads `preprocessor_config.json` (or the newer `processor_config.json`). Raises `UserError` for a step that is not known here."""
        path, config = _read_config(Path(directory))
        try:
            return cls(**_fields(config))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{path} describes no image processor that is known here ({reason}): use one of the presets"
            ) from error

    @classmethod
    def standardising(
        cls, images: Iterable[UInt8[np.ndarray, "_ _ _"]], size: int | tuple[int, int], **changes: Any
    ) -> "ImageProcessor":
        """The processor of which `images`, brought to `size`, come out with mean 0 and deviation 1 in each channel: those of a training set, as grey or as coloured as its first. `changes` are fields.

        A channel that is the same everywhere is given the deviation of one grey level. Raises `UserError` if there are no images, and for a coloured one after a grey first.
        """
        images = iter(images)
        first = next(images, None)
        if first is None:
            raise UserError("there are no images to take mean and deviation of: the data set is empty")
        channels = first.shape[-1]
        size = (size, size) if isinstance(size, int) else size
        process = cls(size, **{**dict(mean=(0.0,) * channels, std=(1.0,) * channels), **changes})
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
        if self.fit == "squash":
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

    def unprocess(self, image: Float[np.ndarray, "*batch H W C"]) -> UInt8[np.ndarray, "*batch H W C"]:
        """The picture that a processed image shows, from 0 to 255: the inverse of the normalisation, not of the resizing."""
        scale, offset = self._affine
        return np.clip(np.rint((np.asarray(image, np.float32) - offset) / scale), 0, 255).astype(np.uint8)

    @functools.cached_property
    def _affine(self) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
        """The normalisation as one multiplication and one addition."""
        mean, std = np.asarray(self.mean), np.asarray(self.std)
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


PRESETS: dict[str, dict[str, Any]] = {
    # google/siglip-*: preprocessor_config.json.
    "siglip": dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resample="bicubic", fit="squash"),
    # github.com/openai/CLIP, clip.py, `_transform`: mean and deviation of its training images.
    "clip": dict(
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), resample="bicubic", fit="crop"
    ),
    # github.com/pytorch/examples, imagenet/main.py: mean and deviation of the ImageNet training set.
    "imagenet": dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resample="bilinear", fit="crop"),
}


def random_flip(image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W C"]:
    """Left and right change places, or not, with equal chances. "left of" in a caption does not survive this."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def random_crop(image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator, padding: int) -> UInt8[np.ndarray, "H W C"]:
    """A window of the image's own size from the image with `padding` black pixels on each side (He et al. 2016, section 4.2)."""
    height, width = image.shape[:2]
    top, left = rng.integers(0, 2 * padding, size=2, endpoint=True)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return padded[top : top + height, left : left + width]


def random_resized_crop(
    image: UInt8[np.ndarray, "H W C"],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "h w C"]:
    """A window with a share `scale` of the area and width : height in `ratio` (Szegedy et al. 2015, section 6), at its own size.

    An `ImageProcessor` that squashes resizes it. Area is drawn evenly, the ratio evenly in its logarithm. Where ten tries do not fit into the image, the largest centred window of an allowed ratio is taken.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(0, height - h, endpoint=True), rng.integers(0, width - w, endpoint=True)
            return image[top : top + h, left : left + w]
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    top, left = (height - h) // 2, (width - w) // 2
    return image[top : top + h, left : left + w]


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
    raise UserError(f"{directory} holds no preprocessor_config.json: give a published model's directory, or use a preset")


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
        return dict(size=_height_width(config["crop_size"]), fit="crop", shorter_side=shorter_side, **fields)
    return dict(size=_height_width(size), fit="squash", **fields)


def _height_width(size: int | dict) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])
