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
        with pytest.raises(UserError, match="no text"):
            Tokenizer.of_characters([] if not texts else [""])


@pytest.mark.parametrize("size", [7, 0, -1, 2**31, 2**80, True])
def test_a_vocabulary_without_room_or_end_is_refused(size):
    for make in (Tokenizer.train, Tokenizer.of_bytes):
        with pytest.raises(UserError, match=f"vocabulary of {size} tokens"):
            make(TEXTS, vocab_size=size)


@pytest.mark.parametrize("length", [0, -1, None, True, 2**31, 2**80])
def test_a_length_is_needed(tokenizers_of_every_kind, length):
    for tokenizer in tokenizers_of_every_kind:
        with pytest.raises(UserError, match=f"{length} tokens.*at least 1"):
            tokenizer(["a"], length)


@pytest.fixture(scope="module")
def tokenizers_of_every_kind(tmp_path_factory) -> list[Tokenizer]:
    pair = tmp_path_factory.mktemp("pair")
    plain = sentence_pieces(tmp_path_factory.mktemp("plain"))
    for name in ("source.spm", "target.spm"):
        (pair / name).write_bytes((plain / "spiece.model").read_bytes())
    table = ["</s>", "<unk>", "▁a", "a", "▁red", ">>deu<<", "<pad>"]
    (pair / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(table)}))
    published = published_json(tmp_path_factory.mktemp("published"))
    made = [make([*TEXTS, "x\N{REPLACEMENT CHARACTER}"]) for make in MAKERS]
    tokenizers = [*made, Tokenizer.load(published), Tokenizer.load(plain), *Tokenizer.load_pair(pair)]
    for tokenizer in tokenizers:
        tokenizer.length = None  # So that a length is asked for.
    return tokenizers


MAKERS = [Tokenizer.train, Tokenizer.of_characters, Tokenizer.of_bytes]
NO_TEXTS = {
    "a text": ("a cat", "one text"),
    "bytes": (b"a cat", "one text"),
    "a number": (7, "int"),
    "none": (None, "NoneType"),
    "a mapping": ({"a": 1}, "dict"),
    "texts and none": (["a", None], "text 1 is a NoneType"),
    "texts and bytes": (["a", b"a"], "text 1 is a bytes"),
    "texts and numbers": (["a", 1.5], "text 1 is a float"),
    "texts and lists": (["a", ["b"]], "text 1 is a list"),
    "numbers of numpy": (np.arange(3), "text 0 is a int64"),
}


@pytest.mark.parametrize("texts, message", NO_TEXTS.values(), ids=NO_TEXTS)
def test_what_is_no_sequence_of_texts_is_refused_in_every_way_in(tokenizers_of_every_kind, texts, message):
    uses = [use for tokenizer in tokenizers_of_every_kind for use in (lambda given, t=tokenizer: t(given, 9), tokenizer.encode)]
    for use in [*uses, *MAKERS]:
        with pytest.raises(UserError, match=message) as error:
            use(texts)
        assert "\n" not in str(error.value)


HALVES = {"a \ud83d cat": "a \N{REPLACEMENT CHARACTER} cat", "\udc00": "\N{REPLACEMENT CHARACTER}", "\ud83d\ude42 a": "🙂 a"}


@pytest.mark.parametrize("text, shown", HALVES.items(), ids=["first half", "second half", "both halves"])
def test_half_of_a_character_is_the_one_that_cannot_be_shown_in_every_way_in(tokenizers_of_every_kind, text, shown):
    for tokenizer in tokenizers_of_every_kind:
        chex.assert_trees_all_equal(tokenizer([text], 30), tokenizer([shown], 30))
        chex.assert_trees_all_equal(tokenizer.encode([text, "a"]), tokenizer.encode([shown, "a"]))
    for make in MAKERS:
        chex.assert_trees_all_equal(*(make([given, "a cat"]).encode([shown, "a cat"]) for given in (text, shown)))


@pytest.mark.parametrize("text", ["\0", "a\0b", "", " ", "\n", "👩\u200d👧", "a\u0301", "\ufeff", "a" * 10_000])
def test_every_text_has_a_row_and_an_end(tokenizers_of_every_kind, text):
    for tokenizer in tokenizers_of_every_kind:
        (row,) = tokenizer([text], 12)
        assert tokenizer.end in row and row.min() >= 0 and row.max() < tokenizer.vocab_size
        assert isinstance(tokenizer.decode(row), str)
        assert tokenizer([], 12).shape == (0, 12) and tokenizer.encode([]) == []


NO_IDS = {
    "negative": [-1],
    "beyond": [10**6],
    "far beyond": [2**80],
    "floats": [1.0, 2.5],
    "of floats": np.zeros(3, np.float32),
    "booleans": [True],
    "texts": ["a"],
    "a text": "abc",
    "none": None,
    "and none": [2, None],
    "rows": [[2, 3], [3, 2]],
    "rows of several lengths": [[2, 3], [3]],
    "a number": 7,
}


@pytest.mark.parametrize("ids", NO_IDS.values(), ids=NO_IDS)
def test_what_is_no_row_of_ids_is_refused(tokenizers_of_every_kind, ids):
    for tokenizer in tokenizers_of_every_kind:
        with pytest.raises(UserError, match="token") as error:
            tokenizer.decode(ids)
        assert "\n" not in str(error.value)
        assert tokenizer.decode([]) == ""


