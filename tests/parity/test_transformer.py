"""Blocks and stacks equal torch's and transformers', in value and in the gradients of inputs and parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from versus_torch import assert_near, assert_same, normal, seeds, shapes, small

from jaxdl.nn import (
    AttentionPooling,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    MultiHeadAttention,
    RMSNorm,
    Transformer,
    TransformerBlock,
    gelu,
    gelu_tanh,
    padding_mask,
    rope,
    rotary_frequencies,
    stack_blocks,
    token_positions,
)
from jaxdl.weights import TRANSPOSED, UNCHANGED, Table, convert, dense, norm, packed_attention

F = torch.nn.functional


def shaken(layer):
    """With no parameter left at zero or one."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.eval()


def assert_equal(ours, theirs, layer, table, module, *arrays, tolerance=1e-5, double=1e-10):
    """`ours(variables, *arrays)` and `theirs(*tensors)` give the same values and gradients of all arrays and parameters, in float32 and, as far as they have it, in float64."""
    _assert_equal(ours, theirs, layer, table, module, arrays, tolerance)
    if double is not None:
        with jax.enable_x64(True):
            _assert_equal(ours, theirs, layer.double(), table, module, [np.float64(array) for array in arrays], double)


def _assert_equal(ours, theirs, layer, table, module, arrays, tolerance):
    expected_shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *map(jnp.asarray, arrays))["params"])
    read = lambda tensors: convert({name: tensor.detach().numpy() for name, tensor in tensors}, table, expected_shapes)
    params = read(layer.named_parameters())
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = theirs(*tensors)
    (cotangent,) = (array.astype(arrays[0].dtype) for array in normal(0, tuple(expected.shape)))
    layer.zero_grad()
    expected.backward(torch.tensor(cotangent))

    @jax.jit
    def forward_and_back(cotangent, params, *arrays):
        value, pull = jax.vjp(lambda params, *arrays: ours({"params": params}, *arrays), params, *arrays)
        return value, pull(cotangent)

    value, gradients = forward_and_back(cotangent, params, *arrays)
    assert_near(value, expected.detach().numpy(), tolerance)
    wanted = read((name, parameter.grad) for name, parameter in layer.named_parameters()), *(x.grad.numpy() for x in tensors)
    jax.tree.map(lambda got, want: assert_near(got, np.asarray(want), tolerance), gradients, wanted)


@shapes
@given(batch=small, length=small, width=st.integers(1, 16), hidden=st.integers(1, 40), exact=st.booleans(), seed=seeds)
def test_feed_forward(batch, length, width, hidden, exact, seed):
    arrays = normal(seed, (batch, length, width), (width, hidden), (hidden,), (hidden, width), (width,))
    module = FeedForward(hidden, gelu) if exact else FeedForward(hidden)

    def ours(x, w, b, v, c):
        return module.apply({"params": {"expand": {"kernel": w, "bias": b}, "contract": {"kernel": v, "bias": c}}}, x)

    theirs = lambda x, w, b, v, c: F.gelu(x @ w + b, approximate="none" if exact else "tanh") @ v + c
    assert_same(ours, theirs, *arrays)


TORCH = dict(dropout=0.0, activation=torch.nn.GELU(approximate="tanh"), batch_first=True)
FEED_FORWARD = {**dense("feed_forward/expand", "linear1"), **dense("feed_forward/contract", "linear2")}


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@shapes
@given(batch=small, length=small, heads=st.integers(1, 3), head=st.integers(2, 5), hidden=st.integers(1, 20), seed=seeds)
def test_an_encoder_block_is_torchs(norm_first, batch, length, heads, head, hidden, seed):
    torch.manual_seed(seed)
    width = heads * head
    layer = shaken(torch.nn.TransformerEncoderLayer(width, heads, hidden, norm_first=norm_first, **TORCH))
    rows = {**norm("attention_norm", "norm1"), **norm("feed_forward_norm", "norm2"), **packed_attention("attention", "self_attn")}
    block = TransformerBlock(heads, hidden, norm=functools.partial(LayerNorm, 1e-5), norm_first=norm_first)
    valid = np.arange(length) < np.random.default_rng(seed).integers(1, length, (batch, 1), endpoint=True)

    def theirs(x):
        return layer(x, src_key_padding_mask=~torch.tensor(valid))

    def ours(variables, x):
        return block.apply(variables, x, mask=padding_mask(jnp.asarray(valid)))

    assert_equal(ours, theirs, layer, Table({**rows, **FEED_FORWARD}), block, *normal(seed, (batch, length, width)))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@shapes
