"""Where GPT attends, read from the model as it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.models.gpt2 import GPT
from jaxdl.nn import ATTENTIONS, attention_weights, stack_blocks

DEPTH, HEADS, LENGTH = 3, 2, 7


@pytest.fixture(scope="module")
def model() -> tuple:
    module = GPT(vocabulary=11, length=LENGTH, width=8, depth=DEPTH, num_heads=HEADS)
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 11)
    params = module.init(jax.random.key(1), tokens)["params"]
    keys = iter(jax.random.split(jax.random.key(2), 200))
    return module, jax.tree.map(lambda leaf: leaf + 0.5 * jax.random.normal(next(keys), leaf.shape), params), tokens


def test_the_weights_of_every_block_are_shares_of_what_came_before(model):
    module, params, tokens = model
    weights = attention_weights(module, params, tokens)
    assert len(weights) == DEPTH
    for block in weights:
        assert block.shape == (2, HEADS, LENGTH, LENGTH)
        np.testing.assert_allclose(block.sum(-1), 1, rtol=1e-6)
        assert not np.triu(block, 1).any() and np.asarray(block).min() >= 0
    assert np.abs(weights[0] - weights[1]).max() > 0.01


@pytest.mark.parametrize(
    "how", [dict(scan=True), dict(remat=True), dict(attention=ATTENTIONS["flash"])], ids=["scan", "remat", "flash"]
)
def test_they_do_not_depend_on_how_the_model_is_computed(model, how):
    module, params, tokens = model
    expected = jnp.stack(attention_weights(module, params, tokens))
    found = attention_weights(module.clone(**how), stack_blocks(params) if "scan" in how else params, tokens)
    np.testing.assert_allclose(jnp.stack(found), expected, atol=1e-6)


def test_the_first_block_is_the_softmax_of_its_own_products(model):
    module, params, tokens = model
    one = params["decoder"]["block_0"]
    x = params["tokens"]["embedding"][tokens] + params["positions"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + module.eps)
    x = x * one["attention_norm"]["scale"] + one["attention_norm"]["bias"]
    project = lambda name: x @ one["attention"][name]["kernel"] + one["attention"][name]["bias"]
    query, key = (project(name).reshape(2, LENGTH, HEADS, -1) for name in ("query", "key"))
    products = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    products = np.where(np.tri(LENGTH, dtype=bool), products, -np.inf)
    expected = np.exp(products) / np.exp(products).sum(-1, keepdims=True)
    np.testing.assert_allclose(attention_weights(module, params, tokens)[0], expected, atol=1e-5)
