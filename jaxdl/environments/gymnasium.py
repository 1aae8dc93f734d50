"""Environments of Gymnasium, which are simulators on the host: called back from compiled programs.

A simulator cannot be put into a checkpoint. But it is deterministic: it is where it is by the seed of its episode and the actions since. So that is the state here, and the simulators are a cache: one that stands where it is asked to act goes on from there, and where there is none, as after a restart, an episode is played again from its seed. To a program the environment is a function like those that are written in jax; seeds, resuming and films need no second way.
"""

import collections
import threading
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree, UInt8

from jaxdl.environments.gymnax import space
from jaxdl.environments.interface import Action, Environment, Observation
from jaxdl.environments.spaces import Box, Discrete
from jaxdl.errors import UserError, unknown


@flax.struct.dataclass
class Played:
    """An episode up to now."""

    seed: PyTree
    actions: PyTree
    """`T ...`: those that were taken, and zeros."""
    time: PyTree
    observation: PyTree


class Gymnasium(Environment):
    """`gymnasium:NAME`, on one device. An observation that is a number of `Discrete` ones is seen one-hot. Needs a simulator that depends on nothing but seed and actions, and ends by its own rules alone: the time limit is read from its registration (1,000 steps where that has none)."""

    def __init__(self, name: str):
        try:
            import gymnasium
        except ImportError as error:
            raise UserError(
                f"gymnasium:{name} needs Gymnasium, which cannot be imported ({error}): pip install gymnasium"
            ) from None
        if name not in gymnasium.registry:
            raise unknown("environment of Gymnasium", name, gymnasium.registry)
        try:
            first = gymnasium.make(name, max_episode_steps=-1)
        except Exception as error:  # Whatever an installed package raises: most often another package is missing.
            raise UserError(f"gymnasium:{name} cannot be made: {str(error).splitlines()[0]}") from None
        self.name = f"gymnasium:{name}"
        self.action_space = space(first.action_space, self.name)
        self.start = int(getattr(first.action_space, "start", 0))
        seen = space(first.observation_space, self.name)
        self.categories = seen.count if isinstance(seen, Discrete) else 0
        self.observation_space = Box.of(0, 1, (seen.count,)) if isinstance(seen, Discrete) else seen
        self.time_limit = gymnasium.spec(name).max_episode_steps or 1000
        self.simulators = Simulators(lambda: gymnasium.make(name, max_episode_steps=-1), first)
        self.drawn = Simulators(lambda: gymnasium.make(name, max_episode_steps=-1, render_mode="rgb_array"))
        self.frames_per_second = min(float(first.metadata.get("render_fps") or 30), 50)

    def reset(self, key: Key[Array, ""]) -> Played:
        seed = jax.random.bits(key) >> 1
        shape = jax.ShapeDtypeStruct(self.observation_space.shape, jnp.float32)
        observation = jax.pure_callback(self._beginnings, shape, seed, vmap_method="broadcast_all")
        discrete = isinstance(self.action_space, Discrete)
        actions = jnp.zeros(
            (self.time_limit, *(() if discrete else self.action_space.shape)), jnp.int32 if discrete else jnp.float32
        )
        return Played(seed, actions, jnp.zeros((), jnp.int32), observation)

    def observe(self, state: Played) -> Observation:
        return state.observation

    def step(self, state: Played, action: Action, key: Key[Array, ""]) -> tuple[Played, Float[Array, ""], Bool[Array, ""]]:
        actions, number = state.actions.at[state.time].set(action), jax.ShapeDtypeStruct((), jnp.float32)
        shapes = jax.ShapeDtypeStruct(self.observation_space.shape, jnp.float32), number, jax.ShapeDtypeStruct((), bool)
        found = jax.pure_callback(self._steps, shapes, state.seed, actions, state.time + 1, vmap_method="broadcast_all")
        observation, reward, terminated = found
        return Played(state.seed, actions, state.time + 1, observation), reward, terminated

    def render(self, state: Played) -> UInt8[np.ndarray, "H W 3"] | None:
        """None where Gymnasium cannot draw, as without pygame."""
        try:
            self.drawn.at(int(state.seed), self._taken(state.actions, state.time))
            return self.drawn.picture
        except ImportError:
            return None
        except Exception as error:
            if "not installed" in str(error):
                return None
            raise

    def _taken(self, actions: np.ndarray, time: Any) -> np.ndarray:
        taken = np.asarray(actions)[: int(time)]
        return taken + self.start if isinstance(self.action_space, Discrete) else taken

    def _seen(self, observation: Any) -> np.ndarray:
        if self.categories:
            return np.eye(self.categories, dtype=np.float32)[int(observation)]
        return np.asarray(observation, np.float32)

    def _beginnings(self, seeds: Array) -> np.ndarray:
        seeds = np.asarray(seeds)
        rows = [self._seen(self.simulators.beginning(int(seed))) for seed in seeds.ravel()]
        return np.stack(rows).reshape(*seeds.shape, *self.observation_space.shape)

    def _steps(self, seeds: Array, actions: Array, times: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        seeds, actions, times = map(np.asarray, (seeds, actions, times))
        batch = seeds.shape
        rows = zip(seeds.ravel(), actions.reshape(-1, *actions.shape[seeds.ndim :]), times.ravel())
        found = [self.simulators.at(int(seed), self._taken(actions, time)) for seed, actions, time in rows]
        observations, rewards, terminated = zip(*found)
        seen = np.stack([self._seen(observation) for observation in observations])
        array = lambda values, dtype: np.asarray(values, dtype).reshape(batch)
        return seen.reshape(*batch, *self.observation_space.shape), array(rewards, np.float32), array(terminated, bool)


class Simulators:
    """Simulators by where they stand: the seed of their episode, and the actions since."""

    def __init__(self, make: Any, first: Any = None):
        self.make, self.free = make, [first] if first is not None else []
        self.standing: collections.OrderedDict[tuple[int, bytes], Any] = collections.OrderedDict()
        self.begun: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self.lock = threading.Lock()
        self.picture: Any = None

    most = 1024
    """How many may stand; of more, those that nobody asked for longest are begun anew."""

    def beginning(self, seed: int) -> Any:
        """The first observation of an episode."""
        with self.lock:
            if seed not in self.begun:
                simulator = self._new()
                self.begun[seed], _ = simulator.reset(seed=seed)
                self._stands((seed, b""), simulator)
                while len(self.begun) > 4 * self.most:
                    self.begun.popitem(last=False)
            return self.begun[seed]

    def at(self, seed: int, actions: np.ndarray) -> tuple[Any, float, bool]:
        """Observation, reward and end after these actions, the last of which may be new (at least one, unless only a picture is wanted)."""
        with self.lock:
            before = actions[:-1]
            simulator = self.standing.pop((seed, before.tobytes()), None)
            if simulator is None:
                simulator = self._new()
                simulator.reset(seed=seed)
                for action in before:
                    simulator.step(action)
            observation, reward, terminated = None, 0.0, False
            if len(actions):
                observation, reward, terminated, _, _ = simulator.step(actions[-1])
            if simulator.render_mode is not None:
                self.picture = np.asarray(simulator.render())
            self._stands((seed, actions.tobytes()), simulator)
            return observation, float(reward), bool(terminated)

    def _new(self) -> Any:
        return self.free.pop() if self.free else self.make()

    def _stands(self, place: tuple[int, bytes], simulator: Any) -> None:
        other = self.standing.pop(place, None)
        if other is not None:
            self.free.append(other)
        self.standing[place] = simulator
        while len(self.standing) > self.most:
            self.free.append(self.standing.popitem(last=False)[1])
