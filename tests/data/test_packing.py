"""Rows that hold several sentence pairs each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data.packing import Packed, buckets, pack
from jaxdl.errors import UserError

sizes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes)
def test_every_pair_that_fits_is_in_one_row_and_no_row_is_too_long(sizes):
    rows = pack(np.array(sizes, np.int32).reshape(-1, 2), 10)
    packed = sorted(index for row in rows for index in row)
    assert packed == [index for index, size in enumerate(sizes) if max(size) <= 10]
    for row in rows:
        assert row and (np.array([sizes[index] for index in row]).sum(0) <= 10).all()


def test_packing_leaves_little_padding():
    lengths = np.random.default_rng(0).integers(4, 25, (3000, 2)).astype(np.int32)
    assert lengths.sum() / (2 * 64 * len(pack(lengths, 64))) > 0.88
    alike = np.repeat(lengths[:, :1], 2, axis=1)
    assert alike.sum() / (2 * 64 * len(pack(alike, 64))) > 0.97


def test_a_row_holds_its_pairs_one_after_the_other():
    pairs = [(np.array([5, 6]), np.array([7])), (np.array([8]), np.array([9, 10, 11])), (np.arange(9), np.arange(9))]
    packed = Packed(pairs, 8, start=1, end=2, pad=0)
    assert (len(packed), packed.info.left_out, packed.filled, packed.target_tokens) == (1, 1, 11 / 16, 6)
    (order,) = packed.rows
    row = {name: array.tolist() for name, array in packed[0].items()}
    parts = {
        0: dict(source=[5, 6, 2], target=[1, 7], labels=[7, 2]),
        1: dict(source=[8, 2], target=[1, 9, 10, 11], labels=[9, 10, 11, 2]),
    }
    for name in ("source", "target", "labels"):
        joined = parts[order[0]][name] + parts[order[1]][name]
        assert row[name] == joined + [0] * (8 - len(joined))
        if name != "labels":
            numbers = [1] * len(parts[order[0]][name]) + [2] * len(parts[order[1]][name])
            assert row[f"{name}_segments"] == numbers + [0] * (8 - len(joined))
    with pytest.raises(UserError, match="none of 3 pairs has at most 1 tokens"):
        Packed(pairs, 1, start=1, end=2, pad=0)


def test_buckets_are_few_and_each_sentence_is_in_the_shortest_that_holds_it():
    found = buckets([1, 16, 17, 40, 33, 100, 3])
    assert found == {16: [0, 6, 1], 32: [2], 64: [4, 3], 128: [5]}
