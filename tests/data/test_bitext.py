"""Sentences in two languages, from CLDR and from files."""

import gzip

import pytest

from jaxdl.data import PARALLEL_TEXT, Translation
from jaxdl.data.bitext import read_pairs
from jaxdl.errors import UserError


@pytest.fixture(scope="module")
def cldr():
    return PARALLEL_TEXT.open("builtin:cldr")


def test_cldr_speaks_both_languages_and_holds_out_what_is_not_trained_on(cldr):
    train, test = cldr
    assert len(train) > 16_000 and len(test) > 900
    assert {pair.source: pair.target for pair in train}["Germany"] == "Deutschland"
    assert {pair.category for pair in train} == {pair.category for pair in test} == {"name", "phrase"}
    sources = [{pair.source for pair in part} for part in cldr]
    assert not sources[0] & sources[1]
    held_out = {pair.source for pair in test if pair.category == "name"}
    assert 100 < len(held_out) < 200
    lists = [pair.source for part in cldr for pair in part if " or " in pair.source]
    names = [name.strip() for source in lists for name in source.replace(" or ", ",").split(",")]
    assert len(lists) > 500 and not held_out & set(names)
    assert list(PARALLEL_TEXT.open_part("builtin:cldr", "test")) == list(test)


def test_cldr_speaks_other_languages_too():
    french = PARALLEL_TEXT.open_part("builtin:cldr", "test", source="de", target="fr")
    assert any(pair.source.startswith("vor ") and pair.target.startswith("il y a ") for pair in french)
    with pytest.raises(UserError, match="CLDR does not know the language"):
        PARALLEL_TEXT.open("builtin:cldr", source="en", target="xx")


def write(folder, name, *lines, packed=False):
    content = "".join(f"{line}\n" for line in lines).encode()
    (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


def test_files_are_read_plain_or_compressed_line_by_line(tmp_path):
    write(tmp_path, "train.en", "one", "", "two\u2028lines", " three ", packed=True)
    write(tmp_path, "train.de", "eins", "leer", "zwei", "drei")
    pairs = read_pairs(tmp_path / "train", source="en", target="de")
    assert list(pairs) == [Translation("one", "eins"), Translation("two\u2028lines", "zwei"), Translation("three", "drei")]
    assert (pairs.info.left_out, pairs.info.reason) == (1, "have an empty side")
    assert next(iter(read_pairs(tmp_path / "train", source="de", target="en"))) == Translation("eins", "one")


def test_what_is_missing_or_wrong_is_refused_by_name(tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            PARALLEL_TEXT.open(f"folder:{tmp_path}")

    refused(r"there is no file .*train\.en or .*train\.en\.gz: give folder:PATH with files train\.en and train\.de")
    write(tmp_path, "train.en", "one", "two")
    write(tmp_path, "train.de", "eins")
    refused("2 lines and .*train.de 1: each line must have its translation")
    write(tmp_path, "train.de", "", "")
    refused("have no sentences")
    (tmp_path / "train.de").write_bytes(b"\xff\xfa")
    refused(r"no text in UTF-8 \(byte 0\)")
    (tmp_path / "train.de").unlink()
    packed = gzip.compress(b"eins\nzwei\n" * 100)
    for broken in (b"no gzip", packed[:20], packed[:12] + b"\xff" * 9 + packed[21:]):
        (tmp_path / "train.de.gz").write_bytes(broken)
        refused(r"train\.de\.gz cannot be read .*: fetch it again")
