"""Where published weights are looked for, and how it is said that they are not there. Their values are compared in tests/parity."""

import json
import sys
import types

import chex
import flax.linen as nn
import huggingface_hub
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from published_siglip import CONFIG, published_shapes, write_published_siglip
from safetensors.numpy import load_file, save_file

import jaxdl.models
from jaxdl import pretrained
from jaxdl.data.prompts import PromptProcessor
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.models import clip, siglip
from jaxdl.nn import stack_blocks
from jaxdl.weights import (
    BATCHED,
    UNCHANGED,
    PublishedTensors,
    Table,
    convert,
    dense,
    norm,
    packed,
    packed_attention,
    patch_kernel,
    reordered,
    scalar,
)


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
    sources = {siglip.published(module).source(path)[0] for path in flatten_dict(shapes, sep="/")}
    assert sources == set(published_shapes())


def test_a_family_says_what_its_texts_are(tmp_path):
    PromptProcessor.extending(Tokenizer.train(["a red ring"], vocab_size=60), 9).save(tmp_path)
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 12, "width": 12}, "image_seq_length": 4}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    assert isinstance(pretrained.load_processors(tmp_path)[1], Tokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    process, texts = pretrained.load_processors(tmp_path)
    assert process.size == (12, 12) and texts(["a ring"], ["red"]).tokens[0, :5].tolist() == [texts.image_token] * 4 + [texts.bos]


class Conversion(chex.TestCase):
    def setUp(self):
        super().setUp()
        random = np.random.default_rng(0)
        draw = lambda *shape: random.standard_normal(shape, np.float32)
        self.tensors = {
            "x.weight": draw(2, 3), "x.bias": draw(2), "y.7.weight": draw(4), "y.7.bias": draw(4), "t": draw(1), "v": draw(2),
            "z.in_proj_weight": draw(6, 2), "z.in_proj_bias": draw(6), "z.out_proj.weight": draw(2, 2), "z.out_proj.bias": draw(2),
            "c.attn": draw(3, 6), "patch": draw(5, 3, 2, 2), "cls": draw(1, 4), "o": draw(4, 3),
        }  # fmt: skip
        self.table = Table({
            **dense("a", "x"), **norm(r"n_(\d)", r"y.\1"), **packed_attention("m", "z"),
            "s": ("t", scalar(1)), "u": ("v", UNCHANGED), "b": ("cls", BATCHED), "p": ("patch", patch_kernel(2)),
            "first": ("c.attn", packed(0, 2, axis=-1)), "second": ("c.attn", packed(1, 2, axis=-1)),
            "o": ("o", reordered([2, 0, 1], -1)),
        })  # fmt: skip
        t = self.tensors
        part = lambda start: {
            "kernel": t["z.in_proj_weight"][start : start + 2].T,
            "bias": t["z.in_proj_bias"][start : start + 2],
        }
        self.expected = {
            "a": {"kernel": t["x.weight"].T, "bias": t["x.bias"]},
            "n_7": {"scale": t["y.7.weight"], "bias": t["y.7.bias"]},
            "m": {"query": part(0), "key": part(2), "value": part(4), "out": {"kernel": t["z.out_proj.weight"].T, "bias": t["z.out_proj.bias"]}},
            "s": np.asarray(t["t"][0]),
            "u": t["v"],
            "b": t["cls"][0],
            "p": np.stack([t["patch"][:, c, y, x] for y in range(2) for x in range(2) for c in range(3)]),
            "first": t["c.attn"][:, :3],
            "second": t["c.attn"][:, 3:],
            "o": np.stack([t["o"][:, 1], t["o"][:, 2], t["o"][:, 0]], 1),
        }  # fmt: skip

    def test_rows_transpose_split_flatten_and_reorder(self):
        shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, self.expected))
        chex.assert_trees_all_equal(convert(self.tensors, self.table, shapes), self.expected)

    def test_what_is_written_is_what_was_read(self):
        written = PublishedTensors(self.expected, self.table)
        chex.assert_trees_all_equal(dict(written), self.tensors)
        self.assertEqual({name: written.nbytes(name) for name in written}, {name: t.nbytes for name, t in self.tensors.items()})

    def test_a_gap_in_the_table_is_a_fault_of_the_table(self):
        with self.assertRaisesRegex(LookupError, "no row of the table matches the parameter a/b"):
            convert({}, Table({"b": ("x", UNCHANGED)}), {"a": {"b": jax.ShapeDtypeStruct((), jnp.float32)}})
        with self.assertRaisesRegex(LookupError, r"do not make the whole of c\.attn"):
            PublishedTensors({"first": np.zeros(3)}, self.table)


