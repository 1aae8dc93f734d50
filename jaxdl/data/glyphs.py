"""Glyphs: the Latin letters of the fonts that come with matplotlib, as grey images with their Unicode names.

The fonts of one family are all to train on or all held out: a bold letter is nearly its regular one. Held-out letters are of a family that was never seen, Computer Modern, with upright, slanted, bold, sans-serif and typewriter fonts. A glyph is a pure function of its font, its letter and, where it is moved about, a seed.
"""

import dataclasses
import functools
import string
import unicodedata
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from jaxdl.data.digests import digest_of_packages
from jaxdl.data.elements import NO_PIXELS, AnnotatedImage, CaptionedImage, LabelledImage
from jaxdl.data.sources import Info, Mapped, Source, Split

FAMILIES: dict[str, tuple[str, ...]] = {
    "DejaVu Sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    "DejaVu Sans Mono": ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "STIX": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "Computer Modern": ("cmr10", "cmb10", "cmti10", "cmmi10", "cmss10", "cmtt10"),
}
"""Fonts with all Latin letters, by family."""
TEST_FAMILY = "Computer Modern"

CLASSES = string.ascii_uppercase + "abdefghnqrt"
"""Upper and lower case are one class where handwriting hardly tells them apart (EMNIST's merged classes; Cohen et al. 2017, section II)."""

_FILLS = 0.72
"""Share of the image's side that an em fills, so that ascenders and descenders are inside."""


@dataclasses.dataclass(frozen=True)
class Glyph:
    """A letter of a font."""

    font: str
    letter: str

    @property
    def label(self) -> int:
        """Index into `CLASSES`."""
        return CLASSES.index(self.letter if self.letter in CLASSES else self.letter.upper())

    @property
    def caption(self) -> str:
        """As Unicode calls the letter: "latin small letter a"."""
        return unicodedata.name(self.letter).lower()


@dataclasses.dataclass(frozen=True)
class Pose:
    """How a glyph is moved about in its image."""

    scale: float = 1.0
    degrees: float = 0.0
    right: float = 0.0
    """In units of the image's side; negative to the left."""
    down: float = 0.0


def all_glyphs(split: Split) -> list[Glyph]:
    """Letter by letter, each in all fonts of the split."""
    fonts = [font for family, fonts in FAMILIES.items() if (family == TEST_FAMILY) == (split == "test") for font in fonts]
    return [Glyph(font, letter) for letter in string.ascii_letters for font in fonts]


def render(glyph: Glyph, resolution: int, pose: Pose = Pose()) -> UInt8[np.ndarray, "H W 1"]:
    """The letter, white on black, all letters of a font on one line: its em is 0.72 of the side, and the middle between capital height and baseline is that of the image. Drawn at four times the resolution and averaged."""
    side = 4 * resolution
    canvas = Picture.new("L", (side, side))
    font = _font(glyph.font, max(1, round(_FILLS * side * pose.scale)))
    left, _, right, _ = font.getbbox(glyph.letter, anchor="ls")
    _, top, _, bottom = font.getbbox("H", anchor="ls")
    where = side / 2 - (left + right) / 2, side / 2 - (top + bottom) / 2
    ImageDraw.Draw(canvas).text(where, glyph.letter, fill=255, font=font, anchor="ls")
    if pose != Pose():
        shift = (round(pose.right * side), round(pose.down * side))
        canvas = canvas.rotate(pose.degrees, Picture.Resampling.BILINEAR, translate=shift)
    return np.asarray(canvas.resize((resolution, resolution), Picture.Resampling.BOX))[..., None]


class Glyphs(Source[CaptionedImage]):
    """All letters of the fonts of a split: 16 fonts to train on, 6 of another family to test. With `jitter` there are so many copies of each, one after the other, all turned, scaled and moved by a little at random; without it each is there once, as it is."""

    info = Info(classes=tuple(CLASSES))

    def __init__(self, split: Split, *, resolution: int = 32, jitter: int = 0):
        self.glyphs, self.resolution, self.jitter = all_glyphs(split), resolution, jitter
        self._seed = 0 if split == "train" else 1
        digest = digest_of_packages(["matplotlib", "numpy", "pillow"], "glyphs", split, resolution, jitter)
        self.info = dataclasses.replace(self.info, digest=digest)

    def __len__(self) -> int:
        return len(self.glyphs) * max(1, self.jitter)

    def __getitem__(self, index: int) -> CaptionedImage:
        told = self.annotations(index)
        return dataclasses.replace(told, image=render(self.glyph(index), self.resolution, self._pose(index)))

    def annotations(self, index: int) -> CaptionedImage:
        glyph = self.glyph(index)
        return CaptionedImage(NO_PIXELS, (glyph.caption,), glyph.label)

    def glyph(self, index: int) -> Glyph:
        """Which letter of which font it is."""
        if not 0 <= index < len(self):
            raise IndexError(f"glyph {index} of {len(self)}")
        return self.glyphs[index // max(1, self.jitter)]

    def _pose(self, index: int) -> Pose:
        if not self.jitter:
            return Pose()
        random = np.random.default_rng((self._seed, index))
        scale, degrees, (right, down) = random.uniform(0.8, 1.15), random.uniform(-12, 12), random.uniform(-0.08, 0.08, 2)
        return Pose(scale, degrees, right, down)


def captioned(split: Split, *, resolution: int = 32, jitter: int = 0) -> Glyphs:
    """`builtin:glyphs` with the Unicode name of each letter."""
    return Glyphs(split, resolution=resolution, jitter=jitter)


def labelled(split: Split, *, resolution: int = 32, jitter: int = 0) -> Source[LabelledImage]:
    """`builtin:glyphs` with the class of each letter."""
    glyphs = Glyphs(split, resolution=resolution, jitter=jitter)
    return Mapped(glyphs, lambda each: LabelledImage(each.image, each.label))


def annotated(split: Split, *, resolution: int = 32, jitter: int = 0) -> Source[AnnotatedImage]:
    """`builtin:glyphs` with both."""
    glyphs = Glyphs(split, resolution=resolution, jitter=jitter)
    return Mapped(glyphs, lambda each: AnnotatedImage(each.image, each.captions, label=each.label))


@functools.lru_cache(64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # Only for the folder of its fonts.

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # The basic layout is the same whether Pillow was built with Raqm or without.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
