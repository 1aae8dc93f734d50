"""What the comparisons with torch share."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis_profiles import few
from jax.typing import ArrayLike

torch = pytest.importorskip("torch")

shapes = few(4)
small = st.integers(1, 5)
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


def assert_same(
    ours: Callable,
    theirs: Callable,
    *arrays: np.ndarray,
    tolerance: float = 1e-5,
    double: float | None = 1e-10,
    scale: float | None = None,
) -> None:
    """Both functions give the same value and the same gradient for each of the arrays: within `tolerance` in float32, and within `double` in float64, unless one of them has no float64. Measured as by `assert_near`."""
    _assert_same(ours, theirs, arrays, tolerance, scale)
    if double is not None:
        with jax.enable_x64(True):
            _assert_same(ours, theirs, [np.float64(array) for array in arrays], double, scale)


def _assert_same(ours: Callable, theirs: Callable, arrays: Sequence[np.ndarray], tolerance: float, scale: float | None) -> None:
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    (cotangent,) = (array.astype(arrays[0].dtype) for array in normal(0, tuple(expected.shape)))

    @jax.jit
    def forward_and_back(cotangent: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, Sequence[jax.Array]]:
        value, pull = jax.vjp(ours, *arrays)
        return value, pull(cotangent)

    value, gradients = forward_and_back(cotangent, *arrays)
    assert_near(value, expected.detach().numpy(), tolerance, scale)
    wanted = torch.autograd.grad(expected, tensors, torch.tensor(cotangent))
    for gradient, want in zip(gradients, wanted, strict=True):
        assert_near(gradient, want.numpy(), tolerance, scale)


def assert_near(got: ArrayLike, want: np.ndarray, tolerance: float, scale: float | None = None) -> None:
    """Within `tolerance · scale`, and `tolerance` of the number itself. Unless given, the scale is the largest number of the array, or 1 where that is smaller: in a sum, its summands are what is rounded."""
    assert np.asarray(got).dtype == want.dtype
    scale = max(1.0, float(np.abs(want).max(initial=0))) if scale is None else scale
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


def outputs_of_parts(model: "torch.nn.Module", run: Callable[[], object]) -> dict[str, np.ndarray]:
    """What each part of a torch model gives while `run` runs it, by the part's name; of several outputs the first."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str, output: object) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, torch.Tensor):
            found[name] = output.detach().float().numpy()

    hooks = [
        part.register_forward_hook(lambda _part, _inputs, output, name=name: keep(name, output))
        for name, part in model.named_modules()
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


def parts_of_towers(depths: dict[str, int]) -> dict[str, str]:
    """Names of ours and of Hugging Face's for all blocks, and what is in them, of the towers `vision` and `text` of CLIP or SigLIP."""
    parts = {"": "", "/attention": ".self_attn", "/attention_norm": ".layer_norm1", "/feed_forward_norm": ".layer_norm2"}
    parts |= {"/feed_forward": ".mlp", "/feed_forward/expand": ".mlp.fc1"}
    return {
        f"{tower}/encoder/block_{layer}{ours}": f"{tower}_model.encoder.layers.{layer}{theirs}"
        for tower, depth in depths.items()
        for layer in range(depth)
        for ours, theirs in parts.items()
    }
