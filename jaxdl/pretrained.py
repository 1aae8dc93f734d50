"""Published weights: from a directory or a hub name to a module and its parameters.

`config.json` names the family, `jaxdl/models/<model_type>.py`, which offers two things:

- `from_config(config, **changes) -> (module, inputs)`, with abstract inputs that fix the shapes of all parameters;
- `PUBLISHED`, a `jaxdl.weights.Table` that says which published tensor each parameter is read from, or a function from the config to one.

Weights come from safetensors alone, since a pickle can run any code. Both sides must match to the last tensor.
"""

import importlib
import json
import os
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import huggingface_hub
import jax
import numpy as np
import safetensors
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

import jaxdl.models
from jaxdl.data.image import ImageProcessor
from jaxdl.data.paligemma import TextProcessor
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError, unknown
from jaxdl.nn import stack_blocks
from jaxdl.weights import convert

_PROCESSORS = ("*.json", "spiece.model", "*.spm")
_WEIGHTS = ("config.json", "model*.safetensors", "model.safetensors.index.json")


def load(
    path_or_hub_name: str | os.PathLike,
    expected: type[nn.Module] = nn.Module,
    *,
    param_dtype: DTypeLike | None = None,
    scan: bool = False,
    **changes: Any,
) -> tuple[nn.Module, PyTree[Array]]:
    """The published model in a directory, or of a name such as "google/siglip-base-patch16-224" on the Hugging Face hub: a module of the class `expected`, and its parameters.

    Parameters have `param_dtype`, or else the type they are stored in; with `scan` those of a model's blocks are stacked, as its field `scan` has them. `changes` are other fields of the module that are no matter of the weights: `dtype` to compute in, `attention`, `dropout`, `remat`. Raises `UserError` if there is no such model, it is another than expected, its family or one of its settings is unknown here, or a tensor is missing, left over, or has another shape.
    """
    directory = _fetch(path_or_hub_name, _WEIGHTS)
    config = _read_json(directory / "config.json")
    family = _family(config, directory)
    try:
        module, inputs = family.from_config(config, **changes)
        if not isinstance(module, expected):
            raise UserError(f"the weights are those of a {type(module).__name__}: give those of a {expected.__name__}")
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        table = family.PUBLISHED(config) if callable(family.PUBLISHED) else family.PUBLISHED
        files = _weight_files(directory)
        if not files:
            raise _no_weights(path_or_hub_name, directory)
        params = convert(_Tensors(files), table, shapes, param_dtype)
    except UserError as error:
        raise UserError(f"{path_or_hub_name}: {error}") from error
    return (family.from_config(config, scan=True, **changes)[0], stack_blocks(params)) if scan else (module, params)


def load_processors(path_or_hub_name: str | os.PathLike) -> tuple[ImageProcessor, Tokenizer | TextProcessor]:
    """What turns images and texts into a published model's inputs: for PaliGemma, whose texts are questions and answers, a `TextProcessor`. Raises `UserError` where `load` does, and if either is missing."""
    directory = _fetch(path_or_hub_name, _PROCESSORS)
    config = directory / "config.json"
    questions = config.is_file() and _read_json(config).get("model_type") == "paligemma"
    texts = TextProcessor.from_pretrained(directory) if questions else Tokenizer.load(directory)
    return ImageProcessor.from_pretrained(directory), texts


def load_image_processor(path_or_hub_name: str | os.PathLike) -> ImageProcessor:
    """What turns images into a published model's input. Raises `UserError` where `load` does, and if it is missing or unknown here."""
    return ImageProcessor.from_pretrained(_fetch(path_or_hub_name, _PROCESSORS))


def load_tokenizer(path_or_hub_name: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a file, in a directory, or of a published model. Raises `UserError` if there is none."""
    if Path(path_or_hub_name).expanduser().is_file():
        return Tokenizer.load(Path(path_or_hub_name).expanduser())
    return Tokenizer.load(_fetch(path_or_hub_name, _PROCESSORS))


def load_tokenizers(path_or_hub_name: str | os.PathLike) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers of source and target of a model that translates, see `Tokenizer.load_pair`. Raises `UserError` if they are missing."""
    return Tokenizer.load_pair(_fetch(path_or_hub_name, _PROCESSORS))


class _Tensors(Mapping[str, np.ndarray]):
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
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _weight_files(directory: Path) -> list[Path]:
    """One file, or the shards that the index lists, or nothing."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        names = set(_read_json(index).get("weight_map", {}).values())
        if foreign := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index.name} points out of its directory ({foreign[0]}): fetch it again")
        return [directory / name for name in sorted(names)]
    return []


def _no_weights(path_or_hub_name: str | os.PathLike, directory: Path) -> UserError:
    """The error for a model without safetensors. A pickle is named with what writes them; those on the hub are never fetched, so that it is asked for their names."""
    name = str(path_or_hub_name)
    if local := Path(name).expanduser().is_dir():
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
    fetch = "" if local else f"h.snapshot_download({name!r}, local_dir={written!r}, allow_patterns={list(_PROCESSORS)}); "
    model = f"getattr(t, t.AutoConfig.from_pretrained({name!r}).architectures[0]).from_pretrained({name!r})"
    return UserError(
        f"there is no model.safetensors, and {pickles[0]} is a pickle, which can run any code and is not read here: "
        f'with torch and transformers, python -c "import huggingface_hub as h, transformers as t; {fetch}{model}.save_pretrained({written!r})" '
        f"writes {written}/model.safetensors; then give {written}"
    )


def _family(config: dict, directory: Path) -> ModuleType:
    """The file of `jaxdl/models` that `model_type` names, if weights are published for it."""
    files = (importlib.import_module(f"jaxdl.models.{file.name}") for file in pkgutil.iter_modules(jaxdl.models.__path__))
    families = {file.__name__.rpartition(".")[2]: file for file in files if hasattr(file, "PUBLISHED")}
    given = str(config.get("model_type")).replace("-", "_")
    if given not in families:
        raise unknown(f"model family for {directory}, the model_type in its config.json", given, families)
    return families[given]


def _fetch(path_or_hub_name: str | os.PathLike, patterns: Sequence[str]) -> Path:
    """A local directory as it is, or else the files of a model on the hub, by way of its cache."""
    directory = Path(path_or_hub_name).expanduser()
    if directory.is_dir():
        return directory
    name = str(path_or_hub_name)
    if directory.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
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


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} holds no {path.name}: give the directory of a published model") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: fetch it again")
    return content
