"""Glyphs: letters of fonts, of which a family is never seen in training."""

import string

import matplotlib.textpath
import numpy as np
import pytest
from matplotlib.font_manager import FontProperties

from jaxdl.data import CAPTIONED_IMAGES, LABELLED_IMAGES
from jaxdl.data.glyphs import CLASSES, FAMILIES, TEST_FAMILY, Glyph, Glyphs, Pose, all_glyphs, render


@pytest.fixture(scope="module")
def parts():
    return Glyphs("train", resolution=32), Glyphs("test", resolution=32)


def test_fonts_of_one_family_are_on_one_side(parts):
    train, test = parts
    assert (len(train), len(test)) == (52 * 16, 52 * 6)
    fonts = [{glyph.font for glyph in part.glyphs} for part in parts]
    assert not fonts[0] & fonts[1] and fonts[1] == set(FAMILIES[TEST_FAMILY])
    assert fonts[0] | fonts[1] == {font for family in FAMILIES.values() for font in family}
    assert not {each.image.tobytes() for each in train} & {each.image.tobytes() for each in test}


def test_letters_have_their_unicode_names_and_emnists_classes(parts):
    _, test = parts
    assert len(CLASSES) == 37
    found = {test.glyph(index).letter: (test[index].captions, test[index].label) for index in range(len(test))}
    assert set(found) == set(string.ascii_letters)
    assert found["g"] == (("latin small letter g",), CLASSES.index("g")) and found["G"][1] == CLASSES.index("G")
    assert found["c"] == (("latin small letter c",), CLASSES.index("C")) and found["C"][1] == found["c"][1]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_letter_has_the_area_of_its_outline(split):
    """By matplotlib's reader of the same fonts, whose outlines are filled by a polygon's area."""
    for glyph in all_glyphs(split)[::7]:
        from pathlib import Path

        file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{glyph.font}.ttf"
        path = matplotlib.textpath.TextPath((0, 0), glyph.letter, size=100, prop=FontProperties(fname=str(file)))
        outlines = path.to_polygons(closed_only=True)
        area = abs(sum(np.sum(p[:-1, 0] * p[1:, 1] - p[1:, 0] * p[:-1, 1]) / 2 for p in outlines)) / 100**2
        drawn = render(glyph, 128).mean() / 255 / 0.72**2
        assert abs(drawn - area) < 0.1 * area + 0.004, glyph


def test_no_letter_is_cut_off_or_blank(parts):
    for part in parts:
        for index in range(len(part)):
            image = part[index].image
            assert image.shape == (32, 32, 1) and image.max() > 100
            assert not image[[0, -1]].any() and not image[:, [0, -1]].any()


def test_jitter_makes_different_copies_that_are_always_the_same(parts):
    jittered = Glyphs("train", resolution=24, jitter=5)
    assert len(jittered) == 5 * len(parts[0]) and jittered.glyph(14) == parts[0].glyph(2)
    copies = {jittered[index].image.tobytes() for index in range(10, 15)}
    assert len(copies) == 5 and copies == {
        Glyphs("train", resolution=24, jitter=5)[index].image.tobytes() for index in range(10, 15)
    }
    assert jittered[14].label == parts[0][2].label and jittered[14].captions == parts[0][2].captions
    for index in range(0, len(jittered), 97):
        assert jittered[index].image.max() > 60
    with pytest.raises(IndexError):
        jittered[len(jittered)]


def test_a_pose_moves_turns_and_scales():
    glyph = Glyph("DejaVuSans", "H")
    centre = lambda image: np.array([np.average(grid, weights=image[..., 0]) for grid in np.indices(image.shape[:2])])
    still = render(glyph, 64)
    np.testing.assert_allclose(centre(still), [31.5, 31.5], atol=0.5)
    np.testing.assert_allclose(centre(render(glyph, 64, Pose(right=0.1, down=-0.05))) - centre(still), [-3.2, 6.4], atol=0.3)
    turned = render(glyph, 64, Pose(degrees=90))
    difference = np.abs(np.rot90(still).astype(int) - turned)
    assert difference.mean() < 0.1 * still.mean()
    assert abs(render(glyph, 64, Pose(scale=0.5)).mean() / still.mean() - 0.25) < 0.02


def test_glyphs_open_with_labels_and_with_captions():
    labelled, held_out = LABELLED_IMAGES.open("builtin:glyphs", resolution=20, jitter=2)
    assert (len(labelled), len(held_out), labelled[0].image.shape) == (2 * 832, 2 * 312, (20, 20, 1))
    assert labelled.info.classes == held_out.info.classes == tuple(CLASSES)
    captioned, _ = CAPTIONED_IMAGES.open("builtin:glyphs", resolution=20)
    assert captioned.annotations(0).captions == ("latin small letter a",) and captioned[0].label == labelled[0].label
