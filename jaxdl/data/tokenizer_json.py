"""What a configuration adds to a `tokenizer.json`: marks, small letters, and what stands around a text."""

from typing import Any

import tokenizers

from jaxdl.data.tokenizer_config import MARKS_ARE_TEXT, added_marks, mark_of, named_marks
from jaxdl.errors import UserError


def add_marks(model: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that the configuration adds to those of `tokenizer.json`, by transformers' rule. Raises `UserError` where they would have other ids than it says."""
    there, added = model.get_added_tokens_decoder(), added_marks(config)
    more = [mark for index, mark in added.items() if there.get(index) != mark]
    known = {mark.content for mark in (*there.values(), *more)}
    for mark in named_marks(config):
        is_text = config.get(MARKS_ARE_TEXT) and model.token_to_id(mark.content) is not None
        if mark.content not in known and not is_text:
            shown = mark.content == mark_of(config, "unk_token")  # Where ids become text.
            sides = dict(lstrip=mark.lstrip, rstrip=mark.rstrip, single_word=mark.single_word)
            properties = dict(special=not shown, normalized=mark.normalized and not shown)
            more.append(tokenizers.AddedToken(mark.content, **sides, **properties))
    model.add_tokens(more)
    for index, mark in added.items():
        if (found := model.token_to_id(mark.content)) != index:
            reason = f"{mark.content!r} has the id {index} in added_tokens_decoder, and {found} in tokenizer.json"
            raise UserError(f"{reason}: fetch both from one place")


def add_lower_case(model: tokenizers.Tokenizer) -> None:
    """Before everything else that is done to a text, and after marks are cut out of it. A saved tokenizer has it already."""
    rules = tokenizers.normalizers
    if model.normalizer is None:
        model.normalizer = rules.Lowercase()
    elif "A" in model.normalizer.normalize_str("A"):
        model.normalizer = rules.Sequence([rules.Lowercase(), model.normalizer])


def add_ends(model: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """The marks that begin and end each text, those that the configuration calls so. Raises `UserError` where it has none."""
    ends = []
    for field in ("eos_token", "bos_token"):
        if (mark := mark_of(config, field)) is None:
            raise UserError(f"{field!r} is null in tokenizer_config.json beside it, and stands around every text: name it")
        ends.append((mark, model.token_to_id(mark)))
    model.post_processor = tokenizers.processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
