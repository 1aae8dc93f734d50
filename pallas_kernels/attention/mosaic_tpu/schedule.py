"""Which tiles of the logits a TPU kernel visits, and in which order: a list that the scalar core reads ahead of the vector units.

A TPU goes through a grid one step after another, and while it works on a step it fetches the blocks of the next. So a tile that need not be visited should be no step at all, and that is what happens where masks are known while tracing: the causal half of a square costs half of the steps. Where arrays hide tiles (segments, lengths, offsets, masks), the steps are those that may be needed; one that turns out empty does nothing, and names the blocks of the next that is not, so that it fetches nothing that is not wanted soon.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention.masks import EMPTY, FULL, PARTIAL, tile_table
from pallas_kernels.attention.problem import Operands, Spec
from pallas_kernels.attention.tiles import merge_batches, tile_states

INDEX_BITS = 13
"""Of the indices of line and tile in a word: 2 · 13 + 4 bits stay clear of the sign."""
MOST_WORDS = 200_000
"""Of int32 in a kernel's lists: 0.8 MB of the 1 MiB of scalar memory that a TPU has (v4 to tpu7x)."""

Index = int | jax.Array
"""Known while tracing, or computed when the kernel runs."""
Array = jax.Array | np.ndarray


class Step(NamedTuple):
    """One step of the list. A line is a row of tiles (of queries, or of keys in a transposed list) that is summed up before the next begins."""

    line: Index
    tile: Index
    """Along the line; where the state is EMPTY, that of the next step which is not."""
    first: Any
    """Of its line?"""
    last: Any
    state: Index

    @staticmethod
    def pack(line: Array, tile: Array, first: Array, last: Array, state: Array) -> Array:
        """As one int32."""
        return line << INDEX_BITS + 4 | tile << 4 | first << 3 | last << 2 | state

    @staticmethod
    def unpack(word: jax.Array) -> "Step":
        tile = word >> 4 & (1 << INDEX_BITS) - 1
        return Step(word >> INDEX_BITS + 4, tile, (word >> 3 & 1) == 1, (word >> 2 & 1) == 1, word & 3)


class Schedule(NamedTuple):
    """The steps of all lines."""

    words: Array
    """int32: packed steps, `count` for each batch, or once where all batches are alike."""
    count: int
    alike: bool
    states: frozenset[int]
    """Those that occur beside EMPTY."""
    patterns: np.ndarray | None
    """bool `P rows columns`: what is visible in tiles that a block mask cuts; the last is all True."""
    pattern: np.ndarray | None
    """int32 `count`: the pattern of each step, or where a step needs none, that of the next that does."""

    def step(self, words: Any, batch: Index, index: Index) -> Step:
        """The index-th step of a batch, from `words` in scalar memory."""
        return Step.unpack(words[index if self.alike else batch * self.count + index])


def refusal(spec: Spec, operands: Operands, block_q: int, block_kv: int) -> str | None:
    """Why the list does not fit, or None."""
    lines, tiles = -(-operands.query.shape[1] // block_q), -(-operands.key.shape[1] // block_kv)
    if max(lines, tiles) > 1 << INDEX_BITS:
        return f"its lists count up to {1 << INDEX_BITS} tiles, and these lengths have {lines} × {tiles}: give larger block_sizes"
    words = len(np.nonzero(_possible(spec, operands, block_q, block_kv))[0]) * (1 if spec.block_mask is None else 2)
    if words > MOST_WORDS:
        return f"its lists have up to {MOST_WORDS} words, and this problem's {words}: give larger block_sizes"
    return None


def schedule(spec: Spec, operands: Operands, block_q: int, block_kv: int, transposed: bool = False) -> Schedule:
    """Lines are queries, or keys if `transposed`; then the patterns are transposed as well."""
    states = tile_states(spec, operands, block_q, block_kv)
    possible = _possible(spec, operands, block_q, block_kv)
    if transposed:
        states, possible = states.swapaxes(1, 2), possible.T.copy()
    # A line that sees nothing still has to say so.
    possible[:, 0] |= ~possible.any(1)
    lines, tiles = (x.astype(np.int32) for x in np.nonzero(possible))
    count = len(lines)
    if len(states) * count > MOST_WORDS:
        # One list for all batches, with what any of them needs.
        states = merge_batches(states, len(states))
    states = states[:, lines, tiles].astype(np.int32)
    changes = np.concatenate([[1], lines[1:] != lines[:-1], [1]]).astype(np.int32)
    known = isinstance(states, np.ndarray)
    wanted = (tiles if known else jnp.asarray(tiles))[_next(states != EMPTY)]
    words = Step.pack(lines, wanted, changes[:-1], changes[1:], states)
    kinds = frozenset(np.unique(states).tolist()) - {EMPTY} if known else frozenset({PARTIAL, FULL})
    patterns = pattern = None
    if spec.block_mask is not None and PARTIAL in kinds:
        table = tile_table(spec.block_mask, operands.query.shape[1], operands.key.shape[1], block_q, block_kv)
        indices = np.where(table.states == PARTIAL, table.indices, len(table.patterns)).astype(np.int32)
        patterns = np.concatenate([table.patterns, np.ones_like(table.patterns[:1])])
        if transposed:
            indices, patterns = indices.T, patterns.swapaxes(1, 2)
        pattern = indices[lines, tiles]
        if known:
            pattern = pattern[_next(states == PARTIAL)[0]]
    return Schedule(words.reshape(-1), count, len(states) == 1, kinds, patterns, pattern)


def _next(wanted: Array) -> Array:
    """For each of `B' count`, the index of the first that is wanted from there on; the last of all where none is."""
    count = wanted.shape[-1]
    if isinstance(wanted, np.ndarray):
        indices = np.where(wanted, np.arange(count), count - 1)
        return np.minimum.accumulate(indices[:, ::-1], axis=1)[:, ::-1]
    return lax.cummin(jnp.where(wanted, jnp.arange(count, dtype=jnp.int32), count - 1), axis=1, reverse=True)


def _possible(spec: Spec, operands: Operands, block_q: int, block_kv: int) -> np.ndarray:
    """Bool `lines tiles`: what is not empty by all that is known while tracing."""
    if operands.q_offset is not None:
        spec = dataclasses.replace(spec, is_causal=False, window=None)
    static = Operands(operands.query, operands.key, operands.value)
    return np.asarray(tile_states(spec, static, block_q, block_kv)[0] != EMPTY)
