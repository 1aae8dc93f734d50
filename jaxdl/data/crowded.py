"""Crowded scenes: generated images of up to twelve things that touch and cover each other.

Each thing has a dark rim, so that two of one colour stay apart where they overlap. A later thing covers the earlier ones; masks are of what remains visible, and boxes are around the masks. A scene is a pure function of `(seed, index)`.
"""

import collections
import dataclasses
import itertools

import numpy as np
from jaxtyping import Bool, UInt8

from jaxdl.data.digests import digest_of_packages
from jaxdl.data.elements import NO_PIXELS, AnnotatedImage, Boxes, CaptionedImage
from jaxdl.data.images import with_captions
from jaxdl.data.scenes import COLORS, SHAPES, Scene, Thing, coverage_of, ground, philox
from jaxdl.data.sources import Info, Source, Split

SIZES = {"small": (0.07, 0.09), "medium": (0.11, 0.13), "large": (0.16, 0.19)}
"""Range of the radius, half the side of the box that every shape fills, in units of the image's side."""
MOST = 12
"""Things that are tried in a scene; at least a third as many."""
LEAST_VISIBLE = 0.35
"""Share of its own pixels that later things leave of any thing."""
TRAIN_SCENES, TEST_SCENES = 20_000, 1_000
SEEDS = {"train": 0, "test": 1}

