"""Text documents."""

import pytest

from jaxdl.data import DOCUMENTS
from jaxdl.data.documents import sample_documents
from jaxdl.errors import UserError


def test_the_standard_library_is_split_by_modules():
    train, test = DOCUMENTS.open("builtin:modules")
    assert len(train) > 8 * len(test) > 40
    assert not set(train) & set(test)
    assert any("class OrderedDict" in text or "import argparse" in text for text in train)


def test_the_last_tenth_of_a_file_is_held_out(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(chr(ord("a") + i % 26) for i in range(1000)))
    for place in (file, tmp_path):
        train, test = DOCUMENTS.open(f"folder:{place}")
        assert (len(train[0]), len(test[0])) == (900, 100) and train[0] + test[0] == file.read_text()


def test_all_files_of_text_below_a_folder_are_read(tmp_path):
    for name, text in (("train/one.txt", "abc"), ("train/deep/two.md", "def"), ("train/no.png", "x"), ("val/three.txt", "ghi")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    train, held_out = DOCUMENTS.open(f"folder:{tmp_path}")
    assert (sorted(train), list(held_out)) == (["abc", "def"], ["ghi"])
    _, book = DOCUMENTS.open("builtin:modules", f"folder:{tmp_path}/train/one.txt")
    assert list(book) == ["abc"]


def test_a_text_is_read_when_it_is_asked_for_and_not_before(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("0123456789")
    texts, _ = DOCUMENTS.open(f"folder:{tmp_path}")
    (tmp_path / "1.txt").write_text("abcdefghij")
    (tmp_path / "2.txt").write_bytes(b"\xff")
    assert (texts[0], texts[1], len(texts)) == ("012345678", "abcdefghi", 3)
    with pytest.raises(UserError, match=r"2\.txt is no text in UTF-8"):
        list(texts)


def test_some_of_many_texts_are_the_same_ones_each_time_and_in_their_order():
    texts = [f"{index:03}" for index in range(100)]
    chosen = sample_documents(texts, 30)
    assert len(chosen) == 10 and chosen == sorted(chosen) == sample_documents(texts, 30) and chosen[-1] > "050"
    assert sorted(map(len, sample_documents(texts, 31))) == [1] + 10 * [3]
    assert sample_documents(texts, 300) == sample_documents(texts, 1000) == texts


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no files of text"):
        DOCUMENTS.open(f"folder:{tmp_path}")
    (tmp_path / "x.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="no text in UTF-8"):
        list(DOCUMENTS.open(f"folder:{tmp_path}")[0])
