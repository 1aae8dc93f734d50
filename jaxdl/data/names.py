"""Names and the languages they are written in: countries, languages and currencies as CLDR names them, or a folder of lists.

The classic set of surnames (Robertson's tutorial, 18 languages) is such a folder.
"""

import copy
import json
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32

from jaxdl.data.digests import digest_of
from jaxdl.data.elements import LabelledText
from jaxdl.data.folders import list_files, require_folder, require_text, told
from jaxdl.data.sources import Info, Source, Split
from jaxdl.data.text_files import read_lines
from jaxdl.errors import UserError

CLDR_LANGUAGES = (
    "cs", "da", "de", "en", "es", "et", "fi", "fr", "hr", "hu", "id", "it", "nl", "pl", "pt", "ro", "sv", "tr",
)  # fmt: skip
"""Of `builtin:names`: eighteen, as the classic set has, all in Latin letters, since an alphabet of its own would give a language away."""

TEST_SHARE = 0.2
_MARKS = " '’ʼ-."
"""What may stand between the letters of a name; numbers and brackets, as of years, are not names."""


class Names(Source[LabelledText]):
    """Names (strings in NFC), each with its language. `entries` are pairs of both; repetitions count once."""

    def __init__(self, entries: Iterable[tuple[str, str]], remarks: str = ""):
        entries = sorted(set(entries))
        classes = tuple(sorted({language for _, language in entries}))
        self.info = Info(classes=classes, remarks=remarks, digest=digest_of(*map("\n".join, zip(*entries))))
        self.names = [name for name, _ in entries]
        self.labels = np.array([self.info.classes.index(language) for _, language in entries], np.int32)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LabelledText:
        return LabelledText(self.names[index], int(self.labels[index]))

    def part(self, split: Split) -> "Names":
        """A fifth of the distinct names is held out, by a fixed seed. Whoever bears a name, it is on one side only: what was learned by heart does not help."""
        distinct = sorted(set(self.names))
        order = np.random.default_rng(0).permutation(len(distinct))
        held_out = {distinct[index] for index in order[: round(TEST_SHARE * len(distinct))]}
        chosen = [index for index, name in enumerate(self.names) if (name in held_out) == (split == "test")]
        part = copy.copy(self)
        part.names, part.labels = [self.names[index] for index in chosen], self.labels[chosen]
        return part


def normalise(name: str) -> str:
    """One spelling of what looks alike: NFC, single spaces."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def cldr_names(languages: Collection[str] = CLDR_LANGUAGES) -> list[tuple[str, str]]:
    """Names of territories, languages and currencies in each of `languages`, as the Unicode CLDR that comes with babel has them.

    A name that several of the languages share ("Iran", "Peso") is left out: no reader could tell. So are names with digits or brackets.
    """
    from babel import Locale  # Not every experiment needs it.

    written: dict[str, set[str]] = {}
    for code in languages:
        locale = Locale.parse(code)
        for table in (locale.territories, locale.languages, locale.currencies):
            for name in map(normalise, table.values()):
                if all(character.isalpha() or character in _MARKS for character in name):
                    written.setdefault(name, set()).add(Locale("en").languages[code])
    return [(name, *found) for name, found in written.items() if len(found) == 1]


def cldr(split: Split) -> Names:
    """`cldr_names`, of which a fifth is held out."""
    return Names(cldr_names()).part(split)


FOLDER_WORDS = "two or more files LANGUAGE.txt with a name a line"


def read_names(folder: Path) -> Names:
    """The names in the files LANGUAGE.txt of a folder, one a line. A name may be in several files.

    Raises `UserError` if there are fewer than two files, or one of them is empty or no text.
    """
    require_folder(folder, FOLDER_WORDS)
    files, _, left_out = list_files(folder, (".txt",), below=False)
    if len(files) < 2:
        raise UserError(
            f"{folder} has {len(files)} {'file' if len(files) == 1 else 'files'} of names: give folder:PATH with {FOLDER_WORDS}"
        )
    entries = []
    for path in files:
        names = [name for name in map(normalise, read_lines(path)) if name]
        if not names:
            raise UserError(f"{path} has no names: give one a line, or remove the file")
        entries += [(name, require_text(path.stem, path)) for name in names]
    return Names(entries, told(left_out))


class Alphabet:
    """Characters as symbols: 0 is the end of a name and the padding after it, 1 any character that is not known, then the known ones follow."""

    END, UNKNOWN = 0, 1

    def __init__(self, characters: str):
        self.characters = characters
        self._symbols = {character: symbol for symbol, character in enumerate(characters, 2)}

    @classmethod
    def of(cls, names: Iterable[str]) -> "Alphabet":
        """All characters of some names, in Unicode's order."""
        return cls("".join(sorted(set().union(*names))))

    @classmethod
    def load(cls, path: Path) -> "Alphabet":
        """Raises `UserError` for what `save` has not written."""
        try:
            characters = json.loads(path.read_text(encoding="utf-8"))["characters"]
            if not isinstance(characters, str):
                raise TypeError(characters)
            return cls(characters)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no alphabet: restore it, or begin a new run") from None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"characters": self.characters}, ensure_ascii=False) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """How many symbols there are."""
        return 2 + len(self.characters)

    def __call__(self, names: Sequence[str], length: int) -> Int32[np.ndarray, "B T"]:
        """`T` is `length`; what is longer is cut, and has no end then."""
        rows = np.zeros((len(names), length), np.int32)
        for row, name in zip(rows, names):
            symbols = [self._symbols.get(character, self.UNKNOWN) for character in name[:length]]
            row[: len(symbols)] = symbols
        return rows

    def decode(self, symbols: Int[np.ndarray, "T"]) -> str:
        """The name up to its end; `�` is what is not known."""
        known = "\0�" + self.characters
        return "".join(known[symbol] for symbol in symbols).partition("\0")[0]
