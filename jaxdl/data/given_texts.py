"""Texts as others hand them in: looked at one by one before a library sees them, which would end at them with an error of its own."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxdl.errors import UserError


def given_texts(texts: Any) -> Iterator[str]:
    """The texts of a sequence, one after another, each as `readable` gives it. Raises `UserError` for what is no sequence of texts, such as one text, which would be read letter by letter."""
    if isinstance(texts, (str, bytes)):
        shown = texts if len(texts) < 40 else texts[:40]
        raise UserError(f"one text came where a sequence of texts belongs: give [{shown!r}]")
    if isinstance(texts, Mapping) or not (hasattr(texts, "__iter__") or hasattr(texts, "__getitem__")):
        raise UserError(f"a {type(texts).__name__} came where a sequence of texts belongs: give a list of texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {index} is a {type(text).__name__} and no text: give a str, or leave it out")
        yield readable(text)


def readable(text: str) -> str:
    """The text with U+FFFD for each half of a character that has lost its other half, as JSON may hold it ("\\ud83d", of an emoji that was cut): it has no form in UTF-8. Two halves in a row are a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
