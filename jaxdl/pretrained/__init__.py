"""Published models in and out: from a directory or a hub name to a module and its parameters, and back to a directory that transformers and diffusers read.

`config.json` names the family, `jaxdl.models.FAMILIES` its file, which says how its settings and tensors are called. Weights are safetensors alone, since a pickle can run any code. Both sides must match to the last tensor.
"""

from jaxdl.pretrained.loading import (
    load,
    load_image_processor,
    load_module,
    load_processors,
    load_tokenizer,
    load_tokenizers,
)
from jaxdl.pretrained.saving import save, save_config

__all__ = [
    "load",
    "load_image_processor",
    "load_module",
    "load_processors",
    "load_tokenizer",
    "load_tokenizers",
    "save",
    "save_config",
]
