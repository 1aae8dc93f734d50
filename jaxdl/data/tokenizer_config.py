"""What `tokenizer_config.json` says of a tokenizer, with the older files beside it and what the code of its class adds."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from jaxdl.files import read_json, refused

MARKS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The marks that transformers has names for, in the order in which it adds those that a vocabulary lacks."""
MARKS_ARE_TEXT = "split_special_tokens"
"""transformers' name for reading a mark that stands in a text, such as "</s>" in HTML, as the characters it is written with. Tokenizers that are made here do; published ones do what their file says, most of them not."""

Accepted = dict[str, tuple[Callable[[Any], bool], str]]
"""What an entry may be where it is not null, and how that is said."""
_FLAGS = ("do_lower_case", "strip_punctuation", "lower_cases", "begins_and_ends", MARKS_ARE_TEXT)
_PROPERTIES = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LARGEST_ID = 10**9 - 1


def read_config(directory: Path, classes: Mapping[str, Mapping[str, Any]], *, of_pieces: bool) -> dict[str, Any]:
    """The entries of `tokenizer_config.json`, `{}` where there is none, with what transformers takes from `special_tokens_map.json` and `added_tokens.json` beside an older one.

    What it leaves out is looked up in `classes`, under its `tokenizer_class` or else by the `model_type` of `config.json`. `of_pieces` is true beside a sentencepiece model, for which more can be asked than is done here. Raises `UserError`, naming file and field, for an entry of another type than it has in transformers.
    """
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    _check(config, path, _ACCEPTED | (_ACCEPTED_OF_PIECES if of_pieces else {}))
    if config.get("added_tokens_decoder") is None:
        config.pop("added_tokens_decoder", None)
        if (older := directory / "special_tokens_map.json").is_file():
            named = read_json(older)
            _check(named, older, _ACCEPTED)
            config |= named
        if (older := directory / "added_tokens.json").is_file():
            config["added_tokens_decoder"] = _decoder(read_json(older), {mark.content for mark in named_marks(config)}, older)
    return {**classes.get(_class(config, directory, classes), {}), **config}


def write_config(directory: str | os.PathLike, config: dict[str, Any]) -> None:
    """Writes a `tokenizer_config.json`."""
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (Path(directory) / "tokenizer_config.json").write_text(text + "\n", "utf-8")


def published_length(config: dict[str, Any]) -> int | None:
    """`model_max_length`, unless it is the huge number that stands for none, or else the `max_length` that SigLIP 2 has instead."""
    lengths = (config.get(field) for field in ("model_max_length", "max_length"))
    return next((int(length) for length in lengths if length is not None and length < 1_000_000), None)


def mark_of(config: dict[str, Any], field: str) -> str | None:
    """A mark as the configuration names it, by itself or with its properties."""
    mark = config.get(field)
    return mark["content"] if isinstance(mark, dict) else mark


def named_marks(config: dict[str, Any]) -> list[AddedToken]:
    """The marks that have names, and the other special ones."""
    more = next((config[field] for field in ("extra_special_tokens", "additional_special_tokens") if config.get(field)), [])
    of_the_model = [
        value for field, value in config.items() if field.endswith("_token") and field not in MARKS and _is_text(value)
    ]
    given = [*map(config.get, MARKS), *of_the_model, *(more.values() if isinstance(more, dict) else more)]
    marks = [_added(each, special=True) for each in given if each is not None]
    return list({mark.content: mark for mark in marks}.values())


def added_marks(config: dict[str, Any]) -> dict[int, AddedToken]:
    """The tokens that were added to a vocabulary, by their ids."""
    return {int(index): _added(token) for index, token in sorted(config.get("added_tokens_decoder", {}).items(), key=_id)}


def _id(item: tuple[str, Any]) -> int:
    return int(item[0])


def _added(token: str | dict[str, Any], special: bool = False) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=special)
    given = {name: token[name] for name in _PROPERTIES if name in token}
    return AddedToken(token["content"], **{**given, "special": special or given.get("special", False)})


def _decoder(ids: dict[str, Any], special: set[str], path: Path) -> dict[str, dict[str, Any]]:
    """`added_tokens.json`, which has an id for each token, in the newer form."""
    for token, index in ids.items():
        if not token or not _is_id(index):
            raise refused(path, token, index, "is no id of a token")
    return {str(index): dict(content=token, special=token in special) for token, index in ids.items()}


def _class(config: dict[str, Any], directory: Path, classes: Mapping[str, Mapping[str, Any]]) -> str:
    if (named := config.get("tokenizer_class")) is not None:
        return named.removesuffix("Fast")
    model = directory / "config.json"
    family = read_json(model).get("model_type") if classes and model.is_file() else None
    return next((name for name in classes if name.removesuffix("Tokenizer").lower() == family), "")


def _check(config: dict[str, Any], path: Path, entries: Accepted) -> None:
    for field, (fits, accepted) in entries.items():
        if config.get(field) is not None and not fits(config[field]):
            raise refused(path, field, config[field], f"is not {accepted}")


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def _is_mark(value: Any) -> bool:
    if not isinstance(value, dict):
        return _is_text(value)
    return _is_text(value.get("content")) and all(isinstance(value.get(name, False), bool) for name in _PROPERTIES)


def _are_marks(value: Any) -> bool:
    return isinstance(value, (list, dict)) and all(map(_is_mark, value.values() if isinstance(value, dict) else value))


def _is_decoder(value: Any) -> bool:
    ids = isinstance(value, dict) and all(re.fullmatch(r"[0-9]{1,9}", key) for key in value)
    return ids and all(isinstance(token, dict) and _is_mark(token) for token in value.values())


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_ID


def _is_length(value: Any) -> bool:
    return type(value) in (int, float) and value >= 1 and (value > 1e6 or not math.fmod(value, 1))


_MARK = (_is_mark, "a token, nor an object with the content of one")
_ACCEPTED: Accepted = {
    **dict.fromkeys(MARKS, _MARK),
    **dict.fromkeys(("extra_special_tokens", "additional_special_tokens"), (_are_marks, "a list of tokens")),
    **dict.fromkeys(_FLAGS, (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(("model_max_length", "max_length"), (_is_length, "a whole number above 0")),
    **dict.fromkeys(("padding_side", "truncation_side"), (lambda value: value in ("left", "right"), "left or right")),
    "added_tokens_decoder": (_is_decoder, "an object that has tokens under their ids"),
    "tokenizer_class": (_is_text, "the name of a class"),
}
_ACCEPTED_OF_PIECES: Accepted = {
    "sp_model_kwargs": (lambda value: value == {}, "empty, and nothing of it is read here"),
    "separate_vocabs": (lambda value: value is False, "false: one vocabulary for source and target is read here"),
    "legacy": (lambda value: value is True, "true, which is the only way that texts are cut here"),
}
