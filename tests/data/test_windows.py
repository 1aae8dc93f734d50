"""Tokens in a file, windows of them, and tokenizers that lose nothing of a text."""

import numpy as np
import pytest

from jaxdl.data.text import Tokenizer
from jaxdl.data.windows import Windows, tokens_of, write_tokens
from jaxdl.errors import UserError


@pytest.mark.parametrize(("vocab_size", "width"), [(300, 2), (70_000, 4)])
def test_tokens_come_back_from_their_file_text_after_text(tmp_path, vocab_size, width):
    texts = ["ab" * 5, "", "🙂 c"]
    tokenizer = Tokenizer.of_bytes(texts, 300)
    write_tokens(tmp_path / "tokens.npy", tokens_of(texts, tokenizer), vocab_size)
    found = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    assert found.dtype.itemsize == width and isinstance(found, np.memmap)
    parts = np.split(found.astype(int), np.flatnonzero(found == tokenizer.end) + 1)
    assert [tokenizer.decode(part) for part in parts] == [*texts, ""]
    (piece,) = Windows(found, len(found) - 1).non_overlapping()
    assert piece.dtype == np.int32 and not isinstance(piece, np.memmap)
    np.testing.assert_array_equal(np.concatenate(list(tokens_of(texts[:1], tokenizer))), tokenizer.encode(texts)[0])


def test_a_file_that_was_not_finished_is_none(tmp_path):
    def broken():
        yield np.zeros(9, np.int32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "tokens.npy", broken(), 300)
    assert not (tmp_path / "tokens.npy").exists()
    with pytest.raises(UserError, match="no token"):
        write_tokens(tmp_path / "tokens.npy", iter([np.zeros(0, np.int32)]), 300)
    assert not (tmp_path / "tokens.npy").exists()


def test_windows_are_all_pieces_and_those_apart_have_every_target_once():
    windows = Windows(np.arange(11, dtype=np.int32), 3)
    assert len(windows) == 8
    np.testing.assert_array_equal(windows[7].tokens, [7, 8, 9, 10])
    apart = windows.non_overlapping()
    assert [piece.tolist() for piece in apart] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(UserError, match="3 tokens has no piece of 4"):
        Windows(np.arange(3, dtype=np.int32), 3)


TEXTS = ["def f(x):\n\treturn  'ünï' + x\n", "🙂 a"]


@pytest.mark.parametrize(
    "make", [Tokenizer.of_characters, lambda texts: Tokenizer.of_bytes(texts, 300)], ids=["characters", "bytes"]
)
def test_nothing_of_a_text_is_lost_also_after_saving(tmp_path, make):
    made = make(TEXTS)
    made.save(tmp_path)
    for tokenizer in (made, Tokenizer.load(tmp_path)):
        assert [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)] == TEXTS
        assert max(map(max, tokenizer.encode(TEXTS))) < tokenizer.vocab_size
        assert tokenizer.end not in np.concatenate(tokenizer.encode(TEXTS))


def test_a_character_that_was_never_seen_is_the_one_that_cannot_be_shown():
    tokenizer = Tokenizer.of_characters(["ab"])
    assert tokenizer.vocab_size == 5 and tokenizer.decode(tokenizer.encode(["abc"])[0]) == "ab\N{REPLACEMENT CHARACTER}"


def test_bytes_cover_every_text():
    tokenizer = Tokenizer.of_bytes(["abab abab"], 260)
    assert tokenizer.vocab_size == 260 and len(tokenizer.encode(["abab"])[0]) < 4
    assert tokenizer.decode(tokenizer.encode(["日本 \x00"])[0]) == "日本 \x00"
    with pytest.raises(UserError, match="at least 258"):
        Tokenizer.of_bytes(["a"], 257)
