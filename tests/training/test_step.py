"""A step is one update, whatever way its gradient is gathered."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.errors import UserError
from jaxdl.training import Aux, Frozen, init_state, make_step
from jaxdl.training.state import parameter_paths, parameters_sha256
from jaxdl.training.step import GRADIENT_NORMS


def linear_regression(params, variables, batch, key):
    error = batch["x"] @ params["weights"] + params["bias"] - batch["y"]
    return jnp.mean(error**2), Aux({"error": jnp.abs(error).mean()})


def state_and_batch(optimizer: optax.GradientTransformation, ema: bool = False):
    init = lambda key: {"params": {"weights": jax.random.normal(key, (3,)), "bias": jnp.zeros(())}}
    random = np.random.default_rng(0)
    batch = {"x": random.normal(size=(8, 3)).astype(np.float32), "y": random.normal(size=8).astype(np.float32)}
    return init_state(init, optimizer, seed=0, ema=ema), batch


class TestStep(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_one_step_of_sgd_is_the_textbook_one(self):
        state, batch = state_and_batch(optax.sgd(0.1))
        after, metrics = self.variant(make_step(linear_regression, optax.sgd(0.1)))(state, batch)
        x, y, w = batch["x"].astype(np.float64), batch["y"].astype(np.float64), np.asarray(state.params["weights"], np.float64)
        error = x @ w - y
        gradient = {"weights": 2 * x.T @ error / 8, "bias": 2 * error.mean()}
        expected = {"weights": w - 0.1 * gradient["weights"], "bias": -0.1 * gradient["bias"]}
        chex.assert_trees_all_close(after.params, jax.tree.map(np.float32, expected), rtol=1e-5)
        norms = dict(zip(parameter_paths(state.params), metrics[GRADIENT_NORMS]))
        np.testing.assert_allclose(norms["weights"], np.linalg.norm(gradient["weights"]), rtol=1e-5)
        np.testing.assert_allclose(metrics["gradient_norm"] ** 2, sum(n**2 for n in norms.values()), rtol=1e-5)
        assert int(after.step) == 1

    @chex.variants(with_jit=True, without_jit=True)
    def test_accumulated_parts_give_the_update_of_the_whole_batch(self):
        optimizer = optax.adam(0.1)
        state, batch = state_and_batch(optimizer)
        whole, metrics = self.variant(make_step(linear_regression, optimizer))(state, batch)
        parts, metrics_of_parts = self.variant(make_step(linear_regression, optimizer, accumulate=4))(state, batch)
        chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-5)
        chex.assert_trees_all_close(metrics, metrics_of_parts, rtol=1e-5)


@pytest.mark.parametrize("steps", [2, None])
def test_frozen_parameters_stay_as_they_are_for_their_time(steps):
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    state, batch = state_and_batch(optimizer)
    step = jax.jit(make_step(linear_regression, optimizer, frozen=Frozen("^weights$", steps)))
    free = jax.jit(make_step(linear_regression, optimizer))
    begun = state.params["weights"]
    for _ in range(2):
        state, metrics = step(state, batch)
        norms = dict(zip(parameter_paths(state.params), metrics[GRADIENT_NORMS]))
        assert norms["weights"] == 0 and norms["bias"] > 0
    np.testing.assert_array_equal(state.params["weights"], begun)
    assert state.params["bias"] != 0
    then, expected = step(state, batch)[0], free(state, batch)[0]
    if steps is None:
        np.testing.assert_array_equal(then.params["weights"], begun)
    else:
        chex.assert_trees_all_close(then.params, expected.params, rtol=1e-6)


def test_what_is_to_be_frozen_has_to_be_there():
    state, batch = state_and_batch(optax.sgd(0.1))
    with pytest.raises(UserError, match="'vision/'"):
        make_step(linear_regression, optax.sgd(0.1), frozen=Frozen("vision/"))(state, batch)


def test_given_parameters_may_be_a_part_and_the_rest_is_initialised():
    init = lambda key: {"params": {"tower": {"a": jnp.zeros(2), "b": jnp.ones(2)}, "head": jax.random.normal(key, (3,))}}
    whole = init_state(init, optax.sgd(0.1), seed=0)
    given = {"tower": {"a": np.full(2, 7, np.float32)}}
    for shardings in (None, lambda state: jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state)):
        state = init_state(init, optax.sgd(0.1), seed=0, params=given, shardings=shardings)
        expected = {"tower": {"a": jnp.full(2, 7.0), "b": jnp.ones(2)}, "head": whole.params["head"]}
        chex.assert_trees_all_equal(state.params, expected)
    with pytest.raises(KeyError, match="tail"):
        init_state(init, optax.sgd(0.1), seed=0, params={"tail": given})


def test_the_average_of_parameters_follows_its_recursion():
    optimizer = optax.sgd(0.1)
    state, batch = state_and_batch(optimizer, ema=True)
    step = jax.jit(make_step(linear_regression, optimizer, ema_decay=0.9))
    expected = state.params
    for _ in range(3):
        state, _ = step(state, batch)
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, state.params)
    chex.assert_trees_all_close(state.ema, expected, rtol=1e-6)


def test_gradients_are_averaged_over_a_mapped_axis():
    optimizer = optax.sgd(0.1)
    state, batch = state_and_batch(optimizer)
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    mapped = jax.vmap(make_step(linear_regression, optimizer, axis_name="data"), in_axes=(None, 0), axis_name="data")
    after, _ = mapped(state, halves)
    whole, _ = make_step(linear_regression, optimizer)(state, batch)
    for half in range(2):
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[half], after.params), whole.params, rtol=1e-5)


def test_a_step_is_traced_once():
    optimizer = optax.sgd(0.1)
    state, batch = state_and_batch(optimizer)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_step(linear_regression, optimizer).update, n=1))
    for _ in range(3):
        state, _ = step(state, batch)


def test_every_step_has_its_own_key():
    seen = []

    def loss(params, variables, batch, key):
        return params["weights"].sum() * 0, Aux({"draw": jax.random.uniform(key)})

    state, batch = state_and_batch(optax.sgd(0.1))
    step = make_step(loss, optax.sgd(0.1))
    for _ in range(3):
        state, metrics = step(state, batch)
        seen.append(float(metrics["draw"]))
    assert len(set(seen)) == 3


@pytest.mark.parametrize("change", [lambda w: w.at[0].add(1e-7), lambda w: w[::-1]])
def test_the_digest_sees_every_bit_and_its_place(change):
    params = {"weights": jnp.array([0.1, 0.2, 0.3]), "bias": jnp.zeros(())}
    assert parameters_sha256(params) == parameters_sha256(dict(reversed(params.items())))
    assert parameters_sha256(params) != parameters_sha256(params | {"weights": change(params["weights"])})
