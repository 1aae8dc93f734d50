"""The two ways in which a program of this project ends badly on purpose. Both print as one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What was given cannot be used. The message says what was given, what is accepted, and what to do. Exit status 2."""


class RunError(Exception):
    """A run that had begun cannot go on; what it saved stands. Exit status 1."""


def unknown(kind: str, given: str, accepted: Iterable[str]) -> UserError:
    """The error for a name that is none of the accepted ones, with the nearest of them as a suggestion."""
    accepted = list(accepted)
    near = difflib.get_close_matches(given, accepted, n=1)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"there is no {kind} {given!r}: {suggestion}choose one of {', '.join(accepted)}")