_RIM = 0.012
"""Width of the dark rim, in units of the image's side."""
_JUDGED_AT = 64
"""Resolution at which it is judged how much of a thing is visible."""
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def crowded_scene(seed: int, index: int) -> Scene:
    """The crowded scene number `index ≥ 0` of the endless sequence that `seed ≥ 0` names. Its things come in the order in which they are drawn.

    A thing that would hide too much of another is left out. Two out of three are placed beside one that is there already, so that they touch or overlap.
    """
    random = philox(seed, index, stream=2)
    things: list[Thing] = []
    full: list[Bool[np.ndarray, "H W"]] = []
    visible: list[Bool[np.ndarray, "H W"]] = []
    for _ in range(int(random.integers(MOST // 3, MOST, endpoint=True))):
        shape, color, size = (str(random.choice(list(options))) for options in (SHAPES, COLORS, SIZES))
        radius = float(random.uniform(*SIZES[size]))
        x, y = random.uniform(radius, 1 - radius, 2).tolist()
        if things and random.random() < 2 / 3:
            other = things[int(random.integers(len(things)))]
            angle, distance = random.uniform(0, 2 * np.pi), random.uniform(0.7, 1.1) * (radius + other.radius)
            place = np.array([other.x, other.y]) + distance * np.array([np.cos(angle), np.sin(angle)])
            x, y = np.clip(place, radius, 1 - radius).tolist()
        thing = Thing(shape, color, size, x, y, radius)
        mask = _footprint(thing, _JUDGED_AT)
        left = [seen & ~mask for seen in visible]
        if all(seen.sum() >= LEAST_VISIBLE * whole.sum() for seen, whole in zip(left, full)):
            things.append(thing)
            full.append(mask)
            visible = [*left, mask]
    return Scene(seed, index, tuple(things))


def render(scene: Scene, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
    """The image: antialiased things with dark rims, one over the other, on the ground of `scenes.render`."""
    image = ground(scene, resolution)
    for thing in scene.things:
        color = np.asarray(COLORS[thing.color], np.float32)
        inner = dataclasses.replace(thing, radius=thing.radius - _RIM)
        for part, shade in ((thing, 0.35 * color), (inner, color)):
            rows, columns, coverage = coverage_of(part, resolution)
            window = image[rows, columns]
            window += coverage[..., None] * (shade - window)
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def visible_masks(scene: Scene, resolution: int) -> Bool[np.ndarray, "N H W"]:
    """The pixels of which each thing covers at least half, rim included, and no later thing does. No pixel is in two masks."""
    masks = np.stack([_footprint(thing, resolution) for thing in scene.things])
    for index in range(len(masks) - 1):
        masks[index] &= ~masks[index + 1 :].any(0)
    return masks


def captions(scene: Scene) -> tuple[str, ...]:
    """True sentences about the scene: how many things there are of each shape, of each colour, and what covers what."""
    shapes = collections.Counter(thing.shape for thing in scene.things)
    colors = collections.Counter(thing.color for thing in scene.things)
    told = [
        f"{_counted(len(scene.things), 'thing')}: {_listed([_counted(shapes[name], name) for name in SHAPES if shapes[name]])}",
        _listed([_counted(colors[name], f"{name} thing") for name in COLORS if colors[name]]),
    ]
    masks = [_footprint(thing, _JUDGED_AT) for thing in scene.things]
    for (lower, hidden), (upper, above) in itertools.combinations(zip(scene.things, masks), 2):
        if (hidden & above).sum() >= 0.1 * hidden.sum():
            told.append(f"a {upper.name} in front of a {lower.name}")
    return tuple(dict.fromkeys(told))


def questions(scene: Scene) -> tuple[tuple[str, str], ...]:
    """How many things there are of each shape, and of each colour; the answers are numbers in words, "no" for none."""
    things = scene.things
    count = lambda name, test: (f"how many {name} are there?", _NUMBERS[sum(map(test, things))])
    return (
        count("things", lambda thing: True),
        *(count(_plural(shape), lambda thing, shape=shape: thing.shape == shape) for shape in SHAPES),
        *(count(f"{color} things", lambda thing, color=color: thing.color == color) for color in COLORS),
    )


class Crowded(Source[AnnotatedImage]):
    """The first `length` crowded scenes of a seed at a resolution, with captions, questions, and boxes of which the labels are indices into `SHAPES`; where they are asked for, masks."""

    info = Info(classes=SHAPES)

    def __init__(self, length: int, resolution: int = 64, seed: int = 0, *, masks: bool = False):
        self.length, self.resolution, self.seed, self.masks = length, resolution, seed, masks
        digest = digest_of_packages(["numpy"], "crowded", length, resolution, seed, masks)
        self.info = dataclasses.replace(self.info, digest=digest)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> AnnotatedImage:
        scene = self._scene(index)
        image = render(scene, self.resolution)
        boxes, masks = _boxes(scene, self.resolution)
        return AnnotatedImage(image, captions(scene), questions(scene), boxes, masks if self.masks else None)

    def annotations(self, index: int) -> AnnotatedImage:
        scene = self._scene(index)
        return AnnotatedImage(NO_PIXELS, captions(scene), questions(scene), _boxes(scene, self.resolution)[0])

    def _scene(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return crowded_scene(self.seed, index)


def annotated(split: Split, *, resolution: int = 64, masks: bool = False) -> Crowded:
    """`builtin:crowded`."""
    return Crowded(TRAIN_SCENES if split == "train" else TEST_SCENES, resolution, SEEDS[split], masks=masks)


def captioned(split: Split, *, resolution: int = 64) -> Source[CaptionedImage]:
    """`builtin:crowded` with nothing but their captions."""
    return with_captions(annotated(split, resolution=resolution))


def _boxes(scene: Scene, resolution: int) -> tuple[Boxes, Bool[np.ndarray, "N H W"]]:
    """Of the things that are visible at this resolution: at a very low one some have no pixel."""
    masks = visible_masks(scene, resolution)
    labels = np.array([SHAPES.index(thing.shape) for thing in scene.things], np.int32)
    seen = masks.any((1, 2))
    return Boxes.around(masks[seen], labels[seen]), masks[seen]


def _footprint(thing: Thing, resolution: int) -> Bool[np.ndarray, "H W"]:
    mask = np.zeros((resolution, resolution), bool)
    rows, columns, coverage = coverage_of(thing, resolution)
    mask[rows, columns] = coverage >= 0.5
    return mask


def _counted(count: int, name: str) -> str:
    return f"{_NUMBERS[count]} {name if count == 1 else _plural(name)}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
