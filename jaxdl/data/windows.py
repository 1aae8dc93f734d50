"""Tokens of texts in a row, in a file that may be larger than memory, and windows of them."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer

from jaxdl.data.elements import Tokens
from jaxdl.data.sources import Source
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError


def tokens_of(documents: Source[str] | Sequence[str], tokenizer: Tokenizer) -> Iterator[Int32[np.ndarray, "_"]]:
    """The tokens of one text after another, each with its end where there are several."""
    for group in _groups(documents):
        for tokens in tokenizer.encode(group):
            yield np.append(tokens, np.int32(tokenizer.end)) if len(documents) > 1 else tokens


def _groups(texts: Iterable[str], characters: int = 2**20) -> Iterator[list[str]]:
    """As many as a tokenizer's threads are worth waking for, and no more in memory."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def write_tokens(path: Path, parts: Iterable[Int32[np.ndarray, "_"]], vocab_size: int) -> None:
    """All parts in one file, which `np.load(path, mmap_mode="r")` reads where it is asked to and nowhere else; two bytes a token if the vocabulary allows it.

    A writer that is interrupted leaves nothing at `path`. Raises `UserError` if there is no token.
    """
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    begun, count = path.with_suffix(".part"), 0

    def head() -> None:
        """Numpy fills it up, so that it stays as long as it is when the count in it grows."""
        np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})

    with begun.open("wb") as file:
        head()
        for part in parts:
            file.write(part.astype(dtype).tobytes())
            count += len(part)
        file.seek(0)
        head()
    if not count:
        raise UserError("the data has no token: give some text")
    begun.replace(path)


class Windows(Source[Tokens]):
    """A source of all pieces of `length + 1` tokens of a long text, which may lie in a file: `source[i].tokens` are those from token `i` on.

    Inputs are all of a piece but the last, targets all but the first. Raises `UserError` if the text is shorter than a piece.
    """

    def __init__(self, tokens: Integer[np.ndarray, "T"], length: int):
        if len(tokens) <= length:
            raise UserError(f"a text of {len(tokens)} tokens has no piece of {length + 1}: give more text, or shorter pieces")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) - self.length

    def __getitem__(self, index: int) -> Tokens:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Tokens(self._piece(index))

    def non_overlapping(self) -> list[Int32[np.ndarray, "L"]]:
        """Pieces that share nothing but their ends, so that each token but the first of all is a target once. What is left at the end is not used."""
        return [self._piece(start) for start in range(0, len(self), self.length)]

    def _piece(self, start: int) -> Int32[np.ndarray, "L"]:
        return np.asarray(self.tokens[start : start + self.length + 1], np.int32)
