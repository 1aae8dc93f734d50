"""Static masks against their definitions, entry by entry, and tile by tile against the dense mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention.masks import (
    EMPTY,
    FULL,
    PARTIAL,
    BigBird,
    Causal,
    Global,
    Local,
    Longformer,
    Mask,
    Segment,
    tile_table,
)

IDS = (0, 0, 1, 1, 0, 2, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0)
LENGTH = len(IDS)
MASKS = {
    "causal": (Causal(), lambda i, j: j <= i),
    "local": (Local(3, 5), lambda i, j: i - 3 <= j <= i + 5),
    "half open": (Local(None, 2), lambda i, j: j <= i + 2),
    "segment": (Segment(IDS), lambda i, j: IDS[i] == IDS[j]),
    "cross segment": (Segment(IDS, IDS[::-1]), lambda i, j: IDS[i] == IDS[::-1][j]),
    "global": (Global((0, 9)), lambda i, j: i in (0, 9) or j in (0, 9)),
    "Longformer": (Longformer(4, (6,)), lambda i, j: abs(i - j) <= 2 or i == 6 or j == 6),
    "and": (Causal() & Segment(IDS), lambda i, j: j <= i and IDS[i] == IDS[j]),
    "or": (Local(1, 1) | Global((3,)), lambda i, j: abs(i - j) <= 1 or i == 3 or j == 3),
    "both": (Causal() & (Local(2, 2) | Global((4,))), lambda i, j: j <= i and (abs(i - j) <= 2 or i == 4 or j == 4)),
}
BIG_BIRD = BigBird(9, block=2, random_blocks=1)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_its_definition(name: str) -> None:
    mask, visible = MASKS[name]
    wanted = [[visible(i, j) for j in range(LENGTH)] for i in range(LENGTH)]
    np.testing.assert_array_equal(mask.dense(np.arange(LENGTH), np.arange(LENGTH)), wanted)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from([*(mask for mask, _ in MASKS.values()), BIG_BIRD, BIG_BIRD & Causal()]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, LENGTH),
    st.integers(1, LENGTH),
)
def test_tiles_are_cut_from_the_dense_mask(mask: Mask, block_q: int, block_kv: int, queries: int, keys: int) -> None:
    dense = mask.dense(np.arange(queries), np.arange(keys))
    table = tile_table(mask, queries, keys, block_q, block_kv)
    assert table.states.shape == table.indices.shape == (-(-queries // block_q), -(-keys // block_kv))
    for (row, column), state in np.ndenumerate(table.states):
        tile = dense[row * block_q : (row + 1) * block_q, column * block_kv : (column + 1) * block_kv]
        assert state == (FULL if tile.all() else PARTIAL if tile.any() else EMPTY)
        if state == PARTIAL:
            pattern = table.patterns[table.indices[row, column]]
            np.testing.assert_array_equal(pattern[: len(tile), : tile.shape[1]], tile)
            assert not pattern[len(tile) :].any() and not pattern[:, tile.shape[1] :].any()
    assert len({pattern.tobytes() for pattern in table.patterns}) == len(table.patterns)


def test_big_bird_sees_its_window_the_ends_and_some_others() -> None:
    mask = BigBird(16, block=4, window_blocks=3, random_blocks=2, seed=3)
    blocks = mask.dense(np.arange(0, 64, 4), np.arange(0, 64, 4))
    assert blocks[[0, -1]].all() and blocks[:, [0, -1]].all()
    for row in range(1, 15):
        assert blocks[row, row - 1 : row + 2].all()
        window = set(range(row - 1, row + 2)) | {0, 15}
        assert blocks[row].sum() == len(window) + 2
    np.testing.assert_array_equal(mask.dense(np.arange(64), np.arange(64)), blocks.repeat(4, 0).repeat(4, 1))
    assert (BigBird(16, seed=3).blocks == BigBird(16, seed=3).blocks).all()
    assert (BigBird(16, seed=3).blocks != BigBird(16, seed=4).blocks).any()


def test_equal_masks_are_one_key_of_a_cache() -> None:
    assert hash(Longformer(4, (1,)) & Causal()) == hash(Longformer(4, (1,)) & Causal())
    assert Longformer(4, (1,)) & Causal() == Longformer(4, (1,)) & Causal() != Longformer(4, (2,)) & Causal()
    assert tile_table(Causal(), 64, 64, 16, 16) is tile_table(Causal(), 64, 64, 16, 16)


def test_tiles_of_a_long_band_are_found_without_looking_at_every_pair() -> None:
    """A band of 1,024 in 65,536: the dense mask would have four billion entries."""
    table = tile_table(Local(1023, 0), 65536, 65536, 512, 512)
    assert (table.states != EMPTY).sum() == 3 * 128 - 3 and len(table.patterns) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Local(-1, 0),
        lambda: Longformer(5),
        lambda: BigBird(8, window_blocks=2),
        lambda: tile_table(BigBird(2, block=8), 17, 17, 8, 8),
        lambda: tile_table(BigBird(2, block=8), 1, 17, 8, 8),
        lambda: tile_table(BigBird(2, block=8), 17, 1, 8, 8),
        lambda: tile_table(Segment(IDS), LENGTH + 1, 3, 8, 8),
        lambda: tile_table(Segment(IDS), 3, LENGTH + 1, 8, 8),
        lambda: tile_table(Segment(IDS, IDS[:5]), LENGTH, 6, 8, 8),
        lambda: tile_table(Causal() & Segment(IDS), LENGTH + 1, 3, 8, 8),
        lambda: tile_table(Segment(IDS) & Causal(), LENGTH + 1, 3, 8, 8),
        lambda: tile_table(Causal() | Segment(IDS), LENGTH + 1, 3, 8, 8),
        lambda: tile_table(Segment(IDS) | Causal(), LENGTH + 1, 3, 8, 8),
    ],
)
def test_wrong_arguments_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="give an even|odd number|reaches 0|blocks of 8|one id per position"):
        make()


def test_lists_and_arrays_of_integers_will_do() -> None:
    assert Segment(list(IDS)) == Segment(np.asarray(IDS)) == Segment(IDS) and hash(Segment(list(IDS))) == hash(Segment(IDS))
    assert Longformer(4, [1, 3]) == Longformer(4, np.asarray([1, 3])) and hash(Global([3])) == hash(Global((3,)))
    assert tile_table(Segment([0, 0, 1], [1, 0]), 3, 2, 2, 2).states.shape == (2, 1)
