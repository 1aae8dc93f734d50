"""Elements: what one example of each kind of data is, as frozen dataclasses of numpy arrays and strings."""

import dataclasses
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer, Num, UInt8

NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
"""The image of an element of which only the annotations were asked for."""

Same = TypeVar("Same")
"""The class of an element, which augmentation keeps."""


@dataclasses.dataclass(frozen=True, eq=False)
class Boxes:
    """Axis-aligned boxes with their labels."""

    xyxy: Float32[np.ndarray, "N 4"]
    """`(left, top, right, bottom)` from 0 to 1, in units of the image's width and height."""
    labels: Int32[np.ndarray, "N"]
    """Indices into `source.info.classes`."""

    def __len__(self) -> int:
        return len(self.xyxy)

    def __getitem__(self, chosen: Bool[np.ndarray, "N"] | Integer[np.ndarray, "K"] | slice) -> "Boxes":
        """The chosen boxes."""
        return Boxes(self.xyxy[chosen], self.labels[chosen])

    @classmethod
    def around(cls, masks: Bool[np.ndarray, "N H W"], labels: Int32[np.ndarray, "N"]) -> "Boxes":
        """The smallest box around each mask, none of which may be empty."""
        xyxy = np.zeros((len(masks), 4), np.float32)
        height, width = masks.shape[1:]
        for box, mask in zip(xyxy, masks):
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            box[:] = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
        return cls(xyxy, labels)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `collate.pad` takes."""
        return {"xyxy": self.xyxy, "labels": self.labels}


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image, and in its subclasses what is known about it. What has a place in the image follows `flip` and `window`."""

    image: UInt8[np.ndarray, "H W C"]
    """From 0 to 255: three channels, or one where it is grey."""

    def flip(self: Same) -> Same:
        """Left and right exchanged. "left of" in a text does not follow."""
        return dataclasses.replace(self, image=self.image[:, ::-1])

    def window(self: Same, top: int, left: int, height: int, width: int) -> Same:
        """The part of the image that begins at a row and a column, in pixels. Outside of the image it is black."""
        return dataclasses.replace(self, image=_window(self.image, top, left, height, width))


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledImage(Image):
    """An image of one class."""

    label: int
    """Index into `source.info.classes`."""


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedImage(Image):
    """An image and at least one text about it."""

    captions: tuple[str, ...]
    label: int | None = None
    """Index into `source.info.classes`, where the captions were made from a class."""


@dataclasses.dataclass(frozen=True, eq=False)
class AnnotatedImage(Image):
    """An image and whatever the data says about it."""

    captions: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    """Pairs of a question and its answer."""
    boxes: Boxes | None = None
    masks: Bool[np.ndarray, "N H W"] | None = None
    """The visible pixels of each box's object."""
    points: Float32[np.ndarray, "K 2"] | None = None
    """`(x, y)` in units of the image's width and height. After a crop some lie outside of 0 to 1."""
    label: int | None = None
    """Class of the whole image, an index into `source.info.classes`."""

    def flip(self: Same) -> Same:
        """Left and right exchanged, also of boxes, masks and points."""
        changes = {}
        if self.boxes is not None:
            left, top, right, bottom = self.boxes.xyxy.T
            changes["boxes"] = Boxes(np.stack([1 - right, top, 1 - left, bottom], 1), self.boxes.labels)
        if self.masks is not None:
            changes["masks"] = self.masks[:, :, ::-1]
        if self.points is not None:
            changes["points"] = np.array([1, 0], np.float32) + np.array([-1, 1], np.float32) * self.points
        return dataclasses.replace(super().flip(), **changes)

    def window(self: Same, top: int, left: int, height: int, width: int) -> Same:
        """As `Image.window`. Objects that leave the window lose their box and mask; of an object that is cut, the box is that of the visible part of its mask, or where there is no mask the part of its box."""
        origin, size, new = (np.array(xy, np.float32) for xy in ((left, top), self.image.shape[1::-1], (width, height)))
        move = lambda xy: (xy * size - origin) / new
        cut_out = lambda array: _window(array, top, left, height, width)
        boxes, masks = self.boxes, None if self.masks is None else np.moveaxis(cut_out(np.moveaxis(self.masks, 0, -1)), -1, 0)
        if boxes is not None:
            xyxy = np.clip(move(boxes.xyxy.reshape(-1, 2, 2)), 0, 1).reshape(-1, 4)
            if masks is None:
                kept = (xyxy[:, 2:] > xyxy[:, :2]).all(1)
            else:
                kept = masks.any((1, 2))
                cut = kept & (masks.sum((1, 2)) < self.masks.sum((1, 2)))
                xyxy[cut] = Boxes.around(masks[cut], boxes.labels[cut]).xyxy
                masks = masks[kept]
            boxes = Boxes(xyxy, boxes.labels)[kept]
        points = None if self.points is None else move(self.points)
        return dataclasses.replace(self, image=cut_out(self.image), boxes=boxes, masks=masks, points=points)


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """A text of one class."""

    text: str
    label: int
    """Index into `source.info.classes`."""


@dataclasses.dataclass(frozen=True)
class Translation:
    """A sentence in two languages."""

    source: str
    target: str
    category: str = ""
    """What sort of sentence it is, where the data says so."""


@dataclasses.dataclass(frozen=True)
class TextPair:
    """A text that describes another, as a docstring describes a function's body."""

    query: str
    document: str
    title: str
    """Where the document stands, as "json.decoder.JSONDecoder.decode"."""


@dataclasses.dataclass(frozen=True, eq=False)
class TableRow:
    """A row of a table."""

    features: Float32[np.ndarray, "F"]
    """In the order of `source.info.columns`."""
    target: float
    """What is to be told: a number, or the index of a class in `source.info.classes`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Consecutive tokens of a text."""

    tokens: Int32[np.ndarray, "T"]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A directed graph: edge `e` goes from node `senders[e]` to node `receivers[e]`. Undirected edges are there in both directions."""

    senders: Int32[np.ndarray, "K"]
    receivers: Int32[np.ndarray, "K"]
    nodes: dict[str, Num[np.ndarray, "N ..."] | Bool[np.ndarray, "N ..."]]
    """By name what each node has: features, labels, membership in a split. At least one, which says how many nodes there are."""
    edges: dict[str, Num[np.ndarray, "K ..."] | Bool[np.ndarray, "K ..."]] = dataclasses.field(default_factory=dict)
    """By name what each edge has."""
    values: dict[str, np.ndarray | np.generic] = dataclasses.field(default_factory=dict)
    """By name what the whole graph has."""

    def arrays(self) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
        """What `collate.pack_graphs` takes."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _window(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """Rows and columns of an array `H W ...`; zeros outside."""
    inside = top >= 0 and left >= 0 and top + height <= image.shape[0] and left + width <= image.shape[1]
    if inside:
        return image[top : top + height, left : left + width]
    window = np.zeros((height, width, *image.shape[2:]), image.dtype)
    rows = slice(max(top, 0), min(top + height, image.shape[0]))
    columns = slice(max(left, 0), min(left + width, image.shape[1]))
    part = image[rows, columns]
    window[rows.start - top : rows.start - top + part.shape[0], columns.start - left : columns.start - left + part.shape[1]] = (
        part
    )
    return window
