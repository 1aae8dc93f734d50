"""What the comparisons with torch share."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

shapes = settings(max_examples=4, deadline=None, derandomize=True)
small = st.integers(1, 5)
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def assert_same(ours: Callable, theirs: Callable, *arrays: np.ndarray, tolerance: float = 1e-5) -> None:
    """Both functions give the same value and the same gradient for each of the arrays."""
    value, pull = jax.vjp(jax.jit(ours), *arrays)
    (cotangent,) = normal(0, value.shape)
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(expected, tensors, torch.tensor(cotangent))
    for gradient, want in zip(pull(cotangent), gradients, strict=True):
        scale = max(1.0, float(want.abs().max()))
        np.testing.assert_allclose(gradient, want.numpy(), rtol=tolerance, atol=tolerance * scale)
