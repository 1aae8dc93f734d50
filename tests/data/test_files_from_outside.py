"""Files as other people's programs write them: each is read as what it means, or refused in one line that names it."""

import dataclasses
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from folders import WRITE
from PIL import Image, ImageCms, ImageOps

from jaxdl.data import (
    ANNOTATED_IMAGES,
    CAPTIONED_IMAGES,
    DOCUMENTS,
    KINDS,
    LABELLED_IMAGES,
    NAMES,
    PARALLEL_TEXT,
    Kind,
    Source,
    report_left_out,
)
from jaxdl.data.image import decode
from jaxdl.data.image_folders import MetadataFolder
from jaxdl.data.text_files import read_lines, read_text, replace_surrogates
from jaxdl.errors import UserError

COLORS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
RAMP = np.arange(256, dtype=np.uint8)[None].repeat(2, 0)
DEEP = RAMP.astype(np.uint16) * 257
"""The ramp in 16 bits."""


def refused(action, *words: str) -> None:
    """It is refused in one line with these words."""
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def whole(kind: Kind, folder: Path) -> Source:
    """All that a folder has of a kind."""
    return dataclasses.replace(kind, same_classes=False).open(f"builtin:{next(iter(kind.builtin))}", f"folder:{folder}")[1]


# --- image files


