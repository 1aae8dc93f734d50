"""Sources: random-access data sets of dicts, opened by a spec such as `builtin:scenes`, `tfds:mnist` or `folder:PATH`."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jaxdl.data.image import decode
from jaxdl.data.scenes import Field, Scenes
from jaxdl.errors import UserError, unknown

Split = Literal["train", "test"]

TRAIN_SCENES, TEST_SCENES = 60_000, 2_000
HELD_OUT_NAMES = ("val", "validation", "valid", "dev", "test")
_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@runtime_checkable
class Source(Protocol):
    """`len(source)` examples; `source[i]` is a dict. Image sources give `image` (`H W C` uint8) with `text` (a tuple of captions), `questions` (a tuple of questions with their answers) or `label` (an index into `classes`).

    Sources of captions also have `texts(i)`, the captions without the image.
    """

    classes: tuple[str, ...]
    """Names of the labels; empty where there are none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def open_source(
    spec: str, split: Split, *, data_dir: str = "", resolution: int = 32, fields: tuple[Field, ...] = ("text",)
) -> Source:
    """The source that `spec` names. What is generated can give more than pictures with captions: `fields` are those of `Scenes`.

    `builtin:scenes` (generated at `resolution`), `builtin:digits`; `tfds:NAME[/CONFIG][:VERSION]`, prepared under `data_dir` (TFDS' own default where empty); `folder:PATH`, images with a `metadata.jsonl` (`file_name`, `text`) or with one sub-folder per class. The test split of a folder is a sibling or sub-folder with a name like `val` or `test`.

    Raises `UserError` for anything else, and for data that is missing or not as it should be.
    """
    kind, _, name = spec.partition(":")
    match kind, name:
        case "builtin", "scenes":
            length, seed = (TRAIN_SCENES, 0) if split == "train" else (TEST_SCENES, 1)
            return Scenes(length, resolution, seed, fields)
        case "builtin", "digits":
            return Digits(split)
        case "builtin", _:
            raise unknown("built-in data set", name, ("scenes", "digits"))
        case "tfds", str(name) if name:
            return TFDS(name, split, data_dir)
        case "folder", str(name) if name:
            return open_folder(_folder_of(Path(name).expanduser(), split))
    raise UserError(f"--data {spec!r} is no data set: give builtin:NAME, tfds:NAME[/CONFIG][:VERSION] or folder:PATH")


def taken_whole(eval_data: str) -> Path | None:
    """The folder that `eval_data` names, all of which is measured on. None for other specs, and for a folder with a sub-folder `train`: of these the held-out part is meant."""
    kind, _, name = eval_data.partition(":")
    path = Path(name).expanduser()
    return path if kind == "folder" and name and not (path / "train").is_dir() else None


def open_held_out(data: str, eval_data: str = "", **how: Any) -> Source:
    """What is measured on: what `eval_data` names, see `taken_whole`, and where it is empty the held-out part of `data`. `how` are the keywords of `open_source`."""
    folder = taken_whole(eval_data)
    return open_source(eval_data or data, "test", **how) if folder is None else open_folder(folder)


def open_told(data: str, eval_data: str, wanted: Callable[[dict[str, tuple]], bool], **how: Any) -> tuple[Source, Source]:
    """What to train on and what is held out, of `data` itself where `eval_data` is empty; of a `CaptionFolder` those pictures of which `wanted` is true of what is told about them. `how` are the keywords of `open_source`."""
    opened = open_source(data, "train", **how), open_held_out(data, eval_data, **how)
    source, held_out = (source.where(wanted) if isinstance(source, CaptionFolder) else source for source in opened)
    return source, held_out


def open_labelled(data: str, eval_data: str = "", *, data_dir: str = "", resolution: int = 32) -> tuple["Cached", "Cached"]:
    """What to train on and what is held out, of `data` itself where `eval_data` is empty: pictures of the same classes, kept in memory once they were read.

    The specs are `open_source`'s. Raises `UserError` also for a source without labels, and if the classes differ.
    """
    opened = []
    how = dict(data_dir=data_dir, resolution=resolution)
    sources = open_source(data, "train", **how), open_held_out(data, eval_data, **how)
    for spec, source in zip((data, eval_data or data), sources):
        if not source.classes:
            raise UserError(f"{spec} has no labels: choose a data set of pictures with classes")
        opened.append(Cached(source))
    source, held_out = opened
    if source.classes != held_out.classes:
        raise UserError(f"the classes of training and held-out data differ: {source.classes} and {held_out.classes}")
    return source, held_out


def some(source: Source, most: int) -> Iterator[dict[str, Any]]:
    """At most `most` examples of a source, evenly chosen, the first and the last among them."""
    return (source[int(index)] for index in np.linspace(0, len(source) - 1, min(len(source), most)))


class Digits:
    """Handwritten digits, 8×8 grey, in scikit-learn's package (UCI, 1998): 1,437 to train, 360 to test, shuffled once with a fixed seed."""

    classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self, split: Split):
        from sklearn.datasets import load_digits  # Takes a second to import.

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        chosen = order[360:] if split == "train" else order[:360]
        self.images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
        self.labels = digits.target[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}


