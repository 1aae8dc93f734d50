"""Stacks of blocks: looped and scanned ones are equal, decoding is the whole sequence, and what drops out drops as the paper says."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxdl.errors import UserError
from jaxdl.nn import (
    FeedForward,
    GatedFeedForward,
    MultiHeadAttention,
    RMSNorm,
    Transformer,
    TransformerBlock,
    padding_mask,
    rope,
    stack_blocks,
    stochastic_depth,
    unstack_blocks,
)

LLAMA = TransformerBlock(
    4,
    24,
    attention_layer=functools.partial(MultiHeadAttention, num_kv_heads=2, rotary=rope, use_bias=False),
    feed_forward_layer=GatedFeedForward,
    norm=functools.partial(RMSNorm, 1e-5),
    is_causal=True,
)
VASWANI = TransformerBlock(4, 24, norm_first=False, is_causal=True, cross_attention=True)
KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, MEMORY = normal(1, 2, 5, 16), normal(2, 2, 6, 16)


def inputs(block):
    return (X, MEMORY) if block.cross_attention else (X,)


def shaken(params):
    """With no parameter left at zero or one."""
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [leaf + 0.1 * normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])


@pytest.mark.parametrize("block", [LLAMA, VASWANI], ids=["Llama", "Vaswani"])
def test_scan_and_remat_change_neither_values_nor_gradients(block):
    loop, arrays = Transformer(2, block), inputs(block)
    params = shaken(loop.init(KEY, *arrays)["params"])
    cotangent = normal(3, *X.shape)

    def run(stack, params):
        loss = lambda params, *arrays: (stack.apply({"params": params}, *arrays) * cotangent).sum()
        return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(1 + len(arrays)))))(params, *arrays)

    value, (gradients, *inner) = run(loop, params)  # Of the inputs, and of the memory where there is one.
    assert all(jnp.abs(gradient).max() > 0.1 for gradient in inner)
    for scan, remat in ((False, True), (True, False), (True, jax.checkpoint_policies.dots_saveable)):
        got, (of_params, *of_inputs) = run(loop.clone(scan=scan, remat=remat), stack_blocks(params) if scan else params)
        np.testing.assert_allclose(got, value, rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), of_inputs, inner)
        of_params = unstack_blocks(of_params) if scan else of_params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), of_params, gradients)


def test_parameters_are_stacked_and_unstacked_anywhere_in_a_model():
    x = (X,)
    looped, scanned = (Transformer(3, LLAMA, scan=scan).init(KEY, *x)["params"] for scan in (False, True))
    stacked = stack_blocks({"text": {"encoder": looped}, "head": jnp.ones(3)})
    assert set(stacked["text"]["encoder"]) == {"blocks", "norm"}
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(stacked["text"]["encoder"]) == shapes(scanned)
    back = unstack_blocks(stacked)
    assert set(back) == {"text", "head"} and shapes(back["text"]["encoder"]) == shapes(looped)
    jax.tree.map(np.testing.assert_array_equal, back["text"]["encoder"], looped)
    kernels = scanned["blocks"]["attention"]["query"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1])  # Each layer is initialised for itself.


def test_names_of_parameters():
    encoder = Transformer(2, TransformerBlock(2, 24)).init(KEY, X)["params"]
    assert set(encoder) == {"block_0", "block_1", "norm"}
    assert set(encoder["block_0"]) == {"attention_norm", "attention", "feed_forward_norm", "feed_forward"}
    decoder = Transformer(1, VASWANI).init(KEY, X, MEMORY)["params"]
    assert set(decoder) == {"block_0"}  # Post-norm has no last one.
    assert set(decoder["block_0"]) == set(encoder["block_0"]) | {"cross_attention", "cross_attention_norm"}


def test_a_scanned_program_does_not_grow_with_the_depth():
    def products(depth):
        stack = Transformer(depth, LLAMA, scan=True)
        params = jax.eval_shape(stack.init, KEY, X)
        return jax.jit(stack.apply).lower(params, X).as_text().count("dot_general")

    assert products(2) == products(20) > 0


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("block", [LLAMA, VASWANI], ids=["Llama", "Vaswani"])
def test_decoding_in_a_compiled_loop_is_the_whole_sequence(block, scan):
    """A prompt of 3 tokens, once padded on the left and once on the right, then one token at a time; the memory is padded as well."""
    stack = Transformer(2, block, scan=scan)
    params = shaken(stack.init(KEY, *inputs(block))["params"])
    apply = functools.partial(stack.apply, {"params": params})
    known = jnp.asarray([[True] * 6, [False, True, True, True, False, False]])
    options = dict(memory_mask=padding_mask(known)) if block.cross_attention else {}
    whole = apply(*inputs(block), **options)

    @jax.jit
    def decode(x):
        memory = [apply(MEMORY, known, method="cache_memory")] if block.cross_attention else []
        prompt = jnp.full((2, 4, 16), 1e3).at[0, 1:].set(x[0, :3]).at[1, :3].set(x[1, :3])
        valid = jnp.asarray([[False, True, True, True], [True, True, True, False]])
        first, cache = apply(prompt, stack.empty_cache(2, 6, 16), *memory, valid=valid, method="decode")

        def step(cache, token):
            y, cache = apply(token[:, None], cache, *memory, method="decode")
            return cache, y[:, 0]

        cache, rest = jax.lax.scan(step, cache, x[:, 3:].swapaxes(0, 1))
        return first, rest.swapaxes(0, 1), cache

    first, rest, cache = decode(X)
    np.testing.assert_allclose(first[0, 1:], whole[0, :3], atol=1e-5)
    np.testing.assert_allclose(first[1, :3], whole[1, :3], atol=1e-5)
    np.testing.assert_allclose(rest, whole[:, 3:], atol=1e-5)
    assert cache.next == 6 and jnp.array_equal(cache.valid.sum(1), jnp.asarray([5, 5]))


def test_a_full_stack_refuses_more():
    stack = Transformer(2, LLAMA)
    params = stack.init(KEY, X)
    _, cache = stack.apply(params, X, stack.empty_cache(2, 6, 16), method="decode")
    with pytest.raises(UserError, match="5 tokens after 5 do not fit into a cache of 6 slots"):
        stack.apply(params, X, cache, method="decode")


class Identity(nn.Module):
    """In place of a normalisation."""

    dtype: object = None
    param_dtype: object = None

    def __call__(self, x):
        return x


class Spy(nn.Module):
    """A block that adds the drop rate it is given."""

    norm_first: bool = False

    @nn.compact
    def __call__(self, x, memory=None, *, train=False, drop_rate=0.0):
        return x + drop_rate


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_drop_rates_rise_linearly_to_that_of_the_last_block(scan):
    stack, zeros = Transformer(4, Spy(), stochastic_depth=0.4, scan=scan), jnp.zeros((1, 1, 1))
    assert stack.apply({}, zeros, train=True) == pytest.approx(0.1 + 0.2 + 0.3 + 0.4)
    assert stack.apply({}, zeros) == 0
    with pytest.raises(UserError, match=r"stochastic_depth is 1\.0"):
        stack.clone(stochastic_depth=1.0).apply({}, zeros)


def test_stochastic_depth_drops_whole_examples_and_keeps_the_mean():
    x = 1 + jnp.arange(6.0).reshape(1, 2, 3).repeat(4000, 0)
    y = stochastic_depth(x, 0.25, KEY)
    kept = np.asarray(y[:, 0, 0] > 0)
    np.testing.assert_allclose(y, np.where(kept[:, None, None], x / 0.75, 0), rtol=1e-6)
    assert kept.mean() == pytest.approx(0.75, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_a_dropped_branch_is_the_identity(scan):
    # A rate of almost 1 in the only block: for nearly every example nothing is added. Without `train`, nothing is dropped.
    stack = Transformer(1, TransformerBlock(4, 24), stochastic_depth=0.99, scan=scan)
    stack = stack.clone(block=stack.block.clone(norm=Identity))
    x = normal(0, 50, 3, 16)
    params = stack.init(KEY, x)
    same = (stack.apply(params, x, train=True, rngs={"dropout": KEY}) == x).all((1, 2))
    assert 44 <= same.sum() <= 50
    assert not (stack.apply(params, x) == x).all((1, 2)).any()


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_dropout_differs_from_part_to_part_and_layer_to_layer(scan):
    class Note(nn.Module):
        """A part that gives ones, and notes what it was given: what has been dropped of the ones before."""

        num: int
        attention: object = None
        dropout: float = 0.0
        dtype: object = None
        param_dtype: object = None

        @nn.compact
        def __call__(self, x, **_):
            self.sow("noted", "x", x)
            return jnp.ones_like(x) + self.param("zero", nn.initializers.zeros, ())

    plain = dict(attention_layer=Note, feed_forward_layer=Note, norm=Identity)
    stack = Transformer(2, TransformerBlock(1, 1, dropout=0.5, **plain), scan=scan)
    stack = stack.clone(block=stack.block.clone(norm_first=False))
    x = jnp.zeros((1, 1, 64))
    params = {"params": stack.init(KEY, x)["params"]}
    last, noted = stack.apply(params, x, train=True, rngs={"dropout": KEY}, mutable=["noted"])
    seen = flatten_dict(noted["noted"], sep="/")
    inputs = [np.asarray(part[0]).reshape(-1, 64) for _, part in sorted(seen.items())]
    # By layer and by part: a scan has both layers in one array.
    attention, feed_forward = inputs if scan else (np.concatenate(inputs[0::2]), np.concatenate(inputs[1::2]))
    steps = np.stack([attention[0], feed_forward[0], attention[1], feed_forward[1], np.asarray(last).ravel()])
    added = np.diff(steps, axis=0)
    assert len(added) == 4 and set(np.unique(added)) == {0, 2}
    assert len({each.tobytes() for each in added}) == 4


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_what_flows_from_part_to_part_is_not_rounded(norm_first):
    """Parts that give 0 leave the stream as it is: in float32, whatever the parts compute in."""
    zero = lambda *args, **options: MultiHeadAttention(*args, **options, out_init=nn.initializers.zeros)
    feed_forward = functools.partial(FeedForward, out_init=nn.initializers.zeros)
    block = TransformerBlock(4, 24, attention_layer=zero, feed_forward_layer=feed_forward, norm_first=norm_first)
    params = block.init(KEY, X)
    params = jax.tree.map_with_path(lambda path, leaf: 0 * leaf if "bias" in str(path) else leaf, params)
    np.testing.assert_array_equal(block.clone(dtype=jnp.bfloat16).apply(params, X), block.apply(params, X))


def test_a_memory_must_be_given_where_it_is_needed_and_nowhere_else():
    with pytest.raises(UserError, match="cross_attention=True needs a memory"):
        VASWANI.init(KEY, X)
    with pytest.raises(UserError, match="cross_attention=False takes no memory"):
        LLAMA.init(KEY, X, MEMORY)
