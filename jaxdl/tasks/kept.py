"""What is made of the training data once and kept in the run, so that a resumed run and a finished one read as it did.

What a process leaves that failed or was killed before there was a checkpoint, `Run.open` removes: it is made anew of the data as they are then (`jaxdl.training.workdir.KEPT`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Integer

from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.files import parse_json, written_whole
from jaxdl.training.workdir import steps

T = TypeVar("T")


def kept(directory: Path, last: str, save: Callable[[Path], None], load: Callable[[], T]) -> T:
    """What `load` reads in a run's directory. Where the file `last` is not there yet, `save(folder)` writes it, with what belongs to it, whole or not at all. Raises `UserError` if a run that has learned with it has lost it, or if it is damaged."""
    file = directory / last
    if not file.exists():
        if steps(directory):
            raise UserError(f"{file}, with which this run has learned, is gone: {_WAY_OUT}")
        with written_whole(directory, last=last) as folder:
            save(folder)
    return _whole(file, load)


def _whole(file: Path, load: Callable[[], T]) -> T:
    """What is in a file. Raises `UserError` if it is damaged."""
    try:
        return load()
    except (UserError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{file} is damaged ({reason}): {_WAY_OUT}") from error


_WAY_OUT = "restore it from a copy, or start anew with --overwrite"


def kept_tokenizer(directory: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer in a run's directory. It is made where there is none yet; what an interrupted process leaves is not taken for one."""
    config = "tokenizer_config.json"
    kept(directory, config, lambda folder: make().save(folder), lambda: parse_json(directory / config))
    return _whole(directory / "tokenizer.json", lambda: Tokenizer.load(directory))


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
