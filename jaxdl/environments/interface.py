"""What an environment is, and how episodes go on in it: the whole of the interface.

An environment is a value without state; what changes is a `State`, which its methods take and give. Everything is a function of arrays, so that `vmap` makes many environments of one, `scan` makes a trajectory, and a checkpoint that holds the `Episode` goes on with the same bits.
"""

import abc

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from jaxdl.environments.spaces import Box, Space

Observation = Float[Array, "*shape"]
Action = Float[Array, "*shape"] | Int[Array, ""]


class Environment(abc.ABC):
    """One kind of world, as of Gymnasium's: `reset` begins an episode, `step` acts in it. The time limit is not among its rules: `advance` cuts there, and says so."""

    name: str
    observation_space: Box
    action_space: Space
    time_limit: int
    """Steps after which an episode is cut off."""
    frames_per_second: float = 30
    """Of its films."""

    @abc.abstractmethod
    def reset(self, key: Key[Array, ""]) -> PyTree:
        """A state to begin with."""

    @abc.abstractmethod
    def observe(self, state: PyTree) -> Observation:
        """What an agent sees of a state."""

    @abc.abstractmethod
    def step(self, state: PyTree, action: Action, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""], Bool[Array, ""]]:
        """The next state, the reward for getting there, and whether that was the end (a terminal state, after which nothing more can be gained)."""

    @abc.abstractmethod
    def render(self, state: PyTree) -> UInt8[np.ndarray, "H W 3"] | None:
        """A picture of one state, in numpy; None where there is none."""


@flax.struct.dataclass
class Episode:
    """Where an environment is. Its key never changes within an episode: what is random in step t is drawn with `fold_in(key, t)`, so that a draw depends neither on other environments nor on how they lie over devices. Leaves may be stacked over environments and seeds."""

    state: PyTree
    key: PyTree
    time: PyTree
    """Steps made."""
    total: PyTree
    """Rewards so far."""

    @property
    def action_key(self) -> Key[Array, ""]:
        """For what an agent draws in this step."""
        return jax.random.fold_in(self.key, 2 * self.time)


@flax.struct.dataclass
class Moment:
    """What came of one action."""

    next_observation: PyTree
    """Of the state that it led to, also where the episode ended there: a value can be asked of it, and no other observation is the right one (that of `Episode` is already a new episode's)."""
    reward: PyTree
    terminated: PyTree
    """The world ended: there is no value after it."""
    ended: PyTree
    """It ended, or was cut off by the time limit, after which there would be more: the value of `next_observation` still counts."""
    total: PyTree
    """Sum of the episode's rewards up to now."""
    length: PyTree


def begin(environment: Environment, key: Key[Array, ""]) -> Episode:
    """An episode's beginning."""
    # 0, 2, 4, ... are for actions, 1, 3, 5, ... for the world: a beginning has the last number of all.
    state = environment.reset(jax.random.fold_in(key, 2**31 - 1))
    return Episode(state, key, jnp.zeros((), jnp.int32), jnp.zeros(()))


def advance(environment: Environment, episode: Episode, action: Action) -> tuple[Episode, Moment]:
    """One step. After the end, or at the time limit, the episode that is given back is a new one."""
    state, reward, terminated = environment.step(episode.state, action, jax.random.fold_in(episode.key, 2 * episode.time + 1))
    time, total = episode.time + 1, episode.total + reward
    ended = terminated | (time >= environment.time_limit)
    moment = Moment(environment.observe(state), reward, terminated, ended, total, time)
    anew = begin(environment, jax.random.fold_in(episode.key, 2**31 - 2))
    on = Episode(state, episode.key, time, total)
    return jax.tree.map(lambda new, old: jnp.where(ended, new, old), anew, on), moment
