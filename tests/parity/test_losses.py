"""Objectives beside torch's."""

import jax.numpy as jnp
import numpy as np
import pytest
from versus_torch import assert_same, normal, torch

from jaxdl.losses import cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch_and_a_mask_is_its_ignored_index(smoothing):
    (logits,) = normal(0, (6, 7))
    labels = np.array([0, 6, 3, -100, 2, -100])
    assert_same(
        lambda x: cross_entropy(x, jnp.asarray(labels), smoothing=smoothing, mask=jnp.asarray(labels >= 0)),
        lambda x: torch.nn.functional.cross_entropy(x, torch.tensor(labels), label_smoothing=smoothing),
        3 * logits,
    )
