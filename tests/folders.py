"""Small folders of each kind of data, as people keep them."""

import json
from pathlib import Path

from PIL import Image

from jaxdl.data import ANNOTATED_IMAGES, CAPTIONED_IMAGES, DOCUMENTS, LABELLED_IMAGES, NAMES, PARALLEL_TEXT


def write_images(path: Path, count: int) -> None:
    for name in ("ant", "cat"):
        (path / name).mkdir(parents=True)
        for index in range(count):
            Image.new("L", (4, 4), 9 + index).save(path / name / f"{index}.png")


def write_captions(path: Path, count: int) -> None:
    path.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (5, 4), (index, 0, 0)).save(path / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "text": f"{path.name} {index}"} for index in range(count)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_documents(path: Path, count: int) -> None:
    path.mkdir(parents=True)
    for index in range(count):
        (path / f"{index}.txt").write_text(f"{path.name} {index}")


def write_pairs(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for language in ("en", "de"):
        path.with_name(f"{path.name}.{language}").write_text("".join(f"{path.name} {index}\n" for index in range(count)))


def write_names(path: Path, count: int) -> None:
    path.mkdir(parents=True)
    for language in ("Danish", "Irish"):
        (path / f"{language}.txt").write_text("".join(f"{language} {chr(97 + index)}\n" for index in range(count)))


WRITE = {
    LABELLED_IMAGES.name: (write_images, 2),
    CAPTIONED_IMAGES.name: (write_captions, 1),
    ANNOTATED_IMAGES.name: (write_captions, 1),
    DOCUMENTS.name: (write_documents, 1),
    PARALLEL_TEXT.name: (write_pairs, 1),
    NAMES.name: (write_names, 2),
}
"""By kind how to write a part of so many, and how many elements each of these is."""
