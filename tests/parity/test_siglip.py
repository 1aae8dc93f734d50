"""SigLIP equals transformers' `SiglipModel`, layer by layer, in its gradients, and from every form of published file."""

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
modeling = pytest.importorskip("transformers.models.siglip.modeling_siglip")
configuration = pytest.importorskip("transformers.models.siglip.configuration_siglip")

from safetensors.numpy import load_file, save_file
from versus_torch import outputs_of_parts, parts_of_towers

from jaxdl import pretrained
from jaxdl.errors import UserError
from jaxdl.losses import sigmoid_loss
from jaxdl.models import siglip
from jaxdl.weights import convert

LAYER, MODEL, GRADIENT = 1e-5, 1e-4, 1e-4
TEXT = dict(vocab_size=50, max_position_embeddings=8, bos_token_id=0, eos_token_id=1)
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
ODD = dict(hidden_size=36, intermediate_size=67, num_hidden_layers=1, num_attention_heads=4)
CONFIGS = {
    "equal towers": (TOWER, dict(TOWER, image_size=32, patch_size=8)),
    "unequal towers": (
        dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3, projection_size=32),
        dict(TOWER, image_size=16, patch_size=4, layer_norm_eps=1e-3),
    ),
    # As So400m/14 at 384 pixels: a head width, a hidden width and a patch that are no powers of two, pixels beyond the last patch.
    "So400m/14": (ODD, dict(ODD, image_size=48, patch_size=14)),
}


@dataclasses.dataclass
class Pair:
    """A published model with weights that are nowhere zero, the same read by us, and what both are given."""

    theirs: Any
    directory: Path
    images: np.ndarray
    tokens: np.ndarray

    def __post_init__(self):
        self.module, self.params = pretrained.load(self.directory)
        apply = functools.partial(self.module.apply, capture_intermediates=True, mutable=["intermediates"])
        self.run_ours = jax.jit(lambda params: apply({"params": params}, jnp.asarray(self.images), jnp.asarray(self.tokens)))

    def run_theirs(self, model, **options):
        return model(pixel_values=torch.tensor(self.images).movedim(-1, 1), input_ids=torch.tensor(self.tokens).long(), **options)


