"""Texts become rows of ids and come back. What transformers makes of the same files is compared in tests/parity."""

import hashlib
import io
import json
import pickle
import subprocess
import sys

import chex
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdl.data.scenes import captions, scene
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError

TEXTS = [caption for index in range(100) for caption in captions(scene(0, index))]
WORDS = sorted({word for text in TEXTS for word in text.replace(",", "").split()})
trained = Tokenizer.train(TEXTS, vocab_size=200)
quick = settings(max_examples=100, deadline=None, derandomize=True)
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@quick
@given(st.lists(anything | st.lists(st.sampled_from(WORDS)).map(" ".join), max_size=5), st.integers(1, 30))
def test_every_row_ends_once_and_is_then_padded(texts, length):
    rows = trained(texts, length)
    chex.assert_shape(rows, (len(texts), length))
    assert rows.dtype == np.int32
    for row in rows:
        end = row.tolist().index(trained.end)
        assert (row[end + 1 :] == trained.pad).all() and not np.isin(row[:end], [trained.pad, trained.end]).any()
        assert row.min() >= 0 and row.max() < trained.vocab_size


@quick
@given(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join))
def test_known_words_come_back(text):
    assert trained.decode(trained([text.upper()], 100)[0]) == text


@quick
@given(st.lists(anything, min_size=2, max_size=5))
def test_a_text_has_the_same_ids_alone_and_in_company(texts):
    chex.assert_trees_all_equal(trained(texts, 20), np.concatenate([trained([text], 20) for text in texts]))


def test_a_long_text_is_cut_and_still_ends():
    row, whole = trained([TEXTS[0]], 4)[0], trained([TEXTS[0]], 50)[0]
    assert row.tolist() == [*whole[:3], trained.end]
    assert trained([TEXTS[0]], 1).tolist() == [[trained.end]]


def test_case_width_and_spaces_do_not_matter():
    rows = trained(["a red circle", "  A  Red\tcircle\n", "ａ ｒｅｄ circle"], 16)
    assert (rows == rows[0]).all()


def test_a_frequent_word_is_one_token():
    for word in ("circle", "red", "small", "left"):
        assert np.flatnonzero(trained([word], 8)[0] == trained.end)[0] == 1


def test_a_character_never_seen_is_unknown_not_lost():
    assert trained(["漢"], 4)[0, 0] not in (trained.pad, trained.end)


def test_the_same_texts_give_the_same_bytes(tmp_path):
    trained.save(tmp_path / "here")
    Tokenizer.train(iter(TEXTS), vocab_size=200).save(tmp_path / "again")
    program = (
        "import sys; from jaxdl.data.text import Tokenizer\n"
        "Tokenizer.train(sys.stdin.read().splitlines(), vocab_size=200).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "elsewhere"], input="\n".join(TEXTS), text=True, check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        digests = {hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.glob(f"*/{name}")}
        assert len(digests) == 1 and len(list(tmp_path.glob(f"*/{name}"))) == 3


@pytest.mark.parametrize("vocab_size", [8, 20, 60, 10_000])
def test_a_vocabulary_is_never_larger_than_asked_for(vocab_size):
    assert Tokenizer.train(TEXTS, vocab_size=vocab_size).vocab_size <= vocab_size


def test_a_saved_tokenizer_is_the_same(tmp_path):
    trained.save(tmp_path / "new" / "directory")
    for path in (tmp_path / "new" / "directory", tmp_path / "new" / "directory" / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert (again.vocab_size, again.pad, again.end) == (trained.vocab_size, trained.pad, trained.end)
        chex.assert_trees_all_equal(again(TEXTS, 20), trained(TEXTS, 20))


def test_the_tokenizers_library_reads_what_is_saved(tmp_path):
    trained.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:20]:
        ids = theirs.encode(text).ids
        assert trained([text], len(ids))[0].tolist() == ids


MARKED = "a</s>b <pad> <unk> </s>"


@pytest.mark.parametrize("make", [Tokenizer.of_characters, Tokenizer.of_bytes, Tokenizer.train])
def test_marks_that_are_written_in_a_text_are_text(make, tmp_path):
    made = make([MARKED])
    made.save(tmp_path)
    for tokenizer in (made, Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(made))):
        row = tokenizer([MARKED], 60)[0]
        assert tokenizer.decode(row) == MARKED and not {tokenizer.pad, tokenizer.end} & set(
            tokenizer.encode([MARKED])[0].tolist()
        )


