"""The canvas that all figures are drawn on, and the one place that turns them into pixels and files."""

import dataclasses
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from jaxtyping import UInt8

from jaxdl.errors import UserError

if TYPE_CHECKING:  # Imported where it is used, so that a command line that draws nothing does not wait for it.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
"""Pixels per inch of every figure."""


@dataclasses.dataclass(frozen=True)
class Animation:
    """Grey or RGB frames that are shown over and over. Raises `UserError` without frames, and where they are too many per second for a GIF, whose viewers show 50 at most."""

    frames: UInt8[np.ndarray, "T H W C"]
    frames_per_second: float = 10

    def __post_init__(self) -> None:
        if not len(self.frames) or self.frames.shape[-1] not in (1, 3):
            raise UserError(f"frames of shape {self.frames.shape}: an animation has one frame or more, of 1 or 3 channels")
        if not 0 < self.frames_per_second <= 50:
            raise UserError(f"{self.frames_per_second:g} frames per second: choose more than 0 and at most 50")


Picture = Union["Figure", UInt8[np.ndarray, "H W C"], Animation]
"""What `save` writes."""


def subplots(
    rows: int, columns: int, width: float, height: float, width_ratios: Sequence[float] | None = None
) -> "tuple[Figure, np.ndarray]":
    """A figure with a flat array of axes, each `width` by `height` inches, without a global pyplot state."""
    import matplotlib.figure

    total = width * (sum(width_ratios) if width_ratios else columns)
    figure = matplotlib.figure.Figure(figsize=(total, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": width_ratios}).ravel()
    return figure, axes


def show(axis: "Axes", image: UInt8[np.ndarray, "H W C"]) -> None:
    """Draws an image, grey where it has one channel, with sharp pixels and no ticks."""
    image = image[..., 0] if image.shape[-1] == 1 else image
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def legend_label(text: str) -> str:
    """A text as the label of what is drawn: matplotlib leaves those that are empty or begin with `_` out of legends, so that they get a mark before them, which is not drawn."""
    return _SHOWN + text if text.startswith("_") or not text else text


_SHOWN = "\u2063"
"""An invisible separator, which no font draws."""


def save(picture: Picture, path: Path) -> Path:
    """Writes `path` as PNG, or as GIF if it is an animation, and returns where; the suffix is added to a name that lacks it."""
    from PIL import Image

    suffix = ".gif" if isinstance(picture, Animation) else ".png"
    path = path if path.name.endswith(suffix) else path.with_name(path.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = lambda pixels: Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if isinstance(picture, Animation):
        first, *rest = map(image, picture.frames)
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / picture.frames_per_second), loop=0)
    else:
        image(pixels(picture)).save(path)
    return path


def pixels(picture: Picture) -> UInt8[np.ndarray, "H W C"]:
    """A picture as an image of 1, 3 or 4 channels: a figure at `DPI`, an array as it is, of an animation up to eight frames side by side."""
    if isinstance(picture, Animation):
        chosen = np.unique(np.linspace(0, len(picture.frames) - 1, 8).round().astype(int))
        return np.concatenate(list(picture.frames[chosen]), axis=1)
    if isinstance(picture, np.ndarray):
        if picture.shape[-1] not in (1, 3, 4):
            raise UserError(f"an image of shape {picture.shape}: images are height, width and 1, 3 or 4 channels")
        return picture
    return _rendered(picture)


def _rendered(figure: "Figure") -> UInt8[np.ndarray, "H W 3"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axis in figure.axes:
        if not axis.has_data() and not axis.texts:
            axis.set_axis_off()
    _take_literally(figure)
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # A box is drawn in its place.
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # Where texts leave no room for the axes.
        canvas.draw()
    figure.set_layout_engine("none")  # Laid out once: to be drawn again, for a log, is to be drawn the same.
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _take_literally(figure: "Figure") -> None:
    """Draws every text as it is written: captions and tokens with `$` in them are no mathematics. Only the powers that matplotlib itself writes along logarithmic axes are."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter, LogFormatter

    powers: set[Text] = set()
    for line in (line for axis in figure.axes for line in (axis.xaxis, axis.yaxis)):
        for kind in ("major", "minor"):
            format_, ticks = getattr(line, f"get_{kind}_formatter")(), getattr(line, f"get_{kind}_ticks")()
            if isinstance(format_, LogFormatter):
                powers |= {label for tick in ticks for label in (tick.label1, tick.label2)}
            elif isinstance(format_, FixedFormatter | FuncFormatter):
                getattr(line, f"set_{kind}_formatter")(FuncFormatter(_printed(format_)))
    for text in figure.findobj(Text):
        if text not in powers:
            text.set_parse_math(False)
            text.set_text(_printable(text.get_text()))


def _printed(format_: Any) -> Any:
    return lambda value, place=None: _printable(str(format_(value, place)))


def _printable(text: str) -> str:
    """Without characters that no font can have, control characters and halves of surrogate pairs, which tokens may hold; cut where it is longer than any figure is wide."""
    text = text.removeprefix(_SHOWN)
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    broken: Iterable[str] = (c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
    return "".join(broken)


_LONGEST = 1000
