"""The files of a published model: where they are, and what is in them."""

import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import numpy as np
import safetensors

import jaxdl.models
from jaxdl.errors import UserError, unknown
from jaxdl.files import local_path, read_json

CONFIG_FILES = ("config.json", "model_index.json")
PROCESSOR_FILES = ("*.json", "spiece.model", "*.spm")
STEMS = ("model", "diffusion_pytorch_model")
"""What weight files are called: by transformers, by diffusers."""
WEIGHT_FILES = tuple(
    f"{stem}{end}" for stem in STEMS for end in (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")
)


def fetch(path_or_hub_name: str | os.PathLike, patterns: Sequence[str], subfolder: str | None = None) -> Path:
    """A local directory as it is, or else the files of a model on the hub, by way of its cache; in it the `subfolder`, which has to exist."""
    directory = local_path(path_or_hub_name)
    if not directory.is_dir():
        directory = _download(str(path_or_hub_name), [f"{subfolder}/{each}" if subfolder else each for each in patterns])
    if not subfolder:
        return directory
    if not (directory / subfolder).is_dir() or ".." in Path(subfolder).parts or Path(subfolder).is_absolute():
        raise UserError(f"{path_or_hub_name} has no sub-folder {subfolder}: {_parts(directory) or 'it holds one model itself'}")
    return directory / subfolder


def read_config(directory: Path) -> dict[str, Any]:
    """Its `config.json`. Raises `UserError` where there is none, with the sub-folders that have one, as those of diffusers' pipelines."""
    if not (directory / "config.json").is_file():
        parts = _parts(directory)
        raise UserError(
            f"{directory} holds several models: {parts}"
            if parts
            else f"{directory} holds no config.json: give the directory of a published model"
        )
    return read_json(directory / "config.json")


def family_of(config: dict[str, Any], directory: Path) -> ModuleType:
    """The file of `jaxdl.models` for a `config.json`. Raises `UserError` for a model that none of them reads."""
    given = str(config.get("model_type") or config.get("_class_name"))
    whole, _, part = given.partition("_")
    if whole in jaxdl.models.FAMILIES and part in ("text_model", "vision_model"):
        raise UserError(f"{directory} holds a {given} (model_type in its config.json), one tower alone: give a whole {whole}")
    if given not in jaxdl.models.FAMILIES:
        what = f"model family for {directory}, the model_type or _class_name in its config.json,"
        raise unknown(what, given, sorted(jaxdl.models.FAMILIES))
    family = importlib.import_module(f"jaxdl.models.{jaxdl.models.FAMILIES[given]}")
    named, read = config.get("architectures") or [], getattr(family, "ARCHITECTURES", ())
    if not (isinstance(named, list) and all(isinstance(each, str) for each in named)):
        raise UserError(f"architectures in the config.json of {directory} is {named!r}: a list of names is read here; correct it")
    if named and read and not set(named) & set(read):
        raise UserError(
            f"{directory} is a {', '.join(map(str, named))} (architectures): of {given}, {', '.join(read)} is read here"
        )
    return family


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of some safetensors files by name, each of them read when it is asked for."""

    def __init__(self, files: Sequence[Path]):
        self._file_of: dict[str, Any] = {}
        for file in files:
            try:
                opened = safetensors.safe_open(file, framework="numpy")
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{file.name} cannot be read ({error}): fetch it again") from error
            self._file_of.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> np.ndarray:
        opened = self._file_of[name]
        try:
            return opened.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{name} cannot be read ({error}): fetch its file again") from error
        except (AttributeError, TypeError, ValueError) as error:  # A type that numpy has not.
            raise UserError(
                f"{name} is stored as {opened.get_slice(name).get_dtype()}, and floats of 16, 32 or 64 bits are read here: "
                "give weights that are not quantized"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def weight_files(directory: Path) -> list[Path]:
    """One file, or the shards that the index lists, or nothing."""
    for stem in STEMS:
        whole, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not (isinstance(files, dict) and files and all(isinstance(name, str) for name in files.values())):
                raise UserError(f"{index.name} names no file for each tensor (weight_map): fetch it again")
            if foreign := [name for name in files.values() if Path(name).name != name]:
                raise UserError(f"{index.name} points out of its directory ({foreign[0]}): fetch it again")
            return [directory / name for name in sorted(set(files.values()))]
    return []


def no_weights(path_or_hub_name: str | os.PathLike, directory: Path) -> UserError:
    """The error for a model without safetensors. A pickle is named with what writes them; those on the hub are never fetched, so that it is asked for their names."""
    name = str(path_or_hub_name)
    if local := local_path(name).is_dir():
        names, name, written = [file.name for file in directory.iterdir()], f"{directory}", f"{directory}"
    else:
        written = name.rpartition("/")[2]
        try:
            names = huggingface_hub.list_repo_files(name)
        except Exception:  # The client lets through what several HTTP libraries raise.
            names = []
    pickles = sorted(file for file in names if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if not pickles:
        return UserError("there is no model.safetensors: fetch the weights, sharded ones with their model.safetensors.index.json")
    patterns = list(PROCESSOR_FILES)
    fetched = "" if local else f"h.snapshot_download({name!r}, local_dir={written!r}, allow_patterns={patterns}); "
    model = f"getattr(t, t.AutoConfig.from_pretrained({name!r}).architectures[0]).from_pretrained({name!r})"
    return UserError(
        f"there is no model.safetensors, and {pickles[0]} is a pickle, which can run any code and is not read here: "
        f'with torch and transformers, python -c "import huggingface_hub as h, transformers as t; {fetched}{model}.save_pretrained({written!r})" '
        f"writes {written}/model.safetensors; then give {written}"
    )


def _parts(directory: Path) -> str:
    """What to do where a directory holds a pipeline of models, a sub-folder each."""
    index = directory / "model_index.json"
    listed = [name for name, kind in read_json(index).items() if isinstance(kind, list)] if index.is_file() else []
    found = {file.parent.name for file in directory.glob("*/config.json")}
    names = sorted(found | set(listed))
    return f"give a subfolder of it, one of {', '.join(names)}" if names else ""


def _download(name: str, patterns: Sequence[str]) -> Path:
    if local_path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"there is no directory {name}: give one that holds config.json and *.safetensors, or a hub name OWNER/MODEL"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # The client lets through what several HTTP libraries raise.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is no directory here, and could not be fetched from huggingface.co ({reason}): "
            "check the name and the connection, or give a directory that holds config.json and *.safetensors"
        ) from error
