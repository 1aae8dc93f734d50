"""The rows of one process."""

import grain

from jaxdl.data.collate import Row

_ENDLESS = 2**48
"""Rows. Grain takes the number of batches through a float, in which that of its own endless data sets is too large an int."""


class Shard(grain.MapDataset):
    """Of each batch the rows of one process, the first process' first."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, process: int, processes: int):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, batch_size // processes
        self._first = process * self._rows

    def __len__(self) -> int:
        return min(len(self._parent), _ENDLESS) // self._batch_size * self._rows

    def __getitem__(self, index: int) -> Row:
        batch, row = divmod(index, self._rows)
        return self._parent[batch * self._batch_size + self._first + row]
