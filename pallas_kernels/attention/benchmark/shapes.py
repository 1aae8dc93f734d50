"""What is computed: which keys each query sees, and how many operations that makes."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Case = Literal["full", "causal", "window", "packed"]
PASSES = "forward", "backward", "forward+backward"
WORK = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
"""Operations of each pass for one of the forward pass: five products of matrices in the backward pass for two (Dao 2023, section 4.1)."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One point of the measurement."""

    case: Case
    length: int
    width: int
    batch: int
    heads: int
    window: int
    ends: tuple[int, ...]
    """Where the packed documents end, but for the last one."""

    def __str__(self) -> str:
        return f"{self.case}, {self.length} tokens, heads of {self.width}"

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from the other points of a run."""
        return self.case, self.length, self.width

    @property
    def segments(self) -> Int[np.ndarray, " T"]:
        """Of the packed documents."""
        return np.searchsorted(self.ends, np.arange(self.length), side="right").astype(np.int32)

    @property
    def arguments(self) -> dict[str, Any]:
        """What `jax.nn.dot_product_attention` is told beside the arrays, in every case but `packed`, which it has no word for."""
        if self.case == "window":
            return {"is_causal": True, "local_window_size": (self.window - 1, 0)}
        return {"is_causal": self.case != "full"}

    @property
    def visible(self) -> Bool[np.ndarray, "T T"]:
        """The dense mask, one byte for each pair and nothing larger on the way."""
        rows, columns = np.arange(self.length)[:, None], np.arange(self.length)
        visible = np.ones((self.length, self.length), bool) if self.case == "full" else columns <= rows
        if self.case == "window":
            visible &= columns > rows - self.window
        if self.case == "packed":
            visible &= self.segments[:, None] == self.segments
        return visible

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key are visible: triangles, counted without the mask."""
        triangle = lambda n: n * (n + 1) // 2
        match self.case:
            case "full":
                return self.length**2
            case "causal":
                return triangle(self.length)
            case "window":
                first = min(self.window, self.length)
                return triangle(first) + (self.length - first) * first
            case "packed":
                return sum(triangle(int(length)) for length in np.diff([0, *self.ends, self.length]))

    @property
    def operations(self) -> float:
        """Of the forward pass: a multiplication and an addition in each of two products, for each pair that is visible."""
        return 4.0 * self.batch * self.heads * self.width * self.pairs


def cut(length: int, documents: int, seed: int) -> tuple[int, ...]:
    """Where documents of different lengths end that together have `length` tokens; the last one ends there."""
    cuts = np.random.default_rng(seed).choice(np.arange(1, length), min(documents, length) - 1, replace=False)
    return tuple(int(each) for each in np.sort(cuts))


def draw(shape: Shape, dtype: str, seed: int) -> tuple[Float[Array, "B T N H"], ...]:
    """Query, key, value and the cotangent of the output, from a normal distribution."""
    keys = jax.random.split(jax.random.key(seed), 4)
    size = shape.batch, shape.length, shape.heads, shape.width
    return tuple(jax.random.normal(key, size, jnp.float32).astype(dtype) for key in keys)
