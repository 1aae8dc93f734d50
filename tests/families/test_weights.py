"""Of every family with published weights: what is written here is read by transformers and computes the same there, and comes back to the bit."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import Family
from safetensors.numpy import load_file, save_file

from jaxdl import pretrained
from jaxdl.errors import UserError

pytestmark = pytest.mark.needs("reference")


@functools.cache
def inputs_of(family: Family) -> tuple[np.ndarray, ...]:
    return family.learner.inputs(family.learner.batches(1, rows=3)[0])


@functools.cache
def params_of(family: Family) -> dict:
    """Nowhere zero, as biases are at the start."""
    given = [jnp.asarray(array) for array in inputs_of(family)]
    shapes = jax.eval_shape(lambda key: family.learner.init(family.learner.module, key, given), jax.random.key(0))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32)), shapes)


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(family.name)
    pretrained.save(family.learner.module, params_of(family), folder)
    return folder


def test_a_saved_model_computes_the_same_in_transformers(family, saved):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    module, inputs = family.learner.module, inputs_of(family)
    params = jax.tree.map(jnp.asarray, params_of(family))
    found = np.asarray(family.reference.ours(jax.jit(module.apply)({"params": params}, *map(jnp.asarray, inputs))))
    model, told = getattr(transformers, family.reference.auto_class).from_pretrained(saved, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        wanted = family.reference.call(model.eval(), *map(torch.tensor, inputs)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_saved_model_comes_back_to_the_bit(family, saved):
    module, params = pretrained.load(saved, type(family.learner.module))
    jax.tree.map(np.testing.assert_array_equal, params, params_of(family))
    config = json.loads((saved / "config.json").read_text())
    assert pretrained.load_module(saved) == module and config["torch_dtype"] == "float32"


@pytest.mark.parametrize("what", ["missing", "too many"])
def test_a_tensor_that_is_missing_or_too_many_is_named(family, saved, tmp_path, what):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    tensors = load_file(saved / "model.safetensors")
    name = max(tensors)
    changed = {other: tensor for other, tensor in tensors.items() if other != name}
    if what == "too many":
        name = "another.weight"
        changed = tensors | {name: np.zeros(3, np.float32)}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        pretrained.load(tmp_path)
