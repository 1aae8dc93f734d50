"""Text: from sentences to rows of token ids, and back."""

import abc
import itertools
import json
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int, Int32

from jaxdl.data.added_tokens import Marks
from jaxdl.data.given_texts import given_texts
from jaxdl.data.tokenizer_config import (
    MARKS_ARE_TEXT,
    added_marks,
    mark_of,
    named_marks,
    published_length,
    read_config,
    write_config,
)
from jaxdl.data.tokenizer_files import broken, read_pieces, read_table
from jaxdl.data.tokenizer_json import add_ends, add_lower_case, add_marks
from jaxdl.errors import UserError
from jaxdl.files import refused

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_FILES = ("spiece.model", "tokenizer.json")
"""Where a published directory has both, the first is what the model was trained with, the second a conversion of it."""


class Tokenizer(abc.ABC):
    """Texts to rows of token ids: each row ends with the token `end`, also where the text was cut, then `pad` fills it up (before it, where `padding_side` is left).

    `Tokenizer.train` makes one from texts, `Tokenizer.load` reads a published or a saved one. In some published tokenizers `pad` is `end`.
    """

    vocab_size: int
    """The number of token ids, which run from 0."""
    pad: int
    end: int
    length: int | None = None
    """The number of tokens that the published model expects, where its files say it."""
    padding_side: Literal["left", "right"] = "right"
    """Where rows are filled up, as the published model has it."""
    truncation_side: Literal["left", "right"] = "right"

    def __call__(self, texts: Sequence[str] | Any, length: int | None = None) -> Int32[np.ndarray, "B T"]:
        """`T` is `length`, at least 1, or else the published one. Raises `UserError` where there is neither, and for what is no sequence of texts."""
        length = self.length if length is None else length
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or not 1 <= length < 2**31:
            raise UserError(f"a row cannot have {length} tokens: give a length of at least 1, for the token that ends it")
        texts = list(given_texts(texts))
        rows = np.full((len(texts), length), self.pad, np.int32)
        for row, ids in zip(rows, self._encode(texts)):
            if len(ids) >= length and self.truncation_side == "left":
                raise UserError(f"a text of {len(ids)} tokens has no room in {length}, and is not cut on the left: give a length")
            ids = ids[: length - 1]
            start = 0 if self.padding_side == "right" else length - len(ids) - 1
            row[start : start + len(ids)] = ids
            row[start + len(ids)] = self.end
        return rows

    def encode(self, texts: Sequence[str] | Any) -> list[Int32[np.ndarray, "_"]]:
        """The tokens of each text, without an end and without padding. What a published tokenizer puts before a text, such as `<bos>`, is there. Raises `UserError` for what is no sequence of texts."""
        return [np.asarray(ids, np.int32) for ids in self._encode(list(given_texts(texts)))]

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int] | Any) -> str:
        """The text of one row, up to its end. Raises `UserError` for what is no row of token ids."""
        row = self._row(ids)
        return self._decode(row[: row.index(self.end)] if self.end in row else row)

    def _row(self, ids: Any) -> list[int]:
        try:
            row = np.asarray(ids)
        except ValueError as error:  # Rows of several lengths.
            raise UserError("rows of token ids came where one belongs: decode them one by one") from error
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            shape = f"of shape {row.shape} and type {row.dtype}"
            raise UserError(f"a row of token ids is one of whole numbers, and this is {shape}: decode rows one by one")
        if row.size and not 0 <= row.min() <= row.max() < self.vocab_size:
            wrong = row.min() if row.min() < 0 else row.max()
            raise UserError(f"there is no token {wrong}: the ids of this tokenizer are from 0 to {self.vocab_size - 1}")
        return row.tolist()

    @abc.abstractmethod
    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `load` reads, and that transformers reads too. Makes the directory."""

    @abc.abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids without the end and without padding."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @staticmethod
    def train(texts: Iterable[str] | Any, vocab_size: int = 4096) -> "Tokenizer":
        """Byte pair encoding (Sennrich et al. 2016) of lower-cased words, with at most `vocab_size` tokens.

        At most half of them are single characters, rarer characters are unknown. The same texts give the same tokenizer, byte for byte. Raises `UserError` if there is no text, or the vocabulary has no room for anything.
        """
        texts = list(given_texts(texts))
        if not any(text.strip() for text in texts):
            raise UserError("there is no text to train a tokenizer on: give at least one caption")
        _check_size(vocab_size, 8, "is too small: give at least 8, for a few characters and three marks")
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
        return _WordPieces(model, {"pad_token": _PAD, "eos_token": _END, "unk_token": _UNKNOWN, MARKS_ARE_TEXT: True})

    @staticmethod
    def of_characters(texts: Iterable[str] | Any) -> "Tokenizer":
        """One token for each character that is in the texts; others become U+FFFD, the character for what cannot be shown. Nothing of a text is changed."""
        marks = [_PAD, _END, "\N{REPLACEMENT CHARACTER}"]
        found: set[str] = set()
        for text in given_texts(texts):  # One after another: they may be more than memory holds.
            found.update(text)
        characters = sorted(found - set(marks))
        if not characters:
            raise UserError("there is no text to take characters from")
        vocabulary = {token: index for index, token in enumerate(marks + characters)}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=marks[2]))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        model.decoder = tokenizers.decoders.Fuse()
        model.add_special_tokens(marks[:2])
        return _WordPieces(model, {"pad_token": _PAD, "eos_token": _END, "unk_token": marks[2], MARKS_ARE_TEXT: True})

    @staticmethod
    def of_bytes(texts: Iterable[str] | Any, vocab_size: int = 4096) -> "Tokenizer":
        """Byte pair encoding of bytes, as GPT-2's: any text has tokens, and they give it back unchanged (Radford et al. 2019, section 2.2).

        The same texts give the same tokenizer. Raises `UserError` if the vocabulary has no room for the 256 bytes and the two marks.
        """
        _check_size(vocab_size, 258, "has no room for 256 bytes and two marks: give at least 258")
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_PAD, _END],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(given_texts(texts), trainer)
        return _WordPieces(model, {"pad_token": _PAD, "eos_token": _END, MARKS_ARE_TEXT: True})

    @staticmethod
    def load(path: str | os.PathLike, classes: Mapping[str, Mapping[str, Any]] = {}) -> "Tokenizer":
        """Reads `tokenizer.json` or a sentencepiece model (`spiece.model`): give the file, or the directory that holds it.

        `tokenizer_config.json` beside it may hold

        - `eos_token` and `pad_token`: which tokens end a text and fill up a row,
        - `do_lower_case`: whether texts are lower-cased first,
        - `strip_punctuation`: whether ASCII punctuation is left out and white space collapsed (sentencepiece models only),
        - `model_max_length` (or `max_length`): the published `length`, and `padding_side`,
        - marks that have other names, and `added_tokens_decoder` (or `added_tokens.json`): tokens that a text may hold whole.

        What it leaves out is looked up in `classes` under its `tokenizer_class`, since published files rely on what the code of that class does. `save` writes it all. Raises `UserError` if there is no tokenizer, or a broken one.
        """
        path = Path(path)
        file = next((path / name for name in _FILES if (path / name).is_file()), None) if path.is_dir() else path
        if file is None or not file.is_file():
            raise UserError(f"{path} holds no tokenizer: give a directory or a file with {' or '.join(_FILES)}")
        config = read_config(file.parent, classes, of_pieces=file.suffix != ".json")
        try:
            if file.suffix == ".json":
                return _WordPieces(tokenizers.Tokenizer.from_str(file.read_text("utf-8")), config)
            return _SentencePieces(read_pieces(file), config)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        except Exception as error:  # tokenizers raises bare `Exception`s.
            raise broken(file, error) from error

    @staticmethod
    def load_pair(path: str | os.PathLike, classes: Mapping[str, Mapping[str, Any]] = {}) -> "tuple[Tokenizer, Tokenizer]":
        """The tokenizers of source and target: two sentencepiece models (`source.spm`, `target.spm`) with one table of ids (`vocab.json`), or else what `load` reads, twice. Raises `UserError` if they are missing or broken."""
        path = Path(path)
        if path.is_dir() and (path / "source.spm").is_file():
            config = {**_PAIR, **read_config(path, classes, of_pieces=True)}
            source, target = (_PairPieces(path / name, config) for name in ("source.spm", "target.spm"))
            return source, target
        tokenizer = Tokenizer.load(path, classes)
        return tokenizer, tokenizer


class _WordPieces(Tokenizer):
    """A `tokenizer.json`."""

    def __init__(self, model: tokenizers.Tokenizer, config: dict):
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = bool(config.get(MARKS_ARE_TEXT))
        add_marks(model, config)
        if config.get("do_lower_case") or config.get("lower_cases"):
            add_lower_case(model)
        if config.get("begins_and_ends"):
            add_ends(model, config)
        self.model, self.config = model, config
        self.vocab_size = max(model.get_vocab().values(), default=-1) + 1
        if self.vocab_size >= 2**31:
            raise UserError(f"its token {self.vocab_size - 1} is beyond 2**31: fetch or train it again")
        self.end = self._mark("eos_token", (_END, "<eos>", "[SEP]", "<|endoftext|>"))
        self.pad = self._mark("pad_token", (_PAD, "[PAD]", "<|endoftext|>"), self.end)
        self.length, self.padding_side, self.truncation_side = _row_format(config)

    def __reduce__(self) -> tuple:
        """Made anew where it is sent: the library pickles a tokenizer without `encode_special_tokens`."""
        return _WordPieces, (self.model, self.config)

    def save(self, directory: str | os.PathLike) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.model.save(str(Path(directory) / "tokenizer.json"))
        write_config(directory, {"tokenizer_class": "PreTrainedTokenizerFast", **self.config})

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:  # One text is not worth waking the threads for, and a data pipeline asks for one at a time.
            encoded = self.model.encode_batch_fast(texts) if len(texts) > 1 else map(self.model.encode, texts)
            rows = [row.ids for row in encoded]
        except Exception as error:  # Of a vocabulary without the token for what is not in it.
            reason = " ".join(str(error).split())
            raise UserError(f"the tokenizer has no tokens for a text ({reason}): fetch or train it again") from error
        return [ids[:-1] if ids and ids[-1] == self.end else ids for ids in rows]

    def _decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def _mark(self, key: str, usual: tuple[str, ...], default: int | None = None) -> int:
        """The id of the token that the configuration names, or else of the first usual one that there is."""
        named = mark_of(self.config, key)
        ids = (self.model.token_to_id(token) for token in ([named] if named else usual))
        found = next((token for token in ids if token is not None), default)
        if found is None:
            raise UserError(f"the tokenizer has no token that ends a text: name its {key!r} in tokenizer_config.json beside it")
        return found


class _SentencePieces(Tokenizer):
    """A sentencepiece model, and tokens that are cut out of a text before it comes to it."""

    def __init__(self, model: sentencepiece.SentencePieceProcessor, config: dict):
        self.model, self.config = model, config
        vocabulary = {model.id_to_piece(index): index for index in range(model.get_piece_size())}
        self.marks = Marks(vocabulary, added_marks(config), named_marks(config))
        self.added = {index: mark for mark, index in self.marks.ids.items() if vocabulary.get(mark) != index}
        self.vocab_size = max([len(vocabulary), *(index + 1 for index in self.added)])
        self.end = self._id("eos_token", model.eos_id())
        if self.end < 0:
            raise UserError("the sentencepiece model has no token that ends a text: train it with an eos_id")
        self.pad = self._id("pad_token", model.pad_id() if model.pad_id() >= 0 else self.end)
        self.lower_case, self.strip_punctuation = (bool(config.get(key)) for key in ("do_lower_case", "strip_punctuation"))
        self.length, self.padding_side, self.truncation_side = _row_format(config)

    def _id(self, field: str, default: int) -> int:
        named = mark_of(self.config, field)
        return default if named is None else self.marks.ids[named]

    def save(self, directory: str | os.PathLike) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "spiece.model").write_bytes(self.model.serialized_model_proto())
        write_config(directory, self.config)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        rows = ([self._token(piece) for piece in self._pieces(text)] for text in texts)
        return [ids[:-1] if ids and ids[-1] == self.end else ids for ids in rows]

    def _token(self, piece: str) -> int:
        return self.marks.ids[piece] if piece in self.marks.ids else self.model.piece_to_id(piece)

    def _pieces(self, text: str) -> list[str]:
        if self.strip_punctuation:  # As SigLIP, whose texts begin with a space of sentencepiece's.
            text = _SPACE + text.replace(_SPACE, " ")
        pieces = self._part(text) if self.config.get(MARKS_ARE_TEXT) else self.marks.apart(text, self._part)
        return (
            pieces[1:]
            if self.strip_punctuation and pieces[:1] == [_SPACE] and pieces[1:2] and pieces[1] in self.marks.ids
            else pieces
        )

    def _part(self, text: str) -> list[str]:
        """The pieces of what is no mark. SigLIP's have no space put before them, which sentencepiece puts before the first word only."""
        if not self.strip_punctuation:
            return self.model.encode(text.lower() if self.lower_case else text, out_type=str)
        unknown = mark_of(self.config, "unk_token") or _UNKNOWN
        return self.model.encode(unknown + self._clean(text), out_type=str)[len(self.model.encode(unknown)) :]

    def _clean(self, text: str) -> str:
        """As `canonicalize_text` of big_vision does, in evaluators/proj/image_text/prompt_engineering.py."""
        text = text.lower() if self.lower_case else text
        return re.sub(r"\s+", " ", text.translate(_NO_PUNCTUATION)).strip()

    def _decode(self, ids: list[int]) -> str:
        """Runs of the model's own pieces by the model, what was added as it is."""
        kept = [token for token in ids if token != self.pad and (token in self.added or token < self.model.get_piece_size())]
        runs = itertools.groupby(kept, key=self.added.get)
        return " ".join(
            text for mark, run in runs if (text := " ".join(mark for _ in run) if mark else self.model.decode(list(run)))
        )


