"""Text: from sentences to rows of token ids, and back."""

import abc
import json
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int, Int32

from jaxdl.errors import UserError

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_MARKS_ARE_TEXT = "split_special_tokens"
"""transformers' name in `tokenizer_config.json` for reading a mark that stands in a text, such as "</s>" in HTML, as the characters it is written with. Tokenizers that are made here do; published ones do what their file says, most of them not."""
_FILES = ("spiece.model", "tokenizer.json")
"""Where a published directory has both, the first is what the model was trained with, the second a conversion of it."""


class Tokenizer(abc.ABC):
    """Texts to rows of token ids: each row ends with the token `end`, also where the text was cut, then `pad` fills it up.

    `Tokenizer.train` makes one from texts, `Tokenizer.load` reads a published or a saved one. In some published tokenizers `pad` is `end`.
    """

    vocab_size: int
    """The number of token ids, which run from 0."""
    pad: int
    end: int
    length: int | None = None
    """The number of tokens that the published model expects, where its files say it."""

    def __call__(self, texts: Sequence[str], length: int | None = None) -> Int32[np.ndarray, "B T"]:
        """`T` is `length`, at least 1, or else the published one. Raises `ValueError` where there is neither."""
        length = self.length if length is None else length
        if length is None or length < 1:
            raise ValueError(f"a row cannot have {length} tokens: give a length of at least 1, for the token that ends it")
        if isinstance(texts, str):
            raise TypeError(f"one text where a sequence of texts belongs: give [{texts!r}]")
        rows = np.full((len(texts), length), self.pad, np.int32)
        for row, ids in zip(rows, self._encode(list(texts))):
            ids = ids[: length - 1]
            row[: len(ids)] = ids
            row[len(ids)] = self.end
        return rows

    def encode(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
        """The tokens of each text, without an end and without padding. What a published tokenizer puts before a text, such as `<bos>`, is there."""
        return [np.asarray(ids, np.int32) for ids in self._encode(list(texts))]

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        """The text of one row, up to its end."""
        ids = [int(token) for token in ids]
        return self._decode(ids[: ids.index(self.end)] if self.end in ids else ids)

    @abc.abstractmethod
    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `load` reads, and that transformers reads too. Makes the directory."""

    @abc.abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids without the end and without padding."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int = 4096) -> "Tokenizer":
        """Byte pair encoding (Sennrich et al. 2016) of lower-cased words, with at most `vocab_size` tokens.

        At most half of them are single characters, rarer characters are unknown. The same texts give the same tokenizer, byte for byte. Raises `UserError` if there is no text, or the vocabulary has no room for anything.
        """
        texts = list(texts)
        if not any(text.strip() for text in texts):
            raise UserError("there is no text to train a tokenizer on: give at least one caption")
        if vocab_size < 8:
            raise UserError(
                f"a vocabulary of {vocab_size} tokens is too small: give at least 8, for a few characters and three marks"
            )
        model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=_UNKNOWN))
        rules, splits = tokenizers.normalizers, tokenizers.pre_tokenizers
        model.normalizer = rules.Sequence(
            [rules.NFKC(), rules.Lowercase(), rules.Replace(tokenizers.Regex(r"\s+"), " "), rules.Strip()]
        )
        model.pre_tokenizer = splits.Sequence([splits.Metaspace(), splits.Punctuation()])
        model.decoder = tokenizers.decoders.Metaspace()
        marks = [_PAD, _END, _UNKNOWN]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=marks, limit_alphabet=(vocab_size - len(marks)) // 2, show_progress=False
        )
        model.train_from_iterator(texts, trainer)
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {_END}", special_tokens=[(_END, model.token_to_id(_END))]
        )
        return _WordPieces(model, {"pad_token": _PAD, "eos_token": _END, "unk_token": _UNKNOWN, _MARKS_ARE_TEXT: True})

    @staticmethod
    def of_characters(texts: Iterable[str]) -> "Tokenizer":
        """One token for each character that is in the texts; others become U+FFFD, the character for what cannot be shown. Nothing of a text is changed."""
        marks = [_PAD, _END, "\N{REPLACEMENT CHARACTER}"]
        found: set[str] = set()
        for text in texts:  # One after another: they may be more than memory holds.
            found.update(text)
        characters = sorted(found - set(marks))
        if not characters:
            raise UserError("there is no text to take characters from")
        vocabulary = {token: index for index, token in enumerate(marks + characters)}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=marks[2]))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        model.decoder = tokenizers.decoders.Fuse()
        model.add_special_tokens(marks[:2])
        return _WordPieces(model, {"pad_token": _PAD, "eos_token": _END, "unk_token": marks[2], _MARKS_ARE_TEXT: True})

    @staticmethod
    def of_bytes(texts: Iterable[str], vocab_size: int = 4096) -> "Tokenizer":
        """Byte pair encoding of bytes, as GPT-2's: any text has tokens, and they give it back unchanged (Radford et al. 2019, section 2.2).

        The same texts give the same tokenizer. Raises `UserError` if the vocabulary has no room for the 256 bytes and the two marks.
        """
        if vocab_size < 258:
            raise UserError(f"a vocabulary of {vocab_size} tokens has no room for 256 bytes and two marks: give at least 258")
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_PAD, _END],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return _WordPieces(model, {"pad_token": _PAD, "eos_token": _END, _MARKS_ARE_TEXT: True})

    @staticmethod
    def load(path: str | os.PathLike, classes: Mapping[str, Mapping[str, Any]] = {}) -> "Tokenizer":
        """Reads `tokenizer.json` or a sentencepiece model (`spiece.model`): give the file, or the directory that holds it.

        `tokenizer_config.json` beside it may hold

        - `eos_token` and `pad_token`: which tokens end a text and fill up a row,
        - `do_lower_case`: whether texts are lower-cased first,
        - `strip_punctuation`: whether ASCII punctuation is left out and white space collapsed (sentencepiece models only),
        - `model_max_length`: the published `length`.

        What it leaves out is looked up in `classes` under its `tokenizer_class`, since published files rely on what the code of that class does. `save` writes it all. Raises `UserError` if there is no tokenizer, or a broken one.
        """
        path = Path(path)
        file = next((path / name for name in _FILES if (path / name).is_file()), None) if path.is_dir() else path
        if file is None or not file.is_file():
            raise UserError(f"{path} holds no tokenizer: give a directory or a file with {' or '.join(_FILES)}")
        try:
            config = _read_config(file.parent, classes)
            if file.suffix == ".json":
                return _WordPieces(tokenizers.Tokenizer.from_str(file.read_text("utf-8")), config)
            return _SentencePieces(sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes()), config)
        except UserError:
            raise
        except Exception as error:  # tokenizers raises bare `Exception`s.
            raise UserError(f"{file} cannot be read as a tokenizer ({error}): fetch or train it again") from error

    @staticmethod
    def load_pair(path: str | os.PathLike, classes: Mapping[str, Mapping[str, Any]] = {}) -> "tuple[Tokenizer, Tokenizer]":
        """The tokenizers of source and target: two sentencepiece models (`source.spm`, `target.spm`) with one table of ids (`vocab.json`), or else what `load` reads, twice. Raises `UserError` if they are missing or broken."""
        path = Path(path)
        if path.is_dir() and (path / "source.spm").is_file():
            try:
                vocabulary = json.loads((path / "vocab.json").read_text("utf-8"))
                config = _read_config(path, classes)
                source, target = (_PairPieces(path / name, vocabulary, config) for name in ("source.spm", "target.spm"))
                return source, target
            except UserError:
                raise
            except (OSError, RuntimeError, ValueError, AttributeError) as error:
                raise UserError(f"the tokenizer in {path} cannot be read ({error}): fetch it again") from error
        tokenizer = Tokenizer.load(path, classes)
        return tokenizer, tokenizer


class _WordPieces(Tokenizer):
    """A `tokenizer.json`."""

    def __init__(self, model: tokenizers.Tokenizer, config: dict):
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = config.get(_MARKS_ARE_TEXT, False)
        self.model, self.config, self.vocab_size = model, config, model.get_vocab_size()
        self.length = _published_length(config)
        self.end = self._mark("eos_token", (_END, "<eos>", "[SEP]", "<|endoftext|>"))
        self.pad = self._mark("pad_token", (_PAD, "[PAD]", "<|endoftext|>"), self.end)
        self.lower_case = config.get("do_lower_case", False)

    def __reduce__(self) -> tuple:
        """Made anew where it is sent: the library pickles a tokenizer without `encode_special_tokens`."""
        return _WordPieces, (self.model, self.config)

    def save(self, directory: str | os.PathLike) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.model.save(str(Path(directory) / "tokenizer.json"))
        _write_config(directory, {"tokenizer_class": "PreTrainedTokenizerFast", **self.config})

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self.lower_case:
            texts = [text.lower() for text in texts]
        # One text is not worth waking the threads for, and a data pipeline asks for one at a time.
        encoded = self.model.encode_batch_fast(texts) if len(texts) > 1 else map(self.model.encode, texts)
        rows = (row.ids for row in encoded)
        return [ids[:-1] if ids and ids[-1] == self.end else ids for ids in rows]

    def _decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def _mark(self, key: str, usual: tuple[str, ...], default: int | None = None) -> int:
        """The id of the token that the configuration names, or else of the first usual one that there is."""
        named = _content(self.config.get(key))
        ids = (self.model.token_to_id(token) for token in ([named] if named else usual))
        found = next((token for token in ids if token is not None), default)
        if found is None:
            raise UserError(f"the tokenizer has no token that ends a text: name its {key!r} in tokenizer_config.json beside it")
        return found


class _SentencePieces(Tokenizer):
    """A sentencepiece model."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor, config: dict):
        self.model, self.config, self.vocab_size = model, config, model.get_piece_size()
        self.length, self.end = _published_length(config), model.eos_id()
        if self.end < 0:
            raise UserError("the sentencepiece model has no token that ends a text: train it with an eos_id")
        self.lower_case, self.strip_punctuation = (config.get(key, False) for key in ("do_lower_case", "strip_punctuation"))
        self.pad = self._pad()

    def _pad(self) -> int:
        """The token that the configuration names, if the model has it, or else the model's own, or else the end."""
        named = _content(self.config.get("pad_token"))
        if named and (found := self.model.piece_to_id(named)) != self.model.unk_id():
            return found
        return self.model.pad_id() if self.model.pad_id() >= 0 else self.end

    def save(self, directory: str | os.PathLike) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "spiece.model").write_bytes(self.model.serialized_model_proto())
        _write_config(directory, self.config)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.model.encode([self._clean(text) for text in texts])

    def _decode(self, ids: list[int]) -> str:
        return self.model.decode([token for token in ids if token != self.pad])

    def _clean(self, text: str) -> str:
        """As `canonicalize_text` of big_vision does, in evaluators/proj/image_text/prompt_engineering.py."""
        text = text.lower() if self.lower_case else text
        return re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip() if self.strip_punctuation else text


