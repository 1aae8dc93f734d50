"""Pairs of sentences, and the rows that they are packed into."""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data import parallel
from jaxdl.data.parallel import Packed, buckets, open_pairs, pack
from jaxdl.errors import UserError


@pytest.fixture(scope="module")
def cldr():
    return tuple(open_pairs("builtin:cldr", split, "en", "de") for split in ("train", "test"))


def test_cldr_speaks_both_languages_and_holds_out_what_is_not_trained_on(cldr):
    train, test = cldr
    assert len(train) > 16_000 and len(test) > 900
    known = dict(train.pairs)
    assert known["Germany"] == "Deutschland"
    assert set(train.kinds) == set(test.kinds) == {"name", "phrase"}
    assert not set(train.sources) & set(test.sources)
    held_out = {source for (source, _), kind in zip(test.pairs, test.kinds) if kind == "name"}
    assert 100 < len(held_out) < 200
    lists = [source for source in test.sources + train.sources if " or " in source]
    names = [name.strip() for source in lists for name in source.replace(" or ", ",").split(",")]
    assert len(lists) > 500 and not held_out & set(names)
    assert open_pairs("builtin:cldr", "test", "en", "de").pairs == test.pairs


def test_cldr_speaks_other_languages_too():
    french = open_pairs("builtin:cldr", "test", "de", "fr")
    assert any(source.startswith("vor ") and target.startswith("il y a ") for source, target in french.pairs)
    with pytest.raises(UserError, match="CLDR does not know the language"):
        open_pairs("builtin:cldr", "test", "en", "xx")


def write(folder, name, *lines, packed=False):
    content = "".join(f"{line}\n" for line in lines).encode()
    (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


def test_a_folder_is_read_plain_or_compressed_line_by_line(tmp_path):
    write(tmp_path, "train.en", "one", "", "two\u2028lines", " three ", packed=True)
    write(tmp_path, "train.de", "eins", "leer", "zwei", "drei")
    write(tmp_path, "val.en", "four")
    write(tmp_path, "val.de", "vier", packed=True)
    write(tmp_path, "extra.de", "fünf")
    write(tmp_path, "extra.en", "five")
    spec = f"folder:{tmp_path}"
    assert open_pairs(spec, "train", "en", "de").pairs == [("one", "eins"), ("two\u2028lines", "zwei"), ("three", "drei")]
    assert open_pairs(spec, "test", "de", "en")[0] == {"source": "vier", "target": "four", "kind": ""}
    assert open_pairs(f"{spec}/extra", "test", "en", "de").pairs == [("five", "fünf")]
    assert open_pairs(f"{spec}/train", "test", "en", "de").pairs == open_pairs(spec, "test", "en", "de").pairs
    for data in (spec, f"{spec}/train"):
        assert open_pairs(data, "test", "en", "de", part="extra").pairs == [("five", "fünf")]


def test_multi30k_has_the_pairs_that_are_published(shared):
    """Elliott et al. 2016: 29,000 to train, 1,014 to validate, 1,000 to test."""
    folder = f"folder:{shared}/data/multi30k"
    counts = [len(open_pairs(spec, split, "en", "de")) for spec, split in ((folder, "train"), (folder, "test"))]
    assert [*counts, len(open_pairs(f"{folder}/test_2016_flickr", "test", "en", "de"))] == [29_000, 1_014, 1_000]


def test_prepared_sets_are_read_by_language(monkeypatch):
    class Prepared:
        def __init__(self, name, split, data_dir, part):
            self.rows = [{"en": b"two", "de": "zwei"} if part == "newstest" else {"en": b"one", "de": "eins"}]

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index]

    monkeypatch.setattr(parallel, "TFDS", Prepared)
    assert open_pairs("tfds:wmt/de-en", "train", "de", "en").pairs == [("eins", "one")]
    assert open_pairs("tfds:wmt/de-en", "test", "de", "en", part="newstest").pairs == [("zwei", "two")]
    with pytest.raises(UserError, match="has en, de"):
        open_pairs("tfds:wmt/de-en", "train", "de", "fr")


