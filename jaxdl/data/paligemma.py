"""What PaliGemma is given and gives back: rows of tokens with places for an image, a question and an answer, and boxes as words (Beyer et al. 2024, arXiv:2407.07726, section 2)."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Bool, Float, Int, Int32

from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError

IMAGE, START = "<image>", "<bos>"
PLACES = tuple(f"<loc{place:04d}>" for place in range(1024))
"""The picture's height, and its width, cut into 1024 equal parts."""
OUTLINES = tuple(f"<seg{code:03d}>" for code in range(128))
"""The codes of an autoencoder of masks, sixteen for an outline."""


@dataclasses.dataclass(frozen=True)
class Rows:
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


class TextProcessor:
    r"""Questions and answers to rows of tokens, and tokens to answers: `<image>` as often as there are patches, `<bos>`, the question, `"\n"`; then the answer and the end of a text.

    Questions and answers are tokenized each on its own, so that the question has the same tokens with an answer and without. Make one by `from_pretrained`, or by `extending` a tokenizer of one's own.
    """

    def __init__(self, model: tokenizers.Tokenizer, patches: int, *, end: int, pad: int):
        self.model, self.patches, self.end, self.pad = model, patches, end, pad
        self.model.no_padding()
        self.model.no_truncation()
        self.image, self.start = (self._id(mark) for mark in (IMAGE, START))
        self.vocabulary = model.get_vocab_size()

    @classmethod
    def extending(cls, tokenizer: Tokenizer, patches: int) -> "TextProcessor":
        """One whose vocabulary is that of `tokenizer`, which stays as it is, and the words of PaliGemma that it lacks."""
        if not isinstance(getattr(tokenizer, "model", None), tokenizers.Tokenizer):
            raise UserError("PaliGemma's words can be added to a tokenizer.json only: train one, or load one")
        model = tokenizers.Tokenizer.from_str(tokenizer.model.to_str())
        special = [tokenizers.AddedToken(mark, normalized=False, special=True) for mark in (START, IMAGE)]
        model.add_special_tokens([mark for mark in special if model.token_to_id(mark.content) is None])
        model.add_tokens([word for word in PLACES + OUTLINES if model.token_to_id(word) is None])
        if not model.encode("\n", add_special_tokens=False).ids:  # Where the tokenizer takes a new line for a space.
            model.add_tokens([tokenizers.AddedToken("\n", normalized=False)])
        return cls(model, patches, end=tokenizer.end, pad=tokenizer.pad)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, patches: int | None = None) -> "TextProcessor":
        """Of a published model's directory: its `tokenizer.json`, and from `preprocessor_config.json` (or the newer `processor_config.json`) the number of patches, unless it is given. Raises `UserError` where they are missing."""
        return cls.extending(Tokenizer.load(directory), _published_patches(Path(directory)) if patches is None else patches)

    def save(self, directory: str | os.PathLike) -> None:
        """As `tokenizer.json` with a configuration that `Tokenizer.load` and transformers read."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.model.save(str(Path(directory) / "tokenizer.json"))
        words = {"pad_token": self.pad, "eos_token": self.end, "bos_token": self.start}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
            key: self.model.id_to_token(word) for key, word in words.items()
        }
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def __call__(self, questions: Sequence[str], answers: Sequence[str] | None = None, length: int | None = None) -> Rows:
        """Rows of `length` tokens, or else of as many as the longest needs. With answers, to train, the padding is at the end, and an answer that is too long is cut, its end is not; without, to be answered, it is at the beginning.

        Raises `UserError` for a question that does not fit, and for answers to other than these questions.
        """
        if isinstance(questions, str) or isinstance(answers, str):
            raise UserError("one text where a sequence of texts belongs: give a list")
        if answers is not None and len(answers) != len(questions):
            raise UserError(f"{len(answers)} answers to {len(questions)} questions: give one for each")
        heads = [[self.image] * self.patches + ids for ids in self._encode([f"{START}{question}\n" for question in questions])]
        tails = [[] for _ in heads] if answers is None else [[*ids, self.end] for ids in self._encode(list(answers))]
        longest = max((len(head) + len(tail) for head, tail in zip(heads, tails)), default=0)
        length = longest if length is None else length
        tokens, valid = np.full((len(heads), length), self.pad, np.int32), np.zeros((len(heads), length), bool)
        for row, (question, head, tail) in enumerate(zip(questions, heads, tails)):
            room = length - len(head)
            if room < (1 if tail else 0):
                raise UserError(
                    f"{length} tokens have no room for {self.patches} of an image and {len(head) - self.patches} of the question {question!r}: give more"
                )
            if len(tail) > room:
                tail = [*tail[: room - 1], self.end]
            ids = head + tail
            place = slice(0, len(ids)) if answers is not None else slice(length - len(ids), length)
            tokens[row, place], valid[row, place] = ids, True
        return Rows(tokens, np.array([len(head) for head in heads], np.int32), valid)

    def decode(self, tokens: Int[np.ndarray, "B T"]) -> list[str]:
        """The answers that rows of tokens spell, each up to its end. Places and outlines stay as words."""
        texts = []
        for row in np.asarray(tokens):
            ends = np.flatnonzero(row == self.end)
            kept = row[: ends[0]] if len(ends) else row
            marks = (self.pad, self.image, self.start)
            texts.append(
                self.model.decode([int(token) for token in kept if token not in marks], skip_special_tokens=False).strip()
            )
        return texts

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Without what the tokenizer itself puts around a text. One text is not worth waking the threads for, and a data pipeline asks for one at a time."""
        if len(texts) == 1:
            return [self.model.encode(texts[0], add_special_tokens=False).ids]
        return [encoded.ids for encoded in self.model.encode_batch(texts, add_special_tokens=False)]

    def _id(self, word: str) -> int:
        if (found := self.model.token_to_id(word)) is None:
            raise UserError(f"the tokenizer has no {word}: it is none of PaliGemma's")
        return found


