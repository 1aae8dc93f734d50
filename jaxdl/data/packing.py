"""Rows of one length that hold several sentence pairs each, and groups of sentences of similar length."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxdl.data.sources import Info, Source
from jaxdl.errors import UserError


class Packed(Source[dict[str, np.ndarray]]):
    """A source of rows with several pairs each, one after the other, as many as fit into `length` source and `length` target tokens (Krell et al. 2021): sentences of all lengths in one shape with little padding.

    The paper's batches are of sentences of similar length (Vaswani et al. 2017, section 5.1). Packing does the same against padding, and needs one shape, which is compiled once, and no buffer of sentences that wait for others of their length: a batch depends on its number alone, which an exact resume needs. Of the experiment's rows of CLDR 96 % is filled, of Multi30k 92 %.

    `source[i]` is a dict of arrays of `length` tokens: `source`, each sentence with its `end`; `target`, each with `start` before it; `labels`, the token that comes next, `end` at last; and the numbers of the pairs in the row, from 1, `source_segments` and `target_segments`, 0 where `pad` is. Which pairs share a row is decided once, in an order that depends on their number alone. Pairs that are longer are left out, and counted in `info`. Raises `UserError` if there is no shorter one.
    """

    def __init__(
        self, pairs: Sequence[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]], length: int, *, start: int, end: int, pad: int
    ):
        self.pairs, self.length, self.start, self.end, self.pad = pairs, length, start, end, pad
        sizes = np.array([[len(source) + 1, len(target) + 1] for source, target in pairs], np.int32).reshape(-1, 2)
        self.rows = pack(sizes, length)
        self.info = Info(left_out=int((sizes > length).any(1).sum()), reason=f"have more than {length} tokens")
        if not self.rows:
            raise UserError(
                f"none of {len(pairs)} pairs has at most {length} tokens on either side: allow more, or give shorter ones"
            )
        self.filled = float(sizes[(sizes <= length).all(1)].sum() / (2 * length * len(self.rows)))
        """The share of tokens that is no padding."""
        self.target_tokens = float(sizes[(sizes <= length).all(1), 1].sum() / len(self.rows))
        """Of a row, on average."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = lambda value: np.full(self.length, value, np.int32)
        row = dict(source=tokens(self.pad), source_segments=tokens(0), target=tokens(self.pad), target_segments=tokens(0), labels=tokens(self.pad))  # fmt: skip
        here = there = 0
        for number, pair in enumerate(self.rows[index], 1):
            source, target = self.pairs[pair]
            reading, writing = slice(here, here + len(source) + 1), slice(there, there + len(target) + 1)
            row["source"][reading] = np.append(source, self.end)
            row["target"][writing] = np.append(self.start, target)
            row["labels"][writing] = np.append(target, self.end)
            row["source_segments"][reading] = row["target_segments"][writing] = number
            here, there = reading.stop, writing.stop
        return row


_OPEN_ROWS = 512
"""Rows that a pair may still be put into. With more of them, packing takes longer and saves next to nothing."""


def pack(sizes: Int[np.ndarray, "N 2"], length: int) -> list[list[int]]:
    """Rows of indices of pairs, of which both sides add up to at most `length`; each pair goes into the first row with room. Longer ones are in none."""
    rows: list[list[int]] = []
    open_rows: list[int] = []
    room = np.zeros((_OPEN_ROWS, 2), np.int64)
    for index in np.random.default_rng(0).permutation(len(sizes)).tolist():
        size = sizes[index]
        if (size > length).any():
            continue
        fits = (room[: len(open_rows)] >= size).all(1)
        if fits.any():
            place = int(fits.argmax())
        else:
            place = len(open_rows) if len(open_rows) < _OPEN_ROWS else int(room.sum(1).argmin())
            open_rows[place : place + 1] = [len(rows)]
            rows.append([])
            room[place] = length
        rows[open_rows[place]].append(index)
        room[place] -= size
    return rows


def buckets(lengths: Sequence[int], shortest: int = 16) -> dict[int, list[int]]:
    """Indices of sentences by the length that they are padded to, the next of `shortest`, its double, and so on: a few shapes for all, and at most half of each is padding but for the shortest."""
    found: dict[int, list[int]] = {}
    for index, length in sorted(enumerate(lengths), key=lambda each: each[1]):
        size = shortest
        while size < length:
            size *= 2
        found.setdefault(size, []).append(index)
    return found
