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