def encoded(picture: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(bits: int, color: int, row: bytes, width: int, *chunks: bytes) -> bytes:
    """A PNG of one row, of kinds that PIL does not write."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def tiff(bits: int, photometric: int, width: int, row: bytes) -> bytes:
    """A TIFF of one row of grey values, of kinds that PIL does not write."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    padded = row + bytes(len(row) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(padded)) + padded + struct.pack("<H", len(tags)) + entries + bytes(4)


tiff_of = lambda bits, photometric, width, row: tiff(bits, photometric, width, row)
lab = ImageCms.profileToProfile(
    Image.fromarray(COLORS), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
)
grey = lambda values: np.repeat(np.asarray(values, np.uint8)[..., None], 3, -1)

GREY_FILES = {
    "8 bits": encoded(RAMP),
    "16 bits, PNG": encoded(DEEP),
    "16 bits, TIFF": encoded(DEEP, "TIFF"),
    "16 bits, packed TIFF": encoded(DEEP, "TIFF", compression="tiff_lzw"),
    "16 bits, JPEG 2000": encoded(DEEP, "JPEG2000", irreversible=False),
    "16 bits, PGM": encoded(DEEP, "PPM"),
    "16 bits, big end first": encoded(Image.frombytes("I;16B", (256, 2), DEEP.astype(">u2").tobytes()), "TIFF"),
    "8 bits in 32": encoded(RAMP.astype(np.int32), "TIFF"),
    "8 bits in floats": encoded(RAMP.astype(np.float32), "TIFF"),
    "LA": encoded(Image.fromarray(RAMP).convert("LA")),
    "RGBA": encoded(Image.fromarray(RAMP).convert("RGBA")),
    "palette": encoded(Image.fromarray(RAMP).convert("P")),
    "RGB": encoded(Image.fromarray(RAMP).convert("RGB"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", GREY_FILES)
def test_grey_of_every_depth_is_the_same_picture(name):
    np.testing.assert_array_equal(decode(GREY_FILES[name]), grey(RAMP))


ROWS = {
    "1 bit": (png(1, 0, b"\x50", 4), [0, 255, 0, 255]),
    "2 bits": (png(2, 0, b"\x1b", 4), [0, 85, 170, 255]),
    "4 bits": (png(4, 0, b"\x05\xaf", 4), [0, 85, 170, 255]),
    "16 bits with alpha": (png(16, 4, struct.pack(">4H", 0x1234, 65535, 5, 0), 2), [0x12, 255]),
    "16 bits, one of them transparent": (
        png(16, 0, struct.pack(">3H", 7, 0x1234, 65535), 3, chunk(b"tRNS", b"\0\7")),
        [255, 0x12, 255],
    ),
    "12 bits": (tiff(12, 1, 2, b"\x80\x0f\xff"), [0x80, 0xFF]),
    "16 bits that count from white": (tiff(16, 0, 3, struct.pack("<3H", 0, 0x1234, 65535)), [255, 255 - 0x12, 0]),
    "8 bits that count from white": (tiff(8, 0, 3, bytes([0, 18, 255])), [255, 237, 0]),
}


@pytest.mark.parametrize("name", ROWS)
def test_grey_that_pil_does_not_write_is_what_it_means(name):
    content, values = ROWS[name]
    np.testing.assert_array_equal(decode(content), grey([values]))


COLOR_FILES = {
    "RGB, PNG": (encoded(COLORS), 0),
    "RGB, 16 bits": (png(16, 2, (COLORS[0].astype(">u2") * 257).tobytes(), 7), 0),
    "RGBA": (encoded(Image.fromarray(COLORS).convert("RGBA")), 0),
    "RGBA, TIFF": (encoded(Image.fromarray(COLORS).convert("RGBA"), "TIFF"), 0),
    "BMP": (encoded(COLORS, "BMP"), 0),
    "YCbCr": (encoded(Image.fromarray(COLORS).convert("YCbCr"), "TIFF"), 3),
    "CMYK": (encoded(Image.fromarray(COLORS).convert("CMYK"), "TIFF"), 0),
    "CMYK, JPEG": (encoded(Image.fromarray(COLORS.repeat(16, 0).repeat(16, 1)).convert("CMYK"), "JPEG", quality=100), 12),
    "LAB": (encoded(lab, "TIFF"), 18),  # 8 bits are coarse where a colour is at the edge of what sRGB has.
}


@pytest.mark.parametrize("name", COLOR_FILES)
def test_colours_of_every_mode_are_the_same_picture(name):
    content, close = COLOR_FILES[name]
    image = decode(content)
    factor = image.shape[1] // 7
    wanted = COLORS[: image.shape[0] // factor].astype(int)
    middle = image[factor // 2 :: factor, factor // 2 :: factor].astype(int)
    assert np.abs(middle - wanted).max() <= close


MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "I;16B")
FORMATS = ("PNG", "TIFF", "JPEG", "GIF", "WEBP", "BMP", "PPM", "JPEG2000", "TGA", "ICO", "DDS", "PCX", "SGI")


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_pil_writes_is_an_image_of_three_channels(kind):
    written = 0
    for mode in MODES:
        sixteen = Image.frombytes(mode, (7, 5), bytes(70)) if mode.startswith("I;16") else None
        other = lab if mode == "LAB" else Image.fromarray(COLORS).convert("L").convert(mode) if mode in "IF1" else None
        picture = sixteen or other or (Image.fromarray(COLORS).convert("P" if mode == "PA" else mode).convert(mode))
        try:
            content = encoded(picture, kind)
        except (OSError, ValueError, KeyError):  # There is no such file.
            continue
        image, written = decode(content), written + 1
        assert image.shape == (5, 7, 3) and image.dtype == np.uint8
        if mode.startswith("I;16"):
            assert image.max() == 0
    assert written >= 2


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([0, 256], "i4"), ([-1, 5], "i4"), ([0, 70_000], "i4"), ([0, 0.5, 1], "f4"), ([0, 300], "f4"), ([-1, 1], "f4"), ([0, np.nan], "f4"), ([np.inf], "f4")],
)  # fmt: skip
def test_values_without_a_range_of_their_own_are_refused(values, dtype, tmp_path):
    (tmp_path / "deep.tif").write_bytes(encoded(np.array([values], dtype), "TIFF"))
    refused(lambda: decode(tmp_path / "deep.tif"), "deep.tif", "no range of their own", "8 or 16 bits")
    eight = np.clip(np.nan_to_num(values), 0, 255).astype(np.uint8)[None]
    (tmp_path / "deep.tif").write_bytes(encoded(eight, "TIFF"))  # As it advises.
    np.testing.assert_array_equal(decode(tmp_path / "deep.tif"), grey(eight))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF", "ICO", "TGA", "JPEG2000", "AVIF"])
def test_what_is_transparent_is_white_and_no_hidden_colour_appears(kind):
    clear = Image.fromarray(np.dstack([COLORS, np.zeros((5, 7), np.uint8)]))
    options = dict(lossless=True, exact=True) if kind == "WEBP" else {}
    try:
        content = encoded(clear, kind, **options)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    assert (decode(content) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L", "1"])
def test_transparency_is_what_transformers_makes_of_it(mode):
    transforms = pytest.importorskip("transformers.image_transforms")
    alpha = np.random.default_rng(1).integers(0, 256, (5, 7), np.uint8)
    picture = Image.fromarray(np.dstack([COLORS, alpha])).convert(mode)
    np.testing.assert_array_equal(decode(encoded(picture)), transforms.convert_to_rgb(picture, return_numpy=True))


def test_half_of_black_on_white_is_grey_and_palettes_have_holes():
    half = np.zeros((2, 2, 4), np.uint8)
    half[..., 3] = 128
    assert np.abs(decode(encoded(half)).astype(int) - 127).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 10, 10, 10, 200])
    palette.putdata([0, 1])
    for transparency in (0, b"\0\xff"):
        np.testing.assert_array_equal(decode(encoded(palette, transparency=transparency)), [[[255] * 3, [10, 10, 200]]])
    keyed = png(8, 2, bytes([1, 2, 3, 4, 5, 6]), 2, chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))
    np.testing.assert_array_equal(decode(keyed), [[[255] * 3, [4, 5, 6]]])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_images_the_first_is_taken(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = dict(lossless=True) if kind == "WEBP" else {}
    image = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    np.testing.assert_array_equal(image, np.full((4, 4, 3), (250, 0, 0)))


ENTRY = lambda tag, kind, count, value: struct.pack("<HHII", tag, kind, count, value)
TURNED = ENTRY(0x112, 3, 1, 6)
LOST = ENTRY(0x8769, 4, 1, 0xFFFFFFF) + ENTRY(0x9003, 2, 20, 0xFFFF)
"""A pointer to nowhere, and a date that lies behind the end."""
BROKEN = {
    "nothing": b"",
    "noise": b"garbage",
    "no directory": b"II*\0\xff\xff\xff\x7f",
    "cut short": b"MM\0*\0\0\0\x08\0\5abcdef",
    "pointers to nowhere": b"II*\0\x08\0\0\0\2\0" + LOST,
    "an orientation of 99": b"II*\0\x08\0\0\0\1\0" + ENTRY(0x112, 3, 1, 99) + bytes(4),
    "an orientation of letters": b"II*\0\x08\0\0\0\1\0" + ENTRY(0x112, 2, 1, ord("6")) + bytes(4),
    "an orientation with rational parts": b"II*\0\x08\0\0\0\1\0" + ENTRY(0x112, 5, 1, 0) + bytes(4),
    "a right orientation before broken tags": b"II*\0\x08\0\0\0\3\0" + TURNED + LOST,
}
OTHER = {
    "an empty profile": (2, b"ICC_PROFILE\0"),
    "a part of a profile": (2, b"ICC_PROFILE\0\1\3xxx"),
    "broken XMP": (1, b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="z'),
    "XMP that is no text": (1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe\xff"),
    "a broken resource": (13, b"Photoshop 3.0\x008BIM\x03\xed"),
    "a broken index of pictures": (2, b"MPF\0II*\0\xff\xff\xff\xff"),
}


def segment(number: int, data: bytes) -> bytes:
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(data) + 2) + data


@pytest.mark.parametrize("strict", [False, True], ids=["warnings", "errors"])
@pytest.mark.parametrize("name", [*BROKEN, *OTHER])
def test_metadata_that_is_broken_makes_no_picture_unreadable(name, strict):
    """Also where warnings are errors, as `python -W error` makes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        photograph, drawing = encoded(COLORS, "JPEG"), encoded(COLORS)
        number, data = OTHER.get(name, (1, b"Exif\0\0" + BROKEN.get(name, b"")))
        turn = (lambda image: np.rot90(image, -1)) if name.startswith("a right") else (lambda image: image)
        found = decode(photograph[:2] + segment(number, data) + photograph[2:])
        np.testing.assert_array_equal(found, turn(decode(photograph)))
        if name in BROKEN:
            exif = BROKEN[name]
            np.testing.assert_array_equal(decode(drawing[:33] + chunk(b"eXIf", exif) + drawing[33:]), turn(COLORS))
            np.testing.assert_array_equal(decode(encoded(COLORS, "WEBP", lossless=True, exif=b"Exif\0\0" + exif)), turn(COLORS))


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "with a wrong sum"])
@pytest.mark.parametrize("name", [b"iCCP", b"iTXt", b"zTXt", b"tEXt", b"eXIf", b"pHYs", b"acTL"])
def test_chunks_of_a_png_that_are_broken_do_no_harm(name, damaged):
    whole = encoded(COLORS)
    for data in (b"", b"x", b"Name\0\1abc", b"Name\0\0" + zlib.compress(bytes(2 << 20)), b"XML:com.adobe.xmp\0\0\0\0\0<x"):
        extra = chunk(name, data)
        extra = extra[:-1] + bytes([extra[-1] ^ damaged])
        np.testing.assert_array_equal(decode(whole[:33] + extra + whole[33:]), COLORS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_every_orientation_is_turned_as_pil_turns_it(kind):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(COLORS, kind, exif=exif, **(dict(lossless=True) if kind == "WEBP" else {}))
        with Image.open(io.BytesIO(content)) as picture:
            np.testing.assert_array_equal(decode(content), np.asarray(ImageOps.exif_transpose(picture)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_file_that_was_cut_anywhere_is_whole_or_refused(kind, tmp_path):
    whole = encoded(COLORS.repeat(8, 0).repeat(8, 1), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    for end in np.linspace(0, len(whole) - 12, 40).astype(int):
        path.write_bytes(whole[:end])
        try:
            assert decode(path).shape == (40, 56, 3)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    path.write_bytes(b"")
    refused(lambda: decode(path), str(path), "cannot be read as an image")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_file_that_was_damaged_anywhere_is_an_image_or_refused(kind):
    whole, random = encoded(COLORS, kind), np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            content[place] = random.integers(256)
        try:
            assert decode(bytes(content)).shape[-1] == 3
        except UserError as error:
            assert "\n" not in str(error)


def test_small_and_large_images(monkeypatch):
    np.testing.assert_array_equal(decode(encoded(np.full((1, 1, 3), 7, np.uint8), "BMP")), [[[7, 7, 7]]])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    np.testing.assert_array_equal(decode(encoded(COLORS)), COLORS)  # 35 pixels: PIL warns, and warnings are errors here.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    refused(lambda: decode(encoded(COLORS)), "more than 30 pixels", "make it smaller")


def test_a_folder_and_a_file_that_may_not_be_read_are_no_images(tmp_path, monkeypatch):
    refused(lambda: decode(tmp_path), str(tmp_path), "is a folder")
    (tmp_path / "a.svg").write_text("<svg/>")
    refused(lambda: decode(tmp_path / "a.svg"), "a.svg", "no PNG, JPEG or other known format", "convert")

    def forbidden(*given, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", forbidden)
    refused(lambda: decode(tmp_path / "a.png"), "a.png", "Permission denied", "change its permissions")


# --- text files

TEXT = "Größe 日本 🙂\nzwei\u2028Teile\n"
TEXTS = {
    "UTF-8": TEXT.encode(),
    "UTF-8 with its mark": TEXT.encode("utf-8-sig"),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "UTF-32": TEXT.encode("utf-32"),
    "CRLF": TEXT.replace("\n", "\r\n").encode(),
    "CR": TEXT.replace("\n", "\r").encode(),
    "CRLF in UTF-16": TEXT.replace("\n", "\r\n").encode("utf-16"),
}
NO_TEXTS = {
    "Latin-1": ("eins\nGröße\n".encode("latin-1"), "line 2"),
    "UTF-16 without its mark": ("eins\nzwei\n".encode("utf-16-le"), "line 1"),
    "half a character": ("eins\nzwei\nGrö".encode()[:-1], "line 3"),
    "half a surrogate pair": (b"eins\n\xed\xa0\xbd\n", "line 2"),
    "a NUL": (b"eins\nzw\0ei\n", "line 2"),
    "UTF-16 that was cut": (TEXT.encode("utf-16")[:-1], "line 2"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_of_every_encoding_and_end_of_line_is_the_same(name, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXTS[name])
    assert read_text(path) == TEXT and read_lines(path) == TEXT.split("\n")[:2]
    assert list(DOCUMENTS.open("builtin:modules", f"folder:{tmp_path}")[1]) == [TEXT]
    (tmp_path / "b.txt").write_bytes(TEXTS[name])
    names = whole(NAMES, tmp_path)
    assert sorted({each.text for each in names}) == ["Größe 日本 🙂", "zwei Teile"] and names.info.classes == ("a", "b")
    for language in ("en", "de"):
        (tmp_path / f"train.{language}").write_bytes(TEXTS[name])
    assert [each.target for each in PARALLEL_TEXT.open_part(f"folder:{tmp_path}", "train")] == TEXT.split("\n")[:2]


@pytest.mark.parametrize("name", NO_TEXTS)
def test_what_is_no_text_is_refused_with_the_file_and_the_line(name, tmp_path):
    content, line = NO_TEXTS[name]
    path = tmp_path / "a.txt"
    for file in ("a.txt", "b.txt", "train.en", "train.de"):
        (tmp_path / file).write_bytes(content)
    refused(lambda: list(DOCUMENTS.open("builtin:modules", f"folder:{tmp_path}")[1]), str(path), line, "convert it")
    refused(lambda: whole(NAMES, tmp_path), str(path), line)
    refused(lambda: PARALLEL_TEXT.open_part(f"folder:{tmp_path}", "train"), "train.en", line)
    (tmp_path / "metadata.jsonl").write_bytes(content)
    refused(lambda: MetadataFolder(tmp_path), "metadata.jsonl", line)


@pytest.mark.parametrize(
    ("content", "lines"),
    [("", []), ("\n", [""]), ("a", ["a"]), ("a\n", ["a"]), ("a\n\nb", ["a", "", "b"]), ("a\rb\nc", ["a\rb", "c"])],
)
def test_lines_are_those_between_ends(content, lines, tmp_path):
    (tmp_path / "a").write_bytes(content.encode())
    assert read_lines(tmp_path / "a") == lines


def test_half_an_emoji_becomes_the_character_that_stands_for_what_is_unknown():
    assert replace_surrogates("a \ud83d cat \udc00") == "a \ufffd cat \ufffd"
    assert replace_surrogates("🙂 日本") == "🙂 日本" and replace_surrogates("\ud83d\ude42") == "🙂"


# --- metadata


def folder_of_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLORS).save(folder / name)
    return folder


GOOD_ROWS = {
    "a caption": ('{"file_name": "a.png", "text": "one"}', ("one",)),
    "captions": ('{"file_name": "a.png", "text": ["one", "two"]}', ("one", "two")),
    "half an emoji": ('{"file_name": "a.png", "text": "a \\ud83d cat"}', ("a \ufffd cat",)),
    "a whole emoji": ('{"file_name": "a.png", "text": "\\ud83d\\ude42"}', ("🙂",)),
    "a separator of lines": (
        '{"file_name": "a.png", "text": "one\u2028two\u2029three\u0085four"}',
        ("one\u2028two\u2029three\u0085four",),
    ),
    "more keys": ('{"file_name": "a.png", "text": "one", "width": 3, "tags": null}', ("one",)),
    "an empty caption": ('{"file_name": "a.png", "text": " "}', ()),
    "a path inside": ('{"file_name": "b/../a.png", "text": "one"}', ("one",)),
    "a path of the folder itself": ('{"file_name": "./a.png", "text": "one"}', ("one",)),
}


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("name", GOOD_ROWS)
def test_a_row_says_what_is_on_its_image(name, ends, tmp_path):
    row, captions = GOOD_ROWS[name]
    folder_of_images(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + ends.join([row, row]).encode())
    source = MetadataFolder(tmp_path)
    assert [each.captions for each in source] == [captions] * 2
    np.testing.assert_array_equal(source[0].image, COLORS)
    if captions:
        assert [each.captions for each in CAPTIONED_IMAGES.open("builtin:scenes", f"folder:{tmp_path}")[1]] == [captions] * 2


TEXT_ROW = "text must be a caption or a list"
BAD_ROWS = {
    '{"file_name": "a.png", "text": null}': TEXT_ROW,
    '{"file_name": "a.png", "text": 3}': TEXT_ROW,
    '{"file_name": "a.png", "text": true}': TEXT_ROW,
    '{"file_name": "a.png", "text": {"en": "one"}}': TEXT_ROW,
    '{"file_name": "a.png", "text": []}': TEXT_ROW,
    '{"file_name": "a.png", "text": ["one", null]}': TEXT_ROW,
    '{"file_name": "a.png", "text": [["one"]]}': TEXT_ROW,
    '{"file_name": "a.png"}': "expected",
    '{"text": "one"}': "expected",
    '{"file_name": null, "text": "one"}': "file_name must be",
    '{"file_name": 3, "text": "one"}': "file_name must be",
    '{"file_name": ["a.png"], "text": "one"}': "file_name must be",
    '{"file_name": "", "text": "one"}': "file_name must be",
    '{"file_name": "a\\u0000.png", "text": "one"}': "file_name must be",
    '{"file_name": "\\ud83d.png", "text": "one"}': "file_name must be",
    '{"file_name": "../a.png", "text": "one"}': "below the folder",
    '{"file_name": "b/../../a.png", "text": "one"}': "below the folder",
    '{"file_name": "/etc/passwd", "text": "one"}': "below the folder",
    '{"file_name": "none.png", "text": "one"}': "there is no image",
    '{"file_name": ".", "text": "one"}': "there is no image",
    '{"file_name": "a.png", "questions": [["what?"]]}': "questions must be",
    '{"file_name": "a.png", "questions": {"what?": "this"}}': "questions must be",
    '["a.png", "one"]': "expected",
    '"a.png"': "expected",
    "3": "expected",
    "null": "expected",
    "{": "expected",
    "[" * 100_000: "expected",
    '{"file_name": "a.png", "text": "one"} {}': "expected",
    '{"file_name": "a.png", "n": ' + "9" * 5000 + "}": "expected",
}  # fmt: skip


@pytest.mark.parametrize("row", BAD_ROWS, ids=lambda row: row[:50])
def test_a_row_that_says_something_else_is_refused_with_its_line(row, tmp_path):
    folder_of_images(tmp_path, "a.png")
    good = '{"file_name": "a.png", "text": "one"}'
    (tmp_path / "metadata.jsonl").write_text("\n".join([good, "", row, good]))
    refused(lambda: MetadataFolder(tmp_path), f"{tmp_path / 'metadata.jsonl'}, line 3: ", BAD_ROWS[row])
    (tmp_path / "metadata.jsonl").write_text(good)
    assert len(MetadataFolder(tmp_path)) == 1


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_metadata_may_be_a_table(ends, tmp_path):
    folder_of_images(tmp_path, "a.png", "b/c.png")
    lines = ["file_name,label,text", 'a.png,3,"one, and', 'two"', "b/c.png,4,three", ""]
    (tmp_path / "metadata.csv").write_bytes(ends.join(lines).encode("utf-8-sig"))
    source, _ = CAPTIONED_IMAGES.open(f"folder:{tmp_path}", "builtin:scenes")
    assert [each.captions for each in source] == [("one, and\ntwo",), ("three",)] and source[1].image.shape == (5, 7, 3)
    refused(lambda: LABELLED_IMAGES.open(f"folder:{tmp_path}"), "has captions (metadata.csv) and no labels")


@pytest.mark.parametrize(
    ("table", "words"),
    [("name,text\na.png,one\n", "it needs file_name and text"), ("", "columns none"), ("file_name,text\n", "has no rows"),
     ("file_name,text\na.png\n", "line 2: expected as many cells"), ("file_name,text\na.png,one,two\n", "line 2: expected as many"),
     ("file_name,text\na.png,one\n../a.png,two\n", "line 3: file_name must be below"), ("file_name,text\nnone.png,one\n", "line 2: there is no image"),
     ("file_name,text\na.png," + "x" * 200_000, "no CSV")],
)  # fmt: skip
def test_a_table_of_another_form_is_refused(table, words, tmp_path):
    folder_of_images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(table)
    refused(lambda: MetadataFolder(tmp_path), "metadata.csv", words)


# --- folders


def clutter(folder: Path) -> None:
    """What systems, editors and archives leave in folders."""
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", ".hidden.txt", ".hidden.jpg"):
        (folder / name).write_bytes(b"\0\1\2")
    for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
        (folder / name).mkdir()
        for file in ("0.png", "a.txt", "train.en", "metadata.jsonl"):
            (folder / name / file).write_bytes(b"\0\1\2")


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.folder], ids=lambda kind: kind.name.replace(" ", "_"))
def test_what_systems_put_into_folders_is_no_data(kind, tmp_path):
    write, each = WRITE[kind.name]
    write(tmp_path / "train", 3)
    write(tmp_path / "val", 2)
    before = kind.open(f"folder:{tmp_path}")
    inside = tmp_path / "train" if (tmp_path / "train").is_dir() else tmp_path
    for folder in (inside, *(path for path in sorted(inside.iterdir()) if path.is_dir())):
        clutter(folder)
    after = kind.open(f"folder:{tmp_path}")
    assert [len(source) for source in after] == [len(source) for source in before] == [3 * each, 2 * each]
    assert after[0].info.classes == before[0].info.classes and after[0].info.digest == before[0].info.digest
    assert len(report_left_out(*after)) <= 1 and not report_left_out(*before)


def test_of_a_class_all_images_below_it_are_read_and_the_rest_is_told(tmp_path):
    folder_of_images(tmp_path, "cat/a.png", "cat/deep/er/b.PNG", "dog/c.JPG", "stray.png")
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "cat/notes.TXT", "cat/.hidden", "dog/README"):
        (tmp_path / name).write_text("x")
    source = whole(LABELLED_IMAGES, tmp_path)
    assert source.info.classes == ("cat", "dog", "empty") and [each.label for each in source] == [0, 0, 1]
    (line,) = report_left_out(source)
    assert line.startswith(f"folder:{tmp_path}: not read: 2 .txt, ") and line.endswith("; there are no images of empty")
    assert all(part in line for part in ("1 hidden", "1 without an ending", "1 images in no class's folder"))


def test_images_that_the_metadata_do_not_name_are_told(tmp_path):
    folder_of_images(tmp_path, "a.png", "b.png", "c/d.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one"]}\n{"file_name": "b.png", "text": ""}\n')
    source = whole(CAPTIONED_IMAGES, tmp_path)
    assert len(source) == 1
    (line,) = report_left_out(source)
    assert "1 of 2 have no caption and are left out" in line and "1 images that metadata.jsonl does not name" in line


@pytest.mark.parametrize("kind", [LABELLED_IMAGES, DOCUMENTS], ids=["images", "documents"])
def test_links_are_followed_but_not_round_and_round(kind, tmp_path):
    WRITE[kind.name][0](tmp_path / "elsewhere", 3)
    place = tmp_path / "data"
    place.mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (place / path.name).symlink_to(path)
    plain, linked = (whole(kind, path) for path in (tmp_path / "elsewhere", place))
    assert len(linked) == len(plain) and linked.info.classes == plain.info.classes
    inside = place if kind is DOCUMENTS else tmp_path / "elsewhere" / "ant"
    (inside / "self").symlink_to(inside)
    (place / "whole").symlink_to(place)
    (inside / "up").symlink_to(place)
    (inside / "broken.png").symlink_to(tmp_path / "nowhere")
    looped = whole(kind, place)
    assert len(looped) == len(plain) and looped.info.classes == plain.info.classes
    (line,) = report_left_out(looped)
    assert "links to a folder that they are in" in line and "1 broken links" in line


def test_names_that_are_no_unicode(tmp_path):
    files = folder_of_images(tmp_path / "classes", "cat/a.png", "dog/b.png")
    os.rename(files / "cat" / "a.png", os.fsencode(files / "cat") + b"/\xe9.png")
    assert whole(LABELLED_IMAGES, files)[0].image.shape == (5, 7, 3)
    os.rename(files / "dog", os.fsencode(files) + b"/\xe9")
    refused(lambda: whole(LABELLED_IMAGES, files), "no UTF-8", "\\xe9", "rename it")
    (tmp_path / "names").mkdir()
    for name in (b"Irish.txt", b"\xe9.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path / "names") + b"/" + name)).write_text("x\n")
    refused(lambda: whole(NAMES, tmp_path / "names"), "no UTF-8", "rename it")


@pytest.mark.parametrize("kind", [LABELLED_IMAGES, CAPTIONED_IMAGES, ANNOTATED_IMAGES, NAMES], ids=lambda kind: kind.name)
def test_a_file_in_the_place_of_a_folder_says_so(kind, tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK")
    refused(lambda: kind.open(f"folder:{tmp_path / 'data.zip'}"), "data.zip is a file, not a folder", "unpack it")


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.folder], ids=lambda kind: kind.name.replace(" ", "_"))
def test_a_folder_that_may_not_be_read_is_named(kind, tmp_path, monkeypatch):
    WRITE[kind.name][0](tmp_path / "train", 2)
    WRITE[kind.name][0](tmp_path / "val", 2)

    def forbidden(path, *given, **options):
        raise PermissionError(13, "Permission denied", str(path))

    read = Path.read_bytes
    monkeypatch.setattr(os, "scandir", forbidden)
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    refused(lambda: kind.open(f"folder:{tmp_path}"), str(tmp_path / "train"), "Permission denied", "permissions")
    monkeypatch.setattr(Path, "read_bytes", read)


@pytest.mark.parametrize("spec", ["folder:~nobody-of-that-name/x", "folder:" + "x" * 5000, "folder:a\0b"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.folder], ids=lambda kind: kind.name.replace(" ", "_"))
def test_a_path_that_cannot_be_is_refused(kind, spec):
    refused(lambda: kind.open(spec))


# --- records of TFDS


class Names:
    """A feature of classes."""

    names = ("a", "b")


@pytest.mark.parametrize("kind", [LABELLED_IMAGES, CAPTIONED_IMAGES, ANNOTATED_IMAGES], ids=lambda kind: kind.name)
def test_labels_of_records_are_those_of_classes(kind):
    element = kind.tfds.element({"image": None, "label": Names})
    assert element({"image": COLORS, "label": np.int64(1)}).label == 1
    for label in (-1, 2, 300):
        refused(lambda: element({"image": COLORS, "label": np.int64(label)}), f"the label {label}", "2 classes")
    for features in ({"image": None, "label": object()}, {"image": None}, {"label": Names}, {}):
        assert kind.tfds.element(features) is None
    deep = element({"image": DEEP[..., None], "label": 0}).image
    np.testing.assert_array_equal(deep[..., 0], RAMP)
    clear = np.dstack([COLORS, np.zeros((5, 7), np.uint8)])
    assert (element({"image": clear, "label": 0}).image == 255).all()
    refused(lambda: element({"image": COLORS / 255, "label": 0}), "float64")


@pytest.mark.parametrize("value", [b"caf\xe9", 3, None, np.zeros(3)])
def test_texts_of_records_are_texts(value):
    for kind, record in ((DOCUMENTS, {"text": value}), (PARALLEL_TEXT, {"en": value, "de": value})):
        element = kind.tfds.element(record)
        refused(lambda: element(record), "a record has")
        assert element(dict.fromkeys(record, "café".encode()))
