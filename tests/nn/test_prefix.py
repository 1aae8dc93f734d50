"""What decoders of prefixes need: a soft cap of logits, a prefix that is read both ways, and blocks that are not alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.nn import ATTENTIONS, MultiHeadAttention, RMSNorm, Transformer, TransformerBlock, rope

PREFIX = np.array([4, 2, 0, 9], np.int32)
LENGTH = 9


@pytest.mark.parametrize("form", ATTENTIONS)
def test_a_soft_cap_is_on_logits_before_the_bias_and_the_mask(form):
    random = np.random.default_rng(0)
    query, key, value = (4 * random.standard_normal((2, 5, heads, 4)) for heads in (4, 2, 2))
    bias, mask = random.standard_normal((2, 4, 5, 5)), np.tril(np.ones((5, 5), bool))
    expected = np.zeros_like(query)
    for b in range(2):
        for n in range(4):
            logits = 1.5 * np.tanh(0.7 * query[b, :, n] @ key[b, :, n // 2].T / 1.5) + bias[b, n]
            weights = np.where(mask, np.exp(logits), 0)
            expected[b, :, n] = weights / weights.sum(-1, keepdims=True) @ value[b, :, n // 2]
    attend = jax.jit(functools.partial(ATTENTIONS[form], scale=0.7, logits_soft_cap=1.5))
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, key, value, bias))
    np.testing.assert_allclose(attend(*arrays, jnp.asarray(mask)[None, None]), expected, atol=1e-5)


def seen(prefix: int, window: tuple[int, int] | None, is_causal: bool) -> np.ndarray:
    """Who sees whom, pair by pair."""
    left, right = window or (LENGTH, LENGTH)
    mask = np.zeros((LENGTH, LENGTH), bool)
    for query in range(LENGTH):
        for key in range(LENGTH):
            near = query - left <= key <= query + (0 if is_causal else right)
            mask[query, key] = near or (query < prefix and key < prefix)
    return mask


def attention(window: tuple[int, int] | None) -> MultiHeadAttention:
    return MultiHeadAttention(2, num_kv_heads=1, head_width=4, rotary=rope, local_window_size=window)


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (4, LENGTH, 6))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, (2, 1)])
def test_a_prefix_sees_itself_whole_and_the_rest_what_it_would(x, window, is_causal):
    layer, free = attention(window), attention(None)
    params = layer.init(jax.random.key(1), x)
    ours = layer.apply(params, x, prefix=jnp.asarray(PREFIX), is_causal=is_causal)
    mask = np.stack([seen(prefix, window, is_causal) for prefix in PREFIX])[:, None]
    np.testing.assert_allclose(ours, free.apply(params, x, mask=jnp.asarray(mask)), atol=1e-6)
    hidden = jnp.asarray(np.arange(LENGTH) != 1)[None, None, None]  # A mask of one's own is kept.
    both = layer.apply(params, x, prefix=jnp.asarray(PREFIX), is_causal=is_causal, mask=hidden)
    np.testing.assert_allclose(both, free.apply(params, x, mask=jnp.asarray(mask) & hidden), atol=1e-6)


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_a_prefix_that_is_decoded_first_gives_what_the_whole_sequence_gives(x, window):
    layer = attention(window)
    params = layer.init(jax.random.key(1), x)
    prefix = 5
    whole = layer.apply(params, x, prefix=jnp.full(4, prefix), is_causal=True)
    decode = functools.partial(layer.apply, params, method="decode")
    first, cache = decode(x[:, :prefix], layer.empty_cache(4, LENGTH, 6), is_causal=False)
    second, cache = decode(x[:, prefix : prefix + 1], cache)
    third, _ = decode(x[:, prefix + 1 :], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second, third], axis=1), whole, atol=1e-5)


def test_a_prefix_belongs_to_self_attention(x):
    layer = MultiHeadAttention(2)
    with pytest.raises(UserError, match="cross-attention"):
        layer.init(jax.random.key(0), x, x, prefix=jnp.asarray(PREFIX))


def stack(depth: int = 4, scan: bool = False, **options) -> Transformer:
    def block(layer: int) -> TransformerBlock:
        how = functools.partial(MultiHeadAttention, local_window_size=(0, 0) if layer % 2 == 0 else None)
        norm = functools.partial(RMSNorm, 1e-6)
        return TransformerBlock(2, 8, attention_layer=how, norm=norm, is_causal=True, **options)

    return Transformer(depth, block, scan=scan)


def test_blocks_by_number_attend_each_in_its_way(x):
    """Behind a window of the token itself nothing else is seen: with it alone no token learns of another."""
    apart, mixed = stack(1), stack(2)
    params = mixed.init(jax.random.key(1), x)

    def reach(module, params) -> np.ndarray:
        gradient = jax.jacobian(lambda x: module.apply(params, x)[0].sum(-1))(x)[:, 0]
        return np.abs(gradient).sum(-1) > 0

    alone = {"params": {"block_0": params["params"]["block_0"], "norm": params["params"]["norm"]}}
    np.testing.assert_array_equal(reach(apart, alone), np.eye(LENGTH, dtype=bool))
    np.testing.assert_array_equal(reach(mixed, params), np.tril(np.ones((LENGTH, LENGTH), bool)))


def test_blocks_by_number_decode_what_they_say_whole_and_are_not_compiled_as_one(x):
    module = stack(sandwich_norm=True)
    params = module.init(jax.random.key(1), x)
    cache = module.empty_cache(4, LENGTH, 6)
    first, cache = module.apply(params, x[:, :6], cache, method="decode")
    second, _ = module.apply(params, x[:, 6:], cache, method="decode")
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), module.apply(params, x), atol=1e-5)
    with pytest.raises(UserError, match="not alike"):
        stack(scan=True).init(jax.random.key(0), x)


def test_what_a_part_adds_is_normalised_where_that_is_asked_for(x):
    block = TransformerBlock(2, 8, norm=functools.partial(RMSNorm, 1e-6), sandwich_norm=True)
    params = block.init(jax.random.key(1), x)["params"]
    only_first = jax.tree.map(lambda leaf: leaf, params)
    only_first["feed_forward_added_norm"] = {"scale": jnp.zeros(6)}
    only_first["attention_added_norm"] = {"scale": jnp.full(6, 2.0)}
    added = block.apply({"params": only_first}, x) - x
    np.testing.assert_allclose(jnp.sqrt((added**2).mean(-1)), 2, rtol=1e-4)
