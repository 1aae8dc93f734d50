"""Texts of every sort have the tokens that transformers' tokenizers give them: marks, capital letters, accents that stand alone, several spaces, NUL, emoji."""

import io
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
import sentencepiece
import tokenizers
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer
from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from jaxdl import pretrained
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Theirs recommend sacremoses, and warn of an end in a text.
WORDS = ["a", "cat", "and", "Dog", "see", "red", "circle", "Straße", "ÉCLAIR", "naïve", "ΟΔΟΣ", "İstanbul"]
CORPUS = [" ".join(np.random.default_rng(seed).choice(WORDS, 7)) for seed in range(200)]
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def pieces(file: Path, marks: bool = True) -> Path:
    ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) if marks else {}
    model, lowered = io.BytesIO(), [text.lower() for text in CORPUS]
    options = dict(vocab_size=70, hard_vocab_limit=False, minloglevel=2, character_coverage=1.0)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS + lowered), model_writer=model, **ids, **options)
    file.write_bytes(model.getvalue())
    return file


def siglip(directory: Path) -> SiglipTokenizer:
    made = SiglipTokenizer(str(pieces(directory / "spiece.model")))
    made.add_tokens(["zebra", "Zebu", tokenizers.AddedToken("cat", single_word=True)])
    made.add_special_tokens({"extra_special_tokens": ["<Image>", tokenizers.AddedToken("<x>", lstrip=True, rstrip=True)]})
    return made


def marian(directory: Path) -> transformers.MarianTokenizer:
    for name in ("source.spm", "target.spm"):
        pieces(directory / name, marks=False)
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "source.spm"))
    table = [model.id_to_piece(index) for index in range(3, model.get_piece_size())]
    table = ["</s>", "<unk>", *table, ">>deu<<", ">>fra<<", "<pad>"]
    (directory / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(table)}))
    files = (str(directory / name) for name in ("source.spm", "target.spm", "vocab.json"))
    return transformers.MarianTokenizer(*files)


def bytes_of(kind: type, marks: list[str], end: str = "") -> Callable[[Path], Any]:
    def make(directory: Path) -> Any:
        vocabulary = {
            token: index for index, token in enumerate([*BYTES, *([each + end for each in BYTES] if end else []), *marks])
        }
        made = kind(vocab=vocabulary, merges=[])
        made.add_tokens(["Zebra", "zebu"])
        return made

    return make


def gemma_of(kind: type) -> Callable[[Path], Any]:
    def make(directory: Path) -> Any:
        letters = sorted({*"▁", *string.ascii_letters, *"".join(CORPUS)} - {" "})
        table = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
        made = kind(vocab={piece: index for index, piece in enumerate(table)}, merges=[])
        made.add_tokens(["Zebra", "zebu"])
        return made

    return make


KINDS: dict[str, Callable[[Path], Any]] = {
    "SiglipTokenizer": siglip,
    "MarianTokenizer": marian,
    "CLIPTokenizer": bytes_of(transformers.CLIPTokenizer, ["<|startoftext|>", "<|endoftext|>"], "</w>"),
    "GPT2Tokenizer": bytes_of(transformers.GPT2Tokenizer, ["<|endoftext|>"]),
    "GemmaTokenizer": gemma_of(transformers.GemmaTokenizer),
    "Siglip2Tokenizer": gemma_of(Siglip2Tokenizer),
}
MADE = {"train": Tokenizer.train, "of_characters": Tokenizer.of_characters, "of_bytes": Tokenizer.of_bytes}
MARKS = [
    "</s>",
    "<unk>",
    "<pad>",
    "<eos>",
    "<bos>",
    "<|endoftext|>",
    "<|startoftext|>",
    ">>deu<<",
    ">>fra<<",
    ">>xyz<<",
    ">><<",
    "<Image>",
    "<x>",
]
FRAGMENTS = [
    *MARKS,
    *map(str.upper, MARKS),
    *map(str.lower, MARKS),
    *WORDS,
    "zebra",
    "Zebra",
    "ZEBRA",
    "zebu",
    "Zebu",
    "cat",
    "scat",
    "ΣΑΣ",
]
FRAGMENTS += [
    " ",
    "  ",
    "\t",
    "\n",
    "▁",
    "\0",
    "e\u0301",
    "\u0301",
    "ﬁ",
    "Å",
    "\u200d",
    "👩\u200d👧",
    "🙂",
    "…",
    "!",
    "'s",
    ".",
    "<",
    ">",
    "漢",
    "\u3000",
    "\ufeff",
]
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"]), max_size=8).map("".join)