def places(boxes: Float[np.ndarray, "N 4"]) -> list[str]:
    """Boxes `(top, left, bottom, right)`, as shares of height and width from 0 to 1, in the words of PaliGemma: four `<loc....>` each, top before left, as in its detection tasks (Beyer et al. 2024, section 3.2).

    A word is the part of 1024 in which the edge lies; what is outside of the picture is brought to its border.
    """
    bins = np.clip(np.floor(np.asarray(boxes, np.float64) * len(PLACES)), 0, len(PLACES) - 1).astype(int)
    return ["".join(PLACES[place] for place in box) for box in bins]


_BOX = re.compile(r"((?:<loc\d{4}>){4})\s*((?:<seg\d{3}>){16})?\s*([^;<>]*)")


def boxes(text: str) -> tuple[Float[np.ndarray, "N 4"], list[str]]:
    """The boxes `(top, left, bottom, right)` that an answer such as `<loc0256>… a red ring ; <loc….` names, as shares from 0 to 1, and what is in each.

    An edge is put into the middle of its part, which halves the largest error. Outlines are passed over, and so is what is no box: fewer than four places, or places beyond 1023.
    """
    found, names = [], []
    for match in _BOX.finditer(text):
        edges = [int(place) for place in re.findall(r"<loc(\d{4})>", match[1])]
        if max(edges) < len(PLACES):
            found.append([(edge + 0.5) / len(PLACES) for edge in edges])
            names.append(match[3].strip())
    return np.array(found, np.float32).reshape(-1, 4), names


def _published_patches(directory: Path) -> int:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (path := directory / name).is_file():
            try:
                config = json.loads(path.read_text("utf-8"))
                return config.get("image_processor", config)["image_seq_length"]
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{path} does not say how many patches an image has (image_seq_length): give `patches`"
                ) from error
    raise UserError(f"{directory} holds no preprocessor_config.json: give a published model's directory, or `patches`")
