"""Generation with a model whose logits are known: the last token decides the next."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl.errors import UserError
from jaxdl.generate import Sampling, choose, filter_logits, generate
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


def test_there_is_nothing_to_draw_at_temperature_zero():
    with pytest.raises(UserError, match="temperature of 0"):
        filter_logits(jnp.zeros(3), Sampling(temperature=0))
