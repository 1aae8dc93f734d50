"""What other programs rely on: `pretrained.load` of every family, from the files that transformers writes."""

import re
import shlex
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from published_models import FAMILIES, publish

from jaxdl import pretrained
from jaxdl.errors import UserError


@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_gives_a_module_and_its_parameters_and_a_call_gives_logits(name, tmp_path):
    *_, inputs, shape = FAMILIES[name]
    inputs = [jnp.asarray(each) for each in inputs]
    publish(name, tmp_path)
    module, params = pretrained.load(tmp_path)
    logits = jax.jit(module.apply)({"params": params}, *inputs).logits
    chex.assert_shape(logits, shape)
    chex.assert_tree_all_finite(logits)
    scanned, stacked = pretrained.load(tmp_path, type(module), scan=True)
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(params))
    np.testing.assert_allclose(jax.jit(scanned.apply)({"params": stacked}, *inputs).logits, logits, atol=1e-5)


def test_the_command_that_is_named_for_a_pickle_writes_what_is_read(tmp_path):
    """Where a directory is without safetensors, as older ones are on the hub."""
    publish("marian", tmp_path / "as published")
    publish("marian", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    state = transformers.MarianMTModel.from_pretrained(tmp_path / "as published").state_dict()
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle") as error:
        pretrained.load(tmp_path / "pickled")
    (command,) = re.findall(r'python (-c ".*")', str(error.value))
    subprocess.run([sys.executable, *shlex.split(command)], check=True, capture_output=True, timeout=300)
    chex.assert_trees_all_equal(pretrained.load(tmp_path / "pickled")[1], pretrained.load(tmp_path / "as published")[1])
