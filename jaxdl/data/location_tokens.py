"""Boxes as words, so that a language model can read and write them (Chen et al. 2022, arXiv:2109.10852; the words of Beyer et al. 2024, arXiv:2407.07726, section 3.2).

Boxes are `(left, top, right, bottom)` as shares of width and height, from 0 to 1. In words the order is top, left, bottom, right.
"""

import re

import numpy as np
from jaxtyping import Float

LOCATIONS = tuple(f"<loc{place:04d}>" for place in range(1024))
"""The height of an image, and its width, cut into 1024 equal parts."""
SEGMENTS = tuple(f"<seg{code:03d}>" for code in range(128))
"""The codes of an autoencoder of masks, sixteen for an outline."""
WORDS = LOCATIONS + SEGMENTS

_WORDS_ORDER = [1, 0, 3, 2]
"""From left, top, right, bottom to top, left, bottom, right, and back."""
_BOX = re.compile(r"((?:<loc\d{4}>){4})\s*((?:<seg\d{3}>){16})?\s*([^;<>]*)")


def boxes_to_words(boxes: Float[np.ndarray, "N 4"]) -> list[str]:
    """Each box `(left, top, right, bottom)` in four `<loc....>`.

    A word is the part of 1024 in which an edge lies; what is outside of the image is brought to its border.
    """
    bins = np.clip(np.floor(np.asarray(boxes, np.float64) * len(LOCATIONS)), 0, len(LOCATIONS) - 1).astype(int)
    return ["".join(LOCATIONS[place] for place in box) for box in bins[:, _WORDS_ORDER]]


def words_to_boxes(text: str) -> tuple[Float[np.ndarray, "N 4"], list[str]]:
    """The boxes `(left, top, right, bottom)` that a text such as `<loc0256>… a red ring ; <loc….` names, from 0 to 1, and what is in each.

    An edge is put into the middle of its part, which halves the largest error. Outlines are passed over, and so is what is no box: fewer than four places, or places beyond 1023.
    """
    found, names = [], []
    for match in _BOX.finditer(text):
        edges = [int(place) for place in re.findall(r"<loc(\d{4})>", match[1])]
        if max(edges) < len(LOCATIONS):
            found.append([(edges[place] + 0.5) / len(LOCATIONS) for place in _WORDS_ORDER])
            names.append(match[3].strip())
    return np.array(found, np.float32).reshape(-1, 4), names
