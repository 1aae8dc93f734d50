"""Every block at its limits: zeros, ones, ±1e4, a length of 1, and nothing to see, compiled, vectorised, and computed again on the way back."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import nn

SIGNALS, IMAGES, KEY = (2, 3, 8), (2, 4, 4, 4), jax.random.key(0)


class Case(NamedTuple):
    """`run(apply, x, seen)`, where `apply` is that of the module for a dtype, and `seen` says of each token of a signal whether it may be looked at."""

    run: Callable[[Callable, jax.Array, jax.Array], Any]
    module: Callable[[Any], linen.Module] | None = None
    shape: tuple[int, ...] = SIGNALS
    least: int = 1
    """The shortest length."""

    @property
    def short(self) -> tuple[int, ...]:
        return (self.shape[0], *[self.least] * (len(self.shape) - 2), self.shape[-1])


def plain(apply, x, seen):
    return apply(x)


def of(function: Callable, shape: tuple[int, ...] = SIGNALS, **rest: Any) -> Case:
    """A function of one array."""
    return Case(lambda apply, x, seen: function(x), None, shape, **rest)


def heads(x):
    """Queries, keys and values: 4 heads of 2 share 2 keys."""
    query = x.reshape(*x.shape[:2], 4, -1)
    return query, query[:, :, :2], query[:, :, 2:]


def looking(attention: Callable, **how: Any) -> Case:
    return Case(lambda apply, x, seen: attention(*heads(x), mask=nn.padding_mask(seen), **how))


def decoded(apply, module, x, seen, **how):
    """Token by token, as far as there are two."""
    cache, outputs = module.empty_cache(*x.shape, x.dtype), []
    for place in range(x.shape[1]):
        now = slice(place, place + 1)
        y, cache = apply(x[:, now], cache, valid=seen[:, now], method="decode", **how)
        outputs.append(y)
    return outputs


def whole_and_decoded(make: Callable[[Any], linen.Module], **how: Any) -> Case:
    """What attends within a sequence, whose tokens are padding where they may not be seen."""

    def run(apply, x, seen):
        return apply(x, mask=nn.padding_mask(seen)), decoded(apply, make(None), x, seen, **how)

    return Case(run, make)


def cell(function: Callable, gates: int, states: int, **how: Any) -> Case:
    kernel = jnp.linspace(-1, 1, 8 * gates * 8).reshape(8, -1)

    def run(apply, x, seen):
        state = (x[:, 0],) * states if states > 1 else x[:, 0]
        return function(kernel, kernel, kernel[0], state, x[:, -1], **how)

    return Case(run)


def recurrent(name: str, **options: Any) -> Case:
    def run(apply, x, seen):
        return apply(x, lengths=seen.sum(1))

    return Case(run, lambda dtype: nn.Recurrent(4, name, dtype=dtype, **options))


def image(make: Callable[[Any], linen.Module], **rest: Any) -> Case:
    return Case(plain, make, IMAGES, **rest)


def signal(make: Callable[[Any], linen.Module]) -> Case:
    return Case(plain, make)


def kernels(module: linen.Module, **how: Any) -> Case:
    return Case(lambda apply, x, seen: apply(x, **how), lambda dtype: module, (3, 8))


def biased(make: Callable[[Any], linen.Module], *sizes: int) -> Case:
    """By a learned bias."""
    return Case(lambda apply, x, seen: nn.dot_product_attention(*heads(x), apply(*sizes)), make, (2, 4, 8), least=4)


def windows(apply, x, seen):
    return nn.sliding_window_attention(*heads(x), mask=nn.padding_mask(seen), local_window_size=(1, 0), block=2)


def moved(apply, x, seen):
    kernel = jnp.linspace(-1, 1, 4 * 4 * 2, dtype=x.dtype).reshape(2, 2, 4, 2)
    return nn.deformable_convolve(x, jnp.tile(x, 2), kernel, x)


def performer(apply, x, seen):
    query, key, value = heads(x)
    mask = nn.padding_mask(seen)
    return [apply(query, key, value, mask=mask, is_causal=causal) for causal in (False, True)]


def batch(apply, x, seen):
    return apply(x, mask=seen, train=True, mutable=["batch_stats"])[0]


def written(apply, x, seen):
    return apply(x[:, 0], steps=2)


FEATURES = nn.random_projection(KEY, 6, 2)

CASES: dict[str, dict[str, Case]] = {
    "activations": {
        **{name: of(getattr(nn, name)) for name in "elu gelu gelu_tanh hard_sigmoid hard_swish leaky_relu mish silu glu".split()},
        "PReLU prelu": Case(plain, lambda dtype: nn.PReLU(per_channel=True)),
    },
    "attention": {
        "dot_product_attention": looking(nn.dot_product_attention, logits_soft_cap=2.0),
        "MultiHeadAttention rope": whole_and_decoded(
            lambda dtype: nn.MultiHeadAttention(4, num_kv_heads=2, rotary=nn.rope, local_window_size=(1, 0), dtype=dtype)
        ),
        "LatentAttention": whole_and_decoded(lambda dtype: nn.LatentAttention(2, 4, 2, 3, 5, 6, dtype=dtype), absorbed=True),
        "sliding_window_attention": Case(windows),
        "RelativePositionBias": biased(lambda dtype: nn.RelativePositionBias(4), 4, 4),
        "WindowPositionBias": biased(lambda dtype: nn.WindowPositionBias(4, (2, 2))),
        "LearnedPositions": Case(plain, lambda dtype: nn.LearnedPositions()),
        "interpolate_positions": of(lambda x: nn.interpolate_positions(x, (1, len(x)), (2, 3)), (4, 8)),
    },
    "linear attention": {
        "linear_attention elu_features": looking(nn.linear_attention),
        "linear_decode": looking(nn.linear_attention, is_causal=True, chunk=2),
        "positive_features": of(lambda x: nn.positive_features(heads(x)[0], FEATURES)),
        "RandomFeatureAttention": Case(performer, lambda dtype: nn.RandomFeatureAttention(6)),
    },
    "convolution": {
        **{
            f"convolve {method}": signal(lambda dtype, method=method: nn.Conv(4, 3, 2, groups=2, dtype=dtype, method=method))
            for method in ("fastest", "taps", "unfold", "lax")
        },
        "Conv convolve": image(lambda dtype: nn.Conv(4, 3, dtype=dtype)),
        "ConvTranspose convolve_transposed": signal(lambda dtype: nn.ConvTranspose(4, 3, 2, dtype=dtype)),
        "MaskedConv": image(lambda dtype: nn.MaskedConv(4, 3, kind="A", dtype=dtype)),
        "SeparableConv": signal(lambda dtype: nn.SeparableConv(4, 3, between=nn.mish, dtype=dtype)),
        "DeformableConv": image(lambda dtype: nn.DeformableConv(4, 2, dtype=dtype)),
        "deformable_convolve sample_bilinear": Case(moved, None, IMAGES),
        "unfold": of(lambda x: nn.unfold(x, 3)),
        "PatchEmbedding patchify": image(lambda dtype: nn.PatchEmbedding(2, 6, dtype=dtype), least=2),
        "unpatchify": of(lambda x: nn.unpatchify(x, 2, 2, 2 * x.shape[1])),
        "max_pool": of(lambda x: nn.max_pool(x, 2, padding="SAME")),
        "average_pool": of(lambda x: nn.average_pool(x, 3, stride=2, padding="SAME", count_padding=False)),
    },
    "normalization": {
        "LayerNorm layer_norm": Case(plain, lambda dtype: nn.LayerNorm(dtype=dtype)),
        "RMSNorm rms_norm": Case(plain, lambda dtype: nn.RMSNorm(dtype=dtype)),
        "GroupNorm group_norm": image(lambda dtype: nn.GroupNorm(2, dtype=dtype)),
        "InstanceNorm instance_norm": image(lambda dtype: nn.InstanceNorm(affine=True, dtype=dtype)),
        "BatchNorm batch_norm batch_statistics": Case(batch, lambda dtype: nn.BatchNorm(dtype=dtype)),
        "WeightNorm weight_norm": kernels(nn.WeightNorm()),
        "SpectralNorm spectral_norm power_iteration": kernels(nn.SpectralNorm()),
    },
    "recurrence": {
        "rnn_cell": cell(nn.rnn_cell, 1, 1, activation="relu"),
        "lstm_cell": cell(nn.lstm_cell, 4, 2),
        "gru_cell": cell(nn.gru_cell, 3, 1),
        "Recurrent recurrence": recurrent("lstm", bidirectional=True),
        **{f"Recurrent {name}": recurrent(name) for name in ("rnn_relu", "gru", "gru_reset_before")},
        "SequenceModel": Case(written, lambda dtype: nn.SequenceModel(nn.Recurrent(4, dtype=dtype), 8, "1:n")),
    },
    "transformer": {
        "FeedForward": Case(plain, lambda dtype: nn.FeedForward(12, dtype=dtype)),
        "GatedFeedForward": Case(plain, lambda dtype: nn.GatedFeedForward(12, dtype=dtype)),
        "AttentionPooling": Case(plain, lambda dtype: nn.AttentionPooling(2, 12, dtype=dtype)),
        "TransformerBlock": whole_and_decoded(lambda dtype: nn.TransformerBlock(2, 12, is_causal=True, dtype=dtype)),
        "stochastic_depth": of(lambda x: nn.stochastic_depth(x, 0.5, KEY)),
        "Transformer": Case(
            lambda apply, x, seen: apply(x, mask=nn.padding_mask(seen)),
            lambda dtype: nn.Transformer(2, nn.TransformerBlock(2, 12, norm_first=False, dtype=dtype), scan=True, remat=True),
        ),
    },
}
"""By room and by the public names that a case goes through; what follows them tells cases of the same apart."""

CONSTANT = set(
    "ATTENTIONS Attention Cache LinearState PerAxis Places Rotary alibi_bias alibi_slopes attention_weights causal_mask "
    "gated_mlp_dim known_tokens length_mask ntk_frequencies padding_mask prefix_mask random_projection raster_mask relative_buckets "
    "rotary_frequencies segment_mask sinusoidal sinusoidal_2d stack_blocks token_positions unstack_blocks window_mask "
    "window_offsets yarn_frequencies yarn_magnitude".split()
)
"""Types, masks, tables and what only rearranges parameters: nothing here is made of numbers that could be extreme."""


def test_every_public_name_is_among_the_cases_or_has_no_extremes():
    named = {name for room in CASES.values() for case in room for name in case.split()}
    assert named & set(nn.__all__) == set(nn.__all__) - CONSTANT


def lanes(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Inputs, and which tokens are seen in them."""
    signs = np.sign(np.random.default_rng(0).standard_normal(shape))
    ones = np.ones(shape)
    inputs = np.stack([0 * ones, ones, 1e4 * ones, -1e4 * ones, 1e4 * signs, signs, signs])
    seen = np.ones((len(inputs), *shape[:2]), bool)
    seen[4, 0], seen[5], seen[6, :, 0] = False, False, False  # Of one example nothing, nothing at all, and all but the first.
    return jnp.asarray(inputs, jnp.float32), jnp.asarray(seen)


