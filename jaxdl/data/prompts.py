"""Rows of tokens for a language model that sees an image: places for the image, a question, an answer (Beyer et al. 2024, arXiv:2407.07726, section 2)."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int, Int32

from jaxdl.data.given_texts import given_texts
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError

IMAGE_TOKEN, BOS = "<image>", "<bos>"


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """What the model is called with, but for the images."""

    tokens: Int32[np.ndarray, "B T"]
    prefix: Int32[np.ndarray, "B"]
    """How many of the real tokens are image and question."""
    valid: Bool[np.ndarray, "B T"]
    """True for real tokens, false for padding."""

    @property
    def answer(self) -> Bool[np.ndarray, "B T"]:
        """True for the tokens of the answer, its end included: those that are learned."""
        return self.valid & (np.cumsum(self.valid, axis=1) > self.prefix[:, None])


class PromptProcessor:
    r"""Questions and answers to rows of tokens, and tokens to answers: `<image>` once for each of `num_image_tokens`, `<bos>`, the question, `"\n"`; then the answer and the end of a text.

    Questions and answers are tokenized each on its own, so that the question has the same tokens with an answer and without. Make one by `from_pretrained`, or by `extending` a tokenizer of one's own.
    """

    def __init__(self, model: tokenizers.Tokenizer, num_image_tokens: int, *, end: int, pad: int):
        self.model, self.num_image_tokens, self.end, self.pad = model, num_image_tokens, end, pad
        self.model.no_padding()
        self.model.no_truncation()
        self.image_token, self.bos = (self._id(mark) for mark in (IMAGE_TOKEN, BOS))
        self.vocab_size = model.get_vocab_size()

    @classmethod
    def extending(cls, tokenizer: Tokenizer, num_image_tokens: int, words: Sequence[str] = ()) -> "PromptProcessor":
        """One whose vocabulary is that of `tokenizer`, which stays as it is, the marks `<bos>` and `<image>`, and `words` that answers may hold, as far as it lacks them."""
        if not isinstance(getattr(tokenizer, "model", None), tokenizers.Tokenizer):
            raise UserError("words can be added to a tokenizer.json only: train one, or load one")
        model = tokenizers.Tokenizer.from_str(tokenizer.model.to_str())
        special = [tokenizers.AddedToken(mark, normalized=False, special=True) for mark in (BOS, IMAGE_TOKEN)]
        model.add_special_tokens([mark for mark in special if model.token_to_id(mark.content) is None])
        model.add_tokens([word for word in words if model.token_to_id(word) is None])
        if not model.encode("\n", add_special_tokens=False).ids:  # Where the tokenizer takes a new line for a space.
            model.add_tokens([tokenizers.AddedToken("\n", normalized=False)])
        return cls(model, num_image_tokens, end=tokenizer.end, pad=tokenizer.pad)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, num_image_tokens: int | None = None, words: Sequence[str] = ()
    ) -> "PromptProcessor":
        """Of a published model's directory: its `tokenizer.json`, extended by what it lacks, and from `preprocessor_config.json` (or the newer `processor_config.json`) the number of an image's tokens, unless it is given. Raises `UserError` where they are missing."""
        count = _published_image_tokens(Path(directory)) if num_image_tokens is None else num_image_tokens
        return cls.extending(Tokenizer.load(directory), count, words)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json` with a configuration that `Tokenizer.load` and transformers read. Makes the directory."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.model.save(str(Path(directory) / "tokenizer.json"))
        marks = {"pad_token": self.pad, "eos_token": self.end, "bos_token": self.bos}
        named = {key: self.model.id_to_token(mark) for key, mark in marks.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": IMAGE_TOKEN}, **named}
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def __call__(
        self, questions: Sequence[str] | Any, answers: Sequence[str] | Any = None, length: int | None = None
    ) -> PromptRows:
        """Rows of `length` tokens, or else of as many as the longest needs. With answers, to train, the padding is at the end, and an answer that is too long is cut, its end is not; without, to be answered, it is at the beginning.

        Raises `UserError` for a question that does not fit, and for answers to other than these questions.
        """
        if isinstance(questions, str) or isinstance(answers, str):
            raise UserError("one text where a sequence of texts belongs: give a list")
        questions, answers = list(given_texts(questions)), None if answers is None else list(given_texts(answers))
        if answers is not None and len(answers) != len(questions):
            raise UserError(f"{len(answers)} answers to {len(questions)} questions: give one for each")
        for question in questions:
            if IMAGE_TOKEN in question:
                raise UserError(f"the question {question!r} holds {IMAGE_TOKEN}, which is put before it here: leave it out")
        image = [self.image_token] * self.num_image_tokens
        heads = [image + ids for ids in self._encode([f"{BOS}{question}\n" for question in questions])]
        tails = [[] for _ in heads] if answers is None else [[*ids, self.end] for ids in self._encode(answers)]
        longest = max((len(head) + len(tail) for head, tail in zip(heads, tails)), default=0)
        length = longest if length is None else length
        tokens, valid = np.full((len(heads), length), self.pad, np.int32), np.zeros((len(heads), length), bool)
        for row, (question, head, tail) in enumerate(zip(questions, heads, tails)):
            room = length - len(head)
            if room < (1 if tail else 0):
                raise UserError(
                    f"{length} tokens have no room for {len(image)} of an image and {len(head) - len(image)} of the question {question!r}: give more"
                )
            if len(tail) > room:
                tail = [*tail[: room - 1], self.end]
            ids = head + tail
            place = slice(0, len(ids)) if answers is not None else slice(length - len(ids), length)
            tokens[row, place], valid[row, place] = ids, True
        return PromptRows(tokens, np.array([len(head) for head in heads], np.int32), valid)

    def decode(self, tokens: Int[np.ndarray, "B T"]) -> list[str]:
        """The answers that rows of tokens spell, each up to its end. Words that were added stay as they are written."""
        marks, texts = (self.pad, self.image_token, self.bos), []
        for row in np.asarray(tokens):
            ends = np.flatnonzero(row == self.end)
            kept = row[: ends[0]] if len(ends) else row
            ids = [int(token) for token in kept if token not in marks]
            texts.append(self.model.decode(ids, skip_special_tokens=False).strip())
        return texts

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Without what the tokenizer itself puts around a text. One text is not worth waking the threads for, and a data pipeline asks for one at a time."""
        if len(texts) == 1:
            return [self.model.encode(texts[0], add_special_tokens=False).ids]
        return [encoded.ids for encoded in self.model.encode_batch(texts, add_special_tokens=False)]

    def _id(self, word: str) -> int:
        if (found := self.model.token_to_id(word)) is None:
            raise UserError(f"the tokenizer has no {word}: make the processor by PromptProcessor.extending, which adds it")
        return found


def _published_image_tokens(directory: Path) -> int:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := directory / name).is_file():
            try:
                config = json.loads(path.read_text("utf-8"))
                return config.get("image_processor", config)["image_seq_length"]
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{path} does not say how many tokens an image has (image_seq_length): give `num_image_tokens`"
                ) from error
    raise UserError(f"{directory} holds no preprocessor_config.json: give a published model's directory, or `num_image_tokens`")
