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
from published_siglip import CONFIG, published_shapes, write_published_siglip

from jaxdl import pretrained
from jaxdl.data.paligemma import TextProcessor
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.models import clip, siglip
from jaxdl.weights import Table, convert, dense, norm, packed_attention, scalar, unchanged


@pytest.fixture
def directory(tmp_path):
    write_published_siglip(tmp_path)
    return tmp_path


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


@pytest.mark.parametrize("model_type", ["siglipp", "../siglip", "os", None, 3, "mlp", "gemma", "lenet"])
def test_an_unknown_family_is_named_with_those_that_are_published(directory, model_type):
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=r"model family.*choose one of clip, gpt2, marian, paligemma, siglip, vit$"):
        pretrained.load(directory)


def test_another_model_than_is_expected_is_refused_by_name(directory):
    pretrained.load(directory, siglip.SigLIP)
    with pytest.raises(UserError, match="the weights are those of a SigLIP: give those of a CLIP"):
        pretrained.load(directory, clip.CLIP)


def test_a_pickle_is_not_read_and_the_mend_is_named(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no model\.safetensors"):
        pretrained.load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        pretrained.load(directory)


def test_a_model_that_the_hub_has_as_a_pickle_only_is_named_with_the_mend(directory, monkeypatch):
    """Of opus-mt's models, and CLIP's smaller ones, it has no safetensors."""
    (directory / "model.safetensors").unlink()
    files = ["config.json", "pytorch_model.bin", "source.spm", "tf_model.h5"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(directory))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: files)
    named = r"^OWNER/MODEL: there is no model\.safetensors, and pytorch_model\.bin is a pickle.*'OWNER/MODEL'.*; then give MODEL$"
    with pytest.raises(UserError, match=named):
        pretrained.load("OWNER/MODEL")
    files.remove("pytorch_model.bin")
    with pytest.raises(UserError, match=r"there is no model\.safetensors: fetch the weights"):
        pretrained.load("OWNER/MODEL")


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


def test_paligemmas_texts_are_questions_and_answers(tmp_path):
    TextProcessor.extending(Tokenizer.train(["a red ring"], vocabulary=60), patches=9).save(tmp_path)
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 12, "width": 12}, "image_seq_length": 4}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    assert isinstance(pretrained.load_processors(tmp_path)[1], Tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    process, texts = pretrained.load_processors(tmp_path)
    assert process.size == (12, 12) and texts(["a ring"], ["red"]).tokens[0, :5].tolist() == [texts.image] * 4 + [texts.start]


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