class _PairPieces(Tokenizer):
    """One of two sentencepiece models, which says how a text is cut, and the table of ids that both share (Tiedemann and Thottingal 2020, OPUS-MT). A text for a model of several target languages begins with a mark as `>>deu<<`."""

    def __init__(self, file: Path, vocabulary: dict[str, int], config: dict):
        self.file_name, self.ids, self.config = file.name, vocabulary, config
        self.model = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
        for mark in (_PAD, _END, _UNKNOWN):
            if mark not in vocabulary:
                raise UserError(f"vocab.json beside {file} has no {mark}: fetch it again")
        self.pad, self.end, self.unknown = (vocabulary[mark] for mark in (_PAD, _END, _UNKNOWN))
        self.pieces = {token: piece for piece, token in vocabulary.items()}
        self.vocab_size, self.length = max(self.pieces) + 1, _published_length(config)

    def save(self, directory: str | os.PathLike) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / self.file_name).write_bytes(self.model.serialized_model_proto())
        (Path(directory) / "vocab.json").write_text(json.dumps(self.ids, ensure_ascii=False), "utf-8")
        _write_config(directory, self.config)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [[self.ids.get(piece, self.unknown) for piece in self._cut(text)] for text in texts]

    def _cut(self, text: str) -> list[str]:
        language = re.match(r">>[^<>]*<<", text)
        marks = [language.group()] if language else []
        return marks + self.model.encode(text[language.end() if language else 0 :], out_type=str)

    def _decode(self, ids: list[int]) -> str:
        pieces = (self.pieces.get(token, _PAD) for token in ids)
        return self.model.decode_pieces([piece for piece in pieces if piece not in (_PAD, _END, _UNKNOWN)])


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _published_length(config: dict) -> int | None:
    """`model_max_length`, unless it is the huge number that stands for none."""
    length = config.get("model_max_length")
    return int(length) if length is not None and length < 1_000_000 else None


def _content(mark: str | dict | None) -> str | None:
    """A token as `tokenizer_config.json` names it, by itself or with its properties."""
    return mark["content"] if isinstance(mark, dict) else mark


def _read_config(directory: Path, classes: Mapping[str, Mapping[str, Any]] = {}) -> dict:
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {**classes.get(config.get("tokenizer_class", "").removesuffix("Fast"), {}), **config}


def _write_config(directory: str | os.PathLike, config: dict) -> None:
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (Path(directory) / "tokenizer_config.json").write_text(text + "\n", "utf-8")
