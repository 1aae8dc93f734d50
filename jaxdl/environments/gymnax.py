"""Environments of gymnax (from 1.0 on), which are jax too."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxdl.environments.interface import Action, Environment, Observation
from jaxdl.environments.spaces import Box, Discrete, Space
from jaxdl.errors import UserError, unknown


@flax.struct.dataclass
class Seen:
    """A state with its observation, which may be random."""

    state: PyTree
    observation: PyTree


class Gymnax(Environment):
    """`gymnax:NAME`. It has no films: gymnax draws with libraries that are not asked for here."""

    def __init__(self, name: str):
        try:
            import gymnax
        except ImportError as error:
            raise UserError(f"gymnax:{name} needs gymnax, which cannot be imported ({error}): pip install 'gymnax>=1'") from None
        if name not in gymnax.registered_envs:
            raise unknown("environment of gymnax", name, gymnax.registered_envs)
        self.name = f"gymnax:{name}"
        self.inner, self.params = gymnax.make(name)
        self.time_limit = int(getattr(self.params, "max_steps_in_episode", 1000))
        self.action_space = space(self.inner.action_space(self.params), self.name)
        self.observation_space = space(self.inner.observation_space(self.params), self.name)

    def reset(self, key: Key[Array, ""]) -> Seen:
        observation, state = self.inner.reset_env(key, self.params)
        return Seen(state, jnp.asarray(observation, jnp.float32))

    def observe(self, state: Seen) -> Observation:
        return state.observation

    def step(self, state: Seen, action: Action, key: Key[Array, ""]) -> tuple[Seen, Float[Array, ""], Bool[Array, ""]]:
        observation, inner, reward, terminated, _ = self.inner.step_env(key, state.state, action, self.params)
        same = lambda new, old: jnp.asarray(new, old.dtype)
        after = Seen(jax.tree.map(same, inner, state.state), jnp.asarray(observation, jnp.float32))
        return after, jnp.asarray(reward, jnp.float32), jnp.asarray(terminated, bool)

    def render(self, state: Seen) -> None:
        """None: there is no picture."""


def space(theirs: Any, name: str) -> Space:
    """A space of gymnax or Gymnasium, by the names of its fields. Raises `UserError` for one that is not flat."""
    match type(theirs).__name__:
        case "Discrete":
            return Discrete(int(theirs.n))
        case "Box":
            low, high = np.asarray(theirs.low, np.float64), np.asarray(theirs.high, np.float64)
            infinite = np.finfo(np.float32).max
            low, high = np.where(low <= -infinite, -np.inf, low), np.where(high >= infinite, np.inf, high)
            return Box.of(low, high, tuple(theirs.shape))
    raise UserError(
        f"{name} has a space {type(theirs).__name__}: what is served are Discrete ones and Box; choose another environment"
    )
