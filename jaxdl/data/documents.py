"""Text without labels, for language models: where it comes from, and windows of its tokens."""

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxdl.data.sources import HELD_OUT_NAMES, TFDS, Split
from jaxdl.errors import UserError, unknown

HELD_OUT = 0.1
"""Share of a text, at its end, that is measured on where the data has no split of its own."""
_ENDINGS = {".txt", ".md", ".rst", ".py", ".tex"}


def open_documents(spec: str, split: Split, *, data_dir: str = "") -> list[str]:
    """The texts that `spec` names: `builtin:python`, the source of Python's standard library, a module each; `tfds:NAME` with a feature `text`; `folder:PATH`, a file of text or a folder of such files.

    A folder with a sub-folder `train` has its held-out texts beside that, in `val` or `test`; of other folders and of a file the last tenth is held out. Raises `UserError` for anything else, and for data that is missing, empty or no UTF-8.
    """
    kind, _, name = spec.partition(":")
    match kind, name:
        case "builtin", "python":
            return _standard_library(split)
        case "builtin", _:
            raise unknown("built-in text", name, ("python",))
        case "tfds", str(name) if name:
            source = TFDS(name, split, data_dir)
            examples = [source[index] for index in range(len(source))]
            if not examples or "text" not in examples[0]:
                raise UserError(f"TFDS {name!r} has no texts (a feature `text`): choose a data set of texts")
            return [text.decode() if isinstance(text, bytes) else str(text) for text in (each["text"] for each in examples)]
        case "folder", str(name) if name:
            return _read(Path(name).expanduser(), split)
    raise UserError(f"--data {spec!r} is no text: give builtin:python, tfds:NAME or folder:PATH, which may be a file")


def _standard_library(split: Split) -> list[str]:
    """Every tenth module, by name, is held out."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(modules) < 20:
        raise UserError("this Python comes without the source of its standard library: give --data folder:PATH")
    return [_text(path) for index, path in enumerate(modules) if (index % 10 == 9) == (split == "test")]


def _read(path: Path, split: Split) -> list[str]:
    if (path / "train").is_dir():
        names = ("train",) if split == "train" else HELD_OUT_NAMES
        folder = next((path / name for name in names if (path / name).is_dir()), None)
        if folder is None:
            raise UserError(f"there is no held-out text beside {path / 'train'}: put it into {path / 'val'}")
        return _texts(folder)
    texts = _texts(path)
    cuts = [round((1 - HELD_OUT) * len(text)) for text in texts]
    return [text[:cut] if split == "train" else text[cut:] for text, cut in zip(texts, cuts)]


def _texts(path: Path) -> list[str]:
    if path.is_file():
        return [_text(path)]
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}: give folder:PATH with files of text ({', '.join(sorted(_ENDINGS))})")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _ENDINGS and file.is_file())
    if not files:
        raise UserError(f"{path} has no files of text ({', '.join(sorted(_ENDINGS))}): put some in")
    return [_text(file) for file in files]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (byte {error.start}): convert it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


class Windows:
    """A source of all pieces of `length + 1` tokens of a long text: `source[i]["tokens"]` are those from token `i` on.

    Inputs are all of a piece but the last, targets all but the first. Raises `UserError` if the text is shorter than a piece.
    """

    classes = ()

    def __init__(self, tokens: Int32[np.ndarray, "T"], length: int):
        if len(tokens) <= length:
            raise UserError(f"a text of {len(tokens)} tokens has no piece of {length + 1}: give more text, or a shorter --length")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) - self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.tokens[index : index + self.length + 1]}

    def apart(self) -> list[Int32[np.ndarray, "L"]]:
        """Pieces that share nothing but their ends: each token but the first of all is a target once; what is left at the end is not used."""
        return [self.tokens[start : start + self.length + 1] for start in range(0, len(self), self.length)]
