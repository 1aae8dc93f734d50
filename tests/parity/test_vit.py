"""ViT equals transformers' `ViTForImageClassification`: logits and gradients, also at another resolution; files; interpolation equals torch's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file
from versus_torch import assert_same, normal, shapes, small

from jaxdl import pretrained
from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.models import vit
from jaxdl.nn import interpolate_positions, stack_blocks

CONFIG = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=12, patch_size=4, num_labels=5
)
LABELS = np.array([3, 0, 4])


def published(kind: str = "ViTForImageClassification", **changes):
    """A model of random weights, nowhere zero, as biases are at the start."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.ViTConfig(**CONFIG | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def theirs():
    return published()


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    theirs.save_pretrained(folder)
    return folder


def images(height: int, width: int) -> np.ndarray:
    return normal(0, (3, height, width, 3))[0]


def gradients(model, given: np.ndarray, folder) -> tuple[np.ndarray, dict]:
    """Logits of a model, and the gradients of its loss, in files as its weights are in."""
    model.zero_grad()
    pixels = torch.tensor(given.transpose(0, 3, 1, 2))
    out = model(pixels, labels=torch.tensor(LABELS), interpolate_pos_encoding=True)
    out.loss.backward()
    slopes = type(model)(model.config)
    with torch.no_grad():
        for slope, parameter in zip(slopes.parameters(), model.parameters(), strict=True):
            slope.copy_(parameter.grad)
    slopes.save_pretrained(folder)
    return out.logits.detach().numpy(), pretrained.load(folder)[1]


def ours(module, params, given: np.ndarray, size: tuple[int, int]):
    """Our loss as a function of the published parameters, interpolation included."""
    module, params = vit.adapt(module, params, size=size)
    logits = module.apply({"params": params}, jnp.asarray(given)).logits
    return cross_entropy(logits, jnp.asarray(LABELS)), logits


@pytest.mark.parametrize("size", [(12, 12), (16, 24), (8, 8)])
def test_logits_and_gradients_are_those_of_the_published_model_at_every_resolution(theirs, directory, tmp_path, size):
    module, params = pretrained.load(directory)
    assert module.eps == 1e-12
    given = images(*size)
    wanted, wanted_slopes = gradients(theirs, given, tmp_path)
    (_, logits), slopes = jax.jit(
        jax.value_and_grad(lambda params: ours(module, params, given, size), has_aux=True)
    )(params)  # fmt: skip
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), slopes, wanted_slopes)


