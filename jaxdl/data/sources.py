"""Sources: random-access data sets of typed elements, and what can be done with any of them."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Integer

E = TypeVar("E")
R = TypeVar("R")

Split = Literal["train", "test"]


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known about a source as a whole."""

    spec: str = ""
    """What it was opened by, for messages."""
    classes: tuple[str, ...] = ()
    """Names of the labels; empty where there are none."""
    columns: tuple[str, ...] = ()
    """Names of the features of a table."""
    left_out: int = 0
    """How many examples of the data are not in the source."""
    reason: str = ""
    """Why they are not, as the end of a sentence that begins with them: "have no caption"."""
    remarks: str = ""
    """What else the user should know about what was found, such as files that are not read."""
    digest: str = ""
    """Hexadecimal digits that are others where the data are: of the names and sizes of files, of what is in memory, or of the versions of what draws it (`jaxdl.data.digests`). Empty where nothing is known."""


class Source(Generic[E], abc.ABC):
    """`len(source)` elements; `source[i]` reads, decodes or draws the one at `0 ≤ i < len(source)` and raises `IndexError` beyond.

    It is no `collections.abc.Sequence`, since what checks types at run time reads an element of these each time they are handed on.
    """

    info: Info = Info()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> E: ...

    def __iter__(self) -> Iterator[E]:
        return (self[index] for index in range(len(self)))

    def annotations(self, index: int) -> E:
        """The element without what takes time to decode or draw: its image has 0 × 0 pixels, and there are no masks."""
        return self[index]

    def where(self, wanted: Callable[[E], bool], reason: str) -> "Subset[E]":
        """The elements of whose annotations `wanted` is true; the others are counted in `info.left_out`. `reason` says why, such as "have no caption"."""
        kept = Subset(self, [index for index in range(len(self)) if wanted(self.annotations(index))])
        left_out = len(self) - len(kept)
        if left_out:
            kept.info = dataclasses.replace(self.info, left_out=self.info.left_out + left_out, reason=reason)
        return kept


class Subset(Source[E]):
    """The elements of a source at some of its indices, in their order."""

    def __init__(self, source: Source[E], indices: Integer[np.ndarray, "N"] | Sequence[int]):
        self.source, self.indices, self.info = source, np.asarray(indices, np.int64), source.info

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> E:
        return self.source[int(self.indices[index])]

    def annotations(self, index: int) -> E:
        return self.source.annotations(int(self.indices[index]))


class Mapped(Source[R], Generic[E, R]):
    """`function` of each element of a source."""

    def __init__(self, source: Source[E], function: Callable[[E], R]):
        self.source, self.function, self.info = source, function, source.info

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> R:
        return self.function(self.source[index])

    def annotations(self, index: int) -> R:
        return self.function(self.source.annotations(index))


class Cached(Source[E]):
    """Keeps elements of a source in memory once they were read, up to `room` bytes of arrays."""

    def __init__(self, source: Source[E], room: int = 2**30):
        self.source, self.info, self.room = source, source.info, room
        self._kept: dict[int, E] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> E:
        element = self._kept.get(index)
        if element is None:
            element = self.source[index]
            size = _size(element)
            if size <= self.room:
                self.room -= size
                self._kept[index] = element
        return element

    def annotations(self, index: int) -> E:
        return self.source.annotations(index)


def evenly_spaced(source: Source[E] | Sequence[E], most: int) -> Iterator[E]:
    """At most `most` elements of a source at equal distances, the first and the last among them."""
    return (source[int(index)] for index in np.linspace(0, len(source) - 1, min(len(source), most)))


def report_left_out(*sources: Source[Any]) -> list[str]:
    """A line for each source that lacks some of its data, or about which there is something to remark."""
    lines: dict[str, None] = {}
    for info, length in ((source.info, len(source)) for source in sources):
        total = info.left_out + length
        lacks = f"{info.left_out:,} of {total:,} {info.reason} and are left out" if info.left_out else ""
        if told := "; ".join(filter(None, (lacks, info.remarks))):
            lines[f"{info.spec}: {told}"] = None
    return list(lines)


def _size(value: Any) -> int:
    """Bytes of the arrays in an element."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if dataclasses.is_dataclass(value):
        return sum(_size(getattr(value, field.name)) for field in dataclasses.fields(value))
    return sum(map(_size, value.values())) if isinstance(value, dict) else 0
