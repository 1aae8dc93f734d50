"""Sheets of images, boxes and masks show every pixel where it belongs."""

import numpy as np
import pytest

from jaxdl import figures
from jaxdl.errors import UserError
from jaxdl.figures.detection import overlay
from jaxdl.figures.images import rgb

random = np.random.default_rng(0)


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def places_of(image: np.ndarray, sheet: np.ndarray) -> list[tuple[int, int]]:
    """Top left corners at which an image, in its own pixels, stands in a sheet."""
    height, width = image.shape[:2]
    starts = np.argwhere((sheet[: 1 - height, : 1 - width] == rgb(image)[0, 0]).all(-1))
    found = lambda y, x: np.array_equal(sheet[y : y + height, x : x + width], rgb(image))
    return [(y, x) for y, x in starts.tolist() if found(y, x)]


def test_every_image_of_a_grid_is_shown_once_row_by_row():
    images = random.integers(0, 256, (7, 100, 120, 3), np.uint8)
    (axis,) = figures.grid(images, columns=3).axes
    sheet = np.asarray(axis.images[0].get_array())
    corners = [places_of(image, sheet) for image in images]
    assert all(len(places) == 1 for places in corners)
    rows, columns = np.array([places[0] for places in corners]).T
    assert (np.diff(rows.reshape(-1)) >= 0).all() and len(set(rows.tolist())) == 3
    assert columns[:3].tolist() == sorted(columns[:3]) and columns.tolist() == [*columns[:3], *columns[:3], columns[0]]
    assert columns[1] - columns[0] > 120  # A gap between them.


def test_small_images_are_enlarged_all_alike_and_stay_sharp():
    images = random.integers(0, 256, (4, 8, 8, 1), np.uint8)
    (axis,) = figures.grid(images).axes
    sheet = np.asarray(axis.images[0].get_array())
    for image in images:
        assert len(places_of(image.repeat(12, 0).repeat(12, 1), sheet)) == 1


def test_what_a_grid_shows_is_what_is_written():
    """No pixel is resampled: the figure has a pixel for each of the sheet."""
    figure = figures.grid(random.integers(0, 256, (6, 28, 28, 3), np.uint8))
    sheet, drawn = np.asarray(figure.axes[0].images[0].get_array()), figures.pixels(figure)
    np.testing.assert_array_equal(drawn, sheet)


def test_images_of_any_size_and_channels_have_their_titles():
    images = [random.integers(0, 256, size, np.uint8) for size in ((8, 8, 1), (120, 40, 3), (30, 60, 4), (700, 20, 3))]
    (axis,) = figures.grid(images, 2, ["$a$", "b {", "c", "a very long title of an image " * 9], title="all").axes
    shown = texts(axis)
    assert shown[:3] == ["$a$", "b {", "c"] and shown[3].endswith("…") and shown[3].count("\n") == 2
    sheet = np.asarray(axis.images[0].get_array())
    assert len(places_of(images[1], sheet)) == 1 and axis.figure.get_suptitle() == "all"
    assert len(places_of(images[2], sheet)) == 1  # On white.


def test_a_transparent_pixel_is_white():
    image = np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)
    assert rgb(image).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_rows_of_images_have_labels_and_columns():
    rows = {
        "input": random.integers(0, 256, (3, 100, 100, 3), np.uint8),
        "output": [random.integers(0, 256, (100, 100, 1), np.uint8)],
    }
    (axis,) = figures.image_rows(rows, ["0.0", "0.5", "1.0"]).axes
    assert texts(axis) == ["0.0", "0.5", "1.0", "input", "output"]
    sheet = np.asarray(axis.images[0].get_array())
    ((top, left),), ((below, under),) = places_of(rows["input"][0], sheet), places_of(rows["output"][0], sheet)
    assert below > top + 100 and left == under
    labels = axis.texts[3:]
    assert top < labels[0].get_position()[1] < top + 100 and below < labels[1].get_position()[1] < below + 100


def test_nothing_is_drawn_of_nothing():
    assert figures.grid([]) is None and figures.image_rows({}) is None and figures.image_rows({"a": []}) is None
    assert figures.boxes([], [], []) is None and figures.masks([], []) is None and figures.answers([], [], [], []) is None


def test_a_wrong_number_of_titles_is_refused():
    with pytest.raises(UserError, match="2 titles"):
        figures.grid(np.zeros((3, 4, 4, 1), np.uint8), titles=["a", "b"])


def test_boxes_are_left_top_right_bottom_in_shares_of_the_sides():
    image = np.zeros((50, 200, 3), np.uint8)
    found = (np.array([[0.1, 0.2, 0.5, 0.8]]), ["a $ thing"])
    figure = figures.boxes([image], ["detect a thing"], [found], true=[np.array([[0.0, 0.0, 1.0, 1.0]])])
    (axis,) = figure.axes
    there, drawn = axis.patches
    assert np.allclose(drawn.get_bbox().extents, [19.5, 9.5, 99.5, 39.5]) and drawn.get_linestyle() in ("-", "solid")
    assert np.allclose(there.get_bbox().extents, [-0.5, -0.5, 199.5, 49.5]) and there.get_linestyle() == "--"
    assert texts(axis) == ["a $ thing"] and axis.get_title() == "detect a thing"


def test_a_mask_colours_its_pixels_and_no_others():
    image = random.integers(0, 256, (20, 30, 3), np.uint8)
    masks = np.zeros((2, 20, 30), bool)
    masks[0, 2:9, 3:12] = True
    masks[1, 10:18, 20:28] = True
    painted = overlay(image, masks, opacity=0.5)
    anywhere = masks.any(0)
    np.testing.assert_array_equal(painted[~anywhere], image[~anywhere])
    blue, orange = painted[2, 3].tolist(), painted[10, 20].tolist()  # Their borders are their colours.
    assert blue != orange and (painted[2, 3:12] == blue).all() and (painted[2:9, 11] == blue).all()
    np.testing.assert_allclose(painted[3:8, 4:11], (image[3:8, 4:11] + np.array(blue)) / 2, atol=0.6)
    (axis,) = figures.masks([image], [masks], [["one", "other"]], ["title"]).axes
    np.testing.assert_array_equal(axis.images[0].get_array(), overlay(image, masks))
    assert texts(axis) == ["one", "other"] and axis.get_title() == "title"
    for mask, text in zip(masks, axis.texts):
        x, y = map(int, text.get_position())
        assert mask[y, x]


def test_masks_of_another_size_are_refused():
    with pytest.raises(UserError, match="size"):
        figures.masks([np.zeros((4, 5, 3), np.uint8)], [np.zeros((1, 5, 4), bool)])


def test_right_answers_are_green_and_wrong_ones_red_with_the_truth():
    image = np.zeros((8, 8, 1), np.uint8)
    right, wrong, none = figures.answers([image] * 3, ["a?", "b?", "c?"], ["yes", "no", ""], ["yes", "maybe", ""]).axes
    assert (right.get_xlabel(), right.xaxis.label.get_color()) == ("yes", "tab:green")
    assert (wrong.get_xlabel(), wrong.xaxis.label.get_color()) == ("no\n(maybe)", "tab:red")
    assert none.get_xlabel() == "(nothing)" and wrong.get_title() == "b?"
