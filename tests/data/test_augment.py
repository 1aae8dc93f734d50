"""Boxes, masks and points follow the image; images are mixed by the shares that are said, and distorted as far as is said."""

import collections
import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data import ANNOTATED_IMAGES, AnnotatedImage, Boxes, CaptionedImage, Image, LabelledImage, augment
from jaxdl.data.augment import (
    DISTORTIONS,
    cutmix,
    mixup,
    rand_augment,
    random_crop,
    random_flip,
    random_resized_crop,
    random_shift,
)
from jaxdl.errors import UserError

sides = st.integers(1, 12)
quick = settings(max_examples=50, deadline=None, derandomize=True)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def distorted(image: np.ndarray, name: str, strength: float, sign: int = 1) -> np.ndarray:
    """One distortion, with its strength from 0 to 1."""
    picture = augment.Picture.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return np.asarray(DISTORTIONS[name](picture, strength, sign)).reshape(image.shape)


@quick
@given(sides, sides, st.floats(0.05, 5), st.integers(0, 99))
def test_mixup_adds_both_pictures_up_by_the_share_it_says(height, width, alpha, seed):
    random = np.random.default_rng(seed)
    first, second = random.standard_normal((2, height, width, 3)).astype(np.float32)
    mixed, share = mixup(first, second, random, alpha)
    assert mixed.dtype == np.float32 and 0 <= share <= 1
    np.testing.assert_allclose(mixed, second + share * (first - second), atol=1e-5)


def test_the_shares_of_mixup_are_spread_as_a_beta_distribution():
    """Beta(α, α) has mean ½ and variance 1 / (4 (2α + 1)) (Johnson et al. 1995, section 25.3)."""
    random, picture = np.random.default_rng(0), np.zeros((1, 1, 1), np.float32)
    for alpha in (0.2, 1.0, 4.0):
        shares = [mixup(picture, picture, random, alpha)[1] for _ in range(4000)]
        assert np.isclose(np.mean(shares), 0.5, atol=0.02)
        assert np.isclose(np.var(shares), 1 / (4 * (2 * alpha + 1)), rtol=0.1)


@quick
@given(sides, sides, st.integers(0, 99))
def test_cutmix_puts_in_a_rectangle_and_says_what_is_left(height, width, seed):
    first, second = np.zeros((height, width, 1), np.float32), np.ones((height, width, 1), np.float32)
    mixed, share = cutmix(first, second, np.random.default_rng(seed))
    rows, columns = (np.flatnonzero(mixed[..., 0].any(axis)) for axis in (1, 0))
    assert np.isclose(share, 1 - mixed.mean()) and not first.any()
    wanted = np.zeros((height, width))
    if len(rows):
        wanted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1
    np.testing.assert_array_equal(mixed[..., 0], wanted)


def test_the_rectangles_of_cutmix_keep_the_proportions_and_lie_everywhere():
    """Where nothing is lost at the border; its share of the area is then even, from 0 to 1, and large ones are lost more often."""
    random, first, second = np.random.default_rng(0), np.zeros((40, 80, 1)), np.ones((40, 80, 1))
    covered, whole = np.zeros((40, 80)), 0
    for _ in range(2000):
        mixed, _ = cutmix(first, second, random)
        covered += mixed[..., 0]
        high, wide = (int(mixed[..., 0].any(axis).sum()) for axis in (1, 0))
        inside = high and not (mixed[[0, -1]].any() or mixed[:, [0, -1]].any())
        if inside:
            whole += 1
            assert abs(wide - 2 * high) <= 2
    assert whole > 200 and covered.min() > 100
    np.testing.assert_allclose(covered, covered[::-1], atol=250)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", DISTORTIONS)