class TFDS:
    """A data set prepared by TensorFlow Datasets in array_record format, read without TensorFlow: the split `part`, where it is named, or else what is called `train`, or `validation` or `test`."""

    def __init__(self, name: str, split: Split, data_dir: str, part: str = ""):
        import tensorflow_datasets as tfds  # Not everybody needs it.

        where = data_dir or "TFDS' default folder"
        try:
            builder = tfds.builder(name, data_dir=data_dir or None)
            available = tuple(builder.info.splits)
        except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
            raise UserError(
                f"TFDS has no data set {name!r} in {where} ({_first_line(error)}): see --data-dir and its catalog"
            ) from None
        names = (part,) if part else ("train",) if split == "train" else ("validation", "test")
        wanted = next((name for name in names if name in available), None)
        if part and available and not wanted:
            raise unknown(f"split of TFDS {name!r}", part, available)
        if wanted is None:
            prepare = f"python -c \"import tensorflow_datasets as t; t.builder('{name}', file_format='array_record').download_and_prepare()\""
            raise UserError(
                f"TFDS {name!r} has no {part or split} split in {where}: give --data-dir, or prepare it: pip install 'jaxdl[prepare]', then {prepare}"
            )
        try:
            self._source = builder.as_data_source(wanted)
        except (NotImplementedError, ValueError, OSError) as error:
            raise UserError(
                f"TFDS {name!r} in {where} cannot be read ({_first_line(error)}): prepare it with file_format='array_record'"
            ) from None
        features = builder.info.features
        self.classes = tuple(features["label"].names) if "label" in features else ()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]


class CaptionFolder:
    """Images beside a `metadata.jsonl` whose rows have `file_name` and `text`, one caption or a list of them, or `questions`, a list of [question, answer], or both."""

    classes = ()
    left_out = 0

    def __init__(self, directory: Path):
        self.directory = directory
        self.rows: list[tuple[str, dict[str, tuple]]] = []
        path = directory / "metadata.jsonl"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                self.rows.append((row["file_name"], _told(row)))
            except (json.JSONDecodeError, TypeError, KeyError):
                raise UserError(
                    f'{path}, line {number}: expected {{"file_name": ..., "text": caption or list of captions}}, found {line[:80]}'
                ) from None
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
        if not self.rows:
            raise UserError(f"{path} has no rows: give one line per image")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, told = self.rows[index]
        return {"image": decode(self.directory / name), **told}

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of an example, without reading its image."""
        return self.rows[index][1].get("text", ())

    def where(self, wanted: Callable[[dict[str, tuple]], bool]) -> "CaptionFolder":
        """Those images of which `wanted` is true of what is told about them, and `left_out`, how many are not."""
        chosen = copy.copy(self)
        chosen.rows = [row for row in self.rows if wanted(row[1])]
        chosen.left_out = len(self) - len(chosen)
        return chosen


def _told(row: dict[str, Any]) -> dict[str, tuple]:
    """What a row says about its image. Raises `UserError` where that is not what it should be, `KeyError` where there is nothing."""
    told: dict[str, tuple] = {}
    if "text" in row or "questions" not in row:
        text = row["text"]
        told["text"] = tuple(text) if isinstance(text, list) else (text,)
        if not told["text"] or not all(isinstance(caption, str) for caption in told["text"]):
            raise UserError(f"text must be a caption or a list of captions, found {text!r}")
    if "questions" in row:
        pairs = row["questions"]
        if not pairs or not all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in pairs):
            raise UserError(f"questions must be a list of [question, answer], found {pairs!r}")
        told["questions"] = tuple(map(tuple, pairs))
    return told


class ClassFolder:
    """One sub-folder of images per class. Classes are in alphabetical order."""

    def __init__(self, directory: Path):
        self.classes = tuple(
            sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        )
        self.files = [(path, label) for label, name in enumerate(self.classes) for path in _images(directory / name)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.files[index]
        return {"image": decode(path), "label": label}


class Cached:
    """Keeps what a source gave in memory, up to `bytes` bytes of arrays, so that a picture is decoded or drawn once."""

    def __init__(self, source: Source, bytes: int = 2**30):
        self.source, self.classes, self.room = source, source.classes, bytes
        self._kept: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._kept.get(index)
        if example is None:
            example = self.source[index]
            size = sum(value.nbytes for value in example.values() if isinstance(value, np.ndarray))
            if size <= self.room:
                self.room -= size
                self._kept[index] = example
        return example


def open_folder(directory: Path) -> Source:
    """A `CaptionFolder` or a `ClassFolder`, by what is in it."""
    if not directory.is_dir():
        raise UserError(
            f"there is no folder {directory}: give folder:PATH with images and a metadata.jsonl, or one sub-folder per class"
        )
    if (directory / "metadata.jsonl").is_file():
        return CaptionFolder(directory)
    source = ClassFolder(directory)
    if len(source) == 0:
        raise UserError(
            f"{directory} has neither a metadata.jsonl nor sub-folders with images ({', '.join(sorted(_IMAGE_ENDINGS))})"
        )
    return source


def _folder_of(path: Path, split: Split) -> Path:
    """`path` or its `train` for training; for testing what lies beside that under one of the usual names."""
    train = path / "train" if (path / "train").is_dir() else path
    if split == "train":
        return train
    for name in HELD_OUT_NAMES:
        if (train.parent / name).is_dir() and train.parent / name != train:
            return train.parent / name
    raise UserError(
        f"there is no held-out data beside {train}: put it into {train.parent / 'val'}, or name it with --eval-data folder:PATH"
    )


def _images(directory: Path) -> Sequence[Path]:
    return sorted(path for path in directory.iterdir() if path.suffix.lower() in _IMAGE_ENDINGS)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
