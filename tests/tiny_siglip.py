"""The smallest run of SigLIP that the command line can start, and when two runs ended alike."""

from pathlib import Path

import jax
import numpy as np

from jaxdl.training.state import parameter_paths

ROOT = Path(__file__).parents[1]
TINY = (
    "--resolution=16 --patch=8 --width=16 --depth=1 --num-heads=2 --text-width=16 --text-depth=1 --text-length=6"
    " --batch-size=4 --eval-examples=8 --vocabulary=300"
).split()


def assert_same_parameters(ours: dict, expected: dict, what: str = "") -> None:
    """Within 1e-4, but for the biases of keys: their gradient is zero but for rounding, which Adam blows up, and they change nothing."""
    for path, a, b in zip(parameter_paths(expected), jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        if not path.endswith("key/bias"):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=f"{what}: {path}")
