"""One door for all kinds of data: specs, splits, held-out data, what is left out, and messages in one line."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from folders import WRITE, write_captions, write_images, write_pairs
from PIL import Image

from jaxdl.data import (
    ANNOTATED_IMAGES,
    CAPTIONED_IMAGES,
    DOCUMENTS,
    KINDS,
    LABELLED_IMAGES,
    NAMES,
    PARALLEL_TEXT,
    TABLES,
    TEXT_PAIRS,
    Folder,
    Info,
    Kind,
    Records,
    Source,
    report_left_out,
)
from jaxdl.data import kinds as kinds_module
from jaxdl.errors import UserError

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name.replace(" ", "_"))
in_folders = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.folder], ids=lambda kind: kind.name.replace(" ", "_")
)


@every_kind
def test_built_in_sets_have_two_parts_of_typed_elements_that_differ(kind):
    for name in kind.builtin:
        train, held_out = kind.open(f"builtin:{name}")
        assert len(train) > len(held_out) > 10
        for source in (train, held_out):
            assert isinstance(source, Source) and source.info.spec == f"builtin:{name}"
            assert isinstance(source[0], kind.element) and isinstance(source[len(source) - 1], kind.element)
        again, _ = kind.open(f"builtin:{name}")
        assert as_bytes(train[3]) == as_bytes(again[3]) != as_bytes(held_out[3])
        assert as_bytes(kind.open_part(f"builtin:{name}", "train")[3]) == as_bytes(train[3])
        with pytest.raises(UserError, match=f"no part of builtin:{name} 'dev': .*choose one of train, test"):
            kind.open_part(f"builtin:{name}", "dev")


def as_bytes(element) -> bytes:
    """All that is in an element."""
    values = dataclasses.asdict(element) if dataclasses.is_dataclass(element) else element
    return repr(leaves(values)).encode()


def leaves(value):
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    return {key: leaves(each) for key, each in value.items()} if isinstance(value, dict) else value


@every_kind
@pytest.mark.parametrize("spec", ["x", "", "builtin:", "folder:", "tfds:", "text:x", "https://x"])
def test_a_wrong_spec_names_all_that_is_accepted_in_one_line(kind, spec):
    with pytest.raises(UserError) as error:
        kind.open(spec)
    message = str(error.value)
    assert "\n" not in message and kind.accepted() in message and (repr(spec) in message or not spec)
    assert all(f"builtin:{name}" in message for name in kind.builtin)
    assert ("folder:PATH with" in message) == (kind.folder is not None) and ("tfds:NAME" in message) == (kind.tfds is not None)


@every_kind
def test_a_misspelt_built_in_set_is_corrected(kind):
    name = next(iter(kind.builtin))
    with pytest.raises(UserError, match=f"no built-in set of {kind.name} '{name}x': did you mean '{name}'"):
        kind.open(f"builtin:{name}x")


@every_kind
def test_an_option_that_no_reader_has_is_refused(kind):
    with pytest.raises(TypeError, match=f"{kind.name} have no option resolutoin"):
        kind.open(f"builtin:{next(iter(kind.builtin))}", resolutoin=3)


@in_folders
def test_a_folder_has_a_part_to_train_on_and_one_that_is_held_out(kind, tmp_path, monkeypatch):
    write, each = WRITE[kind.name]
    write(tmp_path / "data" / "train", 5)
    with pytest.raises(UserError, match=r"no held-out data beside .*train: put it into .*val"):
        kind.open(f"folder:{tmp_path / 'data'}")
    write(tmp_path / "data" / "test", 2)
    write(tmp_path / "data" / "extra", 4)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in (f"folder:{tmp_path / 'data'}", f"folder:{tmp_path / 'data' / 'train'}", "folder:~/data"):
        assert [len(source) for source in kind.open(spec)] == [5 * each, 2 * each]
        assert len(kind.open_part(spec, "extra")) == 4 * each
        assert kind.open(spec)[0].info.spec == spec
    write(tmp_path / "data" / "val", 3)
    assert [len(source) for source in kind.open("folder:~/data")] == [5 * each, 3 * each]


@in_folders
def test_a_folder_to_measure_on_is_taken_whole_unless_it_has_a_train(kind, tmp_path):
    write, each = WRITE[kind.name]
    for part, count in (("train", 5), ("val", 2), ("test", 3)):
        write(tmp_path / part, count)
    write(tmp_path / "other", 4)
    data = f"folder:{tmp_path}"
    for eval_data, count in (("", 2), (data, 2), (f"{data}/test", 3), (f"{data}/other", 4), (f"{data}/val", 2)):
        assert len(kind.open(data, eval_data)[1]) == count * each
    for eval_data in (f"{data}/train", f"{data}/../{tmp_path.name}/train"):
        with pytest.raises(UserError, match="would be trained on and measured on"):
            kind.open(data, eval_data)


@in_folders
def test_a_missing_folder_is_named(kind, tmp_path):
    for data, eval_data in (
        (f"folder:{tmp_path / 'no'}", ""),
        (f"builtin:{next(iter(kind.builtin))}", f"folder:{tmp_path / 'no'}"),
    ):
        with pytest.raises(UserError, match=rf"there is no .*{tmp_path.name}/no.*: give folder:PATH with"):
            kind.open(data, eval_data)


@pytest.mark.parametrize("kind", [DOCUMENTS, NAMES], ids=["documents", "names"])
def test_data_without_parts_is_cut_where_the_kind_says_how(kind, tmp_path):
    WRITE[kind.name][0](tmp_path / "data", 20)
    train, held_out = kind.open(f"folder:{tmp_path / 'data'}")
    texts = lambda source: [element if isinstance(element, str) else element.text for element in source]
    if kind is DOCUMENTS:
        assert [one + other for one, other in zip(texts(train), texts(held_out))] == [
            f"data {index}" for index in sorted(map(str, range(20)))
        ]
    else:
        assert (len(train), len(held_out)) == (32, 8) and not set(texts(train)) & set(texts(held_out))


@pytest.mark.parametrize("kind", [LABELLED_IMAGES, CAPTIONED_IMAGES, ANNOTATED_IMAGES], ids=["labels", "captions", "annotations"])
def test_mnist_of_tfds_opens_as_every_kind_of_image(kind, shared):
    train, held_out = kind.open("tfds:mnist", data_dir=f"{shared}/tfds")
    assert (len(train), len(held_out), train[0].image.shape) == (60_000, 10_000, (28, 28, 1))
    assert train.info.classes == tuple("0123456789") and isinstance(held_out[5], kind.element)
    assert sorted({held_out[index].label for index in range(100)}) == list(range(10))
    if kind is CAPTIONED_IMAGES:
        assert held_out[0].captions == tuple(
            f"{words}{held_out[0].label}" for words in ("a photo of ", "a picture of ", "this is ", "")
        )
    assert len(kind.open_part("tfds:mnist", "test", data_dir=f"{shared}/tfds")) == 10_000
    with pytest.raises(UserError, match=r"no split of TFDS 'mnist' 'tset': did you mean 'test'"):
        kind.open_part("tfds:mnist", "tset", data_dir=f"{shared}/tfds")


def test_tiny_shakespeare_is_that_of_tfds(shared, monkeypatch):
    monkeypatch.setenv("HOME", str(shared))
    train, held_out = DOCUMENTS.open("tfds:tiny_shakespeare", data_dir="~/tfds")
    assert len(train[0]) == 1_003_854 and train[0].startswith("First Citizen:\nBefore we proceed")
    assert len(held_out[0]) == 55_770


def test_records_that_lack_what_a_kind_needs_are_refused(shared):
    for kind, name, words in (
        (DOCUMENTS, "mnist", "TFDS 'mnist' has image, label, and text documents need `text`"),
        (LABELLED_IMAGES, "tiny_shakespeare", "TFDS 'tiny_shakespeare' has text, and labelled images need `image` and `label`"),
        (PARALLEL_TEXT, "mnist", "sentence pairs need a text in each of the two languages"),
    ):
        with pytest.raises(UserError, match=words):
            kind.open(f"tfds:{name}", data_dir=f"{shared}/tfds")


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.tfds], ids=lambda kind: kind.name.replace(" ", "_"))
def test_a_set_that_tfds_lacks_says_how_to_get_it(kind, tmp_path):
    with pytest.raises(UserError, match=rf"TFDS 'mnist' .* in {tmp_path}.*prepare it: pip install 'jaxdl\[prepare\]'"):
        kind.open("tfds:mnist", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"TFDS has no data set 'mnist_of_mars' .*\(data_dir\)"):
        kind.open("tfds:mnist_of_mars", data_dir=str(tmp_path))


def test_different_classes_are_refused_where_they_matter(tmp_path):
    write_images(tmp_path / "train", 2)
    for name in ("bee", "cat"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "val" / name / "0.png")
    with pytest.raises(UserError, match=r"has the classes ant, cat, and held-out folder:.* has bee, cat"):
        LABELLED_IMAGES.open(f"folder:{tmp_path}")
    with pytest.raises(UserError, match="has the classes zero, one"):
        LABELLED_IMAGES.open("builtin:digits", f"folder:{tmp_path}/val")
    train, held_out = CAPTIONED_IMAGES.open("builtin:scenes", f"folder:{tmp_path}/val")
    assert (train.info.classes, held_out.info.classes) == ((), ("bee", "cat"))


def test_images_without_captions_are_left_out_counted_and_told(tmp_path):
    for part in ("train", "val"):
        write_captions(tmp_path / part, 3)
    with (tmp_path / "train" / "metadata.jsonl").open("a") as file:
        for index in range(2):
            file.write("\n" + json.dumps({"file_name": f"{index}.png", "questions": [["what?", "this"]]}))
    spec = f"folder:{tmp_path}"
    sources = CAPTIONED_IMAGES.open(spec)
    assert [(len(source), source.info.left_out) for source in sources] == [(3, 2), (3, 0)]
    assert report_left_out(*sources) == [f"{spec}: 2 of 5 have no caption and are left out"]
    asked, _ = ANNOTATED_IMAGES.open(spec, "builtin:scenes", wanted=lambda each: bool(each.questions), reason="have no question")
    assert len(asked) == 2 and report_left_out(asked) == [f"{spec}: 3 of 5 have no question and are left out"]
    with pytest.raises(UserError, match=r"has no annotated images: all 3 have no question: choose other data"):
        ANNOTATED_IMAGES.open(spec, wanted=lambda each: bool(each.questions), reason="have no question")


def test_translations_have_a_direction_and_further_parts(tmp_path):
    write_pairs(tmp_path / "train", 3)
    (tmp_path / "val.de.gz").write_bytes(gzip.compress(b"vier\n"))
    (tmp_path / "val.en").write_text("four\n")
    _, held_out = PARALLEL_TEXT.open(f"folder:{tmp_path}", source="de", target="en")
    assert (held_out[0].source, held_out[0].target) == ("vier", "four")
    for spec in ("builtin:cldr", f"folder:{tmp_path}"):
        with pytest.raises(UserError, match="source and target are both 'en': there is nothing to translate"):
            PARALLEL_TEXT.open(spec, source="en", target="en")
    (tmp_path / "train.en").unlink()
    _, held_out = PARALLEL_TEXT.open("builtin:cldr", f"folder:{tmp_path}")
    assert [pair.source for pair in held_out] == ["four"]


def test_multi30k_has_the_pairs_that_are_published(shared):
    """Elliott et al. 2016: 29,000 to train, 1,014 to validate, 1,000 to test."""
    train, held_out = PARALLEL_TEXT.open(f"folder:{shared}/data/multi30k")
    test = PARALLEL_TEXT.open_part(f"folder:{shared}/data/multi30k", "test_2016_flickr")
    assert (len(train), len(held_out), len(test)) == (29_000, 1_014, 1_000)
    assert "".join(pair.source for pair in test).isascii() and any("ß" in pair.target for pair in test)


class Prepared(Source[dict]):
    """In the place of TFDS: translations as its records have them."""

    features = {"en": None, "de": None}

    def __init__(self, name, *, splits, part, data_dir):
        self.rows = [{"en": b"two", "de": b"zwei"} if part == "newstest" else {"en": b"one", "de": b"eins"}]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_prepared_translations_are_read_by_language(monkeypatch):
    monkeypatch.setattr(kinds_module, "TFDS", Prepared)
    train, _ = PARALLEL_TEXT.open("tfds:wmt/de-en", source="de", target="en")
    assert (train[0].source, train[0].target) == ("eins", "one")
    assert PARALLEL_TEXT.open_part("tfds:wmt/de-en", "newstest")[0].target == "zwei"
    with pytest.raises(UserError, match="TFDS 'wmt/de-en' has en, de, and sentence pairs need"):
        PARALLEL_TEXT.open("tfds:wmt/de-en", source="de", target="fr")


@dataclasses.dataclass(frozen=True)
class Station:
    name: str
    height: float


class Stations(Source[Station]):
    def __init__(self, rows):
        self.rows, self.info = rows, Info(columns=("height",))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Station(*self.rows[index])


def test_a_new_kind_is_a_value_and_a_reader(tmp_path, monkeypatch):
    """Everything else, from specs to messages, it has at once."""

    def read(path: Path, *, least: float = 0.0) -> Stations:
        rows = [line.split(",") for line in (path / "stations.csv").read_text().splitlines()]
        return Stations([(name, float(height)) for name, height in rows if float(height) >= least])

    stations = Kind(
        "weather stations",
        Station,
        {"alps": lambda split: Stations([("Säntis", 2501.0)] if split == "train" else [("Zugspitze", 2956.0)])},
        Folder(read, "a stations.csv of names and heights"),
        Records(lambda features: (lambda record: Station(record["en"].decode(), 0.0)) if "en" in features else None, "`en`"),
    )
    for part in ("train", "dev"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "stations.csv").write_text(f"{part},3\nlow,1\n")
    train, held_out = stations.open(f"folder:{tmp_path}", least=2.0)
    assert [*train, *held_out] == [Station("train", 3.0), Station("dev", 3.0)] and train.info.columns == ("height",)
    assert stations.open("builtin:alps", f"folder:{tmp_path}/train")[1][1] == Station("low", 1.0)
    monkeypatch.setattr(kinds_module, "TFDS", Prepared)
    assert stations.open("tfds:wmt")[0][0] == Station("one", 0.0)
    accepted = "give builtin:alps, tfds:NAME or folder:PATH with a stations.csv of names and heights"
    with pytest.raises(UserError, match=f"'alps' cannot be opened as weather stations: {accepted}"):
        stations.open("alps")
    with pytest.raises(UserError, match=r"folder:.* has no weather stations: choose other data"):
        stations.open(f"folder:{tmp_path}", least=9.0)


def test_a_kind_without_folders_says_what_it_has():
    assert TEXT_PAIRS.accepted() == "builtin:docstrings"
    assert TABLES.accepted() == "builtin:iris, builtin:wine, builtin:breast_cancer, builtin:diabetes or builtin:digits"
    for spec in ("folder:x", "tfds:x"):
        with pytest.raises(UserError, match=f"'{spec}' cannot be opened as tables: give builtin:iris"):
            TABLES.open(spec)
    with pytest.raises(UserError, match="cannot be opened as tables"):
        TABLES.open("builtin:iris", "folder:x")
