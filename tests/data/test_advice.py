"""What messages about data advise works when it is followed."""

import re
import shlex
import subprocess

import pytest
from folders import WRITE
from PIL import Image

from jaxdl.data import DOCUMENTS, KINDS, LABELLED_IMAGES, NAMES, PARALLEL_TEXT, Subset, train_batches
from jaxdl.data.text_files import read_text
from jaxdl.errors import UserError

in_folders = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.folder], ids=lambda kind: kind.name.replace(" ", "_")
)


def message(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)


@in_folders
@pytest.mark.parametrize("spec", ["", "/train"])
def test_held_out_data_go_where_it_says(kind, spec, tmp_path):
    write, each = WRITE[kind.name]
    write(tmp_path / "data" / "train", 3)
    data = f"folder:{tmp_path / 'data'}{spec}"
    if spec and kind.folder.cut:
        pytest.skip("it is cut")
    told = message(lambda: kind.open(data))
    place = re.search(r"put it into (?:files )?(\S+?)(\.LANGUAGE in both languages)?, or give", told)
    assert bool(place[2]) == (kind is PARALLEL_TEXT)
    write(type(tmp_path)(place[1]), 2)
    assert [len(source) for source in kind.open(data)] == [3 * each, 2 * each]


@pytest.mark.parametrize("kind", [LABELLED_IMAGES], ids=["images"])
def test_images_in_classes_without_parts_say_where_the_others_go(kind, tmp_path):
    write, each = WRITE[kind.name]
    write(tmp_path / "data", 3)
    place = re.search(r"put it into (\S+),", message(lambda: kind.open(f"folder:{tmp_path / 'data'}")))[1]
    write(type(tmp_path)(place), 2)
    assert [len(source) for source in kind.open(f"folder:{tmp_path / 'data'}")] == [3 * each, 2 * each]


def test_captions_give_way_to_classes(tmp_path):
    for part in ("train", "val"):
        WRITE["captioned images"][0](tmp_path / part, 2)
    told = message(lambda: LABELLED_IMAGES.open(f"folder:{tmp_path}"))
    assert "give one sub-folder of images per class, and no such file" in told
    for part in ("train", "val"):
        WRITE["labelled images"][0](tmp_path / part, 2)
        (tmp_path / part / "metadata.jsonl").unlink()
    assert len(LABELLED_IMAGES.open(f"folder:{tmp_path}")[0]) == 4


def test_names_of_which_none_can_be_held_out(tmp_path):
    for language in ("Danish", "Irish"):
        (tmp_path / f"{language}.txt").write_text("Ek\n")
    told = message(lambda: NAMES.open(f"folder:{tmp_path}"))
    assert "too few labelled names to hold some of them out, 2: give more, or other data to measure on" in told
    train, held_out = NAMES.open(f"folder:{tmp_path}/", f"folder:{other_names(tmp_path)}")  # Other data.
    assert (len(train), len(held_out)) == (2, 2)
    (tmp_path / "Irish.txt").write_text("\n".join(f"O{letter}" for letter in "abcdefghij"))  # More.
    assert all(len(source) for source in NAMES.open(f"folder:{tmp_path}"))


def other_names(folder):
    (folder / "other").mkdir()
    for language in ("Danish", "Irish"):
        (folder / "other" / f"{language}.txt").write_text("Ny\n")
    return folder / "other"


def test_many_classes_are_told_by_their_difference(tmp_path):
    for part, classes in (("train", range(40)), ("val", range(1, 43))):
        for index in classes:
            (tmp_path / part / f"c{index:02}").mkdir(parents=True)
            Image.new("L", (2, 2)).save(tmp_path / part / f"c{index:02}" / "a.png")
    told = message(lambda: LABELLED_IMAGES.open(f"folder:{tmp_path}"))
    assert "has 40 classes, c00 alone, and held-out " in told and "has 42, c40, c41, c42 alone: give" in told and len(told) < 400


def test_text_is_converted_by_the_command_that_it_names(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Größe\n".encode("latin-1"))
    command = re.search(r"as (iconv .*) does", message(lambda: read_text(path)))[1]
    path.write_bytes(subprocess.run([*shlex.split(command), str(path)], capture_output=True, check=True).stdout)
    assert read_text(path) == "Größe\n"


def test_a_part_that_is_not_there_is_named_where_it_was_sought(tmp_path):
    WRITE["text documents"][0](tmp_path / "data" / "train", 2)
    assert str(tmp_path / "data" / "extra") in message(lambda: DOCUMENTS.open_part(f"folder:{tmp_path / 'data'}", "extra"))
    WRITE["text documents"][0](tmp_path / "data" / "extra", 2)
    assert len(DOCUMENTS.open_part(f"folder:{tmp_path / 'data'}", "extra")) == 2


def test_data_without_an_element_have_a_name():
    source = Subset(LABELLED_IMAGES.open("builtin:digits")[0], [])
    assert (
        message(lambda: train_batches(source, lambda each, rng: {}, batch_size=1, seed=0))
        == "builtin:digits is empty: choose other data"
    )
