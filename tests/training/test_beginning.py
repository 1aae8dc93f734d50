"""Optimizers do the same to blocks that are stacked and to blocks that are not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.launch import Training
from jaxdl.losses import cross_entropy
from jaxdl.models.gpt2 import GPT
from jaxdl.nn import stack_blocks
from jaxdl.training import OPTIMIZERS, Aux, Layout, data_mesh, matrices, start
from jaxdl.training.state import parameter_paths

MODULE = GPT(vocabulary=11, length=6, width=8, depth=3, num_heads=2)


def stepped(optimizer: optax.GradientTransformation, params: dict, gradients: list[dict]) -> dict:
    state = optimizer.init(params)
    for each in gradients:
        updates, state = jax.jit(optimizer.update)(each, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("embeddings", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_stacked_blocks_is_that_of_each_block(name, embeddings):
    params = MODULE.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))["params"]
    random = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), params) for _ in range(2)]
    optimizer = OPTIMIZERS[name](optax.constant_schedule(0.1), 0.5, b2=0.9, mask=matrices, embeddings=embeddings)
    expected = stack_blocks(stepped(optimizer, params, gradients))
    found = stepped(optimizer, stack_blocks(params), [stack_blocks(each) for each in gradients])
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_a_scanned_model_is_that_of_the_model(name):
    tokens = np.random.default_rng(0).integers(0, 11, (4, 7)).astype(np.int32)
    begun = MODULE.init(jax.random.key(0), jnp.asarray(tokens[:, :-1]))["params"]

    def after_one_step(scan: bool) -> dict:
        module = MODULE.clone(scan=scan)

        def loss(params, variables, batch, key):
            return cross_entropy(module.apply({"params": params}, batch["tokens"][:, :-1]).logits, batch["tokens"][:, 1:]), Aux()

        step, state = start(
            Training(learning_rate=0.1, warmup=0.0),
            Layout("jit", data_mesh(jax.devices()[:1])),
            loss,
            lambda schedule: OPTIMIZERS[name](schedule, 0.5, mask=matrices),
            lambda key: module.init(key, jnp.asarray(tokens[:, :-1])),
            stack_blocks(begun) if scan else begun,
        )
        return jax.device_get(jax.jit(step)(state, {"tokens": tokens})[0].params)

    expected, found = stack_blocks(after_one_step(False)), after_one_step(True)
    for path, theirs, ours in zip(parameter_paths(expected), jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        if not path.endswith("key/bias"):  # Its gradient is zero but for rounding, which Adam blows up.
            np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("prepare", [lambda params: params, stack_blocks])
def test_kernels_and_embeddings_decay_and_nothing_else(prepare):
    params = prepare(MODULE.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))["params"])
    for path, decays in zip(parameter_paths(params), jax.tree.leaves(matrices(params)), strict=True):
        assert decays == path.endswith(("kernel", "embedding", "positions")), path
