"""What the settings of a search may be. Errors are `UserError`s."""

import math
from collections.abc import Sequence

import numpy as np

from jaxdl.errors import UserError


def check_number(name: str, value: float, least: float = 0, most: float = math.inf, *, whole: bool = False) -> None:
    """From `least` to `most`, both included, and finite."""
    kinds = int | np.integer if whole else int | float | np.integer | np.floating
    if not isinstance(value, kinds) or not (math.isfinite(value) and least <= value <= most):
        bounds = f"from {least} on" if most == math.inf else f"from {least} to {most}"
        raise UserError(f"{name} is {value!r}: give a {'whole ' if whole else ''}number {bounds}")


def check_suppressed(tokens: Sequence[int]) -> None:
    """Ids from 0 on."""
    for token in tokens:
        check_number("a suppressed token", token, whole=True)
