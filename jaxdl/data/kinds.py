"""The kinds of data, and the one door to all of them: `train, held_out = KIND.open("builtin:digits")`."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from jaxdl.data import bitext, crowded, documents, glyphs, images, names, scenes, tables
from jaxdl.data.code import Docstrings
from jaxdl.data.elements import AnnotatedImage, CaptionedImage, LabelledImage, LabelledText, TableRow, TextPair, Translation
from jaxdl.data.sources import Info, Mapped, Source, Split
from jaxdl.data.tfds import TFDS, Record
from jaxdl.errors import UserError, unknown
from jaxdl.files import local_path

E = TypeVar("E")

HELD_OUT_NAMES = ("val", "validation", "valid", "dev", "test")
"""What the held-out part of a folder may be called; the first that is there is taken."""
_TFDS_SPLITS = {"train": ("train",), "test": ("validation", "test")}


@dataclasses.dataclass(frozen=True)
class Folder(Generic[E]):
    """How a kind of data lies in files."""

    read: Callable[..., Source[E]]
    """`(path, **options)`: all that is at `path`. Raises `UserError` for what is missing or broken."""
    words: str
    """What is in a folder, as the end of "give folder:PATH with"."""
    part: str = "{}"
    """How the files of a part are named after its path."""
    exists: Callable[..., bool] = lambda path: path.is_dir()
    """`(path, **options)`: whether there is a part at `path`, such as `PATH/train`."""
    cut: Callable[[Source[E], Split], Source[E]] | None = None
    """How data without parts is cut into one to train on and a held-out one; where it is None, the held-out part has to be there."""


@dataclasses.dataclass(frozen=True)
class Records(Generic[E]):
    """How records of TFDS become elements."""

    element: Callable[..., Callable[[Record], E] | None]
    """`(features, **options)`: the function of a record; None where these features are not enough."""
    words: str
    """The features that it takes."""


@dataclasses.dataclass(frozen=True)
class Kind(Generic[E]):
    """A kind of data. The `options` of `open` are keywords of its readers: each is given those that it has, and one that none has is a `TypeError`."""

    name: str
    """In words, in the plural."""
    element: type[E]
    builtin: Mapping[str, Callable[..., Source[E]]] = dataclasses.field(default_factory=dict)
    """By name `(split, **options)`: sets that packages bring along, or that are generated."""
    folder: Folder[E] | None = None
    tfds: Records[E] | None = None
    same_classes: bool = False
    """Whether training and held-out data must have the same classes."""

    def open(
        self,
        data: str,
        eval_data: str = "",
        *,
        data_dir: str = "",
        wanted: Callable[[E], bool] | None = None,
        reason: str = "",
        **options: Any,
    ) -> tuple[Source[E], Source[E]]:
        """What to train on and what is held out: of `data` itself, or of `eval_data` where that is given. Both are `builtin:NAME`, `tfds:NAME[/CONFIG][:VERSION]`, prepared under `data_dir`, or `folder:PATH`.

        A folder is what it says in `folder.words`, with sub-folders `train` and one of `HELD_OUT_NAMES`, or is named by its part to train on, beside which the held-out part lies. A folder of `eval_data` is taken whole unless it has a `train`. Of both only those elements remain of whose annotations `wanted` is true; `reason` says why others are left out, such as "have no caption".

        Raises `UserError` for anything else, for data that is missing, broken or empty, for held-out data that is trained on, and for different classes where they must be the same.
        """
        self._check(options)
        self._refuse_overlap(data, eval_data, options)
        sources = []
        for spec, split in ((data, "train"), (eval_data or data, "test")):
            whole = self._explicit_eval_folder(eval_data, options) if split == "test" else None
            if whole is not None:
                source = _call(self.folder.read, whole, options)
            else:
                source = self._open_split(spec, split, "", data_dir, options)
            sources.append(self._finish(source, spec, wanted, reason))
        train, held_out = sources
        if self.same_classes and train.info.classes != held_out.info.classes:
            raise _other_classes(train.info, held_out.info)
        return train, held_out

    def open_part(self, data: str, part: str, *, data_dir: str = "", **options: Any) -> Source[E]:
        """A further part of `data` by its name: `folder:PATH/part`, a split of TFDS, or "train" or "test" of a built-in set."""
        self._check(options)
        return self._finish(self._open_split(data, "test", part, data_dir, options), data, None, "")

    def _explicit_eval_folder(self, eval_data: str, options: Mapping[str, Any]) -> Path | None:
        """The folder that `eval_data` names, if all of it is meant: where it has no part `train`."""
        if self.folder is None or not (path := _path(eval_data)):
            return None
        return path if self._exists(path, options) and not self._exists(path / "train", options) else None

    def _open_split(self, spec: str, split: Split, part: str, data_dir: str, options: Mapping[str, Any]) -> Source[E]:
        """One split, or the `part` that is named."""
        form, _, name = spec.partition(":")
        match form, name:
            case "builtin", str(name) if name and self.builtin:
                if name not in self.builtin:
                    raise unknown(f"built-in set of {self.name}", name, self.builtin)
                if part not in ("", "train", "test"):
                    raise unknown(f"part of {spec}", part, ("train", "test"))
                return _call(self.builtin[name], part or split, options)
            case "tfds", str(name) if name and self.tfds:
                records = TFDS(name, splits=_TFDS_SPLITS[split], part=part, data_dir=data_dir)
                function = _call(self.tfds.element, records.features, options)
                if function is None:
                    raise UserError(
                        f"TFDS {name!r} has {', '.join(records.features)}, and {self.name} need {self.tfds.words}: choose another data set"
                    )
                return Mapped(records, _naming(spec, function))
            case "folder", str(name) if name and self.folder:
                return self._open_folder(_path(spec), split, part, options)
        given = f"{spec!r} cannot be opened as {self.name}" if spec else f"there are no {self.name} without a name"
        raise UserError(f"{given}: give {self.accepted()}")

    def _open_folder(self, path: Path, split: Split, part: str, options: Mapping[str, Any]) -> Source[E]:
        """`path` or its `train` to train on; held out is what lies in or beside it under one of the usual names, or is cut off."""
        if part:
            beside = not self._exists(path / part, options) and self._exists(path.parent / part, options)
            return _call(self.folder.read, (path.parent if beside else path) / part, options)
        train = self._train_folder(path, options)
        alone = train == path and self._exists(path, options)
        cut = self.folder.cut if alone else None
        root = path.parent if alone else path
        beside = cut is None or path.name == "train"
        parts = (root / name for name in HELD_OUT_NAMES if beside and root / name != train)
        held_out = next((each for each in parts if self._exists(each, options)), None)
        if split == "test" and held_out:
            return _call(self.folder.read, held_out, options)
        source = _call(self.folder.read, train, options)
        if cut and not held_out:
            if not len(found := cut(source, split)):
                raise UserError(
                    f"{train} has too few {self.name} to hold some of them out, {len(source)}: give more, or other data to measure on"
                )
            return found
        if split == "train":
            return source
        raise UserError(
            f"there is no held-out data beside {train}: put it into {self.folder.part.format(root / 'val')}, or give other data to measure on"
        )

    def _train_folder(self, path: Path, options: Mapping[str, Any]) -> Path:
        return path / "train" if self._exists(path / "train", options) else path

    def _refuse_overlap(self, data: str, eval_data: str, options: Mapping[str, Any]) -> None:
        """Held-out data must not be what is trained on."""
        held_out = self._explicit_eval_folder(eval_data, options)
        path = _path(data)
        if held_out and path and self._train_folder(path, options).resolve() == held_out.resolve():
            raise UserError(f"{eval_data} would be trained on and measured on: give other data to measure on")

    def _finish(self, source: Source[E], spec: str, wanted: Callable[[E], bool] | None, reason: str) -> Source[E]:
        """Leaves out what is not wanted, and keeps the spec for messages."""
        total = len(source)
        if wanted is not None:
            source = source.where(wanted, reason)
        source.info = dataclasses.replace(source.info, spec=spec)
        if not len(source):
            why = source.info.reason or reason
            raise UserError(f"{spec} has no {self.name}" + (f": all {total:,} {why}" if total else "") + ": choose other data")
        return source

    def accepted(self) -> str:
        """The specs of this kind, in words."""
        forms = [f"builtin:{name}" for name in self.builtin]
        forms += ["tfds:NAME"] if self.tfds else []
        forms += [f"folder:PATH with {self.folder.words}"] if self.folder else []
        return " or ".join(filter(None, [", ".join(forms[:-1]), forms[-1]]))

    def _exists(self, path: Path, options: Mapping[str, Any]) -> bool:
        """Raises `UserError` where one may not even ask."""
        try:
            return _call(self.folder.exists, path, options)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None

    def _check(self, options: Mapping[str, Any]) -> None:
        readers = [*self.builtin.values(), self.folder and self.folder.read, self.tfds and self.tfds.element]
        known = set().union(*(_keywords(reader) for reader in readers if reader))
        if strange := options.keys() - known:
            raise TypeError(
                f"{self.name} have no option {', '.join(sorted(strange))}: there are {', '.join(sorted(known)) or 'none'}"
            )


_TOLD = 10
"""Classes that a message names, at most."""


def _other_classes(train: Info, held_out: Info) -> UserError:
    """The error for different classes: all of them, or where they are many those that are in one only."""
    if max(len(train.classes), len(held_out.classes)) <= _TOLD:
        theirs = [f"the classes {', '.join(train.classes)}", ", ".join(held_out.classes)]
    else:
        theirs = [f"{len(train.classes):,} classes", f"{len(held_out.classes):,}"]
        for place, (one, other) in enumerate(((train, held_out), (held_out, train))):
            alone = [name for name in one.classes if name not in set(other.classes)]
            others = f" and {len(alone) - _TOLD:,} others" if len(alone) > _TOLD else ""
            theirs[place] += f", {', '.join(alone[:_TOLD])}{others} alone" if alone else ""
    return UserError(
        f"{train.spec} has {theirs[0]}, and held-out {held_out.spec} has {theirs[1]}: give data with the same classes, in the same order"
    )


def _naming(spec: str, function: Callable[[Record], E]) -> Callable[[Record], E]:
    """The function, whose errors name the data."""

    def element(record: Record) -> E:
        try:
            return function(record)
        except UserError as error:
            raise UserError(f"{spec}: {error}") from None

    return element


def _path(spec: str) -> Path | None:
    """The path of a folder's spec."""
    form, _, name = spec.partition(":")
    return local_path(name) if form == "folder" and name else None


