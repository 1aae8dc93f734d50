"""What runs keep of their data beside the checkpoints: the same care for every kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxdl.data.names import Alphabet
from jaxdl.data.text import Tokenizer
from jaxdl.data.windows import write_tokens
from jaxdl.errors import UserError
from jaxdl.files import replace_text, written_whole
from jaxdl.tasks.kept import kept, kept_tokenizer, kept_tokens

TEXTS = ["abc", "bcd"]


def alphabet(directory: Path) -> Alphabet:
    save = lambda folder: Alphabet.of(TEXTS).save(folder / "alphabet.json")
    return kept(directory, "alphabet.json", save, lambda: Alphabet.load(directory / "alphabet.json"))


KINDS: dict[str, Callable[[Path], Any]] = {
    "alphabet.json": alphabet,
    "tokenizer.json": lambda directory: kept_tokenizer(directory, lambda: Tokenizer.of_characters(TEXTS)),
    "tokenizer_config.json": lambda directory: kept_tokenizer(directory, lambda: Tokenizer.of_bytes(TEXTS, 300)),
}
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "no text": lambda content: b"\xff\xfe" + content,
    "another form": lambda content: b'{"characters": 3, "model": [], "version": {}',
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", KINDS)
def test_what_is_damaged_is_named_and_what_to_do(tmp_path, name, damage):
    KINDS[name](tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(damage(whole))
    with pytest.raises(UserError) as refused:
        KINDS[name](tmp_path)
    said = str(refused.value)
    assert (
        f"{tmp_path / name} is damaged" in said
        and "restore it from a copy, or start anew with --overwrite" in said
        and "\n" not in said
    )
    (tmp_path / name).write_bytes(whole)
    KINDS[name](tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_what_a_run_has_learned_with_is_not_made_of_other_data_when_it_is_gone(tmp_path, name):
    KINDS[name](tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    KINDS[name](tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="restore it from a copy, or start anew with --overwrite"):
        KINDS[name](tmp_path)
    assert not (tmp_path / name).exists()


def tokens(path: Path) -> bytes:
    write_tokens(path, [np.arange(50, dtype=np.int32)], 60)
    return path.read_bytes()


def saved(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=True)


TOKENS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in its head": lambda path: path.write_bytes(tokens(path)[:20]),
    "cut": lambda path: path.write_bytes(tokens(path)[:-1]),
    "zeros": lambda path: path.write_bytes(bytes(500)),
    "text": lambda path: path.write_text("tokens"),
    "objects": lambda path: saved(path, np.array([{}], object)),
    "rows": lambda path: saved(path, np.zeros((4, 5), np.uint16)),
    "numbers": lambda path: saved(path, np.zeros(40, np.float32)),
    "another vocabulary": lambda path: saved(path, np.arange(30, 70, dtype=np.uint16)),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("damage", TOKENS)
def test_damaged_tokens_are_named_and_what_to_do(tmp_path, damage):
    TOKENS[damage](file := tmp_path / "tokens.npy")
    with pytest.raises(UserError) as refused:
        kept_tokens(file, 60)
    assert (
        str(file) in (said := str(refused.value)) and "remove it to have it made of the data again" in said and "\n" not in said
    )


def test_whole_tokens_are_read(tmp_path):
    tokens(tmp_path / "tokens.npy")
    assert kept_tokens(tmp_path / "tokens.npy", 50).tolist() == list(range(50))


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "sample.txt"
    replace_text(path, "before \N{LATIN SMALL LETTER U WITH DIAERESIS}")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr("os.fsync", full)
        replace_text(path, "after")
    assert path.read_text(encoding="utf-8") == "before ü" and [entry.name for entry in tmp_path.iterdir()] == ["sample.txt"]
    with monkeypatch.context() as patched, pytest.raises(UserError, match="make room"), written_whole(tmp_path, "last") as folder:
        patched.setattr("os.fsync", full)
        (folder / "last").write_text(json.dumps({}))
    assert [entry.name for entry in tmp_path.iterdir()] == ["sample.txt"]
    replace_text(path, "half of a pair: \udce4")  # As a model of bytes may write.
    assert path.read_text(encoding="utf-8") == "half of a pair: ?"