def test_a_distortion_of_no_strength_changes_nothing(name, channels):
    """Beside those that have no strength. (A histogram of fewer pixels than levels is even enough for Pillow.)"""
    image = noise(30, 35, channels) // 2 + 40
    same = (distorted(image, name, 0.0) == image).all()
    assert same == (name not in ("autocontrast", "equalize"))
    grey_colours = channels == 1 and name == "color"
    changed = (distorted(image, name, 1.0) != image).any()
    assert changed == (name != "nothing" and not grey_colours)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_colours_change_by_what_autoaugment_says(strength):
    image = noise(8, 8)
    values = image.astype(int)
    threshold, bits = round(256 * (1 - strength)), 8 - round(4 * strength)
    np.testing.assert_array_equal(distorted(image, "solarize", strength), np.where(values < threshold, values, 255 - values))
    np.testing.assert_array_equal(distorted(image, "posterize", strength), values // 2 ** (8 - bits) * 2 ** (8 - bits))
    for sign in (-1, 1):
        wanted = np.clip(values * (1 + 0.9 * sign * strength), 0, 255)
        np.testing.assert_allclose(distorted(image, "brightness", strength, sign), wanted, atol=1)
    flat = np.full((8, 8, 3), 77, np.uint8)
    np.testing.assert_array_equal(distorted(flat, "contrast", strength), flat)
    spread = distorted(image, "contrast", strength, -1).astype(int).std()
    assert np.isclose(spread / values.std(), 1 - 0.9 * strength, atol=0.03)
    greyer = np.ptp(distorted(image, "color", strength, -1).astype(int), axis=-1).mean()
    assert np.isclose(greyer / np.ptp(values, axis=-1).mean(), 1 - 0.9 * strength, atol=0.03)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_translations_and_shears_move_pixels_by_loops(axis, sign):
    """What comes from outside is grey."""
    image = noise(20, 20, 1)
    for name, offset in (
        (f"translate_{axis}", lambda y, x: sign * 150 / 331 * 20),
        (f"shear_{axis}", lambda y, x: sign * 0.3 * ((y if axis == "x" else x) + 0.5)),
    ):
        wanted = np.full_like(image, 128)
        for y in range(20):
            for x in range(20):
                from_y, from_x = y + 0.5, x + 0.5
                if axis == "x":
                    from_x += offset(y, x)
                else:
                    from_y += offset(y, x)
                if 0 <= from_y < 20 and 0 <= from_x < 20:
                    wanted[y, x] = image[int(from_y), int(from_x)]
        np.testing.assert_array_equal(distorted(image, name, 1.0, sign), wanted)


@pytest.mark.parametrize("sign", [-1, 1])
def test_rotation_is_by_up_to_30_degrees(sign):
    image = np.full((101, 101, 1), 128, np.uint8)
    image[48:53, 83:88] = 255  # To the right of the centre.
    turned = distorted(image, "rotate", 1.0, sign)
    rows, columns, _ = np.nonzero(turned == 255)
    angle = math.degrees(math.atan2(50 - rows.mean(), columns.mean() - 50))
    assert abs(angle - 30 * sign) < 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_distorted_picture_is_a_picture_and_the_same_for_the_same_seed(channels):
    image = noise(9, 7, channels)
    for seed in range(30):
        once, again = (rand_augment(image, np.random.default_rng(seed), count=3) for _ in range(2))
        assert once.shape == image.shape and once.dtype == np.uint8
        np.testing.assert_array_equal(once, again)


def test_every_distortion_is_drawn_as_often_with_either_sign_and_the_strength_asked_for(monkeypatch):
    counts = collections.Counter()

    def counted(name):
        def distort(picture, strength, sign):
            counts[name, sign] += 1
            assert strength == 0.7
            return picture

        return distort

    monkeypatch.setattr(augment, "DISTORTIONS", {name: counted(name) for name in DISTORTIONS})
    random, image = np.random.default_rng(0), noise(4, 4)
    for _ in range(1400):
        rand_augment(image, random, count=2, level=7)
    assert sum(counts.values()) == 2800 and len(counts) == 2 * len(DISTORTIONS) == 28
    assert 60 < min(counts.values()) and max(counts.values()) < 140


@pytest.mark.parametrize("level", [-1, 11, math.nan])
def test_levels_end_at_10(level):
    with pytest.raises(UserError, match="from 0 to 10"):
        rand_augment(noise(4, 4), np.random.default_rng(0), level=level)


GEOMETRY = {
    "flip": random_flip,
    "shift": functools.partial(random_shift, pixels=25),
    "crop": functools.partial(random_crop, size=(30, 41)),
    "larger": functools.partial(random_crop, size=(80, 70)),
    "resized crop": random_resized_crop,
}
every_way = pytest.mark.parametrize("name", GEOMETRY)


@functools.cache
def crowd() -> list[AnnotatedImage]:
    source, _ = ANNOTATED_IMAGES.open("builtin:crowded", resolution=64, masks=True)
    return [source[index] for index in range(12)]


@every_way
def test_boxes_around_moved_masks_are_the_moved_boxes(name):
    left = cut = 0
    for seed, example in enumerate(crowd() * 3):
        moved = GEOMETRY[name](example, np.random.default_rng(seed))
        around = Boxes.around(moved.masks, moved.boxes.labels)
        np.testing.assert_allclose(moved.boxes.xyxy, around.xyxy, atol=1e-6)
        assert moved.masks.shape == (len(moved.boxes), *moved.image.shape[:2]) and moved.masks.any((1, 2)).all()
        left += len(example.boxes) - len(moved.boxes)
        cut += example.masks.sum() - moved.masks.sum()
    assert (left > 0) == (name in ("shift", "crop", "resized crop")) and (cut > 0) == (left > 0)


@every_way
@pytest.mark.parametrize("seed", range(5))
def test_masks_boxes_and_points_show_what_they_showed(name, seed):
    """A picture of one number per object and of one bright pixel, whose places are then found by a loop."""
    height, width = 40, 50
    image, masks = np.zeros((height, width, 1), np.uint8), np.zeros((3, height, width), bool)
    rng = np.random.default_rng(seed)
    for number in range(3):
        top, place = rng.integers(0, height - 8), 16 * number
        masks[number, top : top + 8, place : place + rng.integers(5, 15)] = True
        image[masks[number]] = 10 + number
    y, x = 21, 3 + 9 * seed
    image[y, x] = 255
    masks[:, y, x] = False
    labels = np.arange(3, dtype=np.int32)
    points = np.array([[(x + 0.5) / width, (y + 0.5) / height]], np.float32)
    for example in (
        AnnotatedImage(image, ("a",), (("q", "a"),), Boxes.around(masks, labels), masks, points),
        AnnotatedImage(image, ("a",), (("q", "a"),), Boxes.around(masks, labels), None, points),
    ):
        moved = GEOMETRY[name](example, np.random.default_rng(seed))
        high, wide = moved.image.shape[:2]
        seen = {number for number in range(3) if (moved.image == 10 + number).any()}
        assert seen <= set(moved.boxes.labels.tolist()) and moved.captions == ("a",) and moved.questions == (("q", "a"),)
        for row, number in enumerate(moved.boxes.labels):
            rows, columns = np.nonzero(moved.image[..., 0] == 10 + number)
            left, top, right, bottom = moved.boxes.xyxy[row] * [wide, high, wide, high]
            assert 0 <= left < right <= wide + 1e-4 and 0 <= top < bottom <= high + 1e-4
            if moved.masks is not None:
                np.testing.assert_array_equal(moved.masks[row], moved.image[..., 0] == 10 + number)
            if len(rows) and moved.masks is not None:
                found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                np.testing.assert_allclose((left, top, right, bottom), found, atol=1e-3)
            elif len(rows):
                assert (
                    left - 1e-3 <= columns.min()
                    and columns.max() < right + 1e-3
                    and top - 1e-3 <= rows.min()
                    and rows.max() < bottom + 1e-3
                )
        bright = np.argwhere(moved.image[..., 0] == 255)
        (px, py), inside = moved.points[0] * [wide, high], (moved.points >= 0).all() and (moved.points <= 1).all()
        assert len(bright) == inside
        if inside:
            np.testing.assert_allclose((py - 0.5, px - 0.5), bright[0], atol=1e-3)


@every_way
def test_the_same_seed_augments_the_same_way_whatever_is_known_about_the_image(name):
    image = noise(40, 50)
    kinds = [Image(image), LabelledImage(image, 3), CaptionedImage(image, ("c",), 3), AnnotatedImage(image, label=3)]
    results = set()
    for seed in range(20):
        moved = [GEOMETRY[name](each, np.random.default_rng(seed)) for each in kinds]
        assert [type(each) for each in moved] == [type(each) for each in kinds]
        assert len({each.image.tobytes() for each in moved}) == 1 and moved[1].label == moved[2].label == moved[3].label == 3
        results.add(moved[0].image.tobytes())
    assert (len(results) > 1) == (name != "larger")
    np.testing.assert_array_equal(image, noise(40, 50))


def test_half_of_the_flips_mirror():
    image, rng = noise(3, 4), np.random.default_rng(0)
    flips = [random_flip(Image(image), rng).image for _ in range(1000)]
    mirrored = sum(np.array_equal(flip, np.fliplr(image)) for flip in flips)
    assert mirrored + sum(np.array_equal(flip, image) for flip in flips) == 1000
    assert 440 < mirrored < 560


def test_a_shift_is_a_window_of_the_padded_image_wherever_it_may_be():
    image, rng, seen = noise(5, 6) | 1, np.random.default_rng(0), set()
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 5, x : x + 6].tobytes(): (y, x) for y in range(5) for x in range(5)}
    for _ in range(300):
        seen.add(windows[random_shift(Image(image), rng, 2).image.tobytes()])
    assert len(seen) == 25


