"""The pipeline: every example once a pass, the same bits from the same seed, and a position that can be restored."""

import json

import chex
import numpy as np
import pytest

from jaxdl.data import Source, eval_batches, pad, train_batches
from jaxdl.errors import UserError


class Numbers(Source[dict]):
    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return {"number": index}


def transform(example: dict, rng: np.random.Generator) -> dict:
    return {"number": np.int64(example["number"]), "draw": rng.normal(size=3)}


def batches(seed: int = 0):
    return train_batches(Numbers(20), transform, batch_size=4, seed=seed)


def test_each_pass_shows_every_example_once_in_another_order():
    iterator = batches()
    passes = [np.concatenate([next(iterator)["number"] for _ in range(5)]) for _ in range(3)]
    for numbers in passes:
        assert sorted(numbers) == list(range(20))
    assert not np.array_equal(passes[0], passes[1])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_a_batch_may_have_any_size(batch_size):
    found = [next(train_batches(Numbers(10), transform, batch_size=batch_size, seed=0))["number"] for _ in range(2)]
    assert found[0].shape == (batch_size,)


def test_the_seed_decides_everything():
    one, same, other = batches(), batches(), batches(seed=1)
    for _ in range(12):
        expected, found, different = next(one), next(same), next(other)
        chex.assert_trees_all_equal(expected, found)
        assert not np.array_equal(expected["draw"], different["draw"])


@pytest.mark.parametrize("position", [0, 1, 7])
def test_a_restored_position_goes_on_with_the_same_bits(position):
    iterator = batches()
    for _ in range(position):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(6)]
    resumed = batches()
    resumed.set_state(state)
    chex.assert_trees_all_equal(expected, [next(resumed) for _ in range(6)])


def test_draws_differ_between_passes():
    iterator = batches()
    rows = [next(iterator) for _ in range(10)]
    draws = {tuple(draw) for row in rows for draw in row["draw"]}
    assert len(draws) == 40


def test_an_empty_source_is_an_error():
    with pytest.raises(UserError, match="empty"):
        train_batches(Numbers(0), transform, batch_size=4, seed=0)


def test_evaluation_batches_have_one_shape_and_lose_nothing():
    rows = [np.array([i, i]) for i in range(7)]
    found = list(eval_batches(rows, 3))
    assert {batch.shape for batch, _ in found} == {(3, 2)}
    np.testing.assert_array_equal(np.concatenate([batch[:count] for batch, count in found]), np.stack(rows))


def test_rows_may_be_dicts_of_arrays():
    rows = [{"a": np.array([i, i]), "b": np.float32(i)} for i in range(5)]
    found = list(eval_batches(iter(rows), 2))
    assert [count for _, count in found] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([batch["a"] for batch, _ in found])[:5, 0], range(5))
    assert found[-1][0]["b"].tolist() == [4, 4]


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_are_made_by_the_function_that_is_given(processes):
    """Of each process' own rows: together they are those of one."""
    ragged = lambda example, rng: {"number": np.int64(example["number"]), "things": {"x": np.arange(example["number"] % 5)}}
    parts = [
        next(
            train_batches(Numbers(20), ragged, batch_size=4, seed=0, collate=pad(things=3), process=process, processes=processes)
        )
        for process in range(processes)
    ]
    numbers = np.concatenate([part["number"] for part in parts])
    np.testing.assert_array_equal(numbers, next(batches())["number"])
    counts = numbers % 5
    assert all(part["things"]["x"].shape == (4 // processes, 3) for part in parts)
    np.testing.assert_array_equal(np.concatenate([part["things"]["valid"].sum(1) for part in parts]), np.minimum(counts, 3))
    np.testing.assert_array_equal(np.concatenate([part["things"]["cut"] for part in parts]), np.maximum(counts - 3, 0))


def test_stacked_batches_have_the_bits_of_grains_own():
    import grain

    reference = grain.MapDataset.source(Numbers(20)).seed(3).shuffle().repeat().random_map(transform).batch(4)
    found = batches(seed=3)
    for index in range(7):
        chex.assert_trees_all_equal(reference[index], next(found))


def test_evaluation_batches_may_be_padded():
    rows = [{"things": {"x": np.arange(count)}} for count in (1, 3, 2)]
    found = list(eval_batches(rows, 2, pad(things=2)))
    assert [(batch["things"]["valid"].sum(1).tolist(), count) for batch, count in found] == [([1, 2], 2), ([2, 2], 1)]
