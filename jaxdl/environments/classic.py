"""Classic control, as in Gymnasium, step for step: a pole on a cart, a pendulum, two links, a car in a valley.

The fields of a state are scalars, which may be stacked over environments or abstract.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from jaxdl.environments.interface import Environment
from jaxdl.environments.pictures import LIGHT, SIGNAL, WOOD, Canvas
from jaxdl.environments.spaces import Box, Discrete


def wrapped(angle: Float[Array, ""]) -> Float[Array, ""]:
    """The same angle between −π and π."""
    return (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi


@flax.struct.dataclass
class Cart:
    """Metres, radians and their rates."""

    position: PyTree
    speed: PyTree
    angle: PyTree
    turning: PyTree


class CartPole(Environment):
    """Push a cart to the left (0) or right (1) so that the pole on it stays up: 1 for every step (Barto, Sutton and Anderson 1983; `CartPole-v1`, at most 500)."""

    name, time_limit, frames_per_second = "cartpole", 500, 50
    action_space = Discrete(2)
    observation_space = Box.of(-np.inf, np.inf, (4,))

    gravity, cart_mass, pole_mass, half_length, force, seconds = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    farthest, steepest = 2.4, 12 * 2 * np.pi / 360

    def reset(self, key: Key[Array, ""]) -> Cart:
        return Cart(*jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05))

    def observe(self, state: Cart) -> Float[Array, "4"]:
        return jnp.stack([state.position, state.speed, state.angle, state.turning])

    def step(self, state: Cart, action: Int[Array, ""], key: Key[Array, ""]) -> tuple[Cart, Float[Array, ""], Bool[Array, ""]]:
        total, sine, cosine = self.cart_mass + self.pole_mass, jnp.sin(state.angle), jnp.cos(state.angle)
        lever = self.pole_mass * self.half_length
        pull = (jnp.where(action == 1, self.force, -self.force) + lever * state.turning**2 * sine) / total
        turn = (self.gravity * sine - cosine * pull) / (self.half_length * (4 / 3 - self.pole_mass * cosine**2 / total))
        push = pull - lever * turn * cosine / total
        after = Cart(
            state.position + self.seconds * state.speed,
            state.speed + self.seconds * push,
            state.angle + self.seconds * state.turning,
            state.turning + self.seconds * turn,
        )
        fallen = (jnp.abs(after.position) > self.farthest) | (jnp.abs(after.angle) > self.steepest)
        return after, jnp.ones(()), fallen

    def render(self, state: Cart) -> UInt8[np.ndarray, "H W 3"]:
        canvas = Canvas(-2.4, -0.5, 2.4, 1.5)
        x, angle, length = float(state.position), float(state.angle), 2 * self.half_length
        canvas.line([(-2.4, 0), (2.4, 0)], LIGHT)
        canvas.box(x - 0.25, -0.12, x + 0.25, 0.12)
        canvas.line([(x, 0.05), (x + length * np.sin(angle), 0.05 + length * np.cos(angle))], WOOD, 0.1)
        canvas.disc((x, 0.05), 0.05)
        return canvas.pixels()


@flax.struct.dataclass
class Swing:
    """Radians from upright, and radians a second."""

    angle: PyTree
    turning: PyTree


class Pendulum(Environment):
    """Swing a pendulum up by a torque from −2 to 2, too weak to lift it, and hold it there: the cost of a step is `angle² + 0.1 turning² + 0.001 torque²` (`Pendulum-v1`). It never ends, and is cut off after 200 steps."""

    name, time_limit, frames_per_second = "pendulum", 200, 20
    action_space = Box.of(-2, 2, (1,))
    observation_space = Box.of(-np.array([1, 1, 8]), np.array([1, 1, 8]), (3,))

    gravity, mass, length, seconds, fastest = 10.0, 1.0, 1.0, 0.05, 8.0

    def reset(self, key: Key[Array, ""]) -> Swing:
        angle, turning = jax.random.uniform(key, (2,), minval=-1, maxval=1)
        return Swing(jnp.pi * angle, turning)

    def observe(self, state: Swing) -> Float[Array, "3"]:
        return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.turning])

    def step(
        self, state: Swing, action: Float[Array, "1"], key: Key[Array, ""]
    ) -> tuple[Swing, Float[Array, ""], Bool[Array, ""]]:
        torque = jnp.clip(action[0], -2, 2)
        cost = wrapped(state.angle) ** 2 + 0.1 * state.turning**2 + 0.001 * torque**2
        pull = 3 * self.gravity / (2 * self.length) * jnp.sin(state.angle) + 3 / (self.mass * self.length**2) * torque
        turning = jnp.clip(state.turning + self.seconds * pull, -self.fastest, self.fastest)
        return Swing(state.angle + self.seconds * turning, turning), -cost, jnp.zeros((), bool)

    def render(self, state: Swing) -> UInt8[np.ndarray, "H W 3"]:
        canvas = Canvas(-1.3, -1.3, 1.3, 1.3, 160)
        canvas.line([(0, 0), (np.sin(float(state.angle)), np.cos(float(state.angle)))], SIGNAL, 0.18)
        canvas.disc((0, 0), 0.06, LIGHT)
        return canvas.pixels()


@flax.struct.dataclass
class Links:
    """Angle of the first link from hanging and of the second from the first, and their rates."""

    first: PyTree
    second: PyTree
    first_turning: PyTree
    second_turning: PyTree


class Acrobot(Environment):
    """Two links that hang, with a torque of −1, 0 or 1 at the joint between them: bring the tip a link's length above the fixed end; −1 for each step before (Sutton 1996; `Acrobot-v1`, its 'book' equations, at most 500)."""

    name, time_limit, frames_per_second = "acrobot", 500, 15
    action_space = Discrete(3)
    fastest = 4 * np.pi, 9 * np.pi
    observation_space = Box.of(-np.array([1, 1, 1, 1, *fastest]), np.array([1, 1, 1, 1, *fastest]), (6,))

    seconds, gravity = 0.2, 9.8
    """Mass, length, and moment of inertia of a link are 1, its centre is in its middle."""

    def reset(self, key: Key[Array, ""]) -> Links:
        return Links(*jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1))

    def observe(self, state: Links) -> Float[Array, "6"]:
        angles = [jnp.cos(state.first), jnp.sin(state.first), jnp.cos(state.second), jnp.sin(state.second)]
        return jnp.stack([*angles, state.first_turning, state.second_turning])

    def rates(self, x: Float[Array, "4"], torque: Float[Array, ""]) -> Float[Array, "4"]:
        """Of angles and their rates (Sutton and Barto 1998, section 11.3)."""
        first, second, first_turning, second_turning = x
        d1 = 0.25 + (1.25 + jnp.cos(second)) + 2
        d2 = (0.25 + 0.5 * jnp.cos(second)) + 1
        phi2 = 0.5 * self.gravity * jnp.cos(first + second - jnp.pi / 2)
        phi1 = -0.5 * (second_turning**2 + 2 * second_turning * first_turning) * jnp.sin(second)
        phi1 += 1.5 * self.gravity * jnp.cos(first - jnp.pi / 2) + phi2
        coriolis = 0.5 * first_turning**2 * jnp.sin(second)
        second_pull = (torque + d2 / d1 * phi1 - coriolis - phi2) / (1.25 - d2**2 / d1)
        return jnp.stack([first_turning, second_turning, -(d2 * second_pull + phi1) / d1, second_pull])

    def step(self, state: Links, action: Int[Array, ""], key: Key[Array, ""]) -> tuple[Links, Float[Array, ""], Bool[Array, ""]]:
        x, torque, dt = jnp.stack(jax.tree.leaves(state)), action.astype(jnp.float32) - 1, self.seconds
        one = self.rates(x, torque)  # The classic Runge–Kutta scheme.
        two = self.rates(x + dt / 2 * one, torque)
        three = self.rates(x + dt / 2 * two, torque)
        four = self.rates(x + dt * three, torque)
        first, second, *rates = x + dt / 6 * (one + 2 * two + 2 * three + four)
        rates = [jnp.clip(rate, -limit, limit) for rate, limit in zip(rates, self.fastest)]
        after = Links(wrapped(first), wrapped(second), *rates)
        up = -jnp.cos(after.first) - jnp.cos(after.first + after.second) > 1
        return after, jnp.where(up, 0.0, -1.0), up

    def render(self, state: Links) -> UInt8[np.ndarray, "H W 3"]:
        canvas = Canvas(-2.2, -2.2, 2.2, 2.2, 180)
        first, both = float(state.first), float(state.first + state.second)
        joint = np.sin(first), -np.cos(first)
        tip = joint[0] + np.sin(both), joint[1] - np.cos(both)
        canvas.line([(-2.2, 1), (2.2, 1)], LIGHT)
        canvas.line([(0, 0), joint], WOOD, 0.16)
        canvas.line([joint, tip], SIGNAL, 0.16)
        for place in ((0, 0), joint):
            canvas.disc(place, 0.09)
        return canvas.pixels()


