"""Where published weights are looked for, and how it is said that they are not there. Their values are compared in tests/parity."""

import json

import chex
import huggingface_hub
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from jaxdl import pretrained
from jaxdl.data.image import ImageProcessor
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.models import siglip
from jaxdl.weights import Table, convert, dense, norm, packed_attention, scalar, unchanged

TOWER = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
CONFIG = {
    "model_type": "siglip",
    "vision_config": dict(TOWER, image_size=8, patch_size=4),
    "text_config": dict(TOWER, vocab_size=20, max_position_embeddings=5),
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the small model above, under their published names."""
    linear = lambda name, out, width: {f"{name}.weight": (out, width), f"{name}.bias": (out,)}
    norm = lambda name: {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    head = "vision_model.head"
    shapes = {"logit_scale": (1,), "logit_bias": (1,), f"{head}.probe": (1, 1, 8)}
    shapes |= {
        "vision_model.embeddings.patch_embedding.weight": (8, 3, 4, 4),
        "vision_model.embeddings.patch_embedding.bias": (8,),
    }
    shapes |= {
        "vision_model.embeddings.position_embedding.weight": (4, 8),
        "text_model.embeddings.position_embedding.weight": (5, 8),
    }
    shapes |= {"text_model.embeddings.token_embedding.weight": (20, 8), **linear("text_model.head", 8, 8)}
    shapes |= {f"{head}.attention.in_proj_weight": (24, 8), f"{head}.attention.in_proj_bias": (24,)}
    shapes |= linear(f"{head}.attention.out_proj", 8, 8) | norm(f"{head}.layernorm")
    shapes |= norm("vision_model.post_layernorm") | norm("text_model.final_layer_norm")
    for block in ("vision_model.encoder.layers.0", "text_model.encoder.layers.0", head):
        shapes |= linear(f"{block}.mlp.fc1", 12, 8) | linear(f"{block}.mlp.fc2", 8, 12)
    for block in ("vision_model.encoder.layers.0", "text_model.encoder.layers.0"):
        shapes |= norm(f"{block}.layer_norm1") | norm(f"{block}.layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}.self_attn.{name}", 8, 8)
    return shapes


@pytest.fixture
def directory(tmp_path):
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape, np.float32) for name, shape in published_shapes().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_the_readme_embeds_an_image_and_a_text(directory):
    Tokenizer.train(["a photo of a cat"], vocabulary=20).save(directory)
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 8, "width": 8}}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))

    module, params = pretrained.load(directory)
    process, tokenize = pretrained.load_processors(directory)
    assert process == ImageProcessor.preset("siglip", 8)
    images = np.stack([process(np.full((30, 40, 3), grey, np.uint8)) for grey in (0, 128, 255)])
    output = jax.jit(module.apply)({"params": params}, images, tokenize(["a cat", "a photo"], length=5))
    chex.assert_shape(output.logits, (3, 2))
    chex.assert_shape([output.image_embeddings, output.text_embeddings], [(3, 8), (2, 8)])
    chex.assert_trees_all_close(jnp.linalg.norm(output.image_embeddings, axis=1), np.ones(3), rtol=1e-6)
    chex.assert_tree_all_finite(output.logits)


def test_published_parameters_have_the_shapes_of_fresh_ones(directory):
    module, params = pretrained.load(directory)
    fresh = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)), jnp.ones((1, 5), int))["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(params, fresh)


def test_a_hub_name_goes_through_the_hubs_cache(directory, monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    chex.assert_trees_all_equal(pretrained.load("google/siglip-tiny")[1], pretrained.load(directory)[1])
    ((name, patterns),) = asked
    assert name == "google/siglip-tiny" and "config.json" in patterns and not any("bin" in pattern for pattern in patterns)


@pytest.mark.parametrize(
    "failure",
    [
        huggingface_hub.errors.LocalEntryNotFoundError("offline\nand more"),
        huggingface_hub.errors.HFValidationError("offline"),
        TimeoutError("offline"),
        RuntimeError("offline"),
    ],
)
@pytest.mark.parametrize("read", [pretrained.load, pretrained.load_processors])
def test_what_the_hub_cannot_give_is_one_clear_line(failure, read, monkeypatch):
    def download(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"google/nothing is no directory here.*\(offline\): check the name") as error:
        read("google/nothing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nowhere", "./no/where", "/no/where", "a/b/c", ""])
def test_a_path_that_is_no_hub_name_is_not_looked_up(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    if path:
        with pytest.raises(UserError, match=r"no directory .*OWNER/MODEL"):
            pretrained.load(path)
    else:
        with pytest.raises(UserError, match=r"holds no config\.json"):
            pretrained.load(tmp_path)


def test_a_file_is_no_directory(directory):
    with pytest.raises(UserError, match="no directory"):
        pretrained.load(directory / "config.json")


def test_a_broken_configuration_is_named(directory):
    for content in ("{", "[]", "\xff"):
        (directory / "config.json").write_text(content, "latin-1")
        with pytest.raises(UserError, match=r"config\.json .*JSON"):
            pretrained.load(directory)


@pytest.mark.parametrize("model_type", ["siglipp", "../siglip", "os", None, 3])
def test_an_unknown_family_is_named_with_those_there_are(directory, model_type):
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=r"model family.*choose one of .*siglip"):
        pretrained.load(directory)


def test_a_pickle_is_not_read_and_the_mend_is_named(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no model\.safetensors"):
        pretrained.load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        pretrained.load(directory)


def test_a_truncated_file_is_named(directory):
    whole = (directory / "model.safetensors").read_bytes()
    for length in (0, 100, len(whole) - 1):
        (directory / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
            pretrained.load(directory)


def test_a_missing_shard_is_named(directory):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors cannot be read"):
        pretrained.load(directory)


def test_an_index_cannot_point_out_of_its_directory(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="out of its directory"):
        pretrained.load(directory)


def test_every_row_of_the_table_is_needed():
    module, inputs = siglip.from_config(CONFIG)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    sources = {siglip.PUBLISHED.source(path)[0] for path in flatten_dict(shapes, sep="/")}
    assert sources == set(published_shapes())


class Conversion(chex.TestCase):
    def test_rows_transpose_split_and_flatten(self):
        rows = {
            **dense("a", "x"),
            **norm(r"n_(\d)", r"y.\1"),
            **packed_attention("m", "z"),
            "s": ("t", scalar),
            "u": ("v", unchanged),
        }
        random = np.random.default_rng(0)
        draw = lambda *shape: random.standard_normal(shape, np.float32)
        tensors = {
            "x.weight": draw(2, 3),
            "x.bias": draw(2),
            "y.7.weight": draw(4),
            "y.7.bias": draw(4),
            "t": draw(1),
            "v": draw(2),
        }
        tensors |= {
            "z.in_proj_weight": draw(6, 2),
            "z.in_proj_bias": draw(6),
            "z.out_proj.weight": draw(2, 2),
            "z.out_proj.bias": draw(2),
        }
        part = lambda start: {
            "kernel": tensors["z.in_proj_weight"][start : start + 2].T,
            "bias": tensors["z.in_proj_bias"][start : start + 2],
        }
        expected = {
            "a": {"kernel": tensors["x.weight"].T, "bias": tensors["x.bias"]},
            "n_7": {"scale": tensors["y.7.weight"], "bias": tensors["y.7.bias"]},
            "m": {
                "query": part(0),
                "key": part(2),
                "value": part(4),
                "out": {"kernel": tensors["z.out_proj.weight"].T, "bias": tensors["z.out_proj.bias"]},
            },
            "s": tensors["t"][0],
            "u": tensors["v"],
        }
        shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, expected))
        chex.assert_trees_all_equal(convert(tensors, Table(rows), shapes), expected)

    def test_a_gap_in_the_table_is_a_fault_of_the_table(self):
        with self.assertRaisesRegex(LookupError, "no row of the table matches the parameter a/b"):
            convert({}, Table({"b": ("x", unchanged)}), {"a": {"b": jax.ShapeDtypeStruct((), jnp.float32)}})