def _keywords(reader: Callable[..., Any]) -> set[str]:
    return {name for name, each in inspect.signature(reader).parameters.items() if each.kind is each.KEYWORD_ONLY}


def _call(reader: Callable[..., Any], first: Any, options: Mapping[str, Any]) -> Any:
    known = _keywords(reader)
    return reader(first, **{name: value for name, value in options.items() if name in known})


LABELLED_IMAGES = Kind(
    "labelled images",
    LabelledImage,
    {"digits": images.Digits, "glyphs": glyphs.labelled},
    Folder(images.read_labelled, images.FOLDER_WORDS),
    Records(images.labelled_records, images.RECORD_WORDS),
    same_classes=True,
)

CAPTIONED_IMAGES = Kind(
    "captioned images",
    CaptionedImage,
    {
        "scenes": scenes.captioned,
        "crowded": crowded.captioned,
        "digits": lambda split, *, templates=images.TEMPLATES: images.captioned(images.Digits(split), templates),
        "glyphs": glyphs.captioned,
    },
    Folder(images.read_captioned, images.METADATA_WORDS),
    Records(images.captioned_records, images.RECORD_WORDS),
)

ANNOTATED_IMAGES = Kind(
    "annotated images",
    AnnotatedImage,
    {
        "scenes": scenes.annotated,
        "crowded": crowded.annotated,
        "digits": lambda split: images.annotated(images.Digits(split)),
        "glyphs": glyphs.annotated,
    },
    Folder(images.read_annotated, images.METADATA_WORDS),
    Records(images.annotated_records, images.RECORD_WORDS),
)