class _PairPieces(Tokenizer):
    """One of two sentencepiece models, which says how a text is cut, and the table of ids that both share (Tiedemann and Thottingal 2020, OPUS-MT). A text for a model of several target languages begins with a mark as `>>deu<<`."""

    def __init__(self, file: Path, config: dict):
        self.file_name, self.config = file.name, config
        self.table = read_table(file.with_name("vocab.json"))
        try:
            self.model = read_pieces(file)
            self.marks = Marks(self.table, added_marks(config), named_marks(config))
        except UserError as error:
            raise UserError(f"{file.with_name('vocab.json')}: {error}") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise broken(file, error) from error
        self.ids = self.table | self.marks.ids
        for field in _PAIR_MARKS:
            if (named := mark_of(config, field)) is None or named not in self.table:
                raise refused(file.with_name("vocab.json"), field, named, "is not in it: fetch it again")
        self.end, self.pad, self.unknown = (self.ids[mark_of(config, field)] for field in _PAIR_MARKS)
        self.pieces = {token: piece for piece, token in self.ids.items()}
        self.vocab_size = max(self.pieces) + 1
        self.length, self.padding_side, self.truncation_side = _row_format(config)

    def save(self, directory: str | os.PathLike) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / self.file_name).write_bytes(self.model.serialized_model_proto())
        (Path(directory) / "vocab.json").write_text(json.dumps(self.table, ensure_ascii=False), "utf-8")
        write_config(directory, self.config)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [[self.ids.get(piece, self.unknown) for piece in self._cut(text)] for text in texts]

    def _cut(self, text: str) -> list[str]:
        return self._part(text) if self.config.get(MARKS_ARE_TEXT) else self.marks.apart(text, self._part)

    def _part(self, text: str) -> list[str]:
        language = re.match(r">>(?s:.*?)<<", text)
        marks = [language.group()] if language else []
        return marks + self.model.encode(text[language.end() if language else 0 :], out_type=str)

    def _decode(self, ids: list[int]) -> str:
        """Without the marks, and without ids that the table has left out."""
        marks = {self.pad, self.end, self.unknown}
        return self.model.decode_pieces([self.pieces[token] for token in ids if token in self.pieces and token not in marks])


_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What sentencepiece writes for a space."""
_PAIR_MARKS = ("eos_token", "pad_token", "unk_token")
_PAIR = dict(eos_token=_END, pad_token=_PAD, unk_token=_UNKNOWN, model_max_length=512)
"""What transformers' `MarianTokenizer` has where its file says nothing."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _row_format(config: dict) -> tuple[int | None, str, str]:
    return published_length(config), config.get("padding_side") or "right", config.get("truncation_side") or "right"


def _check_size(vocab_size: int, least: int, reason: str) -> None:
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, np.integer)) or not least <= vocab_size < 2**31:
        raise UserError(f"a vocabulary of {vocab_size} tokens {reason}")