def toy(name: str) -> types.ModuleType:
    """A family as one of diffusers' would be: a scale of channels, under diffusers' kinds of names."""
    family = types.ModuleType(f"jaxdl.models.{name}")

    class Toy(nn.Module):
        channels: int

        @nn.compact
        def __call__(self, x):
            return (
                nn.Dense(self.channels, name="conv_in")(x) + self.param("scale", nn.initializers.ones, (2 * self.channels,)).sum()
            )

    Toy.__module__ = family.__name__
    family.Toy = Toy
    family.from_config = lambda config, **changes: (
        Toy(config["block_out"], **changes),
        (jax.ShapeDtypeStruct((1, 3), jnp.float32),),
    )
    family.to_config = lambda module, params: {"_class_name": "ToyModel2D", "block_out": module.channels}
    family.published = lambda module: Table({**dense("conv_in", "conv_in"), "scale": ("scale.weight", UNCHANGED)})
    return family


@pytest.fixture
def toy_family(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxdl.models.toy", family := toy("toy"))
    monkeypatch.setitem(jaxdl.models.FAMILIES, "ToyModel2D", "toy")
    return family


def diffusers_folder(directory, shards: int = 1) -> dict[str, np.ndarray]:
    """A pipeline as diffusers lays it out: an index, a folder for each part, weights under diffusers' name."""
    random = np.random.default_rng(0)
    shapes = {"conv_in.weight": (4, 3), "conv_in.bias": (4,), "scale.weight": (8,)}
    tensors = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    index = {
        "_class_name": "ToyPipeline",
        "_diffusers_version": "0.35.0",
        "unet": ["diffusers", "ToyModel2D"],
        "scheduler": ["diffusers", "X"],
    }
    part = directory / "unet"
    part.mkdir(parents=True)
    (directory / "model_index.json").write_text(json.dumps(index))
    (part / "config.json").write_text(json.dumps({"_class_name": "ToyModel2D", "_diffusers_version": "0.35.0", "block_out": 4}))
    if shards == 1:
        save_file(tensors, part / "diffusion_pytorch_model.safetensors")
        return tensors
    names = {name: f"diffusion_pytorch_model-{n:05d}-of-00003.safetensors" for n, name in enumerate(tensors, 1)}
    for name, file in names.items():
        save_file({name: tensors[name]}, part / file)
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_a_part_of_a_diffusers_pipeline_is_read_by_its_class_name(shards, toy_family, tmp_path):
    tensors = diffusers_folder(tmp_path, shards)
    for module, params in (pretrained.load(tmp_path, subfolder="unet"), pretrained.load(tmp_path / "unet")):
        assert module == toy_family.Toy(4)
        np.testing.assert_array_equal(params["conv_in"]["kernel"], tensors["conv_in.weight"].T)
        np.testing.assert_array_equal(params["scale"], tensors["scale.weight"])


def test_a_pipeline_is_asked_for_one_of_its_parts(toy_family, tmp_path):
    diffusers_folder(tmp_path)
    with pytest.raises(UserError, match=r"holds several models: give a subfolder of it, one of scheduler, unet$"):
        pretrained.load(tmp_path)
    for wrong in ("vae", "unet/..", "/"):
        with pytest.raises(UserError, match=r"has no sub-folder .*one of scheduler, unet$"):
            pretrained.load(tmp_path, subfolder=wrong)


def test_of_a_part_on_the_hub_nothing_else_is_fetched(toy_family, tmp_path, monkeypatch):
    diffusers_folder(tmp_path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, *, allow_patterns: asked.extend(allow_patterns) or str(tmp_path)
    )
    pretrained.load("OWNER/MODEL", subfolder="unet")
    assert "unet/config.json" in asked and all(pattern.startswith("unet/") for pattern in asked)


@pytest.mark.parametrize("limit, files", [(10**9, ["diffusion_pytorch_model.safetensors"]), (40, [
    "diffusion_pytorch_model-00001-of-00003.safetensors", "diffusion_pytorch_model-00002-of-00003.safetensors",
    "diffusion_pytorch_model-00003-of-00003.safetensors", "diffusion_pytorch_model.safetensors.index.json",
])])  # fmt: skip
def test_a_diffusers_model_is_written_as_it_was(limit, files, toy_family, tmp_path):
    tensors = diffusers_folder(tmp_path / "theirs")
    module, params = pretrained.load(tmp_path / "theirs", subfolder="unet")
    pretrained.save(module, params, tmp_path / "ours", max_shard_bytes=limit)
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == sorted(["config.json", *files])
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == {"_class_name": "ToyModel2D", "block_out": 4}
    written = {name: t for file in (tmp_path / "ours").glob("*.safetensors") for name, t in load_file(file).items()}
    chex.assert_trees_all_equal(written, tensors)
    chex.assert_trees_all_equal(pretrained.load(tmp_path / "ours")[1], params)


def test_a_config_alone_makes_the_module(directory, tmp_path):
    module, params = pretrained.load(directory)
    pretrained.save_config(
        module, jax.eval_shape(lambda: params), tmp_path / "out", tokenizer=pretrained.load_tokenizer(directory)
    )
    assert pretrained.load_module(tmp_path / "out", siglip.SigLIP) == module
    scanned = pretrained.load_module(tmp_path / "out", scan=True, dropout=0.5)
    assert scanned.text.scan and scanned.vision.dropout == 0.5
    pretrained.save_config(scanned, stack_blocks(params), tmp_path / "stacked")
    assert pretrained.load_module(tmp_path / "stacked") == module
    with pytest.raises(UserError, match=r"there is no model\.safetensors"):
        pretrained.load(tmp_path / "out")
    with pytest.raises(UserError, match="the weights are those of a SigLIP: give those of a CLIP"):
        pretrained.load_module(tmp_path / "out", clip.CLIP)


def test_weights_of_another_model_do_not_stay(directory):
    module, params = pretrained.load(directory)
    pretrained.save(module, params, directory, max_shard_bytes=2000)
    assert not (directory / "model.safetensors").exists()
    chex.assert_trees_all_equal(pretrained.load(directory)[1], params)
    changed = jax.tree.map(lambda x: x + 1, params)
    pretrained.save(module, changed, directory)
    assert [file.name for file in directory.glob("*.safetensors*")] == ["model.safetensors"]
    chex.assert_trees_all_equal(pretrained.load(directory)[1], changed)


def test_a_save_that_fails_leaves_what_was_there(directory, monkeypatch):
    module, params = pretrained.load(directory)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(UserError, match="cannot be written to .*No space left"):
        pretrained.save(module, jax.tree.map(lambda x: x + 1, params), directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    with pytest.raises(UserError, match="cannot be written to"):
        pretrained.save(module, params, directory / "config.json")


def test_what_has_no_published_form_is_refused(directory):
    module, params = pretrained.load(directory)
    with pytest.raises(UserError, match=r"a Dense has no published form: models of clip, .*vit have one"):
        pretrained.save(nn.Dense(3), {}, directory)
    with pytest.raises(UserError, match=r"the parameters are not those of the module \(text/head/bias\)"):
        pretrained.save(
            module, params | {"text": params["text"] | {"head": {"kernel": params["text"]["head"]["kernel"]}}}, directory
        )
    with pytest.raises(UserError, match=r"the parameters are not those of the module \(vision/encoder/block_1"):
        pretrained.save(module.clone(vision=module.vision.clone(depth=2)), params, directory)
