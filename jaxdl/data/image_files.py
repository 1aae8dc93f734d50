"""Image files, of every mode and depth that PIL reads, as RGB of 8 bits."""

import contextlib
import functools
import io
import os
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, UnidentifiedImageError

from jaxdl.errors import UserError

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262
"""Tags of EXIF and of TIFF."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What an orientation asks for (EXIF 2.32, section 4.6.4)."""
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PIXELS_OF_PNG = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""The chunks of a PNG that its pixels are made of."""
_METADATA_OF_JPEG, _SCAN_OF_JPEG = range(0xE2, 0xEE), 0xDA
"""Markers of segments: those of programs, but for JFIF, EXIF and Adobe's, which says what the colours are; and the first that is compressed."""


def decode(image: str | os.PathLike | bytes) -> UInt8[np.ndarray, "H W 3"]:
    """An image file, or the bytes of one, as RGB from 0 to 255, turned the way its EXIF orientation says. EXIF, XMP and colour profiles that are broken are as if they were not there.

    - Of 16 bits per channel the upper 8 are taken. Grey values of 32 bits and floating-point ones have no range of their own: from 0 to 255 they are taken as they are, and beyond refused, as floating-point ones from 0 to 1 are.
    - What is transparent lies on white, as transformers has it, whatever colour is hidden there.
    - Of an animation, and of a file with several pages, the first image is taken.

    Raises `UserError` for what PIL cannot read, naming the file.
    """
    given = f"an image of {len(image):,} bytes" if isinstance(image, bytes) else str(image)
    try:
        try:
            return _decode(image)
        except Warning:  # Of broken tags or many pixels, where a program makes errors of warnings.
            with warnings.catch_warnings(action="ignore"):
                return _decode(image)
    except UserError as error:
        raise UserError(f"{given} {error}") from None
    except FileNotFoundError as error:
        raise UserError(f"{given} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{given} is a folder and cannot be read as an image: name a file in it") from error
    except PermissionError as error:
        raise UserError(f"{given} cannot be read as an image ({error.strerror}): change its permissions") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{given} cannot be read as an image (no PNG, JPEG or other known format): convert or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{given} has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller, or remove it") from error
    except Exception as error:  # What PIL raises for a broken file is of nearly any kind.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{given} cannot be read as an image ({reason}): repair or remove it") from error


def as_image(array: np.ndarray) -> UInt8[np.ndarray, "H W C"]:
    """What a data set gives as the array of an image, as `decode` would have it: of 16 bits per channel the upper 8, what is transparent on white. Grey stays grey. Raises `UserError` for another one."""
    array = (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"an image is an array {array.shape} of {array.dtype}: choose data with height, width and 1, 3 or 4 channels of 8 or 16 bits"
        )
    return array if array.shape[-1] < 4 else np.asarray(_on_white(Image.fromarray(array)).convert("RGB"))


def _decode(image: str | os.PathLike | bytes) -> UInt8[np.ndarray, "H W 3"]:
    """As `decode`, with PIL's errors. It refuses some files for their metadata alone, so that there is a second try without them."""
    try:
        return _pixels(image)
    except (Warning, UserError, FileNotFoundError):
        raise
    except Exception:
        with contextlib.suppress(Exception):
            return _pixels(_without_metadata(image if isinstance(image, bytes) else Path(image).read_bytes()))
        raise


def _pixels(image: str | os.PathLike | bytes) -> UInt8[np.ndarray, "H W 3"]:
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        picture = _on_white(_eight_bits(picture)).convert("RGB")
        return np.array(picture if turn is None else picture.transpose(turn))


def _orientation(picture: Image.Image) -> int:
    """From 1 to 8; 1, as it is, where nothing that can be read says otherwise."""
    try:
        found = picture.getexif().get(_ORIENTATION)
    except Warning:
        raise
    except Exception:
        return 1
    return found if isinstance(found, int) else 1


def _eight_bits(picture: Image.Image) -> Image.Image:
    """In a mode of 8 bits per channel that PIL converts to RGB or RGBA without losing what it means."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return _of_sixteen_bits(picture)
    if picture.mode in ("I", "F"):
        return _of_any_range(picture)
    if picture.mode == "LAB":
        return ImageCms.applyTransform(picture, _lab_to_rgb())
    return picture


def _of_sixteen_bits(picture: Image.Image) -> Image.Image:
    """The upper 8 bits of grey values. TIFF has some of 12 bits, and some that count from white."""
    values, tags = np.asarray(picture).astype(np.int32), getattr(picture, "tag_v2", {})
    (bits, *_) = tags.get(_BITS, (16,))
    values = values << (16 - bits) if bits < 16 else values
    grey = _grey(values >> 8 if tags.get(_PHOTOMETRIC) != 0 else 255 - (values >> 8))
    hidden = picture.info.get("transparency")
    return grey if hidden is None else Image.merge("LA", (grey, _grey(255 * (values != hidden))))


def _of_any_range(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    # Values from 0 to 1 are most likely shares of white, but they could be nearly black.
    if not 0 <= low <= high <= 255 or (picture.mode == "F" and 0 < high <= 1):
        kind = "floating-point values" if picture.mode == "F" else "values of 32 bits"
        raise UserError(
            f"has {kind} from {low:g} to {high:g}, which have no range of their own: save it with 8 or 16 bits per channel"
        )
    return _grey(np.rint(values))


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("LA").convert("RGBA") if picture.mode == "La" else picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


@functools.cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    profiles = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
    return ImageCms.buildTransform(*profiles, "LAB", "RGB")


def _without_metadata(content: bytes) -> bytes:
    """A PNG of nothing but its pixels, a JPEG without profiles and what else programs put there; other files as they are."""
    kept, start = [content[: len(_PNG)]], len(_PNG)
    if content.startswith(_PNG):
        while start < len(content):
            end = start + 12 + int.from_bytes(content[start : start + 4], "big")
            if content[start + 4 : start + 8] in _PIXELS_OF_PNG:
                kept.append(content[start:end])
            start = end
    elif content.startswith(_JPEG):
        kept, start = [_JPEG], len(_JPEG)
        while start + 1 < len(content) and content[start + 1] != _SCAN_OF_JPEG:
            end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
            if content[start + 1] not in _METADATA_OF_JPEG:
                kept.append(content[start:end])
            start = end
    return b"".join(kept) + content[start:]