@pytest.fixture(scope="module", params=[*KINDS, *MADE])
def both(request, tmp_path_factory) -> tuple[Any, Any, Path]:
    """Transformers' tokenizer and ours of the same directory."""
    directory, files = tmp_path_factory.mktemp("tokenizer"), tmp_path_factory.mktemp("files")
    if request.param in MADE:
        MADE[request.param]([*CORPUS, "".join(FRAGMENTS)]).save(directory)
        kind = TokenizersBackend
    else:
        made = KINDS[request.param](files)
        made.save_pretrained(directory)
        kind = type(made)
    ours = pretrained.load_tokenizers(directory)[0]
    return kind.from_pretrained(directory), ours, directory


def without_end(ids: list[int], end: int) -> list[int]:
    return ids[:-1] if ids[-1:] == [end] else ids


def equal(theirs: Any, ours: Tokenizer, texts: list[str]) -> None:
    """But for the end, which GPT-2's and Gemma's put nowhere, SigLIP's where the text has none, and the others everywhere."""
    expected = [without_end(theirs(text)["input_ids"], ours.end) for text in texts]
    assert [ids.tolist() for ids in ours.encode(texts)] == expected
    for text, ids in zip(texts, expected):
        assert ours.encode([text])[0].tolist() == ids


def holds_for_any_text(both: tuple[Any, Tokenizer, Path], count: int) -> None:
    theirs, ours, _ = both

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(TEXT, min_size=1, max_size=3))
    def equals(texts):
        equal(theirs, ours, texts)

    equals()


def test_any_text_has_transformers_tokens(both):
    holds_for_any_text(both, 200)


@pytest.mark.slow
def test_any_of_many_texts_has_transformers_tokens(both):
    holds_for_any_text(both, 5000)


def test_each_fragment_beside_a_mark_has_transformers_tokens(both):
    theirs, ours, _ = both
    equal(theirs, ours, [between.join(["a", fragment, "Cat"]) for fragment in FRAGMENTS for between in ("", " ")])


def test_a_tokenizer_that_was_saved_again_gives_the_same(both, tmp_path):
    theirs, ours, directory = both
    for tokenizer in pretrained.load_tokenizers(directory):
        tokenizer.save(tmp_path)
    again = pretrained.load_tokenizers(tmp_path)[0]
    assert (again.pad, again.end, again.length, again.vocab_size) == (ours.pad, ours.end, ours.length, ours.vocab_size)
    equal(theirs, again, FRAGMENTS)


def test_sizes_and_marks_are_transformers(both):
    theirs, ours, _ = both
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.end == theirs.eos_token_id
    assert ours.pad == (theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert ours.length == (theirs.model_max_length if theirs.model_max_length < 10**6 else None)


def test_half_of_a_character_is_the_one_that_cannot_be_shown(both):
    theirs, ours, _ = both
    text = json.loads('"a \\ud83d cat \\udc00"')
    shown = "a \N{REPLACEMENT CHARACTER} cat \N{REPLACEMENT CHARACTER}"
    assert ours.encode([text, text])[1].tolist() == ours.encode([shown])[0].tolist()
    assert ours([text], 40).tolist() == ours([shown], 40).tolist()
    equal(theirs, ours, [shown])


def test_every_token_is_read_and_no_other(both):
    _, ours, _ = both
    for token in range(ours.vocab_size):
        assert isinstance(ours.decode([token]), str)
    for wrong in (-1, ours.vocab_size, 2**40, 2**80):
        with pytest.raises(UserError, match="token"):
            ours.decode([0, wrong] if ours.end != 0 else [2, wrong])


PROBES = ["a Cat", "zebra", "a <x> b</s>", "<unk> cat <pad>", "new", "a<|endoftext|> b", "<Image>see", "NEW one", "  a  "]
mark = st.sampled_from(["</s>", "<unk>", "<pad>", "<eos>", "<|endoftext|>", "a", "new", "<x>"])
flags = st.fixed_dictionaries(
    {}, optional={name: st.booleans() for name in ("lstrip", "rstrip", "normalized", "special", "single_word")}
)
properties = st.builds(lambda content, more: {"content": content, "__type": "AddedToken", **more}, mark, flags)
added = st.dictionaries(
    st.integers(0, 80).map(str), st.builds(lambda content, more: {"content": content, **more}, mark, flags), max_size=3
)
SOUND: dict[str, st.SearchStrategy[Any]] = dict(
    eos_token=mark | properties,
    pad_token=mark | properties,
    unk_token=mark | properties,
    bos_token=mark | properties,
    mask_token=mark,
    boi_token=mark,
    model_max_length=st.integers(1, 100) | st.just(10**30) | st.just(1e30) | st.just(32.0),
    padding_side=st.sampled_from(["left", "right"]),
    truncation_side=st.sampled_from(["left", "right"]),
    split_special_tokens=st.booleans(),
    added_tokens_decoder=added,
    extra_special_tokens=st.lists(mark, max_size=2, unique=True),
    additional_special_tokens=st.lists(mark, max_size=2, unique=True),
    clean_up_tokenization_spaces=st.booleans(),
    add_prefix_space=st.just(False),
    sp_model_kwargs=st.just({}),
    legacy=st.just(True),
    separate_vocabs=st.just(False),
)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 10**12, 10**400, True, float("nan"), float("inf")])
WRONG = st.none() | st.text(max_size=5) | numbers | st.lists(numbers | st.none() | st.text(max_size=3), max_size=3)
WRONG |= st.dictionaries(
    st.sampled_from(["content", "x", "7", "-1", "lstrip"]), numbers | st.none() | st.text(max_size=2) | st.just({}), max_size=2
)
UNREAD = {"clean_up_tokenization_spaces", "add_prefix_space"}
"""Which change no ids where a tokenizer comes from `tokenizer.json` or a sentencepiece model."""


