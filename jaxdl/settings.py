"""How the settings in a published `config.json` are read: under all their names, each with the default of the class of transformers that wrote it, and checked.

What is asked for beyond them is refused, unless it is known to change nothing that a model computes.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxdl.errors import UserError

_MOST = 2**31 - 1
"""The largest whole number of a setting: what is indexed by 32 bits."""
_SHOWN = 80
"""How much of a value an error shows."""

# Settings that all classes of transformers had at some time and that change nothing here: types and places of weights, what is returned, training, generation, labels, tokenizers, and a file's own history.
_UNUSED = re.compile(
    r"""_.* | .*_token(_ids?)? | .*dropout.* | .*drop(_path)?(_rate)? | .*layerdrop | init(ializer)?_.* | .*_init(_value)?
    | architectures | model_type | (torch_)?dtype | transformers(_js)?(_version|_weights|\.js_config) | name_or_path | auto_map
    | gradient_checkpointing | torchscript | use_bfloat16 | use_cache | cache_implementation | return_dict.* | output_.*
    | (attn|experts)_implementation | use_flash_attention(_2)? | use_sdpa | chunk_size_feed_forward | tf_legacy_loss | unsloth.*
    | base_model_(tp|pp|ep|fsdp)_plan | problem_type | finetuning_task | task.* | prefix | id2label | label2id | num_labels
    | is_(encoder_)?decoder | tie_(encoder_decoder|word_embeddings|last_hidden_states) | cross_attention_hidden_size | is_composition
    | (max|min)_(new_)?(length|tokens) | do_sample | early_stopping | num_beam(s|_groups) | num_return_sequences | low_memory
    | temperature | top_[kp] | min_p | typical_p | penalty_alpha | (.*_)?(diversity|repetition|length|decay_length)_penalty
    | (.*_)?no_repeat_ngram_size | bad_words_ids | .*suppress_tokens | remove_invalid_values | (epsilon|eta)_cutoff | .*assistant.*
    | target_lookbehind | prompt_lookup_.* | tokenizer.* | vocab_file | model_max_length | max_seq(uence)?_len(gth)? | (padding|truncation)_side
    | processor.* | (feature_extractor|image_processor)_type | language.* | (src|source|tgt|target)_lang(s|uage)?
    | ignore_index | label_smoothing.* | .*loss.* | train(ing)?_.* | wandb.*
    | seed | license | author.* | description | title | url | tags | datasets? | version | date | created.* | comment.* | onnx.*""",
    re.VERBOSE,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a file that leaves the setting out means by it, and what it may say."""

    default: Any
    accepted: str
    """What may be given, in words."""
    accepts: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value


def count(default: int | None, *, least: int = 1, most: int = _MOST) -> Setting:
    """A whole number."""
    within = lambda value: type(value) is int and least <= value <= most
    return Setting(default, f"a whole number from {least} to {most}", within)


def depth(default: int) -> Setting:
    """How many blocks there are; each takes time to build, so that thousands of them are a mistake."""
    return count(default, least=0, most=1000)


def number(default: float | None, *, above: float | None = None) -> Setting:
    """A number from 0 on, or one `above` a bound."""
    within = lambda value: type(value) in (int, float) and (0 <= value <= 1e30 if above is None else above < value <= 1e30)
    return Setting(default, "a number from 0 on" if above is None else f"a number above {above}", within, float)


def flag(default: bool) -> Setting:
    """True or false."""
    return Setting(default, "true or false", lambda value: type(value) is bool)


def fixed(value: Any, *same: Any) -> Setting:
    """The one value that is computed here; `same` mean the same."""
    return Setting(value, repr(value), lambda given: any(given == each for each in (value, *same)), lambda _: value)


def optional(setting: Setting) -> Setting:
    """The setting, or null."""
    accepts = lambda value: value is None or setting.accepts(value)
    read = lambda value: None if value is None else setting.read(value)
    return dataclasses.replace(setting, accepted=f"{setting.accepted} or null", accepts=accepts, read=read)


def side(default: int) -> Setting:
    """The side of a square in pixels, which newer files may give twice, as height and width."""
    inner = count(default, most=2**15)
    square = lambda value: (
        isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1] and inner.accepts(value[0])
    )
    return Setting(
        default,
        f"the side of a square, {inner.accepted},",
        lambda value: inner.accepts(value) or square(value),
        lambda value: value[0] if isinstance(value, list | tuple) else value,
    )


def anything(default: Any = None) -> Setting:
    """A setting that its reader checks."""
    return Setting(default, "anything", lambda _: True)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one class of transformers' configurations.

    `owner` has them; `aliases` are other names of them (transformers' `attribute_map`), and `unused` are names that the class has or had for what changes nothing here.
    """

    owner: str
    fields: Mapping[str, Setting]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: Collection[str] = ()

    def read(self, config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """All settings by name, those that `config` leaves out as the class has them. `where` is said in errors, as " in vision_config".

        Raises `UserError` that names the setting for a value that is not read here, for one that is given under two names with different values, and for a setting that is not the class's.
        """
        said: dict[str, str] = {}
        for name, value in config.items():
            field = self.aliases.get(name, name)
            if field not in self.fields:
                self._refuse_unknown(name, value, where)
            elif field in said and config[said[field]] != value:
                raise UserError(
                    f"{said[field]}{where} is {_shown(config[said[field]])} and {name} {_shown(value)}: "
                    "both are names of one setting, give one of them"
                )
            else:
                said[field] = name
        return {field: self._value(field, config, said.get(field), where) for field in self.fields}

    def _value(self, field: str, config: Mapping[str, Any], name: str | None, where: str) -> Any:
        setting = self.fields[field]
        if name is None:
            return setting.default
        if not setting.accepts(config[name]):
            raise UserError(
                f"{name}{where} is {_shown(config[name])}: {self.owner} has {setting.accepted}, and nothing else is read here; "
                "correct it, or give another model"
            )
        return setting.read(config[name])

    def _refuse_unknown(self, name: str, value: Any, where: str) -> None:
        """Unless it is known to change nothing, or asks for nothing: null, false, 0, or what is empty."""
        if name in self.unused or _UNUSED.fullmatch(name) or value is None:
            return
        near = difflib.get_close_matches(name.lower(), [*self.fields, *self.aliases], n=1, cutoff=0.85)
        if near or value not in (False, 0, "", [], {}):
            suggestion = (
                f"did you mean {near[0]!r}?" if near else "take it out of config.json if it changes nothing that is computed"
            )
            raise UserError(f"{name}{where} is {_shown(value)}, a setting that {self.owner} has not here: {suggestion}")


def section(config: Mapping[str, Any], name: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a part, which is `default` where it is left out or null. Raises `UserError` if it is no object."""
    if (part := config.get(name)) is None:
        return default
    if not isinstance(part, Mapping):
        raise UserError(f"{name} is {_shown(part)}: an object with the settings of this part is read here; correct it")
    return part


def refuse_uneven(
    given: Mapping[str, Any], width: str = "hidden_size", heads: str = "num_attention_heads", where: str = ""
) -> None:
    """Raises `UserError` where the setting `width` cannot be split into as many heads as `heads` says."""
    if given[width] % given[heads]:
        raise UserError(
            f"{width} of {given[width]}{where} cannot be split into {given[heads]} heads ({heads}): correct one of them"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
