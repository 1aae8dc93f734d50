"""Text for language models."""

import numpy as np
import pytest

from jaxdl.data.documents import Windows, held_out_documents, open_documents, some_documents, tokens_of, write_tokens
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError


def test_the_standard_library_is_split_by_modules():
    train, test = (open_documents("builtin:python", split) for split in ("train", "test"))
    assert len(train) > 8 * len(test) > 40
    assert not set(train) & set(test)
    assert any("class OrderedDict" in text or "import argparse" in text for text in train)


def test_the_last_tenth_of_a_file_is_held_out(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(chr(ord("a") + i % 26) for i in range(1000)))
    for place in (file, tmp_path):
        train, test = (open_documents(f"folder:{place}", split) for split in ("train", "test"))
        assert (len(train[0]), len(test[0])) == (900, 100) and train[0] + test[0] == file.read_text()


def test_a_folder_may_have_a_split_of_its_own(tmp_path):
    for name, text in (("train/one.txt", "abc"), ("train/deep/two.md", "def"), ("val/three.txt", "ghi")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(open_documents(f"folder:{tmp_path}", "train")) == ["abc", "def"]
    assert list(open_documents(f"folder:{tmp_path}", "test")) == ["ghi"]


def test_a_text_to_measure_on_is_read_whole_where_it_is_named(tmp_path):
    for name in ("train/one.txt", "val/two.txt", "book.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name:0>20}")
    for data, eval_data, texts in (
        ("builtin:python", "folder:{}/book.txt", ["000000000000book.txt"]),
        ("builtin:python", "folder:{}/val", ["000000000val/two.txt"]),
        ("builtin:python", "folder:{}", ["000000000val/two.txt"]),
        ("folder:{}/book.txt", "", ["xt"]),
    ):
        assert list(held_out_documents(data.format(tmp_path), eval_data.format(tmp_path))) == texts


def test_a_text_is_read_when_it_is_asked_for_and_not_before(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("0123456789")
    texts = open_documents(f"folder:{tmp_path}", "train")
    (tmp_path / "1.txt").write_text("abcdefghij")
    (tmp_path / "2.txt").write_bytes(b"\xff")
    assert (texts[0], texts[1], len(texts)) == ("012345678", "abcdefghi", 3)
    with pytest.raises(UserError, match=r"2\.txt is no text in UTF-8"):
        list(texts)


def test_some_of_many_texts_are_the_same_ones_each_time_and_in_their_order():
    texts = [f"{index:03}" for index in range(100)]
    chosen = some_documents(texts, 30)
    assert len(chosen) == 10 and chosen == sorted(chosen) == some_documents(texts, 30) and chosen[-1] > "050"
    assert sorted(map(len, some_documents(texts, 31))) == [1] + 10 * [3]
    assert some_documents(texts, 300) == some_documents(texts, 1000) == texts


@pytest.mark.parametrize(("vocabulary", "width"), [(300, 2), (70_000, 4)])
def test_tokens_come_back_from_their_file_text_after_text(tmp_path, vocabulary, width):
    texts = ["ab" * 5, "", "🙂 c"]
    tokenizer = Tokenizer.of_bytes(texts, 300)
    write_tokens(tmp_path / "tokens.npy", tokens_of(texts, tokenizer), vocabulary)
    found = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    assert found.dtype.itemsize == width and isinstance(found, np.memmap)
    parts = np.split(found.astype(int), np.flatnonzero(found == tokenizer.end) + 1)
    assert [tokenizer.decode(part) for part in parts] == [*texts, ""]
    (piece,) = Windows(found, len(found) - 1).apart()
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


def test_tiny_shakespeare_is_that_of_tfds(shared):
    train, held_out = (open_documents("tfds:tiny_shakespeare", split, data_dir=f"{shared}/tfds") for split in ("train", "test"))
    assert len(train[0]) == 1_003_854 and train[0].startswith("First Citizen:\nBefore we proceed")
    assert len(held_out[0]) == 55_770


def latin(path) -> str:
    path.write_bytes("café".encode("latin-1"))
    return f"folder:{path}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "builtin:pyton", "did you mean 'python'"),
        (lambda folder: "text:x", "is no text"),
        (lambda folder: f"folder:{folder}/nowhere", "there is no file or folder"),
        (lambda folder: f"folder:{folder}", "has no files of text"),
        (lambda folder: latin(folder / "x.txt"), "no text in UTF-8"),
        (lambda folder: f"folder:{(folder / 'train').mkdir() or folder}", "no held-out text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        list(open_documents(make(tmp_path), "test"))


def test_windows_are_all_pieces_and_those_apart_have_every_target_once():
    windows = Windows(np.arange(11, dtype=np.int32), 3)
    assert len(windows) == 8
    np.testing.assert_array_equal(windows[7]["tokens"], [7, 8, 9, 10])
    apart = windows.apart()
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
        assert max(map(max, tokenizer.encode(TEXTS))) < tokenizer.vocabulary
        assert tokenizer.end not in np.concatenate(tokenizer.encode(TEXTS))


def test_a_character_that_was_never_seen_is_the_one_that_cannot_be_shown():
    tokenizer = Tokenizer.of_characters(["ab"])
    assert tokenizer.vocabulary == 5 and tokenizer.decode(tokenizer.encode(["abc"])[0]) == "ab\N{REPLACEMENT CHARACTER}"


def test_bytes_cover_every_text():
    tokenizer = Tokenizer.of_bytes(["abab abab"], 260)
    assert tokenizer.vocabulary == 260 and len(tokenizer.encode(["abab"])[0]) < 4
    assert tokenizer.decode(tokenizer.encode(["日本 \x00"])[0]) == "日本 \x00"
    with pytest.raises(UserError, match="at least 258"):
        Tokenizer.of_bytes(["a"], 257)
