"""How GPT begins, how it goes on with a text, and where it attends, read from the model as it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.generate import Sampling
from jaxdl.models.gpt2 import GPT, continue_text
from jaxdl.nn import ATTENTIONS, attention_weights, stack_blocks
from jaxdl.training.state import parameter_paths

DEPTH, HEADS, LENGTH = 3, 2, 7


@pytest.fixture(scope="module")
def model() -> tuple:
    module = GPT(vocab_size=11, length=LENGTH, width=8, depth=DEPTH, num_heads=HEADS)
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


def test_what_leads_back_into_the_residual_stream_starts_smaller():
    """0.02, and 0.02 / √(2 · depth) for the last map of either part of a block."""
    depth = 8
    module = GPT(vocab_size=300, length=64, width=64, depth=depth, num_heads=2)
    params = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    deviations = {path: float(jnp.std(leaf)) for path, leaf in zip(parameter_paths(params), jax.tree.leaves(params))}
    kernels = {path: value for path, value in deviations.items() if path.endswith(("kernel", "embedding", "positions"))}
    assert len(kernels) == 6 * depth + 2
    for path, value in kernels.items():
        wanted = 0.02 / np.sqrt(2 * depth) if path.endswith(("out/kernel", "contract/kernel")) else 0.02
        np.testing.assert_allclose(value, wanted, rtol=0.06, err_msg=path)
    assert all(value < 1e-5 for path, value in deviations.items() if path not in kernels)


def recomputed(module: GPT, params: dict, text: list[int], tokens: int) -> list[int]:
    """The likeliest token, again and again, from all that is seen: the text from `first` on, which is moved when the positions are used up."""
    half = (module.length + 1) // 2
    text, given = list(text), len(text)
    first = 0 if given <= module.length else given - half
    while len(text) < given + tokens:
        if len(text) - first > module.length:
            first = len(text) - half
        logits = module.apply({"params": params}, jnp.asarray([text[first:]])).logits
        text.append(int(logits[0, -1].argmax()))
    return text[given:]


@pytest.mark.parametrize(("given", "tokens"), [(2, 3), (6, 2), (7, 1), (1, 30), (6, 20), (12, 15)])
def test_a_text_longer_than_the_positions_is_that_of_a_model_without_a_cache(model, given, tokens):
    module, params, _ = model
    text = np.random.default_rng(given).integers(0, 11, given).tolist()
    streamed: list[int] = []
    found = continue_text(
        module,
        {"params": params},
        text,
        jax.random.key(0),
        tokens=tokens,
        sampling=Sampling(temperature=0),
        stream=streamed.append,
    )
    assert found == streamed == recomputed(module, params, text, tokens)


def test_nothing_is_written_after_an_end(model):
    module, params, _ = model
    go = lambda **how: continue_text(
        module, {"params": params}, [3, 1], jax.random.key(0), tokens=20, sampling=Sampling(temperature=0), **how
    )
    whole = go()
    streamed: list[int] = []
    end = whole[12]
    assert go(end=end, stream=streamed.append) == streamed == whole[: whole.index(end) + 1]
    with pytest.raises(UserError, match="no token to continue from"):
        continue_text(module, {"params": params}, [], jax.random.key(0), tokens=1)
