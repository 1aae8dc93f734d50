"""How well a pendulum can be held up at all: dynamic programming on a grid of its states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdl.environments import Episode, Pendulum
from jaxdl.environments.classic import Swing, wrapped

ANGLES, SPEEDS, TORQUES = 151, 151, 31
"""Of the grid: odd numbers, so that standing still is on it."""

_PENDULUM = Pendulum()
_TORQUES = np.linspace(-2, 2, TORQUES, dtype=np.float32)


def _value_at(values: Float[Array, "W V"], swing: Swing) -> Float[Array, ""]:
    """Between the four nearest states of the grid. Angles go around."""
    angle = (wrapped(swing.angle) + jnp.pi) / (2 * jnp.pi) * ANGLES
    speed = (swing.turning / _PENDULUM.fastest + 1) / 2 * (SPEEDS - 1)
    left, low = jnp.floor(angle).astype(int), jnp.clip(jnp.floor(speed).astype(int), 0, SPEEDS - 2)
    right, up = angle - left, speed - low
    at = lambda i, j: values[i % ANGLES, j]
    lower = (1 - right) * at(left, low) + right * at(left + 1, low)
    return (1 - up) * lower + up * ((1 - right) * at(left, low + 1) + right * at(left + 1, low + 1))


def _worth(values: Float[Array, "W V"], swing: Swing) -> Float[Array, "N"]:
    """Of each torque: its reward, and the value of where it leads."""

    def one(torque: Float[Array, ""]) -> Float[Array, ""]:
        after, reward, _ = _PENDULUM.step(swing, torque[None], jax.random.key(0))
        return reward + _value_at(values, after)

    return jax.vmap(one)(jnp.asarray(_TORQUES))


@functools.partial(jax.jit, static_argnames="steps")
def optimal_values(steps: int) -> Float[Array, "T W V"]:
    """The most that can be had in the steps that remain, 0 to `steps − 1` of them, from each state of a grid (Bellman 1957)."""
    angles = 2 * jnp.pi * jnp.arange(ANGLES) / ANGLES - jnp.pi
    speeds = jnp.linspace(-_PENDULUM.fastest, _PENDULUM.fastest, SPEEDS)
    grid = Swing(*jnp.meshgrid(angles, speeds, indexing="ij"))

    def back(values: Float[Array, "W V"], _: None) -> tuple[Array, Array]:
        best = jax.vmap(jax.vmap(lambda swing: _worth(values, swing).max()))(grid)
        return best, values

    return jax.lax.scan(back, jnp.zeros((ANGLES, SPEEDS)), None, steps)[1]


def best_returns(episodes: Episode) -> Float[np.ndarray, "E"]:
    """What is had in the world itself, and not on the grid, from where these episodes begin, by the torque that is worth most at every moment."""

    @jax.jit
    def play(swing: Swing) -> Float[Array, ""]:
        def on(swing: Swing, values: Float[Array, "W V"]) -> tuple[Swing, Array]:
            torque = jnp.asarray(_TORQUES)[_worth(values, swing).argmax()]
            after, reward, _ = _PENDULUM.step(swing, torque[None], jax.random.key(0))
            return after, reward

        return jax.lax.scan(on, swing, optimal_values(_PENDULUM.time_limit), reverse=True)[1].sum()

    return np.asarray(jax.jit(jax.vmap(play))(episodes.state))
