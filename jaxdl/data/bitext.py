"""Sentences in two languages: what CLDR says in both, and files of lines that are translations of each other."""

import datetime
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdl.data.digests import digest_of
from jaxdl.data.elements import Translation
from jaxdl.data.names import normalise
from jaxdl.data.sources import Info, Source, Split
from jaxdl.data.text_files import read_lines
from jaxdl.data.tfds import Record, text_of
from jaxdl.errors import UserError

CLDR_PHRASES = 16_000
"""Of `builtin:cldr`, beside its names."""
_TEST_PHRASES, _TEST_SHARE = 800, 0.1
"""Held out: so many phrases, and this share of the names."""


class Pairs(Source[Translation]):
    """Sentences and their translations, in memory."""

    def __init__(self, pairs: Sequence[Translation], left_out: int = 0, reason: str = ""):
        digest = digest_of(*("\n".join(side) for side in zip(*((pair.source, pair.target) for pair in pairs))))
        self.pairs, self.info = pairs, Info(left_out=left_out, reason=reason, digest=digest)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Translation:
        return self.pairs[index]


def pair_exists(stem: Path, *, source: str = "en", target: str = "de") -> bool:
    """Whether there are files `stem.source` and `stem.target`, plain or as `.gz`."""
    return all(_file(stem, language) for language in (source, target))


def _file(stem: Path, language: str) -> Path | None:
    names = (f"{stem.name}.{language}", f"{stem.name}.{language}.gz")
    return next((stem.with_name(name) for name in names if stem.with_name(name).is_file()), None)


FOLDER_WORDS = "files train.en and train.de (or other languages), plain or .gz, a sentence a line, or folder:PATH/NAME for files NAME.en and NAME.de"


def read_pairs(stem: Path, *, source: str = "en", target: str = "de") -> Pairs:
    """The lines of the files `stem.source` and `stem.target`, plain or as `.gz`. Where either line is empty the pair is left out.

    Raises `UserError` for files that are missing, empty, no text or of different numbers of lines.
    """
    _two(source, target)
    sides = []
    for language in (source, target):
        path = _file(stem, language)
        if path is None:
            file = f"{stem / 'train' if stem.is_dir() else stem}.{language}"
            raise UserError(f"there is no file {file} or {file}.gz: give folder:PATH with {FOLDER_WORDS}")
        sides.append([line.strip() for line in read_lines(path)])
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{stem}.{source} has {len(sides[0]):,} lines and {stem}.{target} {len(sides[1]):,}: each line must have its translation"
        )
    pairs = [Translation(one, other) for one, other in zip(*sides) if one and other]
    if not pairs:
        raise UserError(f"{stem}.{source} and {stem}.{target} have no sentences: put one a line")
    return Pairs(pairs, len(sides[0]) - len(pairs), "have an empty side")


def translation_records(
    features: Mapping[str, Any], *, source: str = "en", target: str = "de"
) -> Callable[[Record], Translation] | None:
    """How TFDS' records with a text in each language become elements; None where they have not both."""
    _two(source, target)
    if not {source, target} <= set(features):
        return None
    return lambda record: Translation(text_of(record[source]), text_of(record[target]))


def _two(source: str, target: str) -> None:
    if source == target:
        raise UserError(f"source and target are both {source!r}: there is nothing to translate")


def cldr_pairs(split: Split, *, source: str = "en", target: str = "de") -> Pairs:
    """What the Unicode CLDR that comes with babel says in two languages: names, and phrases that are made of them.

    - `name`: territories, languages, scripts and currencies.
    - `phrase`: dates ("Thursday, March 5, 2026"), spans of time ("in 3 weeks"), quantities ("1,234.5 kilometers"), prices, lists of territories. Numbers are written, words ordered and inflected as each language does.

    A tenth of the names and 800 phrases are held out, by a fixed seed; no source is on both sides, and lists have only names to train on. A held-out phrase is a new combination of known words, while of a held-out name one can only guess how the languages spell alike (Albania, Albanien), which is hard. Raises `UserError` for a language that CLDR does not have.
    """
    _two(source, target)
    return Pairs(_cldr(source, target)[split])


@functools.cache
def _cldr(source: str, target: str) -> dict[Split, list[Translation]]:
    from babel import Locale, UnknownLocaleError

    try:
        locales = [Locale.parse(code) for code in (source, target)]
    except (UnknownLocaleError, ValueError) as error:
        raise UserError(f"CLDR does not know the language: {error}; give codes such as en, de, fr") from None
    random = np.random.default_rng(0)

    names: dict[str, str] = {}
    for table in ("territories", "languages", "scripts", "currencies"):
        one, other = (getattr(locale, table) for locale in locales)
        for key in sorted(one.keys() & other.keys()):
            # Numbers and brackets belong to what is no longer in use, "Pseudo" to what tests programs.
            if not re.search(r"[()\d]|Pseudo", one[key] + other[key]):
                names.setdefault(normalise(one[key]), normalise(other[key]))
    order = random.permutation(list(names)).tolist()
    held_out = set(order[: round(_TEST_SHARE * len(names))])

    one, other = (locale.territories for locale in locales)
    known = names.keys() - held_out
    phrases: dict[str, str] = {}
    for phrase, translation in _phrases(random, locales, [key for key in sorted(one.keys() & other.keys()) if one[key] in known]):
        if phrase not in names:
            phrases.setdefault(phrase, translation)
        if len(phrases) == CLDR_PHRASES:
            break

    made = [Translation(*pair, "phrase") for pair in phrases.items()]
    named = [[Translation(*pair, "name") for pair in names.items() if (pair[0] in held_out) == side] for side in (False, True)]
    return {"train": named[0] + made[_TEST_PHRASES:], "test": named[1] + made[:_TEST_PHRASES]}


_CURRENCIES = "AUD BRL CAD CHF CNY CZK DKK EUR GBP HUF INR JPY KRW MXN NOK PLN SEK TRY USD ZAR".split()


def _phrases(random: np.random.Generator, locales: Sequence[Any], territories: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Endlessly the same phrase in both locales; many come again."""
    from babel.dates import format_date, format_timedelta
    from babel.lists import format_list
    from babel.numbers import format_currency
    from babel.units import format_unit

    shared = set.intersection(*(set(locale.unit_display_names) for locale in locales))
    # Where a language has no word for a unit, babel writes its key.
    units = [unit for unit in sorted(shared) if all(unit not in format_unit(1, unit, locale=locale) for locale in locales)]
    any_of = lambda choices: choices[int(random.integers(len(choices)))]
    while True:
        number = round(10 ** random.uniform(0, 4), int(random.integers(2)))
        match random.integers(5):
            case 0:
                day = datetime.date(1900, 1, 1) + datetime.timedelta(days=int(random.integers(73_000)))
                write = functools.partial(format_date, day, any_of(["full", "long"]))
            case 1:
                span = datetime.timedelta(seconds=any_of([-1, 1]) * round(10 ** random.uniform(0, 10)))
                write = functools.partial(format_timedelta, span, add_direction=True)
            case 2:
                write = functools.partial(format_unit, number, any_of(units))
            case 3:
                write = functools.partial(format_currency, number, any_of(_CURRENCIES), format_type="name")
            case _:
                chosen = random.choice(len(territories), int(random.integers(2, 4)), replace=False)
                style = any_of(["standard", "or"])

                def write(locale: Any, chosen: Sequence[int] = chosen, style: str = style) -> str:
                    return format_list([locale.territories[territories[index]] for index in chosen], style, locale=locale)

        first, second = (normalise(write(locale=locale)) for locale in locales)
        yield first, second