def test_in_double_precision_logits_are_the_same_to_12_digits(theirs, directory):
    """What is left in single precision is rounding, and no other eps and no other GELU."""
    given = images(20, 20).astype(np.float64)
    model = published().double()
    wanted = model(torch.tensor(given.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True).logits.detach().numpy()
    with jax.enable_x64(True):
        module, params = pretrained.load(directory, param_dtype=jnp.float64)
        _, logits = ours(module, params, given, (20, 20))
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", [dict(scan=True), dict(remat=True), dict(dtype=jnp.bfloat16)])
def test_other_ways_to_compute_give_the_same(directory, how):
    module, params = pretrained.load(directory)
    given = images(12, 12)
    wanted = module.apply({"params": params}, jnp.asarray(given)).logits
    other = module.clone(**how)
    out = jax.jit(other.apply)({"params": stack_blocks(params) if "scan" in how else params}, jnp.asarray(given))
    np.testing.assert_allclose(out.logits, wanted, atol=0.05 * np.abs(wanted).max() if "dtype" in how else 1e-5)


def test_biases_of_queries_keys_and_values_may_be_missing(tmp_path):
    model = published(qkv_bias=False, num_labels=2)
    model.save_pretrained(tmp_path)
    module, params = pretrained.load(tmp_path)
    assert module.num_classes == 2 and "bias" not in params["encoder"]["block_0"]["attention"]["query"]
    given = images(12, 12)
    wanted = model(torch.tensor(given.transpose(0, 3, 1, 2))).logits.detach()
    np.testing.assert_allclose(module.apply({"params": params}, jnp.asarray(given)).logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_model_without_a_head_gives_features_and_adapts_to_classes(tmp_path):
    model = published("ViTModel")
    model.save_pretrained(tmp_path)
    assert "pooler.dense.weight" in load_file(tmp_path / "model.safetensors")
    module, params = pretrained.load(tmp_path)
    given = images(12, 12)
    out = module.apply({"params": params}, jnp.asarray(given))
    wanted = model(torch.tensor(given.transpose(0, 3, 1, 2))).last_hidden_state[:, 0].detach()
    assert out.logits is None
    np.testing.assert_allclose(out.features, wanted, rtol=1e-5, atol=1e-5)
    module, params = vit.adapt(module, params, num_classes=7)
    out = module.apply({"params": params}, jnp.asarray(given))
    np.testing.assert_array_equal(out.logits, np.zeros((3, 7)))
    np.testing.assert_allclose(out.features, wanted, rtol=1e-5, atol=1e-5)


def test_a_tensor_that_is_missing_or_left_over_is_named(directory, tmp_path):
    tensors = load_file(directory / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    for changed, message in (
        ({name: tensor for name, tensor in tensors.items() if name != "classifier.bias"}, "classifier.bias is missing"),
        (tensors | {"vit.something": np.zeros(1)}, "something is left over"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            pretrained.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
        (dict(layer_norm_eps="1e-12"), "layer_norm_eps is '1e-12'"),
        (dict(num_attention_heads=5), "32 cannot be split into 5 heads"),
        (dict(image_size=[12, 16]), "side of a square"),
    ],
)
def test_settings_of_other_models_are_refused(directory, tmp_path, settings, message):
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=message):
        pretrained.load(tmp_path)


@shapes
@given(small, small, small, small, small, st.integers(0, 2))
def test_interpolation_is_torchs(height, width, high, wide, features, first):
    (table,) = normal(height, (first + height * width, features))

    def theirs(table: torch.Tensor) -> torch.Tensor:
        places = table[first:].reshape(1, height, width, features).permute(0, 3, 1, 2)
        moved = torch.nn.functional.interpolate(places, size=(high, wide), mode="bicubic", align_corners=False)
        return torch.cat([table[:first], moved.permute(0, 2, 3, 1).reshape(-1, features)])

    assert_same(lambda table: interpolate_positions(table, (height, width), (high, wide)), theirs, table, tolerance=1e-5)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (16, 37)])
def test_interpolation_is_torchs_between_the_grids_of_published_models(old, new):
    """14 places of 16 pixels make 224, 24 make 384. Theirs is in double precision: in single precision it is off by up to 5e-6, since the places themselves are rounded."""
    (table,) = normal(0, (1 + old**2, 6))
    places = torch.tensor(table[1:], dtype=torch.float64).reshape(1, old, old, 6).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(places, size=(new, new), mode="bicubic", align_corners=False)
    found = interpolate_positions(jnp.asarray(table), (old, old), (new, new))
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], wanted.permute(0, 2, 3, 1).reshape(-1, 6), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", vit.VARIANTS)
def test_a_variant_is_a_published_configuration(name):
    """Parameter by parameter what transformers makes of the same numbers, at 224 pixels and with 1000 classes."""
    row = vit.VARIANTS[name]
    config = transformers.ViTConfig(
        hidden_size=row.width, num_hidden_layers=row.depth, num_attention_heads=row.num_heads, intermediate_size=4 * row.width,
        patch_size=row.patch_size, num_labels=1000,
    )  # fmt: skip
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in transformers.ViTForImageClassification(config).parameters())
    module = vit.ViT.variant(name, num_classes=1000)
    shapes = jax.eval_shape(module.clone(scan=True).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    ours, _ = vit.from_config(config.to_dict())
    same = dict(eps=module.eps, mlp_dim=None)
    assert dataclasses.replace(ours, **same) == module
