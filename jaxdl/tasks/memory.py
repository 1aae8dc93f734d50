"""What several parts of an evaluation want of the same variables is computed once."""

from collections.abc import Callable
from typing import Any, TypeVar

from jaxtyping import PyTree

Found = TypeVar("Found")


class Latest:
    """`fn(variables, ...)`, of which the last result is kept as long as the same variables, as an object, are asked about: `evaluate` and `show` then share what is predicted. Further arguments are expected to be the same too."""

    def __init__(self, fn: Callable[..., Found]):
        self._fn, self._variables = fn, None
        self._found: Any = None

    def __call__(self, variables: PyTree, *more: Any) -> Found:
        if self._variables is not variables:
            self._found, self._variables = self._fn(variables, *more), variables
        return self._found