@quick
@given(st.lists(anything | st.sampled_from(["</s>", "<pad>"]), max_size=5).map("".join))
def test_bytes_and_known_characters_come_back_unchanged(text):
    for tokenizer in (Tokenizer.of_bytes([], 258), Tokenizer.of_characters(["x", text])):
        assert tokenizer.decode(tokenizer([text], 2000)[0]) == text


def test_a_data_worker_can_be_sent_a_tokenizer():
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(trained))(TEXTS, 20), trained(TEXTS, 20))


def published_json(tmp_path, end="<eos>", **config):
    """A published `tokenizer.json` with tokens of its own, that begins each text with `<bos>`, truncates and pads."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", end, "<bos>", "<unk>", "a", "b", "C"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"<bos> $A {end}", special_tokens=[("<bos>", 2), (end, 1)]
    )
    model.enable_truncation(3)
    model.enable_padding(length=9)
    model.save(str(tmp_path / "tokenizer.json"))
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_published_json_keeps_its_marks(tmp_path):
    tokenizer = Tokenizer.load(published_json(tmp_path))
    assert (tokenizer.pad, tokenizer.end, tokenizer.length) == (0, 1, None)
    assert tokenizer(["a b", "a b a b a b", ""], 5).tolist() == [[2, 4, 5, 1, 0], [2, 4, 5, 4, 1], [2, 1, 0, 0, 0]]
    assert [ids.tolist() for ids in tokenizer.encode(["a b"])] == [[2, 4, 5]]


def test_the_configuration_beside_it_has_its_say(tmp_path):
    config = dict(eos_token={"content": "<stop>"}, pad_token="<stop>", model_max_length=4, do_lower_case=True)
    tokenizer = Tokenizer.load(published_json(tmp_path, end="<stop>", **config))
    assert (tokenizer.pad, tokenizer.end, tokenizer.length) == (1, 1, 4)
    assert tokenizer(["A"]).tolist() == [[2, 4, 1, 1]]


def sentence_pieces(tmp_path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=44, minloglevel=2, **{"pad_id": 3, **options}
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    return tmp_path


def test_a_plain_sentencepiece_model_is_taken_as_it_is(tmp_path):
    path = sentence_pieces(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / "spiece.model"))
    for tokenizer in (
        Tokenizer.load(path),
        Tokenizer.load(path / "spiece.model"),
        pickle.loads(pickle.dumps(Tokenizer.load(path))),
    ):
        assert (tokenizer.pad, tokenizer.end, tokenizer.vocab_size) == (3, 2, 44)
        for text in ("a red circle, a ring", "A"):
            row = tokenizer([text], 40)[0]
            ids = model.encode(text)
            assert row.tolist() == ids + [2] + [3] * (39 - len(ids))
            assert tokenizer.decode(row) == model.decode(ids)


def test_a_tokenizer_that_marks_no_end_is_refused(tmp_path):
    with pytest.raises(UserError, match="no token that ends a text"):
        Tokenizer.load(sentence_pieces(tmp_path, eos_id=-1))
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(UserError, match="no token that ends a text"):
        Tokenizer.load(published_json(tmp_path, end="<other>"))


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_a_broken_file_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"not a tokenizer")
    with pytest.raises(UserError, match=f"{name} cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_place_without_a_tokenizer_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "tokenizer.json"):
        with pytest.raises(UserError, match=r"holds no tokenizer: give .*spiece\.model or tokenizer\.json"):
            Tokenizer.load(path)


def test_training_on_nothing_is_refused():
    for texts in ([], ["", "  "]):
        with pytest.raises(UserError, match="no text"):
            Tokenizer.train(texts)
    with pytest.raises(UserError, match="7 tokens is too small"):
        Tokenizer.train(TEXTS, vocab_size=7)


def test_a_length_is_needed():
    with pytest.raises(ValueError, match="at least 1"):
        trained(["a"], 0)
    with pytest.raises(ValueError, match="None tokens"):
        trained(["a"])
