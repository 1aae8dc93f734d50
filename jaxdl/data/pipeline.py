"""From a source to batches: order, shuffling, transforms, batching and prefetch, by grain."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import numpy as np

from jaxdl.data.sources import Source
from jaxdl.errors import UserError

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], dict[str, np.ndarray]]
"""An example to arrays of a fixed shape. All its chance comes from the generator, which depends on the seed and the position in the run alone."""


_ENDLESS = 2**48
"""Rows. Grain takes the number of batches through a float, in which that of its own endless data sets is too large an int."""


class _Shard(grain.MapDataset):
    """Of each batch the rows of one process, the first process' first."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, process: int, processes: int):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, batch_size // processes
        self._first = process * self._rows

    def __len__(self) -> int:
        return min(len(self._parent), _ENDLESS) // self._batch_size * self._rows

    def __getitem__(self, index: int) -> Example:
        batch, row = divmod(index, self._rows)
        return self._parent[batch * self._batch_size + self._first + row]


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    threads: int | None = None,
    process: int = 0,
    processes: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator of batches, shuffled anew in each pass, prepared ahead in threads: one for every four cores, unless their number is given. More help where files are decoded, and hinder where Python's own code does the work, in which threads take turns.

    Its `get_state()` is a small dict that `set_state` takes in another process to go on with the same bits; it does not depend on the number of processes. Process number `process` of `processes` gets its rows of each batch, and together they get what one process would. A batch may span two passes. Raises `UserError` if the source is empty or the processes do not divide the batch.
    """
    if len(source) == 0:
        raise UserError("the data set is empty")
    if batch_size % processes:
        raise UserError(
            f"a batch of {batch_size} cannot be shared by {processes} processes: choose a --batch-size that is a multiple of {processes}"
        )
    threads = max(1, (os.cpu_count() or 1) // 4) if threads is None else threads
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(transform)
    batches = _Shard(examples, batch_size, process, processes).batch(batch_size // processes)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


Row = np.ndarray | dict[str, np.ndarray]


def eval_batches(rows: Iterable[Row], batch_size: int) -> Iterator[tuple[Row, int]]:
    """Stacks rows, arrays or dicts of them, in order into batches of one shape, each with the number of its rows that count; the last is filled up with copies of its first row."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        full = batch + batch[:1] * (batch_size - len(batch))
        if isinstance(batch[0], dict):
            yield {name: np.stack([row[name] for row in full]) for name in batch[0]}, len(batch)
        else:
            yield np.stack(full), len(batch)