@given(batch=small, length=small, source=small, heads=st.integers(1, 3), head=st.integers(2, 5), seed=seeds)
def test_a_decoder_block_is_torchs(norm_first, batch, length, source, heads, head, seed):
    torch.manual_seed(seed)
    width = heads * head
    layer = shaken(torch.nn.TransformerDecoderLayer(width, heads, 7, norm_first=norm_first, **TORCH))
    rows = {**norm("attention_norm", "norm1"), **norm("cross_attention_norm", "norm2"), **norm("feed_forward_norm", "norm3")}
    rows |= {**packed_attention("attention", "self_attn"), **packed_attention("cross_attention", "multihead_attn")}
    options = dict(norm=functools.partial(LayerNorm, 1e-5), norm_first=norm_first, is_causal=True, cross_attention=True)
    block = TransformerBlock(heads, 7, **options)
    valid = np.arange(source) < np.random.default_rng(seed).integers(1, source, (batch, 1), endpoint=True)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def theirs(x, memory):
        return layer(x, memory, tgt_mask=future, tgt_is_causal=True, memory_key_padding_mask=~torch.tensor(valid))

    def ours(variables, x, memory):
        return block.apply(variables, x, memory, memory_mask=padding_mask(jnp.asarray(valid)))

    arrays = normal(seed, (batch, length, width), (batch, source, width))
    assert_equal(ours, theirs, layer, Table({**rows, **FEED_FORWARD}), block, *arrays)


def llama():
    models = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = models.LlamaConfig(
        vocab_size=8, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2
    )
    return models.LlamaModel(config), dict(norm=functools.partial(RMSNorm, 1e-6)), dict(num_kv_heads=2)


def gemma():
    """Heads of a width that is not D/N, multi-query attention, a scale of `1 + w`."""
    models = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    config = models.GemmaConfig(
        vocab_size=8,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
    )
    block = dict(
        norm=functools.partial(RMSNorm, 1e-6, 1.0), feed_forward_layer=functools.partial(GatedFeedForward, activation=gelu_tanh)
    )
    return models.GemmaModel(config), block, dict(num_kv_heads=1, head_width=10)


_LAYER = r"layers.\1"
DECODER = Table(
    {
        r"block_(\d+)/attention/(query|key|value|out)/kernel": (_LAYER + r".self_attn.\2_proj.weight", TRANSPOSED),
        r"block_(\d+)/attention_norm/scale": (_LAYER + ".input_layernorm.weight", UNCHANGED),
        r"block_(\d+)/feed_forward_norm/scale": (_LAYER + ".post_attention_layernorm.weight", UNCHANGED),
        r"block_(\d+)/feed_forward/gate/kernel": (_LAYER + ".mlp.gate_proj.weight", TRANSPOSED),
        r"block_(\d+)/feed_forward/expand/kernel": (_LAYER + ".mlp.up_proj.weight", TRANSPOSED),
        r"block_(\d+)/feed_forward/contract/kernel": (_LAYER + ".mlp.down_proj.weight", TRANSPOSED),
        "norm/scale": ("norm.weight", UNCHANGED),
    }
)


