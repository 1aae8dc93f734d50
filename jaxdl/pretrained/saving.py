"""From a module and its parameters to the files in which such a model is published."""

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from jaxtyping import Array, PyTree

from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.files import local_path, written_whole
from jaxdl.models import FAMILIES, IMAGE_PROCESSORS
from jaxdl.nn import unstack_blocks
from jaxdl.pretrained.files import STEMS, WEIGHT_FILES
from jaxdl.pretrained.loading import Texts
from jaxdl.weights import PublishedTensors

_SHARD = 5_000_000_000
"""Bytes of a weight file, as transformers and diffusers cut them."""


def save(
    module: nn.Module,
    params: PyTree[Array | np.ndarray],
    directory: str | os.PathLike,
    *,
    tokenizer: Texts | None = None,
    process: ImageProcessor | None = None,
    max_shard_bytes: int = _SHARD,
) -> None:
    """Writes a model as it would be published, so that `load` here and `from_pretrained` of transformers or diffusers read it: `config.json` and `model.safetensors` (in shards with an index, where that would be larger than `max_shard_bytes`), and if they are given the files of its tokenizer and its image processor.

    Parameters keep their types, those of scanned blocks are written one by one. They must be where this process can read them. Each file is written whole or not at all, `config.json` last; weights of another model that lie in the directory are removed. Raises `UserError` for a module that cannot be described there, naming the field, and for parameters that are not the module's.
    """
    params = unstack_blocks(params)
    family, config = _describe(module, params, tokenizer)
    stem = STEMS["_class_name" in config]
    tensors = PublishedTensors(params, family.published(module))
    with written_whole(local_path(directory), last="config.json", instead_of=WEIGHT_FILES) as folder:
        _write_description(folder, family, config, module, params, tokenizer, process)
        _write_weights(folder, stem, tensors, max_shard_bytes)


def save_config(
    module: nn.Module,
    params: PyTree[Array | np.ndarray | jax.ShapeDtypeStruct],
    directory: str | os.PathLike,
    *,
    tokenizer: Texts | None = None,
    process: ImageProcessor | None = None,
) -> None:
    """Writes what `save` writes, but for the weights: of `params` the shapes are enough. `load_module` builds the module again. Raises `UserError` where `save` does."""
    shapes = jax.eval_shape(unstack_blocks, params)
    family, config = _describe(module, shapes, tokenizer)
    with written_whole(local_path(directory), last="config.json") as folder:
        _write_description(folder, family, config, module, shapes, tokenizer, process)


def _describe(module: nn.Module, params: PyTree, tokenizer: Texts | None) -> tuple[ModuleType, dict[str, Any]]:
    """The module's family, and its `config.json`, which is read again to see that it makes the same parameters."""
    names = {f"jaxdl.models.{name}" for name in FAMILIES.values()}
    if type(module).__module__ not in names:
        known = ", ".join(sorted(set(FAMILIES.values())))
        raise UserError(f"a {type(module).__name__} has no published form: models of {known} have one")
    family = importlib.import_module(type(module).__module__)
    config = family.to_config(module, params)
    again, inputs = family.from_config(config)
    shape_of = lambda tree: {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    expected, given = shape_of(jax.eval_shape(again.init, jax.random.key(0), *inputs)["params"]), shape_of(params)
    if wrong := sorted(path for path, _ in expected.items() ^ given.items()):
        raise UserError(f"the parameters are not those of the module ({wrong[0]}): give those that it was initialised with")
    if tokenizer is not None:
        marks = tokenizer[-1] if isinstance(tokenizer, tuple) else tokenizer
        ids = {"eos_token_id": marks.end, "pad_token_id": marks.pad}
        config |= {key: token for key, token in ids.items() if key in config and config[key] is None}
    dtype = jnp.result_type(*(param.dtype for param in jax.tree.leaves(params)))
    return family, config | ({} if "_class_name" in config else {"torch_dtype": dtype.name})


def _write_description(
    folder: Path, family: ModuleType, config: dict, module: nn.Module, params: PyTree, tokenizer: Any, process: Any
) -> None:
    if tokenizer is not None:
        for each in tokenizer if isinstance(tokenizer, tuple) else (tokenizer,):
            each.save(folder)
    if process is not None:
        kind = IMAGE_PROCESSORS[process.resize_mode]
        more = family.preprocessor_fields(module, params) if hasattr(family, "preprocessor_fields") else {}
        _write_json(folder / "preprocessor_config.json", {"image_processor_type": kind, **process.to_config(), **more})
    _write_json(folder / "config.json", config)


def _write_weights(folder: Path, stem: str, tensors: PublishedTensors, limit: int) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        if shards[-1] and size + tensors.nbytes(name) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors.nbytes(name)
    files = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    for file, names in zip(files, shards):
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensors.nbytes(name) for name in tensors)
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        _write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
