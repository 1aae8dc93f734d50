"""Text without labels, for language models: where it comes from, its tokens in a row, and windows of them."""

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from jaxdl.data.sources import HELD_OUT_NAMES, TFDS, Split, taken_whole
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError, unknown

HELD_OUT = 0.1
"""Share of a text, at its end, that is measured on where the data has no split of its own."""
_ENDINGS = {".txt", ".md", ".rst", ".py", ".tex"}


class Documents(Sequence):
    """`count` texts, of which `read` gives each when it is asked for; none is kept."""

    def __init__(self, read: Callable[[int], str], count: int):
        self._read, self._count = read, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._read(index)


def open_documents(spec: str, split: Split, *, data_dir: str = "") -> Documents:
    """The texts that `spec` names: `builtin:python`, the source of Python's standard library, a module each; `tfds:NAME` with a feature `text`; `folder:PATH`, a file of text or a folder of such files.

    A folder with a sub-folder `train` has its held-out texts beside that, in `val` or `test`; of other folders and of a file the last tenth is held out. Raises `UserError` for anything else, and for data that is missing or empty; a text that is no UTF-8 is refused when it is read.
    """
    kind, _, name = spec.partition(":")
    match kind, name:
        case "builtin", "python":
            return _standard_library(split)
        case "builtin", _:
            raise unknown("built-in text", name, ("python",))
        case "tfds", str(name) if name:
            source = TFDS(name, split, data_dir)
            if len(source) == 0 or "text" not in source[0]:
                raise UserError(f"TFDS {name!r} has no texts (a feature `text`): choose a data set of texts")
            return Documents(lambda index: _decoded(source[index]["text"]), len(source))
        case "folder", str(name) if name:
            return _folder(Path(name).expanduser(), split)
    raise UserError(f"--data {spec!r} is no text: give builtin:python, tfds:NAME or folder:PATH, which may be a file")


def held_out_documents(data: str, eval_data: str = "", *, data_dir: str = "") -> Documents:
    """What is measured on: what `eval_data` names, see `taken_whole`, and where it is empty the held-out part of `data`; both are specs of `open_documents`."""
    folder = taken_whole(eval_data)
    if folder is None:
        return open_documents(eval_data or data, "test", data_dir=data_dir)
    files = _files(folder)
    return Documents(lambda index: _text(files[index]), len(files))


def _standard_library(split: Split) -> Documents:
    """Every tenth module, by name, is held out."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(modules) < 20:
        raise UserError("this Python comes without the source of its standard library: give --data folder:PATH")
    chosen = [path for index, path in enumerate(modules) if (index % 10 == 9) == (split == "test")]
    return Documents(lambda index: _text(chosen[index]), len(chosen))


def _decoded(text: Any) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def _folder(path: Path, split: Split) -> Documents:
    if (path / "train").is_dir():
        names = ("train",) if split == "train" else HELD_OUT_NAMES
        folder = next((path / name for name in names if (path / name).is_dir()), None)
        if folder is None:
            raise UserError(f"there is no held-out text beside {path / 'train'}: put it into {path / 'val'}")
        files = _files(folder)
        return Documents(lambda index: _text(files[index]), len(files))
    files = _files(path)

    def part(index: int) -> str:
        text = _text(files[index])
        cut = round((1 - HELD_OUT) * len(text))
        return text[:cut] if split == "train" else text[cut:]

    return Documents(part, len(files))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}: give folder:PATH with files of text ({', '.join(sorted(_ENDINGS))})")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _ENDINGS and file.is_file())
    if not files:
        raise UserError(f"{path} has no files of text ({', '.join(sorted(_ENDINGS))}): put some in")
    return files


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 (byte {error.start}): convert it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def some_documents(documents: Sequence[str], characters: int) -> list[str]:
    """Texts with so many characters together, or all if there are not so many: drawn once and for all, and in their order. The last that is drawn is cut."""
    drawn: dict[int, str] = {}
    for index in np.random.default_rng(0).permutation(len(documents)).tolist():
        if characters <= 0:
            break
        drawn[index] = documents[index][:characters]
        characters -= len(drawn[index])
    return [drawn[index] for index in sorted(drawn)]


def tokens_of(documents: Sequence[str], tokenizer: Tokenizer) -> Iterator[Int32[np.ndarray, "_"]]:
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


def write_tokens(path: Path, parts: Iterable[Int32[np.ndarray, "_"]], vocabulary: int) -> None:
    """All parts in one file, which `np.load(path, mmap_mode="r")` reads where it is asked to and nowhere else; two bytes a token if the vocabulary allows it.

    A writer that is interrupted leaves nothing at `path`. Raises `UserError` if there is no token.
    """
    dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
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


class Windows:
    """A source of all pieces of `length + 1` tokens of a long text, which may lie in a file: `source[i]["tokens"]` are those from token `i` on.

    Inputs are all of a piece but the last, targets all but the first. Raises `UserError` if the text is shorter than a piece.
    """

    classes = ()

    def __init__(self, tokens: Integer[np.ndarray, "T"], length: int):
        if len(tokens) <= length:
            raise UserError(f"a text of {len(tokens)} tokens has no piece of {length + 1}: give more text, or a shorter --length")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) - self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self._piece(index)}

    def apart(self) -> list[Int32[np.ndarray, "L"]]:
        """Pieces that share nothing but their ends: each token but the first of all is a target once; what is left at the end is not used."""
        return [self._piece(start) for start in range(0, len(self), self.length)]

    def _piece(self, start: int) -> Int32[np.ndarray, "L"]:
        return np.asarray(self.tokens[start : start + self.length + 1], np.int32)
