"""Crowded scenes: many things that cover each other, and what is said of them."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data.crowded import LEAST_VISIBLE, MOST, SIZES, Crowded, captions, crowded_scene, questions, render, visible_masks
from jaxdl.data.scenes import COLORS, SHAPES, Scene
from jaxdl.data.scenes import masks as whole_masks

numbers = st.integers(0, 2**63 - 1)
quick = settings(max_examples=40, deadline=None, derandomize=True)
WORDS = dict(zip("no one two three four five six seven eight nine ten eleven twelve".split(), range(13)))


@quick
@given(numbers, numbers)
def test_a_crowded_scene_is_a_pure_function_of_seed_and_index(seed, index):
    scene = crowded_scene(seed, index)
    assert scene == crowded_scene(seed, index) and 1 <= len(scene.things) <= MOST
    np.testing.assert_array_equal(render(scene, 32), render(scene, 32))
    for thing in scene.things:
        low, high = SIZES[thing.size]
        assert low <= thing.radius <= high
        assert thing.radius - 1e-9 <= min(thing.x, thing.y) and max(thing.x, thing.y) <= 1 - thing.radius + 1e-9


def test_scenes_are_crowded():
    """Many things, most of which touch another, and a good part covered."""
    counts, touching, covered = [], [], []
    for index in range(200):
        things = crowded_scene(0, index).things
        counts.append(len(things))
        gaps = [[np.hypot(a.x - b.x, a.y - b.y) / (a.radius + b.radius) for b in things if b is not a] for a in things]
        touching += [min(gap) < 1.12 for gap in gaps if gap]
        scene = crowded_scene(0, index)
        covered += [v.sum() < 0.97 * w.sum() for v, w in zip(visible_masks(scene, 64), whole_masks(scene, 64))]
    assert 6.5 < np.mean(counts) < 8 and min(counts) >= 2 and max(counts) == MOST
    assert np.mean(touching) > 0.7 and 0.2 < np.mean(covered) < 0.5


@quick
@given(numbers, numbers, st.sampled_from([48, 64, 96]))
def test_masks_are_what_remains_visible_and_boxes_are_around_them(seed, index, resolution):
    scene = crowded_scene(seed, index)
    visible, whole = visible_masks(scene, resolution), whole_masks(scene, resolution)
    owner = np.full((resolution, resolution), -1)
    for number, mask in enumerate(whole):
        owner[mask] = number
    for number, mask in enumerate(visible):
        np.testing.assert_array_equal(mask, owner == number)
        assert mask.sum() > (LEAST_VISIBLE - 0.12) * whole[number].sum()


def test_pixels_show_the_colour_of_the_thing_whose_mask_they_are_in():
    for index in range(40):
        scene = crowded_scene(5, index)
        image = render(scene, 128).astype(float)
        for thing, mask in zip(scene.things, visible_masks(scene, 128)):
            seen = np.median(image[mask], axis=0)
            if mask.sum() > 150:
                assert min(COLORS, key=lambda name: np.abs(seen - COLORS[name]).sum()) == thing.color


def test_two_overlapping_things_of_one_colour_stay_apart():
    """Along the line between their centres there is a dark rim."""
    found = 0
    for index in range(100):
        scene = crowded_scene(0, index)
        image = render(scene, 128).astype(float)
        for first, second in zip(scene.things, scene.things[1:]):
            circles = first.shape == second.shape == "circle" and first.color == second.color
            if circles and np.hypot(first.x - second.x, first.y - second.y) < 0.9 * (first.radius + second.radius):
                pair = Scene(0, index, (first, second))
                image = render(pair, 128).astype(float).sum(-1)
                steps = np.linspace(0, 1, 200)[:, None]
                line = (np.array([first.x, first.y]) * (1 - steps) + np.array([second.x, second.y]) * steps) * 128
                values = image[line[:, 1].astype(int), line[:, 0].astype(int)]
                assert values.min() < 0.6 * sum(COLORS[first.color])
                found += 1
    assert found >= 2


@quick
@given(numbers, numbers)
def test_captions_and_answers_count_what_is_there(seed, index):
    scene = crowded_scene(seed, index)
    things = scene.things
    first, second, *in_front = captions(scene)
    total, shapes = first.split(":") if len(things) != 1 or ":" in first else (first, "")
    assert WORDS[total.split()[0]] == len(things)
    for shape in SHAPES:
        match = re.search(rf"(\w+) {shape}", shapes)
        assert (WORDS[match[1]] if match else 0) == sum(thing.shape == shape for thing in things)
    for color in COLORS:
        match = re.search(rf"(\w+) {color}", second)
        assert (WORDS[match[1]] if match else 0) == sum(thing.color == color for thing in things)
    for caption in in_front:
        upper, lower = re.fullmatch(r"a (.*) in front of a (.*)", caption).groups()
        pairs = [(a, b) for i, a in enumerate(things) for b in things[i + 1 :] if (b.name, a.name) == (upper, lower)]
        assert any(max(abs(a.x - b.x), abs(a.y - b.y)) < a.radius + b.radius for a, b in pairs)
    for question, answer in questions(scene):
        name = re.fullmatch(r"how many (.*) are there\?", question)[1]
        words = re.sub("(?<=cross)es$|s$", "", name).split()
        assert WORDS[answer] == sum(all(word in ("thing", each.shape, each.color) for word in words) for each in things)


def test_a_source_gives_visible_things_with_boxes_and_masks():
    source = Crowded(5, resolution=64, seed=2, masks=True)
    example = source[4]
    assert example.masks.shape == (len(example.boxes), 64, 64) and source.info.classes == SHAPES
    for box, mask in zip(example.boxes.xyxy * 64, example.masks):
        rows, columns = np.nonzero(mask)
        np.testing.assert_allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=1e-4)
    np.testing.assert_array_equal(source.annotations(4).boxes.xyxy, example.boxes.xyxy)
    assert Crowded(5, seed=2)[4].masks is None
    tiny = Crowded(50, resolution=6, masks=True)
    assert all(len(each.boxes) == len(each.masks) and each.masks.any((1, 2)).all() for each in tiny)
    with pytest.raises(IndexError):
        source[5]
