"""Which tiles are visited and which are masked, against the visible pairs one by one."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import reference, tiles
from pallas_kernels.attention.masks import EMPTY, FULL, PARTIAL, Causal, Global, Local, Mask, Segment
from pallas_kernels.attention.problem import Operands, Spec

BLOCK_MASKS: list[Mask] = [Local(3, 2), Global((2, 9)), Segment([0] * 9 + [1] * 11), Causal() & Segment([2] * 5 + [0] * 15)]


HIDING = ["causal", "window", "block mask", "offset", "mask", "segments", "query lengths", "key lengths"]


@st.composite
def problems(draw: Any) -> tuple[Spec, Operands, int, int]:
    """Up to 20 queries and keys of two examples and two heads, of which up to three things hide pairs, and the sizes of blocks. Lengths lie on the edges of tiles and beside them."""
    queries, keys, block_q, block_kv = (draw(st.integers(1, most)) for most in (20, 20, 9, 9))
    hiding = draw(st.sets(st.sampled_from(HIDING), min_size=1, max_size=3))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))

    def lengths(longest: int, block: int) -> np.ndarray:
        edges = [draw(st.integers(0, longest // block)) * block + draw(st.integers(-1, 1)) for _ in range(2)]
        return np.clip(edges, 0, longest)

    arrays: dict[str, Any] = {}
    if "mask" in hiding:
        shape = [draw(st.sampled_from([1, whole])) for whole in (2, 2, queries, keys)]
        arrays["mask"] = random.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.95]))
    if "segments" in hiding:
        arrays |= {"q_segment_ids": np.sort(random.integers(0, 4, (2, queries)))}
        arrays |= {"kv_segment_ids": np.sort(random.integers(0, 4, (2, keys)))}
    if "query lengths" in hiding:
        arrays["query_lengths"] = lengths(queries, block_q)
    if "key lengths" in hiding:
        arrays["key_value_lengths"] = lengths(keys, block_kv)
    if "offset" in hiding:
        arrays["q_offset"] = random.integers(-9, 10, 2)
    spec = Spec(
        1.0,
        is_causal="causal" in hiding,
        window=draw(st.tuples(st.integers(0, 9), st.integers(0, 9))) if "window" in hiding else None,
        block_mask=draw(st.sampled_from(BLOCK_MASKS)) if "block mask" in hiding else None,
    )
    query, key = (np.zeros((2, length, 2, 1), np.float32) for length in (queries, keys))
    return spec, Operands(query, key, key, **arrays), block_q, block_kv


@settings(max_examples=500, deadline=None, derandomize=True)
@given(problems())
def test_an_empty_tile_has_no_visible_pair_and_a_full_one_no_other(problem: tuple[Spec, Operands, int, int]) -> None:
    spec, operands, block_q, block_kv = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "jnp", np)  # The same functions, without compiling them for every shape.
        states = tiles.tile_states(spec, operands, block_q, block_kv)
        merged = tiles.merge_batches(states, 2)
    visible = reference.visible(spec, operands)
    for (batch, row, column), state in np.ndenumerate(np.broadcast_to(states, (2, *states.shape[1:]))):
        tile = visible[batch, :, row * block_q : (row + 1) * block_q, column * block_kv : (column + 1) * block_kv]
        assert not (state == EMPTY and tile.any()) and not (state == FULL and not tile.all())
        overhangs = (column + 1) * block_kv > visible.shape[3]
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
