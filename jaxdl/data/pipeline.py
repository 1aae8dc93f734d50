"""From a source to batches: order, shuffling, transforms, batching and prefetch, by grain."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jaxdl.data.collate import Collate, Row, stack
from jaxdl.data.sources import Source
from jaxdl.errors import UserError

Transform = Callable[[Any, np.random.Generator], Row]
"""An element to arrays. All its randomness comes from the generator, which depends on the seed and the position in the run alone."""


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    collate: Collate = stack,
    threads: int | None = None,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Row]:
    """An endless iterator of batches (grain's `DatasetIterator`), shuffled anew in each pass, prepared ahead in threads: one for every four cores, unless their number is given. More threads help decoding; transforms in plain Python are limited by the interpreter's lock.

    `collate` makes a batch of its rows, those of one process: see `jaxdl.data.collate`.

    Its `get_state()` is a small dict that `set_state` takes in another process to go on with the same bits; it does not depend on the number of processes. Process number `process` of `processes` gets its rows of each batch, and together they get what one process would. A batch may span two passes. Raises `UserError` if the source is empty or the processes do not divide the batch.
    """
    if len(source) == 0:
        raise UserError(f"{source.info.spec or 'the data set'} is empty: choose other data")
    if batch_size % processes:
        raise UserError(f"a batch of {batch_size} cannot be shared by {processes} processes: choose a multiple of {processes}")
    import grain  # Here, as is what is made of it, so that a command line that trains nothing does not wait for it.

    from jaxdl.data.shard import Shard

    threads = max(1, (os.cpu_count() or 1) // 4) if threads is None else threads
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(transform)
    batches = Shard(examples, batch_size, process, processes).batch(batch_size // processes, batch_fn=collate)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def eval_batches(rows: Iterable[Row], batch_size: int, collate: Collate = stack) -> Iterator[tuple[Row, int]]:
    """Rows in order in batches of one shape, each with the number of its rows that count; the last is filled up with copies of its first row."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        yield collate(batch + batch[:1] * (batch_size - len(batch))), len(batch)
