"""Masks are what loops over queries and keys say they are."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profiles import few

from jaxdl.nn import causal_mask, length_mask, padding_mask, prefix_mask, segment_mask, token_positions, window_mask

sizes = st.integers(1, 7)
examples = few(15)


def loop(queries, keys, allowed):
    return np.array([[allowed(query, key) for key in range(keys)] for query in range(queries)])


@examples
@given(queries=sizes, keys=sizes)
def test_causal_lets_a_query_see_itself_and_what_came_before(queries, keys):
    mask = causal_mask(queries, keys)
    assert mask.shape == (1, 1, queries, keys) and mask.dtype == bool
    np.testing.assert_array_equal(mask[0, 0], loop(queries, keys, lambda query, key: key <= query))
    np.testing.assert_array_equal(causal_mask(queries), causal_mask(queries, queries))


@examples
@given(cached=st.integers(0, 5), queries=sizes)
def test_queries_after_a_cache_are_the_last_rows_of_the_whole_mask(cached, queries):
    whole = causal_mask(cached + queries)
    np.testing.assert_array_equal(causal_mask(cached + jnp.arange(queries), cached + queries), whole[:, :, cached:])


@examples
@given(queries=sizes, keys=sizes, left=st.none() | st.integers(0, 4), right=st.none() | st.integers(0, 4))
def test_a_window_includes_both_its_ends(queries, keys, left, right):
    def allowed(query, key):
        return (left is None or query - key <= left) and (right is None or key - query <= right)

    np.testing.assert_array_equal(window_mask(queries, keys, left=left, right=right)[0, 0], loop(queries, keys, allowed))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_any_integer_is_a_number_of_places(integer):
    np.testing.assert_array_equal(causal_mask(integer(5), integer(3)), causal_mask(5, 3))
    np.testing.assert_array_equal(window_mask(integer(5), left=integer(1), right=0), window_mask(5, left=1, right=0))
    np.testing.assert_array_equal(prefix_mask(jnp.asarray([2]), integer(5)), prefix_mask(jnp.asarray([2]), 5))


def test_each_example_may_have_positions_of_its_own():
    queries, keys = jnp.asarray([[4, 5], [1, 2]]), jnp.asarray([[0, 4, 5], [3, 2, 0]])
    expected = [[[0, 1, 0], [0, 1, 1]], [[0, 0, 1], [0, 1, 0]]]
    np.testing.assert_array_equal(window_mask(queries, keys, left=1, right=0)[:, 0], np.array(expected, bool))


@examples
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3), queries=sizes)
def test_lengths_and_prefixes(lengths, queries):
    padded = length_mask(jnp.asarray(lengths), 6)
    prefixed = prefix_mask(jnp.asarray(lengths), queries, 6)
    assert padded.shape == (len(lengths), 1, 1, 6)
    for example, length in enumerate(lengths):
        np.testing.assert_array_equal(padded[example, 0, 0], [key < length for key in range(6)])
        expected = loop(queries, 6, lambda query, key: key < length or key <= query)
        np.testing.assert_array_equal(prefixed[example, 0], expected)


def test_packed_documents_do_not_see_each_other():
    documents = jnp.asarray([[7, 7, 3, 3, 3], [1, 2, 2, 2, 1]])
    mask = segment_mask(documents) & causal_mask(5)
    for row, got in zip(np.asarray(documents), mask[:, 0], strict=True):
        np.testing.assert_array_equal(got, loop(5, 5, lambda query, key: key <= query and row[query] == row[key]))
    other = segment_mask(documents[:, :2], documents)
    np.testing.assert_array_equal(other, segment_mask(documents)[:, :, :2])


@pytest.mark.parametrize(
    "valid, expected",
    [([1, 1, 1, 0], [0, 1, 2, 2]), ([0, 0, 1, 1], [-1, -1, 0, 1]), ([1, 0, 0, 1], [0, 0, 0, 1])],
)
def test_positions_count_real_tokens(valid, expected):
    valid = jnp.asarray([valid], bool)
    np.testing.assert_array_equal(token_positions(valid)[0], expected)
    np.testing.assert_array_equal(padding_mask(valid)[0, 0, 0], valid[0])