def test_what_is_missing_or_wrong_is_refused_by_name(tmp_path):
    def refused(spec, message, split="train", languages=("en", "de")):
        with pytest.raises(UserError, match=message):
            open_pairs(spec, split, *languages)

    spec = f"folder:{tmp_path}"
    refused("builtin:cldrs", "did you mean 'cldr'")
    refused("cldr", "is no set of sentences")
    refused(spec, "has no files train.en and train.de")
    refused("builtin:cldr", "nothing to translate", languages=("en", "en"))
    refused(f"{spec}/nothing", "there is no file .*nothing.en")
    write(tmp_path, "train.en", "one", "two")
    write(tmp_path, "train.de", "eins")
    refused(spec, "2 lines and .*train.de 1: each line must have its translation")
    refused(spec, "has no files val.en", split="test")
    write(tmp_path, "train.de", "", "")
    refused(spec, "have no sentences")
    (tmp_path / "train.de").write_bytes(b"\xff\xfe")
    refused(spec, r"no text in UTF-8 \(byte 0\)")
    (tmp_path / "train.de").unlink()
    packed = gzip.compress(b"eins\nzwei\n" * 100)
    for broken in (b"no gzip", packed[:20], packed[:12] + b"\xff" * 9 + packed[21:]):
        (tmp_path / "train.de.gz").write_bytes(broken)
        refused(spec, r"train\.de\.gz cannot be read .*: fetch it again")


sizes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes)
def test_every_pair_that_fits_is_in_one_row_and_no_row_is_too_long(sizes):
    rows = pack(np.array(sizes, np.int32).reshape(-1, 2), 10)
    packed = sorted(index for row in rows for index in row)
    assert packed == [index for index, size in enumerate(sizes) if max(size) <= 10]
    for row in rows:
        assert row and (np.array([sizes[index] for index in row]).sum(0) <= 10).all()


def test_packing_leaves_little_padding():
    lengths = np.random.default_rng(0).integers(4, 25, (3000, 2)).astype(np.int32)
    assert lengths.sum() / (2 * 64 * len(pack(lengths, 64))) > 0.88
    alike = np.repeat(lengths[:, :1], 2, axis=1)
    assert alike.sum() / (2 * 64 * len(pack(alike, 64))) > 0.97


def test_a_row_holds_its_pairs_one_after_the_other():
    pairs = [(np.array([5, 6]), np.array([7])), (np.array([8]), np.array([9, 10, 11])), (np.arange(9), np.arange(9))]
    packed = Packed(pairs, 8, start=1, end=2, pad=0)
    assert (len(packed), packed.dropped, packed.filled, packed.target_tokens) == (1, 1, 11 / 16, 6)
    (order,) = packed.rows
    row = {name: array.tolist() for name, array in packed[0].items()}
    parts = {
        0: dict(source=[5, 6, 2], target=[1, 7], labels=[7, 2]),
        1: dict(source=[8, 2], target=[1, 9, 10, 11], labels=[9, 10, 11, 2]),
    }
    for name in ("source", "target", "labels"):
        joined = parts[order[0]][name] + parts[order[1]][name]
        assert row[name] == joined + [0] * (8 - len(joined))
        if name != "labels":
            numbers = [1] * len(parts[order[0]][name]) + [2] * len(parts[order[1]][name])
            assert row[f"{name}_segments"] == numbers + [0] * (8 - len(joined))
    with pytest.raises(UserError, match="none of 3 pairs has at most 1 tokens"):
        Packed(pairs, 1, start=1, end=2, pad=0)


def test_buckets_are_few_and_each_sentence_is_in_the_shortest_that_holds_it():
    found = buckets([1, 16, 17, 40, 33, 100, 3])
    assert found == {16: [0, 6, 1], 32: [2], 64: [4, 3], 128: [5]}