@st.composite
def configs(draw, saved: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """The file that was saved, with a few entries dropped, renamed, changed, or of no sense."""
    config = dict(saved)
    for name in draw(st.lists(st.sampled_from(sorted({*SOUND, *saved} - {"backend"})), max_size=3, unique=True)):
        fault = draw(st.sampled_from(["dropped", "renamed", "changed", "wrong"]))
        if (
            fault == "changed" and name == "added_tokens_decoder"
        ):  # Without its own, transformers forgets those of tokenizer.json.
            config[name] = {**there, **draw(SOUND[name])}
        elif fault == "changed" and name in SOUND:
            config[name] = draw(SOUND[name])
        elif fault == "wrong" and name not in UNREAD:
            config[name] = draw(WRONG.filter(lambda value: value != {}))
        elif name in config:
            value = config.pop(name)
            if fault == "renamed":
                config[name + "s"] = value
    return config


def outcome(tokenize: Callable[[], Any]) -> Any:
    try:
        return tokenize()
    except Exception as error:
        return error


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory) -> tuple[type, Path]:
    directory = tmp_path_factory.mktemp("published")
    made = KINDS[request.param](tmp_path_factory.mktemp("files"))
    made.save_pretrained(directory)
    model_type = request.param.removesuffix("Tokenizer").lower()
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return type(made), directory


def holds_for_any_file(published: tuple[type, Path], count: int) -> None:
    kind, directory = published
    file = directory / "tokenizer_config.json"
    saved = json.loads(file.read_text())
    read, model = [], directory / "tokenizer.json"
    there = json.loads(model.read_text())["added_tokens"] if model.is_file() else []
    there = {str(token.pop("id")): token for token in there}

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(configs(saved, there))
    def equals_or_is_refused(config):
        file.write_text(json.dumps(config))
        try:
            ours = pretrained.load_tokenizers(directory)[0]
        except UserError as error:
            assert "\n" not in str(error) and str(directory) in str(error)
            assert any(name in str(error) for name in {*config, *SOUND}), str(error)
            return
        tokens = ours.encode(PROBES)
        theirs = outcome(lambda: kind.from_pretrained(directory))
        expected = outcome(lambda: [without_end(theirs(text)["input_ids"], ours.end) for text in PROBES])
        if config.get("tokenizer_class") not in (None, saved["tokenizer_class"]):  # Theirs is of the class that it was.
            return
        if (
            isinstance(expected, Exception)
            or theirs.eos_token_id is None
            or config.get("do_lower_case") != saved.get("do_lower_case")
        ):
            return
        read.append(config)
        assert [ids.tolist() for ids in tokens] == expected
        assert ours.end == theirs.eos_token_id
        assert theirs.pad_token_id in (None, ours.pad)
        assert (ours.length or 10**6) == min(theirs.model_max_length, 10**6)
        assert (ours.padding_side, ours.truncation_side) == (theirs.padding_side, theirs.truncation_side)

    try:
        equals_or_is_refused()
        assert len(read) > count / 10
    finally:
        file.write_text(json.dumps(saved))


def test_any_configuration_means_what_transformers_takes_it_for_or_is_refused(published):
    holds_for_any_file(published, 100)


@pytest.mark.slow
def test_any_of_many_configurations_means_what_transformers_takes_it_for_or_is_refused(published):
    holds_for_any_file(published, 2000)
