"""The encoder-decoder alone. That it equals torch's and transformers' is in tests/parity."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.generate import Beam
from jaxdl.models.marian import VARIANTS, EncoderDecoder, Stack, segment_positions, translate

END = 9
MODULE = EncoderDecoder(12, 16, Stack(2, 2, 32), Stack(2, 4, 24), length=40)
RANDOM = np.random.default_rng(0)
SOURCE, TARGET = RANDOM.integers(1, 9, (3, 7)), RANDOM.integers(1, 9, (3, 6))
SOURCE[1, 4:] = SOURCE[2, 2:] = 0


@pytest.fixture(scope="module")
def variables():
    fresh = jax.jit(MODULE.init)(jax.random.key(0), jnp.asarray(SOURCE), jnp.asarray(TARGET))
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), fresh)


def logits(variables, source, target, **segments):
    segments = {name: jnp.asarray(value) for name, value in segments.items()}
    return jax.jit(functools.partial(MODULE.apply))(variables, jnp.asarray(source), jnp.asarray(target), **segments).logits


def test_no_token_depends_on_padding_of_the_source_or_on_what_comes_later(variables):
    out = logits(variables, SOURCE, TARGET)
    short = logits(variables, SOURCE[1:2, :4], TARGET[1:2])
    np.testing.assert_allclose(out[1:2], short, atol=1e-5)
    changed = TARGET.copy()
    changed[:, 4] = TARGET[:, 4] % 8 + 1
    other = logits(variables, SOURCE, changed)
    np.testing.assert_array_equal(out[:, :4], other[:, :4])
    assert (out[:, 4:] != other[:, 4:]).any(-1).all()


def test_packed_pairs_get_the_logits_that_they_get_alone(variables):
    """Each has its own positions, and sees nothing of its neighbours."""
    sources, targets = (SOURCE[0], SOURCE[1, :4], SOURCE[2, :2]), (TARGET[0, :3], TARGET[1], TARGET[2, :5])
    row = lambda parts: np.pad(np.concatenate(parts), (0, 20 - sum(map(len, parts))))[None]
    numbers = lambda parts: row([np.full(len(part), number) for number, part in enumerate(parts, 1)])
    packed = logits(variables, row(sources), row(targets), source_segments=numbers(sources), target_segments=numbers(targets))[0]
    start = 0
    for source, target in zip(sources, targets):
        alone = logits(variables, source[None], target[None])[0]
        np.testing.assert_allclose(packed[start : start + len(target)], alone, atol=1e-5)
        start += len(target)
    np.testing.assert_array_equal(segment_positions(jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])), [[0, 1, 2, 0, 1, 0, 0, 1]])


def test_decoding_with_a_cache_gives_the_logits_of_teacher_forcing(variables):
    want = logits(variables, SOURCE, TARGET)

    @jax.jit
    def decode(variables, source, target):
        memory = MODULE.apply(variables, source, method="cache_memory")
        out, cache = MODULE.apply(variables, target[:, :3], MODULE.empty_cache(3, 6), memory, method="decode")
        steps = [out.logits]
        for index in range(3, 6):
            out, cache = MODULE.apply(variables, target[:, index : index + 1], cache, memory, method="decode")
            steps.append(out.logits)
        return jnp.concatenate(steps, axis=1)

    np.testing.assert_allclose(decode(variables, jnp.asarray(SOURCE), jnp.asarray(TARGET)), want, atol=1e-5)


def test_greedy_translations_are_those_of_the_likeliest_tokens_one_by_one(variables):
    steps = 8
    ours = jax.jit(functools.partial(translate, MODULE, steps=steps, end=END, beam=None))(variables, jnp.asarray(SOURCE))
    written = np.zeros((3, 1), int)
    for _ in range(steps):
        likely = np.array(logits(variables, SOURCE, np.pad(written, ((0, 0), (0, steps - written.shape[1])))))
        likely[..., 0] = -np.inf  # Padding.
        written = np.append(written, likely[:, written.shape[1] - 1].argmax(-1)[:, None], axis=1)
    ended = np.cumsum(written[:, 1:] == END, axis=1) > 0
    np.testing.assert_array_equal(ours, np.where(ended, END, written[:, 1:]))


def test_a_beam_never_writes_padding_and_finds_what_is_at_least_as_likely(variables):
    def log_probability(rows):
        given = np.concatenate([np.zeros((3, 1), int), rows[:, :-1]], axis=1)
        each = np.take_along_axis(np.array(jax.nn.log_softmax(logits(variables, SOURCE, given))), rows[..., None], -1)[..., 0]
        before = np.cumsum(rows == END, axis=1) - (rows == END)
        return np.where(before == 0, each, 0).sum(1)

    run = lambda beam: np.array(
        jax.jit(functools.partial(translate, MODULE, steps=6, end=END, beam=beam))(variables, jnp.asarray(SOURCE))
    )
    greedy, searched = run(None), run(Beam(8, length_penalty=0.0))
    assert (searched != 0).all()
    assert (log_probability(searched) >= log_probability(greedy) - 1e-5).all()


def test_variants_have_the_sizes_of_the_paper():
    """65 and 213 million parameters with 37,000 tokens (table 3)."""
    for name, millions in (("base", 65), ("big", 213)):
        module = EncoderDecoder.variant(name, 37_000)
        tokens = jnp.zeros((1, 1), jnp.int32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert abs(count / 1e6 - millions) < 0.03 * millions, count
    assert VARIANTS.keys() == {"base", "big"}


def test_it_computes_in_bfloat16_and_drops_only_in_training(variables):
    half = MODULE.clone(dtype=jnp.bfloat16, dropout=0.5)
    exact = logits(variables, SOURCE, TARGET)
    out = half.apply(variables, jnp.asarray(SOURCE), jnp.asarray(TARGET)).logits
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.15)
    dropped = half.apply(
        variables, jnp.asarray(SOURCE), jnp.asarray(TARGET), train=True, rngs={"dropout": jax.random.key(1)}
    ).logits
    assert not np.allclose(dropped.astype(jnp.float32), exact, atol=0.15)
    chex.assert_tree_all_finite(dropped)


def test_wrong_use_is_refused(variables):
    long = jnp.ones((1, 41), jnp.int32)
    one = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(UserError, match="41 tokens are more than the 40 positions"):
        MODULE.apply(variables, long, one)
    with pytest.raises(UserError, match="41 tokens"):
        MODULE.empty_cache(1, 41)
    with pytest.raises(UserError, match="both source and target"):
        MODULE.apply(variables, one, one, source_segments=one)
    with pytest.raises(UserError, match="did you mean 'swish'"):
        MODULE.clone(activation="swisch").init(jax.random.key(0), one, one)
    with pytest.raises(UserError, match="variant"):
        EncoderDecoder.variant("bas", 10)
