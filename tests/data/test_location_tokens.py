"""Boxes become words and come back. Rows with such words are compared with transformers' in test_prompts.py."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data.location_tokens import SEGMENTS, boxes_to_words, words_to_boxes


def test_boxes_become_words_top_before_left_by_the_part_in_which_an_edge_lies():
    given = np.array([[0.0, 0.25, 0.5, 1.0], [-1.0, 0.2499, 0.9999, 2.0]])
    assert boxes_to_words(given) == ["<loc0256><loc0000><loc1023><loc0512>", "<loc0255><loc0000><loc1023><loc1023>"]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=4))
def test_boxes_come_back_within_half_a_part(given):
    given = np.array(given, np.float64).reshape(-1, 4)
    text = " ; ".join(f"{words} thing {row}" for row, words in enumerate(boxes_to_words(given)))
    found, names = words_to_boxes(text)
    assert names == [f"thing {row}" for row in range(len(given))] and found.shape == given.shape
    np.testing.assert_allclose(found, given, atol=0.5 / 1024 + 1e-6)


def test_what_is_no_box_is_passed_over_and_outlines_too():
    outline = "".join(SEGMENTS[:16])
    text = f"<loc0001><loc0002><loc0003> short ; <loc0000><loc0000><loc1024><loc0001> beyond ; <loc0000><loc0512><loc0512><loc1023>{outline} a red ring"
    found, names = words_to_boxes(text)
    assert names == ["a red ring"]
    np.testing.assert_allclose(found * 1024, [[512.5, 0.5, 1023.5, 512.5]])
    assert words_to_boxes("nothing here")[0].shape == (0, 4)
