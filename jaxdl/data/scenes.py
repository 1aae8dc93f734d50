"""Scenes: generated pictures of simple things, with everything that can be said about them.

A scene holds one to three things of several shapes, colours and sizes on a noisy ground. From its description follow the picture at any resolution, captions (relations too), boxes, instance masks, and questions with answers, so that one source serves contrastive learning, captioning, detection, segmentation and question answering. A scene is a pure function of `(seed, index)`: nothing is stored, and any length is free.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from jaxdl.data.digests import digest_of_packages
from jaxdl.data.elements import NO_PIXELS, AnnotatedImage, Boxes, CaptionedImage
from jaxdl.data.images import with_captions
from jaxdl.data.sources import Info, Source, Split

SHAPES = ("circle", "triangle", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 200),
}
SIZES = {"small": (0.14, 0.16), "large": (0.21, 0.24)}
"""Range of the radius, half the side of the box that every shape fills, in units of the picture's side."""

_PLACES = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
_TRIES = 16
_GAP = 0.02
_NUMBERS = ("zero", "one", "two", "three")
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

TRAIN_SCENES, TEST_SCENES = 60_000, 2_000
SEEDS = {"train": 0, "test": 1}
"""Of the two splits of `builtin:scenes`."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. Position and radius are in units of the picture's side, the origin is at the top left."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    @property
    def place(self) -> str:
        """The ninth of the picture that holds the centre: "top left", ..., "center", ..., "bottom right"."""
        return _PLACES[min(int(self.y * 3), 2)][min(int(self.x * 3), 2)]


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything that is in a picture, from the top left on: each thing is left of or above those after it, so that equal scenes are told in equal words. No two things share both shape and colour, so "the red circle" is one thing."""

    seed: int
    index: int
    things: tuple[Thing, ...]

    def relation(self, first: Thing, second: Thing) -> str:
        """Where `first` lies as seen from `second`, along the axis on which their centres are farther apart."""
        dx, dy = second.x - first.x, second.y - first.y
        if abs(dx) >= abs(dy):
            return "left of" if dx > 0 else "right of"
        return "above" if dy > 0 else "below"


def scene(seed: int, index: int) -> Scene:
    """The scene number `index ≥ 0` of the endless sequence that `seed ≥ 0` names.

    A thing that finds no free place in a bounded number of tries is left out, so that boxes never overlap and there is always at least one.
    """
    draw = iter(philox(seed, index, stream=0).random(4 + 3 * (4 + 2 * _TRIES)).tolist())
    choose = lambda options: options[int(next(draw) * len(options))]
    things: list[Thing] = []
    for _ in range(choose((1, 2, 3))):
        shape, color, size = choose(SHAPES), choose(tuple(COLORS)), choose(tuple(SIZES))
        low, high = SIZES[size]
        radius = low + (high - low) * next(draw)
        room = 1 - 2 * (radius + _GAP)
        if any((thing.shape, thing.color) == (shape, color) for thing in things):
            continue
        for _ in range(_TRIES):
            x, y = radius + _GAP + room * next(draw), radius + _GAP + room * next(draw)
            if all(max(abs(x - other.x), abs(y - other.y)) > radius + other.radius + _GAP for other in things):
                things.append(Thing(shape, color, size, x, y, radius))
                break
    return Scene(seed, index, tuple(sorted(things, key=lambda thing: thing.x + thing.y)))


