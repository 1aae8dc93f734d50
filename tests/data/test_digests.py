"""A digest is that of the data, and of nothing else: equal in every process, another one where data are."""

import hashlib
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from folders import WRITE

from jaxdl.data import KINDS, Cached, Mapped, Subset
from jaxdl.data.digests import digest_of, digest_of_files

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name.replace(" ", "_"))
in_folders = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.folder], ids=lambda kind: kind.name.replace(" ", "_")
)


@every_kind
def test_built_in_sets_have_a_digest_which_what_is_made_of_them_keeps(kind):
    for name in kind.builtin:
        train, held_out = kind.open(f"builtin:{name}")
        assert len(train.info.digest) == 16 and int(train.info.digest, 16) >= 0
        assert train.info.digest == kind.open(f"builtin:{name}")[0].info.digest
        if kind.name != "labelled names":  # Both are parts of one list.
            assert train.info.digest != held_out.info.digest
        for made in (Subset(train, [0]), Mapped(train, str), Cached(train), Subset(train, [0, 1]).where(lambda each: True, "")):
            assert made.info.digest == train.info.digest


def test_what_a_generated_set_is_asked_for_makes_it_another_one():
    scenes = KINDS["annotated images"]
    digests = [scenes.open("builtin:scenes", **options)[0].info.digest for options in ({}, {"resolution": 8}, {"masks": True})]
    assert len(set(digests)) == 3


@in_folders
def test_a_folder_has_another_digest_when_a_file_comes_goes_or_grows(kind, tmp_path):
    write, _ = WRITE[kind.name]
    for place in (tmp_path / "one", tmp_path / "two"):
        for part, count in (("train", 3), ("val", 2)):
            write(place / part, count)
    digest = lambda place: kind.open(f"folder:{tmp_path / place}")[0].info.digest
    first = digest("one")
    assert digest("two") == first  # Wherever the folder lies.
    write(tmp_path / "three" / "train", 4)
    write(tmp_path / "three" / "val", 2)
    assert digest("three") != first
    (changed,) = sorted(path for path in (tmp_path / "two").rglob("*") if path.is_file() and "train" in str(path))[:1]
    changed.write_bytes(changed.read_bytes() + b" more\n" * (1 + (kind.name == "sentence pairs")))
    if kind.name == "sentence pairs":
        (tmp_path / "two" / "train.en").write_text((tmp_path / "two" / "train.en").read_text() + " more\n more\n")
    assert digest("two") != first


def test_a_digest_is_the_same_in_every_process():
    code = "from jaxdl.data.digests import digest_of; print(digest_of('a', 1, b'x'))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {digest_of("a", 1, b"x")}
    expected = hashlib.sha256(b"\1\0\0\0\0\0\0\0a\1\0\0\0\0\0\0\0001\1\0\0\0\0\0\0\0x").hexdigest()
    assert digest_of("a", 1, b"x") == expected[:16]


def test_parts_are_told_apart():
    arrays = np.zeros(4, np.int32), np.zeros((2, 2), np.int32), np.zeros(4, np.float32)
    digests = [digest_of(*parts) for parts in (("ab",), ("a", "b"), ("ab", ""), ("\ud83d",), *((array,) for array in arrays))]
    assert len(set(digests)) == len(digests)


def test_many_files_take_no_time_and_one_that_is_missing_is_seen(tmp_path):
    files = [tmp_path / str(index) for index in range(2000)]
    for file in files:
        file.touch()
    started = time.perf_counter()
    first = digest_of_files(tmp_path, files)
    assert time.perf_counter() - started < 1
    assert digest_of_files(tmp_path, files[::-1]) == first
    files[7].unlink()
    assert digest_of_files(tmp_path, files) != first
