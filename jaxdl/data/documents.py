"""Text documents, for language models: files, and what TFDS has."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.data import code
from jaxdl.data.digests import digest_of_files
from jaxdl.data.folders import list_files, told
from jaxdl.data.sources import Info, Mapped, Source, Split
from jaxdl.data.text_files import read_text
from jaxdl.data.tfds import Record, text_of
from jaxdl.errors import UserError

HELD_OUT = 0.1
"""Share of each text, at its end, that is measured on where a folder has no part for that."""
_ENDINGS = (".md", ".py", ".rst", ".tex", ".txt")
FOLDER_WORDS = f"files of text ({', '.join(_ENDINGS)}), or naming one"


class Files(Source[str]):
    """Files of text, of which each is read when it is asked for (`read_text`); none is kept.

    Reading raises `UserError` for a file that is no text.
    """

    def __init__(self, folder: Path, files: Sequence[Path], remarks: str = ""):
        self.files, self.info = files, Info(digest=digest_of_files(folder, files), remarks=remarks)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> str:
        return read_text(self.files[index])


def read_documents(path: Path) -> Files:
    """A file of text, or all that are in a folder and below it, by their paths."""
    if path.is_file():
        return Files(path.parent, [path])
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}: give folder:PATH with {FOLDER_WORDS}")
    listing = list_files(path, _ENDINGS)
    if not listing.files:
        raise UserError(f"{path} has no files of text ({', '.join(_ENDINGS)}): put some in")
    return Files(path, listing.files, told(listing.left_out))


def cut_documents(source: Source[str], split: Split) -> Source[str]:
    """The first nine tenths of each text to train on, the last tenth to test."""

    def part(text: str) -> str:
        cut = round((1 - HELD_OUT) * len(text))
        return text[:cut] if split == "train" else text[cut:]

    return Mapped(source, part)


def modules(split: Split) -> Files:
    """The top-level modules of Python's standard library; see `code.modules`."""
    return Files(code.library(), code.modules(split))


def text_records(features: Mapping[str, Any]) -> Callable[[Record], str] | None:
    """How TFDS' records with a text become documents; None where they have none."""
    return (lambda record: text_of(record["text"])) if "text" in features else None


def sample_documents(documents: Source[str] | Sequence[str], characters: int) -> list[str]:
    """Texts with so many characters together, or all if there are not so many: drawn once and for all, and in their order. The last that is drawn is cut."""
    drawn: dict[int, str] = {}
    for index in np.random.default_rng(0).permutation(len(documents)).tolist():
        if characters <= 0:
            break
        drawn[index] = documents[index][:characters]
        characters -= len(drawn[index])
    return [drawn[index] for index in sorted(drawn)]
