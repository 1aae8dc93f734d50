"""What changes how SigLIP is computed changes nothing in what is computed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.losses import sigmoid_loss
from jaxdl.models.siglip import SigLIP, TextTower, VisionTower
from jaxdl.nn import ATTENTIONS, stack_blocks, unstack_blocks


def model(**changes) -> SigLIP:
    size = dict(width=16, depth=3, num_heads=2, mlp_dim=32, **changes)
    return SigLIP(VisionTower(patch_size=4, **size), TextTower(vocab_size=20, features=16, **size))


@pytest.mark.parametrize(
    "changes",
    [{"scan": True}, {"remat": True}, {"scan": True, "remat": True}, {"attention": ATTENTIONS["flash"]}],
    ids=["scan", "remat", "both", "flash"],
)
def test_loss_and_gradient_are_those_of_the_plain_model(changes):
    random = np.random.default_rng(0)
    images = jnp.asarray(random.uniform(-1, 1, (3, 8, 8, 3)), jnp.float32)
    tokens = jnp.asarray(random.integers(0, 20, (3, 5)), jnp.int32)
    params = model().init(jax.random.key(0), images, tokens)["params"]
    stacked = "scan" in changes

    def loss(module, params):
        out = module.apply({"params": params}, images, tokens, train=True)
        return sigmoid_loss(out.image_embeddings, out.text_embeddings, out.log_temperature, out.bias)

    expected, wanted = jax.jit(jax.value_and_grad(lambda p: loss(model(), p)))(params)
    other = model(**changes)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(other, p)))(stack_blocks(params) if stacked else params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # A bias may be the sum of many terms that cancel: what is left of rounding grows with the terms, not with the sum.
    for mine, theirs in zip(*map(jax.tree.leaves, (unstack_blocks(gradient) if stacked else gradient, wanted)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6 * max(1.0, float(jnp.abs(theirs).max())))
    if stacked:
        initial = other.init(jax.random.key(0), images, tokens)["params"]
        chex.assert_trees_all_equal_shapes(initial, stack_blocks(params))
