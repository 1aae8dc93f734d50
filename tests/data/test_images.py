"""Folders of images, and the digits: what is in them comes out, and every mistake is named with its mend."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxdl.data import ANNOTATED_IMAGES, CAPTIONED_IMAGES, LABELLED_IMAGES
from jaxdl.data.images import MetadataFolder
from jaxdl.errors import UserError


def test_digits_are_split_without_overlap():
    train, test = LABELLED_IMAGES.open("builtin:digits")
    assert (len(train), len(test)) == (1437, 360)
    assert train[0].image.shape == (8, 8, 1) and train[0].image.max() == 255
    assert {digit.label for digit in test} == set(range(10)) and train.info.classes[3] == "three"
    from sklearn.datasets import load_digits

    published = sorted((image * (255 / 16)).round().astype(np.uint8).tobytes() for image in load_digits().images)
    assert sorted(digit.image.tobytes() for part in (train, test) for digit in part) == published


def test_a_caption_folder_gives_images_and_their_captions(caption_folder):
    train, held_out = CAPTIONED_IMAGES.open(f"folder:{caption_folder}")
    assert (
        len(train) == 8 and train[0].captions == ("a red picture", "something red") and train[1].captions == ("a green picture",)
    )
    np.testing.assert_array_equal(train[1].image, np.asarray(Image.open(caption_folder / "train" / "1.png")))
    assert train[0].label is None and not np.array_equal(train[0].image, held_out[0].image)


def write_classes(folder, *classes):
    for name in classes:
        (folder / name).mkdir(parents=True)
        Image.new("L", (4, 4), 9).save(folder / name / "a.png")
        (folder / name / "notes.txt").write_text("no picture")


def test_a_class_folder_has_its_sub_folders_as_classes(tmp_path):
    for part in ("train", "val"):
        write_classes(tmp_path / part, "cat", "ant")
    train, _ = LABELLED_IMAGES.open(f"folder:{tmp_path}")
    assert train.info.classes == ("ant", "cat") and [example.label for example in train] == [0, 1]
    assert train.annotations(1).label == 1 and train.annotations(1).image.size == 0
    captioned, _ = CAPTIONED_IMAGES.open(f"folder:{tmp_path}", templates=("a small {}", "{}"))
    assert (captioned[1].captions, captioned[1].label) == (("a small cat", "cat"), 1) == (captioned.annotations(1).captions, 1)
    annotated, _ = ANNOTATED_IMAGES.open(f"folder:{tmp_path}")
    assert (annotated[1].label, annotated[1].captions, annotated.info.classes) == (1, (), ("ant", "cat"))


def test_a_folder_may_have_questions_and_their_answers(tmp_path):
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "a.png")
    rows = [
        {"file_name": "a.png", "questions": [["what is it?", "a square"], ["how dark?", "very"]]},
        {"file_name": "a.png", "text": "black", "questions": [["what?", "this"]]},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = MetadataFolder(tmp_path)
    assert source[0].questions == (("what is it?", "a square"), ("how dark?", "very")) and source[0].captions == ()
    assert (source[1].captions, source[1].questions, source[1].image.shape) == (("black",), (("what?", "this"),), (4, 5, 3))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r'line 1: expected \{"file_name": ..., "text": caption or list of captions\}, found \{'),
        (['{"file_name": "a.png"}'], "line 1: expected"),
        (['{"file_name": "a.png", "text": "a"}', "", "[]"], "line 3: expected"),
        (['{"file_name": "a.png", "text": 3}'], "line 1: text must be a caption"),
        (['{"file_name": "a.png", "text": []}'], "line 1: text must be a caption"),
        (['{"file_name": "a.png", "questions": []}'], "line 1: questions must be a list of"),
        (['{"file_name": "a.png", "questions": 3}'], "line 1: questions must be a list of"),
        (['{"file_name": "a.png", "questions": [["what?", 3]]}'], "line 1: questions must be a list of"),
        ([], "has no rows"),
    ],
)
@pytest.mark.parametrize("kind", [CAPTIONED_IMAGES, ANNOTATED_IMAGES], ids=["captioned", "annotated"])
def test_broken_metadata_is_named_with_its_line(kind, rows, message, tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=message):
        kind.open(f"folder:{tmp_path}")


def test_a_corrupt_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}))
    source = MetadataFolder(tmp_path)
    assert source.annotations(0).captions == ("a",)
    with pytest.raises(UserError, match=r"a\.png"):
        source[0]


def test_a_folder_of_another_kind_says_what_was_expected(tmp_path, caption_folder):
    (tmp_path / "cats").mkdir()
    for kind in (LABELLED_IMAGES, CAPTIONED_IMAGES, ANNOTATED_IMAGES):
        with pytest.raises(UserError, match="neither a metadata.jsonl nor sub-folders with images"):
            kind.open(f"folder:{tmp_path}")
    with pytest.raises(
        UserError, match=r"has captions \(metadata.jsonl\) and no labels: give one sub-folder of images per class"
    ):
        LABELLED_IMAGES.open(f"folder:{caption_folder}")
