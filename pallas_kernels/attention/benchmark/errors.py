"""How exact it is: against the definition in float64, where that is small enough to be computed."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import reference
from pallas_kernels.attention.benchmark.implementations import Build
from pallas_kernels.attention.benchmark.shapes import Shape, cut, draw
from pallas_kernels.attention.problem import Operands, Spec

PARTS = "output", "d_query", "d_key", "d_value"
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
"""Of the largest error as a share of the largest value: several times what rounding in that dtype makes of it. A wrong tile errs by about 1."""


def small(shape: Shape, seed: int, length: int = 300) -> Shape:
    """The same case with two heads and few tokens, in several tiles of which the last is not full, a window that hides some."""
    return dataclasses.replace(
        shape,
        length=length,
        batch=1,
        heads=2,
        window=min(shape.window, length // 3),
        ends=cut(length, len(shape.ends) + 1, seed),
    )


class Oracle:
    """Output and gradients of a small shape by the definition."""

    def __init__(self, shape: Shape, dtype: str, seed: int):
        self.shape = small(shape, seed)
        self.arrays = draw(self.shape, dtype, seed)
        spec = Spec(scale=1 / math.sqrt(shape.width))
        operands = Operands(*self.arrays[:3], mask=jnp.asarray(self.shape.visible)[None, None])
        out, _ = reference.forward(spec, operands)
        self.wanted = [out, *reference.backward(spec, operands, np.asarray(self.arrays[3]), None)[:3]]

    def errors(self, build: Build) -> dict[str, float]:
        """The largest error of each of `PARTS`, as a share of the largest value. Raises what `build` raises."""
        results = build(self.shape, self.arrays).results()
        return {
            part: float(np.abs(got - want).max() / np.abs(want).max()) for part, got, want in zip(PARTS, results, self.wanted)
        }