def render(scene: Scene, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
    """The picture: antialiased things on the `ground`."""
    image = ground(scene, resolution)
    for thing in scene.things:
        rows, columns, coverage = coverage_of(thing, resolution)
        window = image[rows, columns]
        window += coverage[..., None] * (np.asarray(COLORS[thing.color], np.float32) - window) * np.float32(0.9)
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def ground(scene: Scene, resolution: int) -> Float32[np.ndarray, "H W 3"]:
    """What things lie on: grey with a slight tint, a gradient of light and Gaussian noise."""
    random = philox(scene.seed, scene.index, stream=1)
    level, *tint, slope_x, slope_y = random.random(6, np.float32)
    x, y = _grid(resolution)
    light = 70 + 60 * level + 30 * (slope_x - 0.5) * x + 30 * (slope_y - 0.5) * y
    image = random.standard_normal((resolution, resolution, 3), np.float32)
    image *= 10
    image += light[..., None] + 20 * np.asarray(tint, np.float32)
    return image


def masks(scene: Scene, resolution: int) -> Bool[np.ndarray, "N H W"]:
    """One mask per thing: the pixels of which it covers at least half."""
    result = np.zeros((len(scene.things), resolution, resolution), bool)
    for mask, thing in zip(result, scene.things):
        rows, columns, coverage = coverage_of(thing, resolution)
        mask[rows, columns] = coverage >= 0.5
    return result


def boxes(scene: Scene) -> Float32[np.ndarray, "N 4"]:
    """One box per thing, as `Boxes.xyxy`."""
    return np.array([(t.x - t.radius, t.y - t.radius, t.x + t.radius, t.y + t.radius) for t in scene.things], np.float32)


def captions(scene: Scene) -> tuple[str, ...]:
    """True sentences about the scene. The first is the most telling one: it names every thing and how they lie."""
    things = scene.things
    if len(things) == 1:
        (thing,) = things
        return (
            f"a {thing.name} at the {thing.place}",
            f"a {thing.name}",
            f"one {thing.shape}",
            f"a {thing.size} {thing.shape}",
        )
    first, second = things[:2]
    relation = scene.relation(first, second)
    there = f"a {first.name} {relation} a {second.name}"
    back = f"a {second.name} {_INVERSE[relation]} a {first.name}"
    if len(things) == 2:
        return (
            there,
            back,
            f"a {first.shape} {relation} a {second.shape}",
            f"a {first.shape} and a {second.shape}",
        )
    third = things[2]
    return (
        f"{there} and {scene.relation(first, third)} a {third.name}",
        f"a {third.name} {scene.relation(third, first)} a {first.name} and {scene.relation(third, second)} a {second.name}",
        f"a {first.shape}, a {second.shape} and a {third.shape}",
        f"a {first.color} {first.shape}, a {second.color} {second.shape} and a {third.color} {third.shape}",
    )


def questions(scene: Scene) -> tuple[tuple[str, str], ...]:
    """Pairs of a question and its one right answer: counting, colour, shape, size, existence and relations."""
    things = scene.things
    pairs = [("how many objects are there?", _NUMBERS[len(things)])]
    shapes, colors = [t.shape for t in things], [t.color for t in things]
    for thing in things:
        if shapes.count(thing.shape) == 1:
            pairs.append((f"what color is the {thing.shape}?", thing.color))
        if colors.count(thing.color) == 1:
            pairs.append((f"what shape is the {thing.color} object?", thing.shape))
        pairs.append((f"how large is the {thing.color} {thing.shape}?", thing.size))
    absent = [shape for shape in SHAPES if shape not in shapes]
    pairs.append((f"is there a {things[0].shape}?", "yes"))
    pairs.append((f"is there a {absent[scene.index % len(absent)]}?", "no"))
    for first, second in itertools.pairwise(things):
        relation = scene.relation(first, second)
        name, other = f"{first.color} {first.shape}", f"{second.color} {second.shape}"
        pairs.append((f"is the {name} {relation} the {other}?", "yes"))
        pairs.append((f"is the {name} {_INVERSE[relation]} the {other}?", "no"))
    return tuple(pairs)


class Scenes(Source[AnnotatedImage]):
    """The first `length` scenes of a seed at a resolution, with captions, questions, and boxes of which the labels are indices into `SHAPES`; where they are asked for, masks."""

    info = Info(classes=SHAPES)

    def __init__(self, length: int, resolution: int = 32, seed: int = 0, *, masks: bool = False):
        self.length, self.resolution, self.seed, self.masks = length, resolution, seed, masks
        digest = digest_of_packages(["numpy"], "scenes", length, resolution, seed, masks)
        self.info = dataclasses.replace(self.info, digest=digest)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> AnnotatedImage:
        described = self._scene(index)
        drawn = masks(described, self.resolution) if self.masks else None
        return dataclasses.replace(self.annotations(index), image=render(described, self.resolution), masks=drawn)

    def annotations(self, index: int) -> AnnotatedImage:
        described = self._scene(index)
        labels = np.array([SHAPES.index(thing.shape) for thing in described.things], np.int32)
        return AnnotatedImage(NO_PIXELS, captions(described), questions(described), Boxes(boxes(described), labels))

    def _scene(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return scene(self.seed, index)


def annotated(split: Split, *, resolution: int = 32, masks: bool = False) -> Scenes:
    """`builtin:scenes`."""
    return Scenes(TRAIN_SCENES if split == "train" else TEST_SCENES, resolution, SEEDS[split], masks=masks)


def captioned(split: Split, *, resolution: int = 32) -> Source[CaptionedImage]:
    """`builtin:scenes` with nothing but their captions."""
    return with_captions(annotated(split, resolution=resolution))


def philox(seed: int, index: int, stream: int) -> np.random.Generator:
    """Counter-based, so that every (seed, index) has its own numbers without drawing those before it."""
    return np.random.Generator(np.random.Philox(key=(seed << 64) | index, counter=stream << 192))


@functools.lru_cache
def _grid(resolution: int) -> tuple[Float[np.ndarray, "1 W"], Float[np.ndarray, "H 1"]]:
    """Coordinates of the pixels' centres, in units of the side."""
    centers = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    return centers[None, :], centers[:, None]


def coverage_of(thing: Thing, resolution: int) -> tuple[slice, slice, Float[np.ndarray, "h w"]]:
    """The window of pixels that a thing touches, and how much of each it covers, from 0 to 1.

    Coverage is read off the signed distance to the outline (negative inside): half a pixel in is full, half a pixel out is none.
    """
    pixel = 1 / resolution
    span = lambda center: slice(max(int((center - thing.radius) / pixel - 1), 0), int((center + thing.radius) / pixel + 2))
    rows, columns = span(thing.y), span(thing.x)
    x, y = _grid(resolution)
    x, y = x[:, columns] - np.float32(thing.x), y[rows] - np.float32(thing.y)
    radius = np.float32(thing.radius)
    match thing.shape:
        case "circle":
            distance = np.sqrt(x * x + y * y) - radius
        case "ring":
            distance = np.abs(np.sqrt(x * x + y * y) - 0.75 * radius) - 0.25 * radius
        case "triangle":  # An apex at the top, a base below: the three half-planes that bound it.
            distance = np.maximum((2 * np.abs(x) - y - radius) / math.sqrt(5), y - radius)
        case "cross":
            width, height = np.abs(x), np.abs(y)
            distance = np.maximum(np.minimum(width, height) - 0.25 * radius, np.maximum(width, height) - radius)
    return rows, columns, np.clip(0.5 - distance * resolution, 0, 1)
