"""Masks that are known before anything runs: which pairs of query and key are visible, as objects that combine with & and |.

A mask answers for any rectangle of (query, key) indices: densely, as a boolean array of numpy, or in a word for a whole tile. `tile_table` cuts it into tiles: which are empty and can be skipped, which are full and need no masking, and the few different patterns of the others.
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2


class Mask(abc.ABC):
    """Immutable and hashable. `mask & other` is visible where both are, `mask | other` where either is."""

    @abc.abstractmethod
    def dense(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Bool `len(rows) len(columns)`: is the key visible to the query? Indices lie within the sequences."""

    def tiles(self, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """EMPTY or FULL where that is certain from the first and last query (`top`, `bottom`) and the first and last key of a tile, PARTIAL where only `dense` can tell. The four broadcast."""
        return np.full(np.broadcast_shapes(*map(np.shape, (top, bottom, left, right))), PARTIAL)

    def check(self, queries: int, keys: int) -> None:  # noqa: B027
        """Raises `ValueError` if the mask was made for shorter sequences: most are for any length."""

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Visible where both are."""

    first: Mask
    second: Mask

    def dense(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return self.first.dense(rows, columns) & self.second.dense(rows, columns)

    def check(self, queries: int, keys: int) -> None:
        self.first.check(queries, keys)
        self.second.check(queries, keys)

    def tiles(self, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.minimum(self.first.tiles(top, bottom, left, right), self.second.tiles(top, bottom, left, right))


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """Visible where either is."""

    first: Mask
    second: Mask

    def dense(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return self.first.dense(rows, columns) | self.second.dense(rows, columns)

    def check(self, queries: int, keys: int) -> None:
        self.first.check(queries, keys)
        self.second.check(queries, keys)

    def tiles(self, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.maximum(self.first.tiles(top, bottom, left, right), self.second.tiles(top, bottom, left, right))


@dataclasses.dataclass(frozen=True)
class Local(Mask):
    """Keys from `left` before the query to `right` after it, both inclusive; None sets no limit on that side."""

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for name, side in (("left", self.left), ("right", self.right)):
            if side is not None and side < 0:
                raise ValueError(f"{name}={side}: a window reaches 0 or more positions, or None for no limit")

    def dense(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        distance = columns - rows[:, None]
        visible = np.ones(distance.shape, bool)
        if self.left is not None:
            visible &= distance >= -self.left
        if self.right is not None:
            visible &= distance <= self.right
        return visible

    def tiles(self, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        least, most = left - bottom, right - top
        low = -np.inf if self.left is None else -self.left
        high = np.inf if self.right is None else self.right
        return np.where((most < low) | (least > high), EMPTY, np.where((least >= low) & (most <= high), FULL, PARTIAL))


def Causal() -> Local:
    """Keys up to the query's own index."""
    return Local(None, 0)


@dataclasses.dataclass(frozen=True)
class Segment(Mask):
    """Keys of the query's own segment, for segments that are known beforehand: ids of any integers, in any order, one per position."""

    query_ids: Sequence[int]
    key_ids: Sequence[int] | None = None
    """The same as those of the queries where None."""

    def __post_init__(self) -> None:
        # A list could not be hashed.
        for name, ids in (("query_ids", self.query_ids), ("key_ids", self.key_ids)):
            object.__setattr__(self, name, None if ids is None else tuple(map(int, ids)))

    def dense(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.asarray(self.query_ids)[rows][:, None] == np.asarray(self._key_ids)[columns]

    def check(self, queries: int, keys: int) -> None:
        if len(self.query_ids) < queries or len(self._key_ids) < keys:
            raise ValueError(
                f"segments of {len(self.query_ids)} queries and {len(self._key_ids)} keys, for {queries} and {keys}: give one id per position"
            )

    @property
    def _key_ids(self) -> Sequence[int]:
        return self.query_ids if self.key_ids is None else self.key_ids

    def tiles(self, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        query_low, query_high = _extremes(np.asarray(self.query_ids), top, bottom)
        key_low, key_high = _extremes(np.asarray(self._key_ids), left, right)
        same = (query_low == query_high) & (key_low == key_high) & (query_low == key_low)
        return np.where((query_high < key_low) | (query_low > key_high), EMPTY, np.where(same, FULL, PARTIAL))


def _extremes(ids: np.ndarray, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest id from `first` to `last` (inclusive), for each pair of these."""
    spans = list(zip(np.ravel(first), np.ravel(last)))
    low, high = ([extreme(ids[a : b + 1]) for a, b in spans] for extreme in (np.min, np.max))
    return np.reshape(low, np.shape(first)), np.reshape(high, np.shape(first))


@dataclasses.dataclass(frozen=True)
class Global(Mask):
    """Some positions see every key, and every query sees them (Beltagy et al. 2020, section 3.1, "symmetric")."""

    positions: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", tuple(map(int, self.positions)))

    def dense(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.isin(rows, self.positions)[:, None] | np.isin(columns, self.positions)

    def tiles(self, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        positions = np.unique(self.positions)

        def count(first: np.ndarray, last: np.ndarray) -> np.ndarray:
            return np.searchsorted(positions, last, side="right") - np.searchsorted(positions, first)

        queries, keys = count(top, bottom), count(left, right)
        full = (queries == bottom - top + 1) | (keys == right - left + 1)
        return np.where(full, FULL, np.where((queries == 0) & (keys == 0), EMPTY, PARTIAL))


def Longformer(window: int, global_positions: Sequence[int] = (0,)) -> Mask:
    """`window/2` keys on each side of the query, and global positions that see and are seen by all (Beltagy et al. 2020, section 3.1). Raises `ValueError` if the window is odd."""
    if window % 2:
        raise ValueError(f"window={window}: half of it lies on each side of a query, so give an even number")
    return Local(window // 2, window // 2) | Global(global_positions)


@dataclasses.dataclass(frozen=True)
class BigBird(Mask):
    """Blocks of `block` positions (Zaheer et al. 2020, section 2, in the blocked form of its appendix D): each sees a window of `window_blocks` around itself, `random_blocks` others, and the global blocks, which see everything.

    The first and the last block are global, as in the authors' code (the form without extra tokens, "ITC"). Which blocks are random depends on the seed and on `num_blocks`, the length in blocks.
    """

    num_blocks: int
    block: int = 64
    window_blocks: int = 3
    random_blocks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window_blocks % 2 == 0:
            raise ValueError(f"window_blocks={self.window_blocks}: a window around a block has an odd number of blocks")

    @functools.cached_property
    def blocks(self) -> np.ndarray:
        """Bool `num_blocks num_blocks`: which blocks see which."""
        index = np.arange(self.num_blocks)
        visible = np.abs(index - index[:, None]) <= self.window_blocks // 2
        visible[[0, -1]] = visible[:, [0, -1]] = True
        rng = np.random.default_rng(self.seed)
        for row in visible[1:-1]:
            others = np.flatnonzero(~row)
            row[rng.choice(others, min(self.random_blocks, len(others)), replace=False)] = True
        return visible

    def check(self, queries: int, keys: int) -> None:
        if max(queries, keys) > self.num_blocks * self.block:
            raise ValueError(
                f"BigBird has {self.num_blocks} blocks of {self.block} positions, too few for {queries} queries and {keys} keys: give more"
            )

    def dense(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return self.blocks[np.ix_(rows // self.block, columns // self.block)]

    def tiles(self, top: np.ndarray, bottom: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        # How many visible blocks lie above and to the left of each corner.
        counts = np.pad(self.blocks.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        top, left = top // self.block, left // self.block
        bottom, right = bottom // self.block + 1, right // self.block + 1
        visible = counts[bottom, right] - counts[top, right] - counts[bottom, left] + counts[top, left]
        return np.where(visible == 0, EMPTY, np.where(visible == (bottom - top) * (right - left), FULL, PARTIAL))


class TileTable(NamedTuple):
    """A mask cut into tiles."""

    states: np.ndarray
    """int32, tiles of queries × tiles of keys: EMPTY, PARTIAL or FULL, judged by what lies within T and S. Where a tile overhangs, keeping out what lies beyond is not this table's concern."""
    patterns: np.ndarray
    """bool `P block_q block_kv`: the different contents of the partial tiles, False beyond T and S; at least one, so that there is always an array to pass."""
    indices: np.ndarray
    """int32, tiles × tiles: which pattern a partial tile has; 0 elsewhere."""


@functools.lru_cache(maxsize=64)
def tile_table(mask: Mask, queries: int, keys: int, block_q: int, block_kv: int) -> TileTable:
    """Tiles of `block_q × block_kv` that cover `queries × keys`. Cached, since the mask is the same in every layer: do not write into the arrays."""
    mask.check(queries, keys)
    top, left = np.arange(0, queries, block_q)[:, None], np.arange(0, keys, block_kv)[None]
    bottom, right = np.minimum(top + block_q, queries) - 1, np.minimum(left + block_kv, keys) - 1
    states = np.array(mask.tiles(top, bottom, left, right), np.int32)
    indices = np.zeros_like(states)
    known: dict[bytes, int] = {}
    patterns = []
    for row, column in np.argwhere(states == PARTIAL):
        rows = np.arange(top[row, 0], bottom[row, 0] + 1)
        columns = np.arange(left[0, column], right[0, column] + 1)
        dense = mask.dense(rows, columns)
        if dense.all() or not dense.any():
            states[row, column] = FULL if dense.any() else EMPTY
            continue
        tile = np.zeros((block_q, block_kv), bool)
        tile[: len(rows), : len(columns)] = dense
        indices[row, column] = known.setdefault(np.packbits(tile).tobytes(), len(patterns))
        if indices[row, column] == len(patterns):
            patterns.append(tile)
    return TileTable(states, np.stack(patterns) if patterns else np.zeros((1, block_q, block_kv), bool), indices)
