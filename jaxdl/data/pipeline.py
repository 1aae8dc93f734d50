"""From a source to batches: order, shuffling, transforms, batching and prefetch, by grain."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import numpy as np

from jaxdl.data.sources import Source
from jaxdl.errors import UserError

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], dict[str, np.ndarray]]
"""An example to arrays of a fixed shape. All its chance comes from the generator, which depends on the seed and the position in the run alone."""


def train_batches(source: Source, transform: Transform, *, batch_size: int, seed: int, threads: int = 2) -> grain.DatasetIterator:
    """An endless iterator of batches, shuffled anew in each pass, prepared ahead in threads.

    Its `get_state()` is a small dict that `set_state` takes in another process to go on with the same bits. A batch may span two passes. Raises `UserError` if the source is empty.
    """
    if len(source) == 0:
        raise UserError("the data set is empty")
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    batches = examples.random_map(transform).batch(batch_size)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def eval_batches(rows: Iterable[np.ndarray], batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Stacks rows in order into batches of one shape, each with the number of its rows that count; the last is filled up with copies of its first row."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        yield np.stack(batch + batch[:1] * (batch_size - len(batch))), len(batch)
