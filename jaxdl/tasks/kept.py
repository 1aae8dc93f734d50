"""What is made of the training data once and kept in the run, so that a resumed run and a finished one read as it did.

Until the run has a checkpoint, `Run.open` removes it, so that it is made anew of the data as they are then (`jaxdl.training.workdir.KEPT`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Integer

from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.files import written_whole
from jaxdl.training.identity import read_json
from jaxdl.training.workdir import steps

T = TypeVar("T")


def kept(directory: Path, last: str, save: Callable[[Path], None], load: Callable[[], T]) -> T:
    """What `load` reads in a run's directory. Where the file `last` is not there yet, `save(folder)` writes it, with what belongs to it, whole or not at all. Raises `UserError` if a run that has learned with it has lost it, or if it is damaged."""
    way_out = "restore it from a copy, or start anew with --overwrite"
    if not (directory / last).exists():
        if steps(directory):
            raise UserError(f"{directory / last}, with which this run has learned, is gone: {way_out}")
        with written_whole(directory, last=last) as folder:
            save(folder)
    try:
        return load()
    except (UserError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{directory / last}, or what belongs to it, is damaged ({reason}): {way_out}") from error


def kept_tokenizer(directory: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer in a run's directory. It is made where there is none yet; what an interrupted process leaves is not taken for one."""

    def load() -> Tokenizer:
        read_json(directory / "tokenizer_config.json")  # So that an error names the file of the two that is damaged.
        return Tokenizer.load(directory)

    return kept(directory, "tokenizer_config.json", lambda folder: make().save(folder), load)


def kept_tokens(file: Path, vocab_size: int) -> Integer[np.ndarray, "T"]:
    """The tokens that `write_tokens` has written to a file, which are read where they are asked for. Raises `UserError` if the file is cut, or is not of a vocabulary of that size."""
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        if tokens.ndim != 1 or tokens.dtype.str not in ("<u2", "<u4"):
            raise ValueError(f"it has the shape {tokens.shape} and the type {tokens.dtype}")
        some = tokens[:: max(1, len(tokens) // 2**16)]  # Not all: they may be more than memory holds.
        if some.max(initial=0) >= vocab_size:
            raise ValueError(f"it has tokens beyond the {vocab_size:,} of the tokenizer")
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} is damaged ({reason}): restore it from a copy, or remove it to have it made of the data again"
        ) from None
    return tokens
