"""The tiles of the Hopper kernels: which ones fit, and which ones are taken where the caller names none.

`tiles.json` is the table of the latter: a list of entries, each for an `arch`, a `dtype`, a `width` of heads, `causal` or not, and queries from a `length` on. `logits` says what is done with them: nothing ("plain"), "segments", or "crowded", which is a soft cap or ALiBi. `block_sizes` are the fields of `BlockSizes`, and `source` says how they were found. A null serves both of what it could be; the most specific entry counts.

The table as it is shipped is by analysis, not by measurements: each tile is the largest with which ptxas spills no register and keeps every wgmma asynchronous. Narrow heads get more stages, because their tiles are sooner done with. `python -m experiments.flash_attention --preset h200 --tune` measures on the GPU at hand, and leaves a table in this form to be put into its place. Nothing is ever measured while a program computes.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.attention.mosaic_gpu.dialect import CONSUMERS, ROWS
from pallas_kernels.attention.problem import BlockSizes, Operands, Spec

TABLE = Path(__file__).with_name("tiles.json")
ARCH = "sm_90a"
BLOCK = CONSUMERS * ROWS
"""Queries that a block of the forward grid owns."""


class Tiles(NamedTuple):
    """What a kernel steps through: so many rows of the other side at a time, and how many such tiles are under way."""

    rows: int
    stages: int


class Tuning(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    query_gradient: Tiles
    key_value_gradient: Tiles


FIELDS = {
    "forward": ("key", "key_stages"),
    "query_gradient": ("key_backward", "key_backward_stages"),
    "key_value_gradient": ("query_backward", "query_backward_stages"),
}
"""The fields of `BlockSizes` that are rows and stages of each kernel's tiles: the forward pass and the gradient of the queries step through keys, the gradients of keys and values through queries."""

# The most rows of each kernel's tile, by logits and the width of the heads: with more, ptxas spills registers or makes wgmma wait for each other (`tests/pallas_kernels/test_aot_gpu.py`). Segments hold a tile's ids beside its logits; a soft cap and ALiBi compute with every logit, and heads wider than 128 leave no registers for that.
LARGEST = {
    "plain": {64: (128, 128, 128), 128: (128, 128, 64), 256: (64, 64, 64)},
    "segments": {64: (128, 128, 128), 128: (64, 128, 64), 256: (64, 64, 64)},
    "crowded": {64: (64, 64, 64), 128: (64, 64, 64)},
}
WIDTHS = tuple(LARGEST["plain"])
"""Of the heads that kernels are made for; narrower ones are filled up with zeros."""
# Of shared memory a block may have 227 KiB. Tiles are multiples of 16 KiB; between them lie barriers and vectors.
MOST_TILES = 223 * 1024


def kernel_width(width: int) -> int:
    """That of the kernel which serves heads so wide."""
    return min(each for each in WIDTHS if each >= width)


def kind_of_logits(spec: Spec, operands: Operands) -> str:
    """As the table calls it."""
    if spec.soft_cap is not None or operands.alibi_slopes is not None:
        return "crowded"
    return "plain" if operands.q_segment_ids is None else "segments"


def rows_of_keys(width: int, plain: bool) -> int:
    """How many keys a block of the key-value gradient owns. The sums of 64 keys in 128 columns, twice, are 128 registers of a lane; a soft cap and ALiBi leave room for half of that."""
    return BLOCK if width <= (128 if plain else 64) else ROWS


def most_stages(kernel: str, logits: str, width: int, rows: int) -> int:
    """How many tiles of so many rows shared memory has room for, in each of a kernel's two rings, beside the tiles that a block owns."""
    owned = {
        "forward": BLOCK,
        "query_gradient": 2 * BLOCK,
        "key_value_gradient": 2 * rows_of_keys(width, logits != "crowded"),
    }[kernel]
    return (MOST_TILES // (2 * width) - owned) // (2 * rows)


def candidates(kernel: str, logits: str, width: int) -> list[Tiles]:
    """All that are worth a measurement: more than six tiles under way hide nothing more."""
    most_rows = LARGEST[logits][width][Tuning._fields.index(kernel)]
    return [
        Tiles(rows, stages)
        for rows in (ROWS, BLOCK)
        if rows <= most_rows
        for most in [most_stages(kernel, logits, width, rows)]
        for stages in range(min(2, most), min(6, most) + 1)
    ]


@functools.cache
def shipped() -> tuple[Mapping[str, Any], ...]:
    """The entries of the table."""
    return tuple(json.loads(TABLE.read_text(encoding="utf-8")))


def tuned(logits: str, dtype: str, width: int, causal: bool, length: int) -> BlockSizes:
    """Those of the table."""
    asked = {"arch": ARCH, "logits": logits, "width": width, "dtype": dtype, "causal": causal}
    fitting = [
        entry
        for entry in shipped()
        if entry["length"] <= length and all(entry[name] in (None, value) for name, value in asked.items())
    ]
    best = max(fitting, key=lambda entry: (sum(entry[name] is not None for name in asked), entry["length"]))
    return BlockSizes(**best["block_sizes"])


def tuning(spec: Spec, operands: Operands) -> Tuning:
    """What is wished for, and what is not from the table; fewer stages than the table's where larger tiles leave room for fewer."""
    query, logits = operands.query, kind_of_logits(spec, operands)
    width = kernel_width(query.shape[-1])
    default = tuned(logits, query.dtype.name, width, spec.is_causal, query.shape[1])

    def choose(kernel: str) -> Tiles:
        rows, stages = wished_tiles(kernel, spec.block_sizes)
        usual = Tiles(*wished_tiles(kernel, default))
        rows = usual.rows if rows is None else rows
        return Tiles(rows, min(usual.stages, most_stages(kernel, logits, width, rows)) if stages is None else stages)

    return Tuning(*map(choose, Tuning._fields))


def wished_tiles(kernel: str, sizes: BlockSizes) -> list[int | None]:
    """Rows and stages of a kernel's tiles, as far as they are named."""
    return [getattr(sizes, field) for field in FIELDS[kernel]]


def refusal(spec: Spec, operands: Operands) -> str | None:
    """Why the kernels cannot have the tiles that are wished for, or None."""
    sizes, logits, width = spec.block_sizes, kind_of_logits(spec, operands), kernel_width(operands.query.shape[-1])
    if sizes.query not in (None, BLOCK):
        return f"its blocks have {BLOCK} queries, and block_sizes.query is {sizes.query}"
    for kernel, most in zip(Tuning._fields, LARGEST[logits][width]):
        accepted, (rows, _) = [rows for rows in (ROWS, BLOCK) if rows <= most], wished_tiles(kernel, sizes)
        if rows not in (None, *accepted):
            return (
                f"with {logits} logits and heads of {width} block_sizes.{FIELDS[kernel][0]} is {' or '.join(map(str, accepted))}, "
                f"as wgmma wants multiples of {ROWS} and there are no registers for more, and it is {rows}"
            )
    for kernel, tiles in tuning(spec, operands)._asdict().items():
        most = most_stages(kernel, logits, width, tiles.rows)
        if not 1 <= tiles.stages <= most:
            return (
                f"shared memory has room for {most} tiles of {tiles.rows} × {width} in block_sizes.{FIELDS[kernel][1]}, "
                f"which is {tiles.stages}"
            )
    return None