class Renamed(torch.nn.Module):
    """The stack of a model without its embedding, its projections named as ours."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def named_parameters(self, *options, **more):
        for name, parameter in self.model.named_parameters(*options, **more):
            if name != "embed_tokens.weight":
                for theirs, ours in {
                    "q_proj": "query_proj",
                    "k_proj": "key_proj",
                    "v_proj": "value_proj",
                    "o_proj": "out_proj",
                }.items():
                    name = name.replace(theirs, ours)
                yield name, parameter


@pytest.mark.parametrize("family", [llama, gemma])
def test_a_decoder_with_shared_keys_and_rotary_positions_is_transformers(family):
    torch.manual_seed(0)
    model, parts, heads = family()
    layer = Renamed(shaken(model.float()))
    width = model.config.hidden_size
    head = heads.get("head_width") or width // model.config.num_attention_heads
    turn = lambda x, positions: rope(x, positions, rotary_frequencies(head))
    attention = functools.partial(MultiHeadAttention, rotary=turn, use_bias=False, **heads)
    parts = {"feed_forward_layer": GatedFeedForward, **parts}
    block = TransformerBlock(model.config.num_attention_heads, 40, attention_layer=attention, is_causal=True, **parts)
    stack = Transformer(2, block)
    valid = np.array([[True] * 6, [False, False, True, True, True, True]])
    places = np.maximum(token_positions(jnp.asarray(valid)), 0)
    (x,) = normal(0, (2, 6, width))

    def theirs(x):
        options = dict(attention_mask=torch.tensor(valid), position_ids=torch.tensor(places), use_cache=False)
        return model(inputs_embeds=x, **options).last_hidden_state * torch.tensor(valid)[..., None]

    def ours(variables, x):
        mask = padding_mask(jnp.asarray(valid))
        return stack.apply(variables, x, mask=mask, positions=jnp.asarray(places)) * valid[..., None]

    assert_equal(ours, theirs, layer, DECODER, stack, x, double=None)  # Their rotations and norms are in float32 alone.

    # The same, decoded: the first four slots at once, the others one by one; looped and scanned.
    expected_shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), jnp.asarray(x))["params"])
    params = convert({name: tensor.detach().numpy() for name, tensor in layer.named_parameters()}, DECODER, expected_shapes)
    want = theirs(torch.tensor(x)).detach().numpy()
    for scan in (False, True):
        decoder = stack.clone(scan=scan)
        variables = {"params": stack_blocks(params) if scan else params}
        decode = jax.jit(functools.partial(decoder.apply, variables, method="decode"))
        cache, outputs = decoder.empty_cache(2, 7, width), []
        for start, end in ((0, 4), (4, 5), (5, 6)):
            y, cache = decode(jnp.asarray(x[:, start:end]), cache, valid=jnp.asarray(valid[:, start:end]))
            outputs.append(y)
        np.testing.assert_allclose(np.where(valid[..., None], jnp.concatenate(outputs, 1), 0), want, atol=1e-4)


@shapes
@given(batch=small, length=small, heads=st.integers(1, 3), head=st.integers(2, 5), hidden=st.integers(1, 20), seed=seeds)
def test_attention_pooling_is_torchs_attention_of_a_probe(batch, length, heads, head, hidden, seed):
    torch.manual_seed(seed)
    width = heads * head

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.probe = torch.nn.Parameter(torch.randn(1, 1, width))
            self.attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
            self.norm = torch.nn.LayerNorm(width, eps=1e-6)
            self.linear1, self.linear2 = torch.nn.Linear(width, hidden), torch.nn.Linear(hidden, width)

        def forward(self, x):
            y = self.attention(self.probe.expand(len(x), 1, width), x, x, need_weights=False)[0][:, 0]
            return y + self.linear2(F.gelu(self.linear1(self.norm(y)), approximate="tanh"))

    layer, module = shaken(Head()), AttentionPooling(heads, hidden)
    rows = {"probe": ("probe", UNCHANGED), **packed_attention("attention", "attention"), **norm("norm", "norm"), **FEED_FORWARD}
    assert_equal(module.apply, layer, layer, Table(rows), module, *normal(seed, (batch, length, width)))
