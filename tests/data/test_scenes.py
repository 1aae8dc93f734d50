"""Scenes: what is said of a picture is what is in it."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdl.data import CAPTIONED_IMAGES
from jaxdl.data.scenes import COLORS, SEEDS, SHAPES, SIZES, Scenes, boxes, captions, masks, questions, render, scene

numbers = st.integers(0, 2**63 - 1)


@given(numbers, numbers)
def test_a_scene_is_a_pure_function_of_seed_and_index(seed, index):
    described = scene(seed, index)
    again = scene(described.seed, described.index)
    assert again == described
    np.testing.assert_array_equal(render(again, 32), render(described, 32))


def test_neighbours_in_seed_and_index_differ():
    pictures = [render(scene(seed, index), 32) for seed in range(4) for index in range(4)]
    assert len({picture.tobytes() for picture in pictures}) == 16


@given(numbers, numbers)
def test_one_to_three_things_that_do_not_overlap_and_lie_inside(seed, index):
    described = scene(seed, index)
    things = described.things
    assert 1 <= len(things) <= 3
    assert len({(thing.shape, thing.color) for thing in things}) == len(things)
    for index, thing in enumerate(things):
        low, high = SIZES[thing.size]
        assert low <= thing.radius <= high
        assert thing.radius < thing.x < 1 - thing.radius and thing.radius < thing.y < 1 - thing.radius
        for other in things[index + 1 :]:
            assert np.hypot(thing.x - other.x, thing.y - other.y) > thing.radius + other.radius


@given(numbers, numbers, st.sampled_from([32, 65, 128]))
def test_boxes_hold_the_masks_and_pixels_show_the_colours(seed, index, resolution):
    described = scene(seed, index)
    image, found = render(described, resolution).astype(float), masks(described, resolution)
    for thing, mask, box in zip(described.things, found, boxes(described)):
        rows, columns = np.nonzero(mask)
        assert (
            box[0] - 1 / resolution <= columns.min() / resolution and (columns.max() + 1) / resolution <= box[2] + 1 / resolution
        )
        assert box[1] - 1 / resolution <= rows.min() / resolution and (rows.max() + 1) / resolution <= box[3] + 1 / resolution
        seen = np.median(image[mask], axis=0)
        assert min(COLORS, key=lambda name: np.abs(seen - COLORS[name]).sum()) == thing.color
    assert (found.sum(axis=0) <= 1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_have_the_area_of_their_shapes(shape):
    """At a high resolution the area in units of the squared radius does not depend on where and how large a thing is."""
    areas = []
    for index in range(300):
        described = scene(7, index)
        for thing, mask in zip(described.things, masks(described, 256)):
            if thing.shape == shape:
                areas.append(mask.mean() / thing.radius**2)
    assert len(areas) > 20 and np.std(areas) / np.mean(areas) < 0.02


@given(numbers, numbers)
def test_relations_in_captions_are_true(seed, index):
    described = scene(seed, index)
    by_name = {thing.name: thing for thing in described.things}
    names = "|".join(by_name)
    for first, relation, second in re.findall(
        rf"a ({names}) (left of|right of|above|below) a ({names})", " ".join(captions(described))
    ):
        one, two = by_name[first], by_name[second]
        assert {"left of": one.x < two.x, "right of": one.x > two.x, "above": one.y < two.y, "below": one.y > two.y}[relation]


@given(numbers, numbers)
def test_the_first_caption_names_every_thing(seed, index):
    described = scene(seed, index)
    assert all(thing.name in captions(described)[0] for thing in described.things)


@given(numbers, numbers)
def test_questions_have_one_answer_which_is_right(seed, index):
    described = scene(seed, index)
    asked = questions(described)
    assert len({question for question, _ in asked}) == len(asked)
    answers = dict(asked)
    assert answers["how many objects are there?"] == ("zero", "one", "two", "three")[len(described.things)]
    for question, answer in asked:
        if found := re.fullmatch(r"what color is the (\w+)\?", question):
            assert [t.color for t in described.things if t.shape == found[1]] == [answer]
        if found := re.fullmatch(r"what shape is the (\w+) object\?", question):
            assert [t.shape for t in described.things if t.color == found[1]] == [answer]
        if found := re.fullmatch(r"is there a (\w+)\?", question):
            assert (found[1] in [t.shape for t in described.things]) == (answer == "yes")


def test_a_source_says_all_that_is_known_and_draws_masks_where_they_are_asked_for():
    source = Scenes(10, resolution=48, seed=3, masks=True)
    example, described = source[9], scene(3, 9)
    count = len(example.boxes)
    assert example.image.shape == (48, 48, 3) and example.masks.shape == (count, 48, 48) and source.info.classes == SHAPES
    assert [SHAPES[label] for label in example.boxes.labels] == [thing.shape for thing in described.things]
    assert (example.captions, example.questions) == (captions(described), questions(described))
    assert Scenes(10, seed=3)[9].masks is None
    told = source.annotations(9)
    assert told.image.shape == (0, 0, 3) and told.captions == example.captions
    np.testing.assert_array_equal(told.boxes.xyxy, example.boxes.xyxy)
    with pytest.raises(IndexError):
        source[10]


def test_the_built_in_scenes_are_those_of_two_seeds():
    train, test = CAPTIONED_IMAGES.open("builtin:scenes", resolution=40)
    assert (len(train), len(test)) == (60_000, 2_000) and train.info.classes == ()
    for source, seed in ((train, SEEDS["train"]), (test, SEEDS["test"])):
        np.testing.assert_array_equal(source[7].image, render(scene(seed, 7), 40))
        assert source[7].captions == source.annotations(7).captions == captions(scene(seed, 7))
