"""A pole on a cart, and a network that may balance it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

LONGEST = 200
"""Time steps of an episode."""


class ActorCritic(nn.Module):
    """Logits of the two actions, and the value of a state."""

    @nn.compact
    def __call__(self, x: Float[Array, "*B 4"]) -> tuple[Float[Array, "*B 2"], Float[Array, "*B"]]:
        body = lambda x: nn.tanh(nn.Dense(64)(nn.tanh(nn.Dense(64)(x))))
        return nn.Dense(2, kernel_init=nn.initializers.orthogonal(0.01))(body(x)), nn.Dense(1)(body(x))[..., 0]


def begin(key: Key[Array, ""]) -> dict[str, Array]:
    """A pole that nearly stands (Barto, Sutton and Anderson 1983)."""
    key, start = jax.random.split(key)
    return {"pole": jax.random.uniform(start, (4,), minval=-0.05, maxval=0.05), "time": jnp.zeros((), jnp.int32), "key": key}


def move(environment: dict[str, Array], action: Array) -> tuple[dict[str, Array], Array]:
    """What a push to the left (0) or right (1) leads to, and whether the pole has fallen; a fall or the longest time begins anew."""
    _, speed, angle, turning = environment["pole"]
    push = jnp.where(action == 1, 10.0, -10.0)
    pulled = (push + 0.05 * turning**2 * jnp.sin(angle)) / 1.1
    turn = (9.8 * jnp.sin(angle) - jnp.cos(angle) * pulled) / (0.5 * (4 / 3 - 0.1 * jnp.cos(angle) ** 2 / 1.1))
    change = jnp.stack([speed, pulled - 0.05 * turn * jnp.cos(angle) / 1.1, turning, turn])
    pole, time = environment["pole"] + 0.02 * change, environment["time"] + 1
    fallen = (jnp.abs(pole[0]) > 2.4) | (jnp.abs(pole[2]) > 0.2095)
    moved, anew = {"pole": pole, "time": time, "key": environment["key"]}, begin(environment["key"])
    return jax.tree.map(lambda a, b: jnp.where(fallen | (time >= LONGEST), a, b), anew, moved), fallen
