"""Generation with a model whose logits are known: the last token decides the next."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.errors import UserError
from jaxdl.generate import Beam, Sampling, beam_search, choose, filter_logits, generate
from jaxdl.generate.loop import _generate
from jaxdl.nn import Cache

KEY = jax.random.key(0)


def follow(table, tokens, cache, valid):
    """The logits of what comes after a token are its row of the table; the cache counts."""
    return table[tokens], cache.append(jnp.zeros((*tokens.shape, 1)), valid)


def empty(rows: int, slots: int = 16) -> Cache:
    return Cache.empty(jnp.zeros((rows, slots, 1)))


CHAIN = jnp.log(jnp.eye(5)[jnp.array([1, 2, 3, 4, 0])] + 1e-9)
"""After 0 comes 1, and so on, around."""


def test_the_most_likely_is_followed_from_the_last_token_of_each_prompt():
    greedy = Sampling(temperature=0)
    out = generate(follow, CHAIN, jnp.array([[0, 3], [4, 1]]), empty(2), KEY, steps=6, sampling=greedy)
    np.testing.assert_array_equal(out, [[4, 0, 1, 2, 3, 4], [2, 3, 4, 0, 1, 2]])


def test_what_follows_an_end_is_the_end_and_the_loop_stops_when_all_have_ended():
    seen = []
    out = generate(
        follow, CHAIN, jnp.array([[0], [2]]), empty(2), KEY, steps=9, sampling=Sampling(temperature=0), end=4, stream=seen.append
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(out, [[1, 2, 3, 4, 4, 4, 4, 4, 4], [3, 4, 4, 4, 4, 4, 4, 4, 4]])
    assert [token.tolist() for token in seen] == [[1, 3], [2, 4], [3, 4], [4, 4]]


def test_a_limit_ends_the_loop_before_its_steps_are_made_and_needs_no_compilation():
    seen, programs = [], []
    how = dict(steps=9, sampling=Sampling(temperature=0), stream=seen.append)
    for limit in (3, 5, 20):
        seen.clear()
        out = generate(follow, CHAIN, jnp.array([[0]]), empty(1), KEY, limit=jnp.asarray(limit), **how)
        jax.effects_barrier()
        count = min(limit, 9)
        assert out[0, :count].tolist() == [int(row[0]) for row in seen] == [(1 + step) % 5 for step in range(count)]
        programs.append(_generate._cache_size())
    assert len(set(programs)) == 1


def test_a_key_gives_the_same_tokens_and_they_follow_the_probabilities():
    table = jnp.log(jnp.array([[0.7, 0.2, 0.1]] * 3))
    sample = functools.partial(generate, follow, table, jnp.zeros((400, 1), jnp.int32), steps=5)
    one, same, other = (sample(empty(400), key) for key in (KEY, KEY, jax.random.key(1)))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_allclose(np.bincount(np.ravel(one)) / 2000, [0.7, 0.2, 0.1], atol=0.04)


def test_top_p_keeps_the_fewest_that_reach_it_and_top_k_so_many():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.3, 0.2]))
    kept = lambda **how: np.isfinite(filter_logits(logits, Sampling(**how))).tolist()
    assert kept(top_p=0.4) == [False, True, False, False]
    assert kept(top_p=0.41) == [False, True, True, False]
    assert kept(top_p=0.95) == [True] * 4
    assert kept(top_k=2) == [False, True, True, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_k=3, top_p=0.5) == [False, True, True, False]
    assert kept(temperature=0.01, top_p=0.5) == [False, True, False, False]
    assert choose(logits, Sampling(temperature=0), KEY) == 1
    assert choose(logits, Sampling(temperature=0, suppressed_tokens=(1, 2)), KEY) == 3
    assert {int(choose(logits, Sampling(suppressed_tokens=(0, 3)), jax.random.key(seed))) for seed in range(30)} == {1, 2}


def test_there_is_nothing_to_draw_at_temperature_zero():
    with pytest.raises(UserError, match="temperature of 0"):
        filter_logits(jnp.zeros(3), Sampling(temperature=0))


END, STEPS = 0, 4


def remember(table, tokens, cache, valid):
    """What follows depends on all tokens so far, which only the cache knows: the logits are a row of the table, chosen by the sum of what was seen."""
    written = jnp.asarray(tokens, jnp.float32)[..., None]
    cache = cache.append(written, valid)
    powers = 3.0 ** jnp.arange(cache.slots)
    seen = jnp.where(jnp.arange(cache.slots) < cache.next, cache.entries[..., 0] * powers, 0).sum(1)
    return table[(seen.astype(jnp.int32) * 7 + cache.next) % len(table)][:, None], cache


def enumerate_all(
    table: np.ndarray, first: int, beam: Beam, suppressed_tokens: tuple[int, ...] = ()
) -> list[tuple[float, list[int]]]:
    """Every continuation of up to STEPS tokens with its score, the best first."""
    found = []
    for length in range(1, STEPS + 1):
        for tokens in itertools.product(range(table.shape[1]), repeat=length):
            whole = END not in tokens[:-1] and (tokens[-1] == END or length == STEPS)
            if not whole or set(tokens) & set(suppressed_tokens):
                continue
            sum_ = 0.0
            for step in range(length):
                seen = [first, *tokens[:step]]
                index = sum(token * 3**place for place, token in enumerate(seen)) * 7 + len(seen)
                logits = table[index % len(table)].astype(np.float64)
                sum_ += logits[tokens[step]] - np.log(np.exp(logits).sum())
            penalty = ((beam.offset + length) / (beam.offset + 1)) ** beam.length_penalty
            found.append((sum_ / penalty, list(tokens) + [END] * (STEPS - length)))
    return sorted(found, reverse=True)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(
        [Beam(27, 0.0), Beam(27, 0.6), Beam(27, 1.0, 0.0), Beam(27, 3.0, 0.0), Beam(27, 1.0, 0.0, suppressed_tokens=(2,))]
    ),
)
def test_a_beam_that_holds_all_hypotheses_finds_the_best_continuations_that_there_are(seed, beam):
    table = np.random.default_rng(seed).normal(0, 2, (31, 3)).astype(np.float32)
    prompts = jnp.array([[1], [2]])
    written, scores = beam_search(
        remember, jnp.asarray(table), prompts, empty(2 * beam.width, STEPS), steps=STEPS, end=END, beam=beam
    )
    for row, first in enumerate((1, 2)):
        wanted = enumerate_all(table, first, beam, beam.suppressed_tokens)[: beam.width]
        np.testing.assert_allclose(scores[row][: len(wanted)], [score for score, _ in wanted], rtol=1e-5, atol=1e-5)
        assert written[row][: len(wanted)].tolist() == [tokens for _, tokens in wanted]
        assert np.isneginf(scores[row][len(wanted) :]).all()


def search_by_hand(table: np.ndarray, first: int, beam: Beam) -> list[tuple[float, list[int]]]:
    """Beam search in lists, hypothesis by hypothesis."""
    running, finished = [(0.0, [])], []
    for step in range(STEPS):
        extended = []
        for sum_, tokens in running:
            seen = [first, *tokens]
            logits = table[(sum(token * 3**place for place, token in enumerate(seen)) * 7 + len(seen)) % len(table)]
            likelihood = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
            extended += [(sum_ + value, [*tokens, token]) for token, value in enumerate(likelihood)]
        extended = sorted(extended, reverse=True)[: 2 * beam.width]
        ends = lambda tokens, step=step: tokens[-1] == END or step + 1 == STEPS
        finished += [(sum_ / beam.penalty(step + 1), tokens) for sum_, tokens in extended[: beam.width] if ends(tokens)]
        finished = sorted(finished, reverse=True)[: beam.width]
        running = [each for each in extended if not ends(each[1])][: beam.width]
        longest = STEPS if beam.stop == "surely" else step + 1
        if not running or (len(finished) == beam.width and running[0][0] / beam.penalty(longest) <= finished[-1][0]):
            break
    return [(score, tokens + [END] * (STEPS - len(tokens))) for score, tokens in finished]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([Beam(2), Beam(3, 2.0, 0.0, "likely"), Beam(3, 2.0, 0.0, "surely"), Beam(1, 1.0)]),
)
def test_a_narrow_beam_keeps_what_a_search_by_hand_keeps(seed, beam):
    table = np.random.default_rng(seed).normal(0, 2, (31, 5)).astype(np.float32)
    prompts = jnp.array([[1], [2], [3]])
    written, scores = beam_search(
        remember, jnp.asarray(table), prompts, empty(3 * beam.width, STEPS), steps=STEPS, end=END, beam=beam
    )
    for row, first in enumerate((1, 2, 3)):
        wanted = search_by_hand(table, first, beam)
        np.testing.assert_allclose(scores[row][: len(wanted)], [score for score, _ in wanted], rtol=1e-5)
        assert written[row][: len(wanted)].tolist() == [tokens for _, tokens in wanted]


def test_the_length_penalty_is_that_of_wu_et_al_or_of_hf():
    """Eq. 14 has 5 + |Y| over 5 + 1; HF divides by |Y|^α."""
    np.testing.assert_allclose(Beam(4, 0.6).penalty(13), (18 / 6) ** 0.6)
    np.testing.assert_allclose(Beam(4, 0.6, offset=0.0).penalty(13), 13**0.6)
    assert Beam(4, 0.0).penalty(13) == 1
