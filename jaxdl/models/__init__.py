"""Model families, one file each, read from top to bottom: blocks, model, variants, published weights; and which published names are theirs.

A family whose weights are published offers

- `from_config(config, **changes) -> (module, inputs)`: the module that a `config.json` describes, with abstract inputs that fix the shapes of all parameters;
- `to_config(module, params) -> config`: the inverse, from the parameters or their shapes, which say what the module leaves open;
- `published(module) -> jaxdl.weights.Table`: which published tensor each parameter is read from and written to;

and, where they are needed,

- `ARCHITECTURES`: the names in `architectures` of a `config.json` that it reads;
- `architecture(names)`: which of them tensors of these names are of, where no `config.json` says it;
- `load_texts(directory)`: what its texts are prepared by, if that is not one `Tokenizer`;
- `preprocessor_fields(module, params)`: what its `preprocessor_config.json` holds besides the image processor.
"""

from typing import Any

FAMILIES: dict[str, str] = {
    "clip": "clip",
    "gpt2": "gpt2",
    "marian": "marian",
    "paligemma": "paligemma",
    "siglip": "siglip",
    "vit": "vit",
}
"""Which file of this folder reads and writes a published model, by the `model_type` (transformers) or `_class_name` (diffusers) in its `config.json`."""

_OF_GPT2 = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
_OF_GEMMA = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", padding_side="left")
_OF_SIGLIP = dict(eos_token="</s>", unk_token="<unk>", pad_token="</s>", model_max_length=64)
TOKENIZERS: dict[str, dict[str, Any]] = {
    "CLIPTokenizer": _OF_GPT2 | dict(bos_token="<|startoftext|>", pad_token="<|endoftext|>", begins_and_ends=True),
    "GPT2Tokenizer": _OF_GPT2,
    "GemmaTokenizer": _OF_GEMMA,
    # The texts lose case and punctuation, as in `canonicalize_text` of big_vision, evaluators/proj/image_text/prompt_engineering.py.
    "SiglipTokenizer": _OF_SIGLIP | dict(do_lower_case=True, strip_punctuation=True),
    "Siglip2Tokenizer": _OF_GEMMA | dict(lower_cases=True),
}
"""What transformers' tokenizer of a class does without being told in `tokenizer_config.json`: options of `jaxdl.data.text.Tokenizer.load`. Where one `lower_cases`, or `begins_and_ends` each text with the marks that are called so, its files cannot change it."""

IMAGE_PROCESSORS: dict[str, str] = {"stretch": "SiglipImageProcessor", "crop": "CLIPImageProcessor"}
"""Transformers' class that does what an `ImageProcessor` of a `resize_mode` does."""
