"""From a published model's files to a module, its parameters, and what prepares its inputs."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jaxdl.data.image import ImageProcessor
from jaxdl.data.prompts import PromptProcessor
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.files import local_path
from jaxdl.models import FAMILIES, TOKENIZERS
from jaxdl.nn import stack_blocks
from jaxdl.pretrained.files import (
    CONFIG_FILES,
    PROCESSOR_FILES,
    WEIGHT_FILES,
    Tensors,
    family_of,
    fetch,
    no_weights,
    read_config,
    weight_files,
)
from jaxdl.weights import convert

Texts = Tokenizer | PromptProcessor | tuple[Tokenizer, Tokenizer]
"""What prepares a model's texts: one tokenizer, rows of questions and answers, or the tokenizers of source and target."""


def load(
    path_or_hub_name: str | os.PathLike,
    expected: type[nn.Module] = nn.Module,
    *,
    subfolder: str | None = None,
    param_dtype: DTypeLike | None = None,
    scan: bool = False,
    **changes: Any,
) -> tuple[nn.Module, PyTree[Array]]:
    """The published model in a directory, or of a name OWNER/MODEL on the Hugging Face hub: a module of the class `expected`, and its parameters.

    `subfolder` is the part of a directory that holds several models, as "unet" in those of diffusers. Parameters have `param_dtype`, or else the type they are stored in; with `scan` those of a model's blocks are stacked, as its field `scan` has them. `changes` are other fields of the module that do not affect the weights: `dtype` to compute in, `attention`, `dropout`, `remat`. Raises `UserError` if there is no such model, it is another than expected, its family or one of its settings is unknown here, or a tensor is missing, left over, or has another shape.
    """
    directory = fetch(path_or_hub_name, (*CONFIG_FILES, *WEIGHT_FILES), subfolder)
    config = read_config(directory)
    family = family_of(config, directory)
    try:
        files = weight_files(directory)
        tensors = Tensors(files)
        if files and not config.get("architectures") and hasattr(family, "architecture"):
            config |= {"architectures": [family.architecture(tensors)]}
        module, inputs = _described(family, config, expected, changes)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
        if not files:
            raise no_weights(path_or_hub_name, directory)
        params = convert(tensors, family.published(module), shapes, param_dtype)
    except UserError as error:
        raise UserError(f"{path_or_hub_name}: {error}") from error
    return (family.from_config(config, scan=True, **changes)[0], stack_blocks(params)) if scan else (module, params)


def load_module(
    path_or_hub_name: str | os.PathLike,
    expected: type[nn.Module] = nn.Module,
    *,
    subfolder: str | None = None,
    scan: bool = False,
    **changes: Any,
) -> nn.Module:
    """The module that `load` gives, from `config.json` alone: no weights are needed or fetched. Raises `UserError` as `load` does."""
    directory = fetch(path_or_hub_name, CONFIG_FILES, subfolder)
    config = read_config(directory)
    try:
        return _described(family_of(config, directory), config, expected, changes | (dict(scan=True) if scan else {}))[0]
    except UserError as error:
        raise UserError(f"{path_or_hub_name}: {error}") from error


def load_processors(path_or_hub_name: str | os.PathLike) -> tuple[ImageProcessor, Texts]:
    """What turns images and texts into a published model's inputs. Raises `UserError` where `load` does, and if either is missing."""
    directory = fetch(path_or_hub_name, PROCESSOR_FILES)
    return ImageProcessor.from_pretrained(directory), _load_texts(directory)


def load_image_processor(path_or_hub_name: str | os.PathLike) -> ImageProcessor:
    """What turns images into a published model's input. Raises `UserError` where `load` does, and if it is missing or unknown here."""
    return ImageProcessor.from_pretrained(fetch(path_or_hub_name, PROCESSOR_FILES))


def load_tokenizer(path_or_hub_name: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a file, in a directory, or of a published model. Raises `UserError` if there is none."""
    if (file := local_path(path_or_hub_name)).is_file():
        return Tokenizer.load(file, TOKENIZERS)
    return Tokenizer.load(fetch(path_or_hub_name, PROCESSOR_FILES), TOKENIZERS)


def load_tokenizers(path_or_hub_name: str | os.PathLike) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers of source and target of a model that translates, see `Tokenizer.load_pair`. Raises `UserError` if they are missing."""
    return Tokenizer.load_pair(fetch(path_or_hub_name, PROCESSOR_FILES), TOKENIZERS)


def _described(
    family: ModuleType, config: dict[str, Any], expected: type[nn.Module], changes: dict[str, Any]
) -> tuple[nn.Module, tuple[jax.ShapeDtypeStruct, ...]]:
    try:
        module, inputs = family.from_config(config, **changes)
    except UserError as error:
        raise UserError(f"config.json: {error}") from error
    if not isinstance(module, expected):
        raise UserError(f"the weights are those of a {type(module).__name__}: give those of a {expected.__name__}")
    return module, inputs


def _load_texts(directory: Path) -> Texts:
    """As the family has it, if `config.json` is there and names one."""
    config = read_config(directory) if (directory / "config.json").is_file() else {}
    family = family_of(config, directory) if config.get("model_type") in FAMILIES else None
    return family.load_texts(directory) if hasattr(family, "load_texts") else Tokenizer.load(directory, TOKENIZERS)
