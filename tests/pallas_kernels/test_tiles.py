"""Which tiles are visited and which are masked, against the visible pairs one by one."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import reference, tiles
from pallas_kernels.attention.masks import EMPTY, FULL, PARTIAL, Causal, Global, Local, Mask, Segment
from pallas_kernels.attention.problem import Operands, Spec

BLOCK_MASKS = [None, None, Local(3, 2), Global((2, 9)), Segment([0] * 9 + [1] * 11), Causal() & Segment([2] * 5 + [0] * 15)]


@st.composite
def problems(draw: Any) -> tuple[Spec, Operands, int, int]:
    """Of up to 20 queries and keys and two examples, with blocks of queries and of keys; lengths lie on the edges of tiles and beside them."""
    queries, keys, block_q, block_kv = (draw(st.integers(1, most)) for most in (20, 20, 9, 9))
    seed = np.random.default_rng(draw(st.integers(0, 2**16)))

    def maybe(array: Any) -> Any:
        return array if draw(st.booleans()) else None

    def edges(length: int, block: int) -> np.ndarray:
        places = st.integers(0, -(-length // block)), st.integers(-1, 1)
        return np.array([min(max(draw(places[0]) * block + draw(places[1]), 0), length) for _ in range(2)])

    array = np.zeros((2, queries, 1, 1), np.float32), np.zeros((2, keys, 1, 1), np.float32)
    shape = [draw(st.sampled_from([1, whole])) for whole in (2, 1, queries, keys)]
    ids = None if draw(st.booleans()) else [np.sort(seed.integers(0, 4, (2, length))) for length in (queries, keys)]
    operands = Operands(
        array[0],
        array[1],
        array[1],
        mask=maybe(seed.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.95]))),
        q_segment_ids=ids and ids[0],
        kv_segment_ids=ids and ids[1],
        query_lengths=maybe(edges(queries, block_q)),
        key_value_lengths=maybe(edges(keys, block_kv)),
        q_offset=maybe(seed.integers(-9, 10, 2)),
    )
    window = draw(st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)))
    mask: Mask | None = draw(st.sampled_from(BLOCK_MASKS))
    return Spec(1.0, is_causal=draw(st.booleans()), window=window, block_mask=mask), operands, block_q, block_kv


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems())
def test_an_empty_tile_has_no_visible_pair_and_a_full_one_no_other(problem: tuple[Spec, Operands, int, int]) -> None:
    spec, operands, block_q, block_kv = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "jnp", np)  # The same functions, without compiling them for every shape.
        states = tiles.tile_states(spec, operands, block_q, block_kv)
        merged = tiles.merge_batches(states, 2)
    visible = reference.visible(spec, operands)[:, 0]
    for (batch, row, column), state in np.ndenumerate(np.broadcast_to(states, (2, *states.shape[1:]))):
        tile = visible[batch, row * block_q : (row + 1) * block_q, column * block_kv : (column + 1) * block_kv]
        assert not (state == EMPTY and tile.any()) and not (state == FULL and not tile.all())
        overhangs = (column + 1) * block_kv > visible.shape[2]
        assert not (state == FULL and overhangs)
        # What is merged claims no more than each of its batches does.
        assert merged[0, row, column] in (state, PARTIAL)


@pytest.mark.parametrize("case", ["causal", "window", "lengths", "segments", "mask", "block mask"])
def test_what_is_certain_is_known(case: str) -> None:
    """Of tiles of 4 × 4 in 16 × 16 no more are masked or visited than have to be."""
    array, half = np.zeros((1, 16, 1, 1), np.float32), np.arange(16)[None] // 8
    spec, operands = {
        "causal": (Spec(1.0, is_causal=True), {}),
        "window": (Spec(1.0, window=(7, 3)), {}),
        "lengths": (Spec(1.0), {"query_lengths": np.array([8]), "key_value_lengths": np.array([12])}),
        "segments": (Spec(1.0), {"q_segment_ids": half, "kv_segment_ids": half}),
        "mask": (Spec(1.0), {"mask": (half[:, :, None] == half[:, None])[:, None]}),
        "block mask": (Spec(1.0, block_mask=Local(7, 3)), {}),
    }[case]
    operands = Operands(array, array, array, **operands)
    states = np.asarray(tiles.tile_states(spec, operands, 4, 4)[0])
    by_tile = reference.visible(spec, operands)[0, 0].reshape(4, 4, 4, 4)
    np.testing.assert_array_equal(states, np.where(by_tile.all((1, 3)), FULL, np.where(by_tile.any((1, 3)), PARTIAL, EMPTY)))