@flax.struct.dataclass
class Car:
    """Along the valley, whose floor is at −π/6."""

    position: PyTree
    speed: PyTree


class MountainCar(Environment):
    """A car in a valley, too weak to drive out: rock it to the flag at 0.5 by pushing left (0), not (1) or right (2); −1 for every step (Moore 1990; `MountainCar-v0`, at most 200)."""

    name, time_limit = "mountain_car", 200
    action_space = Discrete(3)
    fastest, left, right, goal = 0.07, -1.2, 0.6, 0.5
    observation_space = Box.of(np.array([left, -fastest]), np.array([right, fastest]), (2,))

    force, gravity = 0.001, 0.0025

    def reset(self, key: Key[Array, ""]) -> Car:
        return Car(jax.random.uniform(key, minval=-0.6, maxval=-0.4), jnp.zeros(()))

    def observe(self, state: Car) -> Float[Array, "2"]:
        return jnp.stack([state.position, state.speed])

    def driven(self, state: Car, push: Float[Array, ""]) -> Car:
        """What a push, in units of speed, leads to."""
        speed = jnp.clip(state.speed + push - self.gravity * jnp.cos(3 * state.position), -self.fastest, self.fastest)
        position = jnp.clip(state.position + speed, self.left, self.right)
        return Car(position, jnp.where((position == self.left) & (speed < 0), 0.0, speed))

    def step(self, state: Car, action: Int[Array, ""], key: Key[Array, ""]) -> tuple[Car, Float[Array, ""], Bool[Array, ""]]:
        after = self.driven(state, self.force * (action.astype(jnp.float32) - 1))
        return after, -jnp.ones(()), (after.position >= self.goal) & (after.speed >= 0)

    def render(self, state: Car) -> UInt8[np.ndarray, "H W 3"]:
        canvas, height = Canvas(-1.2, -0.1, 0.6, 1.2), lambda x: 0.45 * np.sin(3 * x) + 0.55
        road, x = np.linspace(self.left, self.right, 100), float(state.position)
        canvas.line(list(zip(road, height(road))))
        canvas.line([(self.goal, height(self.goal)), (self.goal, height(self.goal) + 0.18)], SIGNAL)
        canvas.disc((x, height(x) + 0.05), 0.05)
        return canvas.pixels()


class MountainCarContinuous(MountainCar):
    """The same with a push from −1 to 1, to be thrifty with: 100 at the flag, less `0.1 push²` for every step (`MountainCarContinuous-v0`, at most 999)."""

    name, time_limit = "mountain_car_continuous", 999
    action_space = Box.of(-1, 1, (1,))
    goal, force = 0.45, 0.0015

    def step(self, state: Car, action: Float[Array, "1"], key: Key[Array, ""]) -> tuple[Car, Float[Array, ""], Bool[Array, ""]]:
        after = self.driven(state, self.force * jnp.clip(action[0], -1, 1))
        there = (after.position >= self.goal) & (after.speed >= 0)
        return after, 100.0 * there - 0.1 * action[0] ** 2, there