def test_a_crop_lies_everywhere_and_a_larger_one_around_the_image():
    image, rng = noise(5, 6), np.random.default_rng(0)
    windows = {image[y : y + 3, x : x + 4].tobytes() for y in range(3) for x in range(3)}
    assert {random_crop(Image(image), rng, (3, 4)).image.tobytes() for _ in range(200)} == windows
    np.testing.assert_array_equal(random_crop(Image(image), rng, (9, 8)).image, np.pad(image, ((2, 2), (1, 1), (0, 0))))


@quick
@given(sides, sides, st.integers(0, 2**32 - 1))
def test_a_resized_crop_is_a_window_of_the_image(height, width, seed):
    places = np.stack([*np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), np.zeros((height, width), int)], -1)
    crop = random_resized_crop(Image(places.astype(np.uint8)), np.random.default_rng(seed)).image
    h, w = crop.shape[:2]
    top, left = crop[0, 0, :2]
    assert h >= 1 and w >= 1
    np.testing.assert_array_equal(crop, places[top : top + h, left : left + w].astype(np.uint8))


def test_resized_crops_have_the_areas_and_ratios_asked_for():
    image, rng = Image(np.zeros((200, 200, 3), np.uint8)), np.random.default_rng(0)
    crops = [random_resized_crop(image, rng, scale=(0.2, 0.5), ratio=(0.5, 2.0)).image for _ in range(2000)]
    shapes = np.array([crop.shape[:2] for crop in crops])
    areas, ratios = shapes.prod(1) / 200**2, shapes[:, 1] / shapes[:, 0]
    assert 0.19 < areas.min() < 0.22 and 0.48 < areas.max() < 0.51
    assert 0.49 < ratios.min() < 0.53 and 1.9 < ratios.max() < 2.04
    assert abs(np.log(ratios).mean()) < 0.03


def test_a_ratio_that_never_fits_falls_back_to_the_centre():
    image = Image(np.arange(40, dtype=np.uint8).reshape(4, 10, 1))
    crop = random_resized_crop(image, np.random.default_rng(0), scale=(1, 1), ratio=(1, 1)).image
    np.testing.assert_array_equal(crop, image.image[:, 3:7])
