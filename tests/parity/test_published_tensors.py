"""Tensors of every family under all the names that they have, and what they hold: read as transformers reads them, or refused by name."""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from published_models import FAMILIES, KINDS, call, publish
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from safetensors.torch import save_model

from jaxdl import pretrained
from jaxdl.errors import UserError
from jaxdl.models.vit import ViT, adapt
from jaxdl.nn import interpolate_positions

HEADS = {
    "gpt2": ("transformer.wte.weight", ("lm_head.weight",)),
    "marian": (
        "model.shared.weight",
        ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "encoder.embed_tokens.weight"),
    ),
    "paligemma": (
        "language_model.model.embed_tokens.weight",
        ("language_model.lm_head.weight", "lm_head.weight", "model.language_model.embed_tokens.weight"),
    ),
}  # fmt: skip
"""Of a model whose logits are by its table of embeddings: the table, and other names that it has."""
TIED = [(name, other) for name in HEADS for other in HEADS[name][1]]


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    publish(request.param, folder)
    return request.param, folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The directory of a family, written once."""
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("published")
            publish(name, made[name])
        return made[name]

    return get


def edit(source: Path, folder: Path, change) -> Path:
    """A copy of a published model whose tensors went through `change`."""
    shutil.copy(source / "config.json", folder / "config.json")
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(name: str, folder: Path) -> np.ndarray:
    module, params = pretrained.load(folder)
    return np.asarray(jax.jit(module.apply)({"params": params}, *map(jnp.asarray, KINDS[name][2])).logits)


def theirs(name: str, folder: Path) -> np.ndarray:
    return call(name, getattr(transformers, KINDS[name][0]).from_pretrained(folder).eval(), KINDS[name][2])


def test_every_family_equals_transformers(kind):
    name, folder = kind
    np.testing.assert_allclose(logits(name, folder), theirs(name, folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "other"), TIED)
def test_a_table_is_read_under_each_of_its_names(published, tmp_path, name, other):
    source, own = published(name), HEADS[name][0]
    wanted = pretrained.load(source)[1]
    alone = edit(source, tmp_path, lambda tensors: {other if key == own else key: tensor for key, tensor in tensors.items()})
    chex.assert_trees_all_equal(pretrained.load(alone)[1], wanted)
    both = edit(source, tmp_path, lambda tensors: tensors | {other: tensors[own].copy()})
    chex.assert_trees_all_equal(pretrained.load(both)[1], wanted)


@pytest.mark.parametrize(("name", "other"), TIED)
def test_a_table_that_was_trained_apart_is_refused_by_its_name(published, tmp_path, name, other):
    own = HEADS[name][0]
    folder = edit(published(name), tmp_path, lambda tensors: tensors | {other: tensors[own] + np.float32(0.1)})
    with pytest.raises(UserError, match=rf"{other} differs from {own}|{own} differs from {other}") as error:
        pretrained.load(folder)
    assert "belong together" not in str(error.value)


@pytest.mark.parametrize("name", HEADS)
def test_what_safetensors_keeps_of_tied_names_is_read(name, published, tmp_path):
    source = published(name)
    model = getattr(transformers, FAMILIES[name][0]).from_pretrained(source).eval()
    shutil.copy(source / "config.json", tmp_path / "config.json")
    save_model(model, str(tmp_path / "model.safetensors"))
    assert HEADS[name][0] not in load_file(tmp_path / "model.safetensors")
    chex.assert_trees_all_equal(pretrained.load(tmp_path)[1], pretrained.load(source)[1])


def test_names_in_memory_are_read(kind, tmp_path):
    """As trainers and converters write them: all of `state_dict`, tied names twice."""
    name, folder = kind
    model = getattr(transformers, KINDS[name][0]).from_pretrained(folder)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    save_torch({key: tensor.clone() for key, tensor in model.state_dict().items()}, str(tmp_path / "model.safetensors"))
    chex.assert_trees_all_equal(pretrained.load(tmp_path)[1], pretrained.load(folder)[1])


PREFIXES = dict(gpt2="transformer.", vit="vit.", clip="clip.", siglip="siglip.", marian="model.", paligemma="model.")


@pytest.mark.parametrize("name", PREFIXES)
def test_the_name_of_the_base_model_may_be_there_or_not(published, tmp_path, name):
    source, prefix = published(name), PREFIXES[name]
    wanted = pretrained.load(source)[1]
    for rename in (lambda key: key.removeprefix(prefix), lambda key: prefix + key.removeprefix(prefix)):
        folder = edit(source, tmp_path, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
        chex.assert_trees_all_equal(pretrained.load(folder)[1], wanted)
    twice = max(load_file(source / "model.safetensors")).removeprefix(prefix)
    both = lambda tensors: {f"{prefix}{twice}": np.float32(1) + tensors.get(twice, tensors.get(f"{prefix}{twice}"))} | tensors
    with pytest.raises(UserError, match="differs from") as error:
        pretrained.load(edit(source, tmp_path, lambda tensors: both(tensors) | {twice: both(tensors)[f"{prefix}{twice}"] + 1}))
    assert twice in str(error.value)


CONSTANTS = {
    "gpt2": {
        "transformer.h.0.attn.bias": np.tril(np.ones((1, 1, 8, 8), bool)),
        "h.1.attn.bias": np.tril(np.ones((1, 1, 8, 8), np.float32)),
        "transformer.h.1.attn.masked_bias": np.array(-1e4, np.float32),
    },
    "clip": {
        "vision_model.embeddings.position_ids": np.arange(5)[None],
        "text_model.embeddings.position_ids": np.arange(6)[None],
    },
    "siglip": {
        "vision_model.embeddings.position_ids": np.arange(4)[None],
        "text_model.embeddings.position_ids": np.arange(6)[None],
    },
    "paligemma": {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(4)[None],
        "model.vision_tower.embeddings.position_ids": np.arange(4)[None],
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "buffer"), [(name, buffer) for name in CONSTANTS for buffer in CONSTANTS[name]])
def test_buffers_hold_what_is_computed_or_are_refused(published, tmp_path, name, buffer):
    source, value = published(name), CONSTANTS[name][buffer]
    wanted = pretrained.load(source)[1]
    chex.assert_trees_all_equal(pretrained.load(edit(source, tmp_path, lambda tensors: tensors | {buffer: value}))[1], wanted)
    other = ~value if value.dtype == bool else 3 - value
    with pytest.raises(UserError, match=f"{buffer} does not hold"):
        pretrained.load(edit(source, tmp_path, lambda tensors: tensors | {buffer: np.ascontiguousarray(other)}))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_positions_of_a_translator_are_sines_and_cosines_or_are_refused(published, tmp_path, side):
    name, source = f"model.{side}.embed_positions.weight", published("marian")
    model = transformers.MarianMTModel.from_pretrained(source)
    table = model.state_dict()[name].numpy()
    wanted = pretrained.load(source)[1]
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        folder = edit(source, tmp_path, lambda tensors: tensors | {name: table.astype(dtype)})
        chex.assert_trees_all_equal(pretrained.load(folder)[1], wanted)
    interleaved = np.ascontiguousarray(table.reshape(len(table), 2, -1).swapaxes(1, 2).reshape(table.shape))
    for wrong in (interleaved, table + np.float32(0.01), table[:-1], np.zeros_like(table)):
        with pytest.raises(UserError, match=f"{name} does not hold sines and cosines"):
            pretrained.load(edit(source, tmp_path, lambda tensors: tensors | {name: wrong}))


def test_a_missing_bias_of_logits_is_zero_as_in_transformers(published, tmp_path):
    folder = edit(published("marian"), tmp_path, lambda tensors: tensors | {})
    tensors = load_file(folder / "model.safetensors")
    del tensors["final_logits_bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_allclose(logits("marian", folder), theirs("marian", folder), rtol=1e-4, atol=1e-4)
    assert not pretrained.load(folder)[1]["logits_bias"].any()


def test_a_bias_of_logits_where_there_is_none_is_refused(published, tmp_path):
    """`logits_bias` is a setting of ours."""
    bias = np.zeros((1, 30), np.float32)
    folder = edit(published("marian"), tmp_path, lambda tensors: tensors | {"final_logits_bias": bias})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logits_bias": False}))
    assert "logits_bias" not in pretrained.load(folder)[1]
    bias[0, 3] = 1
    edit(published("marian"), tmp_path, lambda tensors: tensors | {"final_logits_bias": bias})
    (folder / "config.json").write_text(json.dumps(config | {"logits_bias": False}))
    with pytest.raises(UserError, match="final_logits_bias does not hold zero"):
        pretrained.load(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_floats_of_every_width_are_read(kind, tmp_path, dtype):
    _, folder = kind
    dtype = np.dtype(dtype) if dtype != "bfloat16" else ml_dtypes.bfloat16
    half = edit(folder, tmp_path, lambda tensors: {key: tensor.astype(dtype) for key, tensor in tensors.items()})
    module, params = pretrained.load(half)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), pretrained.load(folder)[1])
    chex.assert_trees_all_equal(jax.tree.map(np.float32, params), jax.tree.map(np.float32, expected))
    assert pretrained.load(half, param_dtype=jnp.float32)[1].keys() == params.keys() and module == pretrained.load_module(folder)


OTHER_TYPES = ["bool", "uint8", "int32", "int64", "float8_e5m2", "complex64"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gpt2", dtype) for dtype in OTHER_TYPES] + [(name, dtype) for name in FAMILIES for dtype in ("int8", "float8_e4m3fn")],
)
def test_what_is_no_float_is_refused_by_its_name(published, tmp_path, name, dtype):
    folder = published(name)
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    tensors = {key: torch.tensor(tensor) for key, tensor in load_file(folder / "model.safetensors").items()}
    name = sorted(tensors)[len(tensors) // 2]
    save_torch(tensors | {name: tensors[name].to(getattr(torch, dtype))}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=f"{name} is stored as .*16, 32 or 64 bits") as error:
        pretrained.load(tmp_path)
    assert "\n" not in str(error.value)


KERNELS = {
    "vit": "vit.embeddings.patch_embeddings.projection.weight",
    "clip": "vision_model.embeddings.patch_embedding.weight",
    "siglip": "vision_model.embeddings.patch_embedding.weight",
    "paligemma": "vision_tower.embeddings.patch_embedding.weight",
}  # fmt: skip
FORMS = {
    **{(name, kernel): [(16, 3, 2, 8), (16, 3, 8, 2), (16, 12, 2, 2), (16, 3, 16), (16, 48), (3, 16, 4, 4), (4, 4, 3, 16)] for name, kernel in KERNELS.items()},
    ("siglip", "vision_model.head.attention.in_proj_weight"): [(16, 16), (16, 48), (3, 16, 16)],
    ("siglip", "vision_model.head.attention.in_proj_bias"): [(16,), (3, 16)],
    ("siglip", "vision_model.head.probe"): [(1, 16), (16,)],
    ("siglip", "vision_model.embeddings.position_embedding.weight"): [(1, 4, 16), (2, 2, 16), (16, 4), (64,)],
    ("clip", "vision_model.embeddings.position_embedding.weight"): [(1, 5, 16), (16, 5)],
    ("clip", "text_projection.weight"): [(16, 12)],
    ("vit", "vit.embeddings.position_embeddings"): [(5, 16), (1, 16, 5), (5, 1, 16)],
    ("vit", "vit.encoder.layer.0.intermediate.dense.weight"): [(16, 24)],
    ("gpt2", "transformer.h.0.attn.c_attn.weight"): [(48, 16), (16, 16), (3, 16, 16)],
    ("gpt2", "transformer.h.0.attn.c_attn.bias"): [(16,), (3, 16), (1, 48)],
    ("gpt2", "transformer.h.0.mlp.c_fc.weight"): [(64, 16)],
    ("marian", "final_logits_bias"): [(30,), (30, 1), (1, 1, 30)],
    ("marian", "model.shared.weight"): [(16, 30)],
    ("paligemma", "language_model.model.layers.0.mlp.down_proj.weight"): [(24, 16)],
    ("paligemma", "language_model.model.layers.0.self_attn.k_proj.weight"): [(16, 8)],
}  # fmt: skip
"""Other forms of tensors, most of them of as many numbers."""


@pytest.mark.parametrize(("name", "tensor", "form"), [(*key, form) for key, forms in FORMS.items() for form in forms])
def test_a_tensor_of_another_form_is_refused_though_it_has_as_many_numbers(published, tmp_path, name, tensor, form):
    assert load_file(published(name) / "model.safetensors")[tensor].shape != form
    folder = edit(published(name), tmp_path, lambda tensors: tensors | {tensor: np.zeros(form, np.float32)})
    with pytest.raises(UserError, match=rf"{tensor} of shape \({form[0]},") as error:
        pretrained.load(folder)
    assert "which is published as" in str(error.value)


@pytest.mark.parametrize("architectures", [["ViTForImageClassification"], ["ViTModel"], None, []])
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_a_head_is_there_if_the_file_or_its_tensors_say_so(tmp_path, kind, architectures):
    config = transformers.ViTConfig(**FAMILIES["vit"][1])
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": architectures}))
    if architectures and architectures != [kind]:
        with pytest.raises(UserError, match=r"classifier\.bias is (missing|left over)"):
            pretrained.load(tmp_path)
    else:
        module, _ = pretrained.load(tmp_path, ViT)
        assert module.num_classes == (5 if kind == "ViTForImageClassification" else 0)


def test_a_classifier_may_be_called_score(published, tmp_path):
    source = published("vit")
    rename = lambda tensors: {key.replace("classifier.", "score."): tensor for key, tensor in tensors.items()}
    chex.assert_trees_all_equal(pretrained.load(edit(source, tmp_path, rename))[1], pretrained.load(source)[1])


@pytest.mark.parametrize("kind", ["SiglipVisionModel", "SiglipTextModel", "CLIPVisionModel", "CLIPTextModel"])
def test_one_tower_alone_is_refused_as_such(tmp_path, kind):
    family = "siglip" if kind.startswith("Sig") else "clip"
    part = "vision_config" if "Vision" in kind else "text_config"
    model = getattr(transformers, kind)
    model(model.config_class(**FAMILIES[family][1][part])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"one tower alone: give a whole {family}"):
        pretrained.load(tmp_path)
    config = {"model_type": family, "architectures": [kind], **FAMILIES[family][1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"is a {kind}"):
        pretrained.load(tmp_path)


def test_what_pools_patches_and_is_not_used_is_no_fault(published, tmp_path):
    """PaliGemma's tower without `vision_use_head` in its config has a head in transformers, which nothing reads."""
    add = lambda tensors: tensors | {"vision_tower.vision_model.head.probe": np.zeros((1, 1, 16), np.float32)}
    folder = edit(published("paligemma"), tmp_path, add)
    chex.assert_trees_all_equal(pretrained.load(folder)[1], pretrained.load(published("paligemma"))[1])


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "paligemma"])
def test_images_of_as_many_patches_in_another_form_are_refused(published, name):
    """As transformers refuses them: the positions of 2×2 patches are not those of 1×4."""
    module, params = pretrained.load(published(name))
    images, *rest = map(jnp.asarray, FAMILIES[name][2])
    shape = lambda given: jax.eval_shape(module.apply, {"params": params}, given, *rest)
    shape(images)
    for form in ((2, 4, 16, 3), (2, 16, 4, 3)):
        with pytest.raises(UserError, match=r"learned positions are those of 2×2"):
            shape(images.reshape(form))


def test_positions_of_an_oblong_image_are_interpolated_to_as_many_of_a_square(published):
    module, params = pretrained.load(published("vit"))
    wide, moved = adapt(module, params, size=(4, 16))
    image = jnp.asarray(FAMILIES["vit"][2][0].reshape(2, 4, 16, 3))
    assert wide.apply({"params": moved}, image).logits.shape == (2, 5)
    table = moved["positions"]["table"]
    square = adapt(wide, moved, size=(8, 8))[1]["positions"]["table"]
    np.testing.assert_allclose(square, interpolate_positions(table, (1, 4), (2, 2)), atol=1e-6)
    assert np.abs(square - table).max() > 1e-3
