"""Tokens that a text may hold whole: cut out before anything is done to the rest, as transformers' slow tokenizers do."""

import re
from collections.abc import Callable, Iterable, Mapping

from tokenizers import AddedToken

from jaxdl.errors import UserError


class Marks:
    """The tokens that are cut out of texts, with their ids: those that were `added`, under the ids they were added with, and those that have names, which a vocabulary has or is given in their order.

    Raises `UserError` where what was added has another id, or another name, in the vocabulary.
    """

    def __init__(self, vocabulary: Mapping[str, int], added: Mapping[int, AddedToken], named: Iterable[AddedToken]):
        pieces = {index: piece for piece, index in vocabulary.items()}
        for index, mark in added.items():
            if vocabulary.get(mark.content, index) != index or pieces.get(index, mark.content) != mark.content:
                there = f"{pieces[index]!r}" if index in pieces else f"{vocabulary[mark.content]} of it"
                raise UserError(f"added_tokens_decoder has {mark.content!r} as token {index}, which in the vocabulary is {there}")
        self._tokens = {mark.content: mark for mark in added.values()}
        self.ids = {mark.content: index for index, mark in added.items()}
        known = {*vocabulary, *self.ids}
        for mark in named:
            if mark.content not in self.ids:
                self._tokens[mark.content] = AddedToken(mark.content, normalized=False, special=True)
                self.ids[mark.content] = vocabulary.get(mark.content, len(known))
                known.add(mark.content)
        longest_first = sorted(map(re.escape, self.ids), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first)})" if self.ids else "(?!)")

    def apart(self, text: str, pieces: Callable[[str], list[str]]) -> list[str]:
        """The marks of a text as they are, and the `pieces` of what stands between them."""
        return [piece for part in self.cut(text) for piece in ([part] if part in self.ids else pieces(part))]

    def cut(self, text: str) -> list[str]:
        """The text in parts: each is one of `ids`, or holds none of them. White space around a mark goes with it where the mark asks for it."""
        parts = [part for part in self._pattern.split(text) if part]
        for place, part in enumerate(parts):
            if (mark := self._tokens.get(part)) is None:
                continue
            before, after = place - 1 if place else None, place + 1 if place + 1 < len(parts) else None
            if mark.rstrip and after is not None:
                parts[after] = parts[after].lstrip()
            if mark.lstrip and before is not None:
                parts[before] = parts[before].rstrip()
            if mark.single_word:  # Part of a longer word it is no mark.
                if before is not None and parts[before][-1:] not in ("", " "):
                    parts[before], parts[place] = parts[before] + part, ""
                elif after is not None and parts[after][:1] not in ("", " "):
                    parts[after], parts[place] = part + parts[after], ""
        return [part for part in parts if part]
