"""Optimizers do the same to blocks that are stacked and to blocks that are not."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import on_one_device

from jaxdl.losses import cross_entropy
from jaxdl.models.gpt2 import GPT
from jaxdl.nn import stack_blocks
from jaxdl.training import OPTIMIZERS, Aux, Update, configured, decay_mask, setup_training
from jaxdl.training.state import parameter_paths

MODULE = GPT(vocab_size=11, length=6, width=8, depth=2, num_heads=2)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a config has to say."""

    steps: int = 10
    seed: int = 0
    clip: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.0

    def schedule(self) -> optax.Schedule:
        return optax.linear_schedule(0.1, 0.0, self.steps)


def stepped(optimizer: optax.GradientTransformation, params: dict, gradients: list[dict]) -> dict:
    state = optimizer.init(params)
    for each in gradients:
        updates, state = jax.jit(optimizer.update)(each, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(("name", "embeddings"), [("adamw", None), ("muon", None), ("muon", 0.5)])
def test_an_update_of_stacked_blocks_is_that_of_each_block(name, embeddings):
    params = MODULE.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))["params"]
    random = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), params) for _ in range(2)]
    optimizer = OPTIMIZERS[name](optax.constant_schedule(0.1), 0.5, b2=0.9, mask=decay_mask, embeddings=embeddings)
    expected = stack_blocks(stepped(optimizer, params, gradients))
    found = stepped(optimizer, stack_blocks(params), [stack_blocks(each) for each in gradients])
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_a_scanned_model_is_that_of_the_model(name):
    tokens = np.random.default_rng(0).integers(0, 11, (4, 7)).astype(np.int32)
    begun = MODULE.init(jax.random.key(0), jnp.asarray(tokens[:, :-1]))["params"]

    def after_one_step(scan: bool) -> dict:
        module = MODULE.clone(scan=scan)

        def loss(params, state, batch, key):
            return cross_entropy(module.apply({"params": params}, batch["tokens"][:, :-1]).logits, batch["tokens"][:, 1:]), Aux()

        step, state = setup_training(
            Training(),
            on_one_device(),
            configured(Training(), loss, lambda schedule: OPTIMIZERS[name](schedule, 0.5, mask=decay_mask)),
            init=lambda key: module.init(key, jnp.asarray(tokens[:, :-1])),
            params=stack_blocks(begun) if scan else begun,
        )
        return jax.device_get(jax.jit(step)(state, {"tokens": tokens})[0].params)

    expected, found = stack_blocks(after_one_step(False)), after_one_step(True)
    for path, theirs, ours in zip(parameter_paths(expected), jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        if not path.endswith("key/bias"):  # Its gradient is zero but for rounding, which Adam blows up.
            np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("prepare", [lambda params: params, stack_blocks])
def test_kernels_and_embeddings_decay_and_nothing_else(prepare):
    params = prepare(MODULE.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))["params"])
    for path, decays in zip(parameter_paths(params), jax.tree.leaves(decay_mask(params)), strict=True):
        assert decays == path.endswith(("kernel", "embedding", "positions")), path


def test_an_update_is_clipped_averaged_and_scheduled_as_the_config_says():
    config = Training(clip=0.5, ema_decay=0.9, accumulate=2)

    def steep(params, state, batch, key):
        return 100 * (params["w"] * batch).sum(-1).mean(), Aux()

    update = configured(config, steep, optax.sgd, repeats=3)
    step, state = setup_training(config, on_one_device(), update, init=lambda key: {"params": {"w": jnp.zeros(4)}})
    assert step.accumulate == 2
    state, metrics = jax.jit(step)(state, np.ones((12, 4), np.float32))
    w, average = np.zeros(4), np.zeros(4)
    for _ in range(3):  # The gradient, 100 in each of four, is cut to the norm 0.5; the rate is that of step 0 all the while.
        w -= 0.1 * 0.25
        average = 0.9 * average + 0.1 * w
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-6)
    np.testing.assert_allclose(state.ema["w"], average, rtol=1e-6)
    _, metrics = jax.jit(step)(state, np.ones((12, 4), np.float32))
    np.testing.assert_allclose(metrics["learning_rate"], 0.09, rtol=1e-6)
    assert configured(Training(), steep, optax.sgd, ema=0.5).ema == 0.5 and configured(Training(), steep, optax.sgd).ema is None
    assert isinstance(update, Update) and update.name == "params"
