"""Worlds to act in: a small interface, worlds written in jax, and those of gymnax and Gymnasium behind the same interface."""

from collections.abc import Callable

from jaxdl.environments.classic import Acrobot, CartPole, MountainCar, MountainCarContinuous, Pendulum
from jaxdl.environments.gymnasium import Gymnasium
from jaxdl.environments.gymnax import Gymnax
from jaxdl.environments.interface import Environment, Episode, Moment, advance, begin
from jaxdl.environments.pixels import Breakout, Catch
from jaxdl.environments.spaces import Box, Discrete, Space
from jaxdl.errors import unknown

ENVIRONMENTS: dict[str, Callable[[], Environment]] = {
    kind.name: kind for kind in (CartPole, Pendulum, Acrobot, MountainCar, MountainCarContinuous, Catch, Breakout)
}
"""Those that are here, by name."""

LIBRARIES: dict[str, Callable[[str], Environment]] = {"gymnax": Gymnax, "gymnasium": Gymnasium}
"""Those of others, as LIBRARY:NAME."""


def make(spec: str) -> Environment:
    """The environment of a name: one of `ENVIRONMENTS`, `gymnax:NAME` or `gymnasium:NAME`. Raises `UserError` for a name that is none, and for a library that is not installed."""
    library, separator, name = spec.partition(":")
    if separator:
        if library not in LIBRARIES:
            raise unknown("library of environments", library, LIBRARIES)
        return LIBRARIES[library](name)
    if spec not in ENVIRONMENTS:
        raise unknown("environment", spec, [*ENVIRONMENTS, "gymnax:NAME", "gymnasium:NAME"])
    return ENVIRONMENTS[spec]()


__all__ = [
    "ENVIRONMENTS",
    "LIBRARIES",
    "Acrobot",
    "Box",
    "Breakout",
    "CartPole",
    "Catch",
    "Discrete",
    "Environment",
    "Episode",
    "Gymnasium",
    "Gymnax",
    "Moment",
    "MountainCar",
    "MountainCarContinuous",
    "Pendulum",
    "Space",
    "advance",
    "begin",
    "make",
]