DOCUMENTS = Kind(
    "text documents",
    str,
    {"modules": documents.modules},
    Folder(documents.read_documents, documents.FOLDER_WORDS, exists=lambda path: path.exists(), cut=documents.cut_documents),
    Records(documents.text_records, "`text`"),
)

PARALLEL_TEXT = Kind(
    "sentence pairs",
    Translation,
    {"cldr": bitext.cldr_pairs},
    Folder(bitext.read_pairs, bitext.FOLDER_WORDS, "files {0}.LANGUAGE in both languages", exists=bitext.pair_exists),
    Records(bitext.translation_records, "a text in each of the two languages, such as `en` and `de`"),
)

NAMES = Kind(
    "labelled names",
    LabelledText,
    {"names": names.cldr},
    Folder(names.read_names, names.FOLDER_WORDS, cut=lambda source, split: source.part(split)),
    same_classes=True,
)

TEXT_PAIRS = Kind("pairs of text", TextPair, {"docstrings": Docstrings})

TABLES = Kind(
    "tables",
    TableRow,
    {name: lambda split, name=name: tables.table(name, split) for name in tables.TABLES},
    same_classes=True,
)

KINDS: dict[str, Kind[Any]] = {
    kind.name: kind
    for kind in (LABELLED_IMAGES, CAPTIONED_IMAGES, ANNOTATED_IMAGES, DOCUMENTS, PARALLEL_TEXT, NAMES, TEXT_PAIRS, TABLES)
}
"""All kinds, by name."""
