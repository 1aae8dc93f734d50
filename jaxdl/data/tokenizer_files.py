"""The files of sentencepiece tokenizers, and what is said of one that cannot be read."""

from pathlib import Path

import sentencepiece

from jaxdl.errors import UserError
from jaxdl.files import read_json, refused


def read_pieces(file: Path) -> sentencepiece.SentencePieceProcessor:
    """The model in a file. Raises `ValueError` or `RuntimeError` where there is none."""
    if not (content := file.read_bytes()):  # Which sentencepiece takes for a model that is still to come.
        raise ValueError("the file is empty")
    return sentencepiece.SentencePieceProcessor(model_proto=content)


def read_table(path: Path) -> dict[str, int]:
    """The ids of pieces in a `vocab.json`. Raises `UserError`, naming the first that has none."""
    table = read_json(path)
    for piece, token in table.items():
        if type(token) is not int or not 0 <= token < 2**31:
            raise refused(path, piece, token, "is no token id: fetch it again")
    return table


def broken(file: Path, error: Exception) -> UserError:
    """The error for a file that a library could not read, in one line."""
    return UserError(f"{file} cannot be read as a tokenizer ({' '.join(str(error).split())}): fetch or train it again")
