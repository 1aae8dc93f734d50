"""Sentences in two languages, for translation: where they come from, and how they are packed into rows of one length."""

import datetime
import functools
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxdl.data.names import normalise
from jaxdl.data.sources import HELD_OUT_NAMES, TFDS, Split
from jaxdl.errors import UserError, unknown

CLDR_PHRASES = 16_000
"""Of `builtin:cldr`, beside its names."""
_TEST_PHRASES, _TEST_SHARE = 800, 0.1
"""Held out: so many phrases, and this share of the names."""


class Pairs:
    """A source of sentences and their translations: `source[i]` is a dict of strings, `source`, `target` and `kind`, which says what sort of sentence it is where the data knows."""

    classes = ()

    def __init__(self, pairs: Iterable[tuple[str, str]], kinds: Sequence[str] = ()):
        self.pairs = list(pairs)
        self.kinds = tuple(kinds) or ("",) * len(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, target = self.pairs[index]
        return {"source": source, "target": target, "kind": self.kinds[index]}

    @property
    def sources(self) -> list[str]:
        return [source for source, _ in self.pairs]

    @property
    def targets(self) -> list[str]:
        return [target for _, target in self.pairs]


def open_pairs(spec: str, split: Split, source: str, target: str, *, data_dir: str = "", part: str = "") -> Pairs:
    """The pairs that `spec` names, from the language `source` to `target`, both by codes as "en" and "de".

    `builtin:cldr` (see `cldr_pairs`); `tfds:NAME[/CONFIG]` with a text for each language; `folder:PATH` with files `train.en`, `train.de` and, held out, `val.en`, `val.de` (or test, dev …), a sentence a line and the same lines in both, plain or as `.gz`; `folder:PATH/NAME` names such a pair of files itself, and what is held out of `folder:PATH/train` lies beside it. `part`, where given, is another part of the same data instead of the split: a pair of files in the folder, by their name without a language, or a split that TFDS has.

    Raises `UserError` for anything else, and for data that is missing, empty, no UTF-8 or of different numbers of lines.
    """
    if source == target:
        raise UserError(f"--source and --target are both {source!r}: there is nothing to translate")
    kind, _, name = spec.partition(":")
    match kind, name:
        case "builtin", "cldr" if part:
            raise UserError(f"{spec} has no part {part!r}: only folder:PATH and tfds:NAME have further parts")
        case "builtin", "cldr":
            return cldr_pairs(split, source, target)
        case "builtin", _:
            raise unknown("built-in set of sentences", name, ("cldr",))
        case "tfds", str(name) if name:
            return _prepared(name, split, part, source, target, data_dir)
        case "folder", str(name) if name:
            path = Path(name).expanduser()
            stem = (path if path.is_dir() else path.parent) / part if part else _stem(path, split, source, target)
            return read_pairs(stem, source, target)
    raise UserError(
        f"--data {spec!r} is no set of sentences: give builtin:cldr, tfds:NAME or folder:PATH with files train.{source} and train.{target}"
    )


def _prepared(name: str, split: Split, part: str, source: str, target: str, data_dir: str) -> Pairs:
    prepared = TFDS(name, split, data_dir, part)
    text = lambda value: value.decode() if isinstance(value, bytes) else str(value)
    examples = [prepared[index] for index in range(len(prepared))]
    if not examples or not {source, target} <= examples[0].keys():
        found = ", ".join(examples[0]) if examples else "nothing"
        raise UserError(f"TFDS {name!r} has {found}: choose a data set with texts in {source} and {target}")
    return Pairs((text(example[source]), text(example[target])) for example in examples)


def _stem(path: Path, split: Split, source: str, target: str) -> Path:
    """What the two files of a split are called without their languages."""
    if not path.is_dir():
        if split == "train" or path.name != "train":
            return path
        path = path.parent
    names = ("train",) if split == "train" else HELD_OUT_NAMES
    for name in names:
        if all(_file(path / name, language) for language in (source, target)):
            return path / name
    raise UserError(
        f"{path} has no files {names[0]}.{source} and {names[0]}.{target}, plain or .gz: put them there, or give folder:PATH/NAME for files NAME.{source}"
    )


def _file(stem: Path, language: str) -> Path | None:
    names = (f"{stem.name}.{language}", f"{stem.name}.{language}.gz")
    return next((stem.with_name(name) for name in names if stem.with_name(name).is_file()), None)


def read_pairs(stem: Path, source: str, target: str) -> Pairs:
    """The lines of the files `stem.source` and `stem.target`, plain or as `.gz`. Where either line is empty the pair is left out."""
    sides = []
    for language in (source, target):
        path = _file(stem, language)
        if path is None:
            raise UserError(
                f"there is no file {stem}.{language} or {stem}.{language}.gz: give folder:PATH, or folder:PATH/NAME for files NAME.{source} and NAME.{target}"
            )
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            # Not splitlines(), which also splits at characters that occur in sentences.
            sides.append([line.strip() for line in content.decode("utf-8-sig").removesuffix("\n").split("\n")])
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no text in UTF-8 (byte {error.start}): convert it") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read ({error}): fetch it again") from None
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{stem}.{source} has {len(sides[0]):,} lines and {stem}.{target} {len(sides[1]):,}: each line must have its translation"
        )
    pairs = [(one, other) for one, other in zip(*sides) if one and other]
    if not pairs:
        raise UserError(f"{stem}.{source} and {stem}.{target} have no sentences: put one a line")
    return Pairs(pairs)


