"""Names: one spelling, one side of the split, one language where it is told; symbols there and back; lists that cannot be read."""

import unicodedata

import numpy as np
import pytest
from babel import Locale
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data import NAMES, LabelledText
from jaxdl.data.names import CLDR_LANGUAGES, Alphabet, Names, cldr_names, normalise
from jaxdl.errors import UserError


@pytest.fixture(scope="module")
def cldr():
    return NAMES.open("builtin:names")


def write(folder, **lists):
    folder.mkdir(parents=True, exist_ok=True)
    for language, names in lists.items():
        (folder / f"{language}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return f"folder:{folder}"


def test_no_name_of_cldr_is_on_both_sides_or_in_two_languages(cldr):
    train, test = cldr
    names = train.names + test.names
    assert len(set(names)) == len(names) and len(test) == round(0.2 * len(names))
    assert train.info.classes == test.info.classes == tuple(sorted(Locale("en").languages[code] for code in CLDR_LANGUAGES))
    for source in cldr:
        assert set(source.labels.tolist()) == set(range(18))
        assert all(name == unicodedata.normalize("NFC", name) and not set(name) & set("0123456789()") for name in source.names)


def test_cldr_names_are_what_a_locale_says_and_no_other_of_them_does():
    names = dict(cldr_names())
    assert names["Deutschland"] == "German" and names["Niemcy"] == "Polish" and names["Duitsland"] == "Dutch"
    assert names["polski"] == "Polish" and names["Polish"] == "English"
    assert "Iran" not in names and "Iran" in Locale("fr").territories.values()
    assert dict(cldr_names(["fr"]))["Iran"] == "French"


def test_most_names_are_short_enough_and_no_language_prevails(cldr):
    train, test = cldr
    assert len(train) > 8000 and np.mean([len(name) <= 24 for name in train.names]) > 0.9
    assert np.bincount(train.labels).max() / len(train) < 0.1 and len(test) > 2000


def test_a_name_in_two_lists_keeps_both_languages_and_one_side(tmp_path):
    names = [f"Name{index}" for index in range(50)]
    spec = write(tmp_path, Danish=names, Swedish=[*names, "Ek", "Ek"])
    train, test = NAMES.open(spec)
    assert (len(train), len(test)) == (101 - len(test), len(test)) and not set(train.names) & set(test.names)
    assert train.info.classes == ("Danish", "Swedish")
    for source in (train, test):
        assert all(
            sorted(label for n, label in zip(source.names, source.labels) if n == name) == [0, 1]
            for name in source.names
            if name != "Ek"
        )


def test_the_split_is_always_the_same_and_does_not_know_the_order():
    entries = [(f"n{index}", "ab"[index % 2]) for index in range(40)]
    test = Names(entries).part("test")
    assert test.names == Names(entries[::-1] * 2).part("test").names and len(test) == 8
    assert test[0] == LabelledText(test.names[0], int(test.labels[0]))


def test_spellings_that_look_alike_are_one():
    assert normalise("Åland") == normalise("  A\u030aland ") == "Åland" and normalise("a \t b") == "a b"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.text("abcdé ñ", min_size=1), min_size=1), st.integers(1, 12))
def test_symbols_go_back_to_what_was_read_of_a_name(names, length):
    alphabet = Alphabet.of(names)
    rows = alphabet(names, length)
    assert rows.shape == (len(names), length) and rows.min(initial=2) >= 0 and rows.max() < len(alphabet)
    assert [alphabet.decode(row) for row in rows] == [name[:length] for name in names]


def test_a_character_that_is_not_known_is_one_symbol():
    alphabet = Alphabet.of(["ab"])
    np.testing.assert_array_equal(alphabet(["bжa"], 5), [[3, Alphabet.UNKNOWN, 2, 0, 0]])
    assert alphabet.decode(np.asarray([3, 1, 2, 0, 2])) == "b�a"


def test_an_alphabet_is_kept_in_a_file(tmp_path):
    Alphabet("aß\u0301").save(tmp_path / "alphabet.json")
    assert Alphabet.load(tmp_path / "alphabet.json").characters == "aß\u0301"
    (tmp_path / "alphabet.json").write_text("[]")
    with pytest.raises(UserError, match=r"alphabet\.json is no alphabet"):
        Alphabet.load(tmp_path / "alphabet.json")


def test_lists_that_cannot_be_read_are_named(tmp_path):
    spec = write(tmp_path, Irish=["Ó Briain"])
    with pytest.raises(UserError, match="has 1 file of names"):
        NAMES.open(spec)
    (tmp_path / "Greek.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=r"Greek\.txt has no names"):
        NAMES.open(spec)
    (tmp_path / "Greek.txt").write_bytes("Abc\nPérez\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"Greek\.txt is no text in UTF-8 \(byte 5\) in line 2"):
        NAMES.open(spec)


def test_the_classic_surnames_lose_their_repetitions(shared):
    train, test = NAMES.open(f"folder:{shared / 'data' / 'names'}")
    assert len(train) + len(test) == 18_012 and len(train.info.classes) == 18
    assert not set(train.names) & set(test.names)
    assert train.info.classes[np.bincount(test.labels).argmax()] == "Russian"