@functools.cache
def make(name: str, directory: Path) -> Pair:
    text, vision = CONFIGS[name]
    torch.manual_seed(0)
    model = modeling.SiglipModel(configuration.SiglipConfig(text_config={**TEXT, **text}, vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    model.save_pretrained(directory / name)
    random, side = np.random.default_rng(0), vision["image_size"]
    tokens = random.integers(0, TEXT["vocab_size"], (3, TEXT["max_position_embeddings"]), np.int32)
    return Pair(model, directory / name, random.standard_normal((3, side, side, 3), np.float32), tokens)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(params=CONFIGS)
def pair(request, folder) -> Pair:
    return make(request.param, folder)


@pytest.fixture
def directory(folder) -> Path:
    """One published model, where any will do."""
    return make("unequal towers", folder).directory


def array(tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def test_every_layer_is_equal(pair):
    theirs = outputs_of_parts(pair.theirs, lambda: pair.run_theirs(pair.theirs))
    found = jax.tree.leaves_with_path(pair.run_ours(pair.params)[1]["intermediates"])
    ours = {"/".join(key.key for key in path[:-2]): output for path, output in found}

    pairs = {"vision/positions": "vision_model.embeddings", "text/positions": "text_model.embeddings"}
    pairs |= {"vision/encoder/norm": "vision_model.post_layernorm", "text/encoder/norm": "text_model.final_layer_norm"}
    pairs |= {"vision/head": "vision_model.head", "text/head": "text_model.head"}
    config = pair.theirs.config
    pairs |= parts_of_towers({tower: getattr(config, f"{tower}_config").num_hidden_layers for tower in ("vision", "text")})
    for our_name, their_name in {"attention": "attention", "norm": "layernorm", "feed_forward": "mlp"}.items():
        pairs[f"vision/head/{our_name}"] = f"vision_model.head.{their_name}"
    for our_name, their_name in pairs.items():
        value = ours[our_name].reshape(theirs[their_name].shape)  # A feed-forward computes on rows.
        np.testing.assert_allclose(value, theirs[their_name], atol=LAYER, rtol=LAYER, err_msg=our_name)


def test_embeddings_logits_and_loss_are_equal(pair):
    with torch.no_grad():
        theirs = pair.run_theirs(pair.theirs, return_loss=True)
    ours, _ = pair.run_ours(pair.params)
    chex.assert_trees_all_close(ours.image_embeddings, array(theirs.image_embeds), atol=LAYER)
    chex.assert_trees_all_close(ours.text_embeddings, array(theirs.text_embeds), atol=LAYER)
    chex.assert_trees_all_close(ours.logits, array(theirs.logits_per_image), atol=MODEL)
    loss = sigmoid_loss(ours.image_embeddings, ours.text_embeddings, ours.log_temperature, ours.bias)
    chex.assert_trees_all_close(loss, array(theirs.loss), rtol=LAYER)


def test_the_gradient_of_every_parameter_is_equal(pair):
    def loss(params):
        output, _ = pair.run_ours(params)
        return sigmoid_loss(output.image_embeddings, output.text_embeddings, output.log_temperature, output.bias)

    pair.theirs.zero_grad()
    pair.run_theirs(pair.theirs, return_loss=True).loss.backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in pair.theirs.named_parameters()}
    # The table is linear in the tensors, so what maps weights maps gradients too.
    expected = convert(theirs, siglip.published(pair.module), jax.eval_shape(lambda: pair.params))
    chex.assert_trees_all_close(jax.jit(jax.grad(loss))(pair.params), expected, atol=GRADIENT, rtol=GRADIENT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_keep_their_type_or_widen(folder, dtype, tmp_path):
    pair = make("unequal towers", folder)
    half = copy.deepcopy(pair.theirs).to(getattr(torch, dtype))
    half.save_pretrained(tmp_path)
    _, stored = pretrained.load(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(dtype)}
    _, wide = pretrained.load(tmp_path, param_dtype=jnp.float32)
    chex.assert_trees_all_equal(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored))
    with torch.no_grad():
        theirs = pair.run_theirs(half.float())
    chex.assert_trees_all_close(pair.run_ours(wide)[0].logits, array(theirs.logits_per_image), atol=MODEL)


def test_shards_hold_the_same_weights_as_one_file(folder, directory, tmp_path):
    make("unequal towers", folder).theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    chex.assert_trees_all_equal(pretrained.load(tmp_path)[1], pretrained.load(directory)[1])


def edited(directory, destination, change):
    """A copy of a published model whose tensors went through `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, destination / "model.safetensors")
    (destination / "config.json").write_text((directory / "config.json").read_text())
    return destination


def test_a_missing_tensor_and_one_left_over_are_named(directory, tmp_path):
    def rename(tensors):
        tensors["vision_model.head.prob"] = tensors.pop("vision_model.head.probe")

    with pytest.raises(UserError, match=r"vision_model\.head\.probe is missing, vision_model\.head\.prob is left over") as error:
        pretrained.load(edited(directory, tmp_path, rename))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["text_model.head.weight", "vision_model.head.attention.in_proj_weight", "vision_model.embeddings.patch_embedding.weight"],
)
def test_a_misshapen_tensor_is_named(directory, tmp_path, name):
    def cut(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name][:-1])

    with pytest.raises(UserError, match=rf"{name} of shape \(\d+, .*does not make"):
        pretrained.load(edited(directory, tmp_path, cut))


def test_many_faults_are_counted_not_listed(directory, tmp_path):
    with pytest.raises(UserError, match=r"and \d+ more; give a directory") as error:
        pretrained.load(edited(directory, tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors)[:-1]]))
    assert str(error.value).count("is missing") == 10 and "\n" not in str(error.value)


def test_buffers_of_older_files_are_no_parameters(directory, tmp_path):
    def add(tensors):
        tensors["text_model.embeddings.position_ids"] = np.arange(8)[None]

    chex.assert_trees_all_equal(pretrained.load(edited(directory, tmp_path, add))[1], pretrained.load(directory)[1])


def test_fields_left_out_have_the_defaults_of_transformers():
    assert siglip.from_config({"model_type": "siglip"}) == siglip.from_config(configuration.SiglipConfig().to_dict())
    assert siglip.from_config({})[0] == siglip.SigLIP.variant("B/16")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act in vision_config is 'gelu'"),
        ({"text_config": {"layer_norm_eps": "1e-6"}}, "layer_norm_eps in text_config is '1e-6'"),
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head"),
        ({"vision_config": {"image_size": [224, 336]}}, "square"),
        ({"text_config": {"projection_size": 512}}, "vectors of 768 and texts of 512"),
        ({"text_config": {"num_attention_heads": 7}}, "hidden_size of 768 in text_config cannot be split into 7 heads"),
    ],
)
def test_settings_that_are_not_siglips_are_refused(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", **config}))
    with pytest.raises(UserError, match=message):
        pretrained.load(tmp_path)


def test_changes_reach_both_towers(directory):
    module, _ = pretrained.load(directory, dropout=0.1, dtype=jnp.bfloat16)
    assert module.vision.dropout == module.text.dropout == 0.1 and module.vision.dtype == module.text.dtype == jnp.bfloat16
