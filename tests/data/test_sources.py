"""Every kind of source opens, and every mistake is named with its mend."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxdl.data import Cached, open_source
from jaxdl.data.sources import open_held_out
from jaxdl.errors import UserError


def test_scenes_to_train_and_to_test_are_different_pictures():
    train, test = (open_source("builtin:scenes", split, resolution=40) for split in ("train", "test"))
    assert train[0]["image"].shape == (40, 40, 3) and not np.array_equal(train[0]["image"], test[0]["image"])


def test_digits_are_split_without_overlap():
    train, test = (open_source("builtin:digits", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train[0]["image"].shape == (8, 8, 1) and train[0]["image"].max() == 255
    assert set(test.labels) == set(range(10)) and train.classes[3] == "three"


def test_a_caption_folder_finds_its_held_out_part(caption_folder):
    train = open_source(f"folder:{caption_folder / 'train'}", "train")
    assert len(train) == 8 and train[0]["text"] == ("a red picture", "something red") and train[1]["text"] == ("a green picture",)
    assert train[1]["image"].shape == (21, 24, 3)
    for path in (caption_folder, caption_folder / "train"):
        assert open_source(f"folder:{path}", "test").directory == caption_folder / "val"
        assert open_held_out(f"folder:{path}").directory == caption_folder / "val"


def test_a_folder_to_measure_on_is_the_one_that_is_named(tmp_path, caption_folder):
    for name in ("val", "test", "other"):
        shutil.copytree(caption_folder / "val", tmp_path / name)
    for name in ("val", "test", "other"):
        assert open_held_out("builtin:scenes", f"folder:{tmp_path / name}").directory == tmp_path / name
    assert open_held_out("builtin:scenes", f"folder:{caption_folder}").directory == caption_folder / "val"
    assert len(open_held_out("builtin:scenes", "builtin:digits")) == 360


def test_a_class_folder_has_its_sub_folders_as_classes(tmp_path):
    for name in ("cat", "ant"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (4, 4), 9).save(tmp_path / "train" / name / "a.png")
        (tmp_path / "train" / name / "notes.txt").write_text("no picture")
    source = open_source(f"folder:{tmp_path}", "train")
    assert source.classes == ("ant", "cat") and [source[i]["label"] for i in range(len(source))] == [0, 1]
    with pytest.raises(UserError, match=r"no held-out data beside .*--eval-data"):
        open_source(f"folder:{tmp_path}", "test")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scenes", "'scenes' is no data set: give builtin:NAME, tfds:NAME"),
        ("builtin:scene", "no built-in data set 'scene': did you mean 'scenes'"),
        ("folder:", "is no data set"),
        ("folder:/nowhere", "there is no folder /nowhere: give folder:PATH with images and a metadata.jsonl"),
        ("tfds:mnist_of_mars", "TFDS has no data set 'mnist_of_mars'"),
        ("tfds:mnist", r"TFDS 'mnist' .* --data-dir, or prepare it: pip install 'jaxdl\[prepare\]'"),
    ],
)
def test_a_wrong_spec_says_what_is_accepted(spec, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_source(spec, "train", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r'line 1: expected \{"file_name": ..., "text": caption or list of captions\}, found \{'),
        (['{"file_name": "a.png"}'], "line 1: expected"),
        (['{"file_name": "a.png", "text": 3}'], "line 1: text must be a caption"),
        (['{"file_name": "a.png", "text": []}'], "line 1: text must be a caption"),
        (['{"file_name": "a.png", "questions": []}'], "line 1: questions must be a list of"),
        (['{"file_name": "a.png", "questions": [["what?", 3]]}'], "line 1: questions must be a list of"),
        ([], "has no rows"),
    ],
)
def test_broken_metadata_is_named_with_its_line(rows, message, tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=message):
        open_source(f"folder:{tmp_path}", "train")


def test_a_folder_may_have_questions_and_their_answers(tmp_path):
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.png")
    rows = [
        {"file_name": "a.png", "questions": [["what is it?", "a square"], ["how dark?", "very"]]},
        {"file_name": "a.png", "text": "black", "questions": [["what?", "this"]]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(f"folder:{tmp_path}", "train")
    assert source[0]["questions"] == (("what is it?", "a square"), ("how dark?", "very")) and "text" not in source[0]
    assert (source[1]["text"], source.texts(0)) == (("black",), ())
    captioned = source.where(lambda told: "text" in told)
    assert (len(source), len(captioned), captioned.left_out, captioned.texts(0)) == (2, 1, 1, ("black",))


def test_scenes_give_the_fields_that_are_asked_for():
    example = open_source("builtin:scenes", "test", fields=("boxes", "questions"))[3]
    assert example.keys() == {"image", "boxes", "questions"}


def test_a_corrupt_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}))
    with pytest.raises(UserError, match=r"a\.png"):
        open_source(f"folder:{tmp_path}", "train")[0]


def test_a_folder_without_images_says_what_was_expected(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match="neither a metadata.jsonl nor sub-folders with images"):
        open_source(f"folder:{tmp_path}", "train")


def test_a_cache_reads_once_and_keeps_to_its_room():
    class Counting:
        classes, reads = (), 0

        def __len__(self):
            return 4

        def __getitem__(self, index):
            self.reads += 1
            return {"image": np.full(100, index, np.uint8)}

    source = Counting()
    cached = Cached(source, bytes=250)
    for _ in range(3):
        assert [cached[i]["image"][0] for i in range(4)] == [0, 1, 2, 3]
    assert source.reads == 2 + 3 * 2
