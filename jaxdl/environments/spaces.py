"""What can be done in an environment, and what is seen of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Discrete:
    """One of `count` actions, by its number."""

    count: int

    def sample(self, key: Key[Array, ""]) -> Int[Array, ""]:
        """Each with the same probability."""
        return jax.random.randint(key, (), 0, self.count)

    def __str__(self) -> str:
        return f"{self.count} discrete actions"


@dataclasses.dataclass(frozen=True)
class Box:
    """Arrays of float32 of one shape, each number between `low` and `high`, which may be infinite."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, low: np.ndarray | float, high: np.ndarray | float, shape: tuple[int, ...]) -> "Box":
        """From bounds that are arrays, or the same for all."""
        flat = lambda bound: tuple(np.broadcast_to(np.asarray(bound, np.float64), shape).ravel().tolist())
        return cls(flat(low), flat(high), shape)

    @property
    def bounds(self) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
        """`low` and `high` as arrays of the shape."""
        array = lambda bound: np.asarray(bound, np.float32).reshape(self.shape)
        return array(self.low), array(self.high)

    @property
    def bounded(self) -> bool:
        """Whether no bound is infinite."""
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*shape"]:
        """Uniform between the bounds, which must be finite."""
        low, high = self.bounds
        return jax.random.uniform(key, self.shape, jnp.float32, low, high)

    def __str__(self) -> str:
        return f"continuous actions of shape {'×'.join(map(str, self.shape)) or 'a scalar'}"


Space = Discrete | Box
