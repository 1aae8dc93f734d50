"""Texts to windows of tokens, the loss on held-out text, and text that is written on the terminal."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdl import launch
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.tasks.kept import kept_tokenizer
from jaxdl.tasks.language_modelling import LanguageModelling, PromptFields, TextFields, open_texts
from jaxdl.training import Run

TEXT = "".join(np.random.default_rng(0).choice(list("abcdefgh \n"), 800))


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, TextFields, PromptFields):
    """Of a language model without a size."""


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    return f"folder:{tmp_path / 'book.txt'}"


def opened(config, directory, tokenizer="characters"):
    with Run.open(directory, "language", config) as run:
        return run, open_texts(run, tokenizer)


def test_the_windows_are_those_of_both_parts_of_a_text(tmp_path, book):
    _, texts = opened(Config(data=book, length=16), tmp_path / "run")
    read = lambda windows: texts.tokenizer.decode(np.asarray(windows.tokens, np.int32))
    assert (read(texts.train), read(texts.held_out)) == (TEXT[:720], TEXT[720:])
    assert texts.tokenizer.decode(texts.train[5].tokens) == TEXT[5:22]
    assert texts.characters_per_token == 1
    assert texts.tokenizer.decode(texts.excerpt) == TEXT[720:728]  # Half a window.


def test_bytes_are_paired_as_often_as_the_vocabulary_allows(tmp_path, book):
    _, texts = opened(Config(data=book, length=16, vocab_size=300), tmp_path / "run", "bytes")
    assert texts.tokenizer.vocab_size == 300
    assert texts.characters_per_token == 80 / len(texts.held_out.tokens) > 1.2


def test_a_resumed_run_reads_what_it_has_kept(tmp_path, book):
    """Also where the text has other characters by now: tokens that were learned keep their meaning."""
    config = Config(data=book, length=16)
    _, first = opened(config, tmp_path / "run")
    (tmp_path / "book.txt").write_text(TEXT.replace("a", "z"))
    _, again = opened(config, tmp_path / "run")
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
    assert again.tokenizer.encode(["abc"])[0].tolist() == first.tokenizer.encode(["abc"])[0].tolist()


def test_a_tokenizer_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    """Killed at any of its files, the next process makes it anew."""
    made = []

    def make():
        made.append(Tokenizer.of_characters(["abc"]))
        return made[-1]

    replace = os.replace
    for files in range(2):
        moved = []

        def killed(source, target, moved=moved, files=files):
            if len(moved) == files:
                raise KeyboardInterrupt
            moved.append(replace(source, target))

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", killed)
            kept_tokenizer(tmp_path, make)
    kept = kept_tokenizer(tmp_path, make)
    assert len(made) == 3 and kept.encode(["cab"])[0].tolist() == made[0].encode(["cab"])[0].tolist()
    kept_tokenizer(tmp_path, make)
    assert len(made) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_an_excerpt_is_of_a_text_that_says_something(tmp_path):
    for name, written in {"train/a.py": TEXT, "val/__init__.py": "", "val/b.py": "a", "val/c.py": TEXT[::-1]}.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(written)
    _, texts = opened(Config(data=f"folder:{tmp_path / 'texts'}", length=16), tmp_path / "run")
    assert texts.tokenizer.decode(texts.excerpt) == TEXT[::-1][:8]


def test_texts_that_are_too_short_are_refused(tmp_path, book):
    with pytest.raises(UserError, match="10 tokens has no piece of 17"):
        opened(Config(data=book, length=16, eval_characters=10), tmp_path / "one")
    with pytest.raises(UserError, match="80 tokens has no piece of 101"):
        opened(Config(data=book, length=100), tmp_path / "two")


def bigrams(variables, tokens):
    """Logits of the next token by a table."""
    return variables["params"]["table"][tokens]


def told(config, directory, written=(), apply=bigrams):
    """A `LanguageModelling` in a run, whose model writes these tokens."""

    def continue_text(variables, text, key, *, tokens, sampling, end, stream):
        assert len(written) <= tokens and sampling.temperature == 0.8
        for token in written:
            stream(token)
        return list(written)

    with Run.open(directory, "language", config) as run:
        return LanguageModelling(run, open_texts(run, config.tokenizer), apply, continue_text)


def test_the_loss_is_that_of_each_held_out_token_but_the_first(tmp_path, book):
    modelling = told(Config(data=book, length=16), tmp_path / "run")
    size = modelling.texts.tokenizer.vocab_size
    table = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    found = modelling.evaluate({"params": {"table": jnp.asarray(table)}}, jax.random.key(0))
    tokens = np.asarray(modelling.texts.held_out.tokens, np.int64)[: 1 + 16 * (79 // 16)]
    probabilities = np.exp(table.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    nats = -np.log(probabilities[tokens[:-1], tokens[1:]]).mean()
    np.testing.assert_allclose(found["validation_loss"], nats, rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_character"], nats / np.log(2), rtol=1e-5)


def test_bits_a_character_do_not_depend_on_the_tokenizer(tmp_path, book):
    """A uniform guess among 300 pairs of bytes, of which there are fewer than characters."""
    modelling = told(Config(data=book, length=16, vocab_size=300, tokenizer="bytes"), tmp_path / "run")
    found = modelling.evaluate({"params": {"table": jnp.zeros((300, 300))}}, jax.random.key(0))
    np.testing.assert_allclose(found["validation_loss"], np.log(300), rtol=1e-5)
    np.testing.assert_allclose(found["bits_per_character"], np.log2(300) * len(modelling.texts.held_out.tokens) / 80, rtol=1e-5)


def test_what_is_written_is_on_the_terminal_when_it_is_readable(tmp_path, capsys):
    """A character of several bytes may be several tokens."""
    (tmp_path / "book.txt").write_text("abc " * 200)
    config = Config(data=f"folder:{tmp_path / 'book.txt'}", length=16, tokenizer="bytes", vocab_size=258, prompt="a🙂")
    tokenizer = Tokenizer.of_bytes(["abc"], 258)
    (written,) = tokenizer.encode(["é🙂!"])
    assert len(written) == 7
    modelling = told(config, tmp_path / "run", [*written.tolist(), tokenizer.end])
    capsys.readouterr()
    modelling.answer({"params": {}})
    assert capsys.readouterr().out == "\n--- it is given:\na🙂\n--- and writes:\né🙂!\n--- the end\n"
    assert (tmp_path / "run" / "sample.txt").read_text() == "a🙂\n--- written:\né🙂!\n"
    assert modelling.conclude({"params": {}}, jax.random.key(0)) == {} and capsys.readouterr().out == ""


def test_without_a_prompt_the_excerpt_is_continued_once_at_the_end(tmp_path, book):
    modelling = told(Config(data=book, length=16), tmp_path / "run", [5, 6])
    assert modelling.answer is None
    modelling.conclude({"params": {}}, jax.random.key(0))
    written = modelling.texts.tokenizer.decode([5, 6])
    assert (tmp_path / "run" / "sample.txt").read_text() == f"{TEXT[720:728]}\n--- written:\n{written}\n"


def test_a_prompt_without_a_token_is_refused(tmp_path):
    (tmp_path / "book.txt").write_text("abc " * 200)
    Tokenizer.train(["abc"] * 9, 10).save(tmp_path / "words")
    config = Config(data=f"folder:{tmp_path / 'book.txt'}", length=8, prompt=" ", tokenizer=str(tmp_path / "words"))
    with pytest.raises(UserError, match="the prompt ' ' has no token"):
        told(config, tmp_path / "run")


@pytest.mark.parametrize("tokenizer", ["characters", "bytes"])
@pytest.mark.parametrize(("train", "held_out"), [(30, 800), (800, 30), (1, 800), (800, 1)])
def test_a_text_that_is_too_short_is_named_and_what_is_advised_works(tmp_path, tokenizer, train, held_out):
    (tmp_path / "train.txt").write_text(TEXT[:train])
    (tmp_path / "held_out.txt").write_text(TEXT[-held_out:])
    names = [f"folder:{tmp_path / name}.txt" for name in ("train", "held_out")]
    config = Config(data=names[0], eval_data=names[1], length=64, vocab_size=258)
    which = f"the text of {names[0]} to train on" if train < held_out else f"the held-out text of {names[1]}"
    with pytest.raises(UserError, match=f"{which}, of .* tokens has no piece of 65 .*: give more text") as error:
        opened(config, tmp_path / "run", tokenizer)
    if advised := str(error.value).partition("or --length ")[2]:
        shorter = dataclasses.replace(config, length=int(advised.split()[0]))
        assert opened(shorter, tmp_path / "other", tokenizer)[1].held_out.length == shorter.length
    else:
        assert min(train, held_out) == 1
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    _, texts = opened(config, tmp_path / "run", tokenizer)  # The same command, with more text.
    assert len(texts.train) > 300 and len(texts.held_out) > 300 and texts.tokenizer.decode(texts.train[0].tokens) == TEXT[:65]


def test_files_that_are_not_read_are_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Run, "say", lambda run, text: told.append(text))
    for name in ("a.txt", "b.pdf", ".c.txt"):
        (tmp_path / name).write_text(TEXT)
    opened(Config(data=f"folder:{tmp_path}", length=16), tmp_path.with_name(f"{tmp_path.name}-run"))
    assert told == [f"folder:{tmp_path}: not read: 1 .pdf, 1 hidden"] or told == [
        f"folder:{tmp_path}: not read: 1 hidden, 1 .pdf"
    ]