def called(bound: linen.Module, *args: Any, method: str = "__call__", mutable: Any = None, **how: Any) -> Any:
    """As `apply`, of a module that has its parameters."""
    value = getattr(bound, method)(*args, **how)
    return (value, None) if mutable else value


def outcome(case: Case, dtype: Any, shape: tuple[int, ...]) -> Any:
    """The value and the gradients of parameters and inputs, for all lanes."""
    inputs, seen = lanes(shape)
    inputs = inputs.astype(dtype)
    module = None if case.module is None else case.module(dtype)
    variables = {"params": {}}
    if module is not None:
        variables = linen.init(lambda bound: case.run(functools.partial(called, bound), inputs[1], seen[0]), module)(KEY)
    others = {name: tree for name, tree in variables.items() if name != "params"}

    def run(params, x, seen):
        apply = None if module is None else lambda *args, **how: module.apply({"params": params, **others}, *args, **how)
        return case.run(apply, x, seen)

    def value_and_gradients(x, seen):
        value, pull = jax.vjp(jax.checkpoint(lambda params, x: run(params, x, seen)), variables.get("params", {}), x)
        return value, pull(jax.tree.map(jnp.ones_like, value))

    return jax.vmap(value_and_gradients)(inputs, seen)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("room", CASES)
def test_values_and_gradients_are_finite(room, dtype):
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # It runs once.
    def all_of_them():
        return {name: [outcome(case, dtype, shape) for shape in (case.shape, case.short)] for name, case in CASES[room].items()}

    for path, leaf in jax.tree.leaves_with_path(all_of_them()):
        assert jnp.isfinite(leaf.astype(jnp.float32)).all(), jax.tree_util.keystr(path)