def cldr_pairs(split: Split, source: str, target: str) -> Pairs:
    """What the Unicode CLDR that comes with babel says in two languages: names, and phrases that are made of them.

    - `name`: territories, languages, scripts and currencies.
    - `phrase`: dates ("Thursday, March 5, 2026"), spans of time ("in 3 weeks"), quantities ("1,234.5 kilometers"), prices, lists of territories. Numbers are written, words ordered and inflected as each language does.

    A tenth of the names and 800 phrases are held out, by a fixed seed; no source is on both sides, and lists have only names to train on. A held-out phrase is a new combination of known words, while of a held-out name one can only guess how the languages spell alike (Albania, Albanien), which is hard. Raises `UserError` for a language that CLDR does not have.
    """
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

    kept = [pair for pair in names.items() if (pair[0] in held_out) == (split == "test")]
    made = list(phrases.items())
    made = made[_TEST_PHRASES:] if split == "train" else made[:_TEST_PHRASES]
    return Pairs(kept + made, ["name"] * len(kept) + ["phrase"] * len(made))


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


class Packed:
    """A source of rows with several pairs each, one after the other, as many as fit into `length` source and `length` target tokens (Krell et al. 2021): sentences of all lengths in one shape with little padding.

    The paper's batches are of sentences of similar length (Vaswani et al. 2017, section 5.1). Packing does the same against padding, and needs one shape, which is compiled once, and no buffer of sentences that wait for others of their length: a batch depends on its number alone, which an exact resume needs. Of the experiment's rows of CLDR 96 % is filled, of Multi30k 92 %.

    `source[i]` is a dict of arrays of `length` tokens: `source`, each sentence with its `end`; `target`, each with `start` before it; `labels`, the token that comes next, `end` at last; and the numbers of the pairs in the row, from 1, `source_segments` and `target_segments`, 0 where `pad` is. Which pairs share a row is decided once, in an order that depends on their number alone. Pairs that are longer are left out, `dropped` of them. Raises `UserError` if there is no shorter one.
    """

    classes = ()

    def __init__(
        self, pairs: Sequence[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]], length: int, *, start: int, end: int, pad: int
    ):
        self.pairs, self.length, self.start, self.end, self.pad = pairs, length, start, end, pad
        sizes = np.array([[len(source) + 1, len(target) + 1] for source, target in pairs], np.int32).reshape(-1, 2)
        self.rows = pack(sizes, length)
        self.dropped = int((sizes > length).any(1).sum())
        if not self.rows:
            raise UserError(f"none of {len(pairs)} pairs has at most {length} tokens on either side: give a longer --length")
        self.filled = float(sizes[(sizes <= length).all(1)].sum() / (2 * length * len(self.rows)))
        """The share of tokens that is no padding."""
        self.target_tokens = float(sizes[(sizes <= length).all(1), 1].sum() / len(self.rows))
        """Of a row, on average."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = lambda value: np.full(self.length, value, np.int32)
        row = dict(source=tokens(self.pad), source_segments=tokens(0), target=tokens(self.pad), target_segments=tokens(0), labels=tokens(self.pad))  # fmt: skip
        here = there = 0
        for number, pair in enumerate(self.rows[index], 1):
            source, target = self.pairs[pair]
            reading, writing = slice(here, here + len(source) + 1), slice(there, there + len(target) + 1)
            row["source"][reading] = np.append(source, self.end)
            row["target"][writing] = np.append(self.start, target)
            row["labels"][writing] = np.append(target, self.end)
            row["source_segments"][reading] = row["target_segments"][writing] = number
            here, there = reading.stop, writing.stop
        return row


_OPEN_ROWS = 512
"""Rows that a pair may still be put into. With more of them, packing takes longer and saves next to nothing."""


def pack(sizes: Int[np.ndarray, "N 2"], length: int) -> list[list[int]]:
    """Rows of indices of pairs, of which both sides add up to at most `length`; each pair goes into the first row with room. Longer ones are in none."""
    rows: list[list[int]] = []
    open_rows: list[int] = []
    room = np.zeros((_OPEN_ROWS, 2), np.int64)
    for index in np.random.default_rng(0).permutation(len(sizes)).tolist():
        size = sizes[index]
        if (size > length).any():
            continue
        fits = (room[: len(open_rows)] >= size).all(1)
        if fits.any():
            place = int(fits.argmax())
        else:
            place = len(open_rows) if len(open_rows) < _OPEN_ROWS else int(room.sum(1).argmin())
            open_rows[place : place + 1] = [len(rows)]
            rows.append([])
            room[place] = length
        rows[open_rows[place]].append(index)
        room[place] -= size
    return rows


def buckets(lengths: Sequence[int], shortest: int = 16) -> dict[int, list[int]]:
    """Indices of sentences by the length that they are padded to, the next of `shortest`, its double, and so on: a few shapes for all, and at most half of each is padding but for the shortest."""
    found: dict[int, list[int]] = {}
    for index, length in sorted(enumerate(lengths), key=lambda each: each[1]):
        size = shortest
        while size < length:
            size *= 2
        found.setdefault(size, []).append(index)
    return found