def test_ids_may_have_gaps(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "a": 9}, unk_token="<unk>"))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 10 and tokenizer.decode(tokenizer(["a"], 3)[0]) == "a"


def test_a_vocabulary_without_an_unknown_token_says_so(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>"))
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no tokens for a text"):
        Tokenizer.load(tmp_path).encode(["b"])


CONFIGS = {
    "model_max_length": ["abc", -1, 0, 1.5, True, [], float("nan")],
    "max_length": ["abc", -1, True],
    "eos_token": [7, "", [], {}, {"content": 7}, {"content": "a", "lstrip": "yes"}, True, "\ud83d"],
    "pad_token": [7, "", [], {"text": "a"}],
    "do_lower_case": ["yes", 1, []],
    "strip_punctuation": ["yes", 1],
    "split_special_tokens": ["yes", 1],
    "padding_side": ["top", 1],
    "truncation_side": ["top", 1],
    "tokenizer_class": [7, [], ""],
    "added_tokens_decoder": [[], "a", {"a": {"content": "a"}}, {"-1": {"content": "a"}}, {"9": "a"}, {"9": {}}, {"9": None}],
    "extra_special_tokens": [7, "a", [7], [None], {"a": 7}],
    "additional_special_tokens": [7, [{}]],
}


@pytest.mark.parametrize("field, value", [(field, value) for field, values in CONFIGS.items() for value in values])
def test_an_entry_of_another_type_is_named_with_its_file(field, value, tmp_path):
    sentence_pieces(tmp_path)
    for model in ("spiece.model", "tokenizer.json", "source.spm"):
        if model == "tokenizer.json":
            (tmp_path / "spiece.model").unlink()
            published_json(tmp_path)
        if model == "source.spm":
            (tmp_path / "source.spm").touch()
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({field: value}))
        with pytest.raises(UserError, match=rf"tokenizer_config\.json.*{field}") as error:
            Tokenizer.load_pair(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b'{"eos_token": 7, "a": -1}'])
def test_an_older_file_that_is_broken_is_named(name, content, tmp_path):
    (published_json(tmp_path) / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        Tokenizer.load(tmp_path)


CONTENTS = {
    "empty": b"",
    "cut": b'{"version": "1.0", "model": {',
    "no UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "spiece.model", "source.spm", "target.spm", "vocab.json", "tokenizer_config.json"]
)
def test_a_file_of_another_shape_is_named(name, content, tmp_path):
    if name in ("source.spm", "target.spm", "vocab.json"):
        model = (sentence_pieces(tmp_path) / "spiece.model").read_bytes()
        for file in ("source.spm", "target.spm"):
            (tmp_path / file).write_bytes(model)
        (tmp_path / "vocab.json").write_text('{"</s>": 0, "<unk>": 1, "<pad>": 2}')
    elif name != "spiece.model":
        published_json(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        Tokenizer.load_pair(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("table", [{"a": "b"}, {"a": -1}, {"a": 1.5}, {"a": True}, {"a": None}, {"</s>": 0}, {}])
def test_a_table_of_ids_that_is_none_is_named(table, tmp_path):
    model = (sentence_pieces(tmp_path) / "spiece.model").read_bytes()
    for file in ("source.spm", "target.spm"):
        (tmp_path / file).write_bytes(model)
    (tmp_path / "vocab.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"vocab\.json"):
        Tokenizer.load_pair(tmp_path)


def test_siglip_2_has_its_length_where_others_have_none(tmp_path):
    tokenizer = Tokenizer.load(published_json(tmp_path, max_length=6, model_max_length=10**30))
    assert tokenizer.length == 6 and tokenizer(["a b"]).tolist() == [[2, 4, 5, 1, 0, 0]]


def test_rows_are_filled_up_on_the_side_that_the_configuration_names(tmp_path):
    tokenizer = Tokenizer.load(published_json(tmp_path, padding_side="left", truncation_side="left"))
    assert tokenizer(["a b", ""], 6).tolist() == [[0, 0, 2, 4, 5, 1], [0, 0, 0, 0, 2, 1]]
    with pytest.raises(UserError, match="not cut on the left"):
        tokenizer(["a b a b"], 3)


def test_a_token_that_was_added_has_the_id_it_was_added_with(tmp_path):
    added = {"7": {"content": "Zebra", "normalized": False}, "9": {"content": "<x>", "special": True}}
    with pytest.raises(UserError, match=r"'<x>' has the id 9 in added_tokens_decoder, and 8"):
        Tokenizer.load(published_json(tmp_path, added_tokens_decoder=added))
    added["8"] = added.pop("9")
    tokenizer = Tokenizer.load(published_json(tmp_path, added_tokens_decoder=added, do_lower_case=True))
    assert tokenizer.vocab_size == 9 and tokenizer.encode(["A Zebra<x> <X> B"])[0].tolist() == [2, 4, 7, 8, 3, 3, 3, 5]


def test_an_added_token_that_has_the_place_of_another_is_refused(tmp_path):
    sentence_pieces(tmp_path)
    for added in ({"5": {"content": "zebra"}}, {"90": {"content": "</s>"}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        with pytest.raises(UserError, match="added_tokens_decoder"):
            Tokenizer.load(tmp_path)
