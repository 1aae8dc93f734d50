"""The smallest run of two towers, in Python and on the command line, and when two runs ended alike."""

from pathlib import Path

import jax
import numpy as np

from jaxdl.training.state import parameter_paths

ROOT = Path(__file__).parents[1]
SIZES = dict(
    resolution=16, patch_size=8, width=16, depth=1, num_heads=2, text_width=16, text_depth=1, text_length=6,
    batch_size=4, eval_examples=8, vocab_size=300,
)  # fmt: skip
TINY = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]


def assert_same_parameters(ours: dict, expected: dict, what: str = "") -> None:
    """Within 1e-4, but for the biases of keys: their gradient is zero but for rounding, which Adam blows up, and they change nothing."""
    for path, a, b in zip(parameter_paths(expected), jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        if not path.endswith("key/bias"):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=f"{what}: {path}")
