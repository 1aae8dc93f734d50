"""A step is its updates, one after the other, whatever way their gradients are gathered."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxdl.errors import UserError
from jaxdl.training import Aux, Frozen, Mean, TrainState, Update, apply_gradients, gradients, init_state, make_step
from jaxdl.training.state import parameter_paths, parameters_sha256
from jaxdl.training.step import GRADIENT_NORMS


def linear_regression(params, state, batch, key):
    error = batch["x"] @ params["weights"] + params["bias"] - batch["y"]
    return jnp.mean(error**2), Aux({"error": jnp.abs(error).mean()})


def state_and_batch(*updates: Update) -> tuple[TrainState, dict]:
    init = lambda key: {"params": {"weights": jax.random.normal(key, (3,)), "bias": jnp.zeros(())}}
    random = np.random.default_rng(0)
    batch = {"x": random.normal(size=(8, 3)).astype(np.float32), "y": random.normal(size=8).astype(np.float32)}
    return init_state(init, updates, seed=0), batch


SGD = Update(linear_regression, optax.sgd(0.1))


class TestStep(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_one_step_of_sgd_is_the_textbook_one(self):
        state, batch = state_and_batch(SGD)
        after, metrics = self.variant(make_step(SGD))(state, batch)
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
        update = Update(linear_regression, optax.adam(0.1))
        state, batch = state_and_batch(update)
        whole, metrics = self.variant(make_step(update))(state, batch)
        parts, metrics_of_parts = self.variant(make_step(update, accumulate=4))(state, batch)
        chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-5)
        chex.assert_trees_all_close(metrics, metrics_of_parts, rtol=1e-5)


@pytest.mark.parametrize("steps", [2, None])
def test_frozen_parameters_stay_as_they_are_for_their_time(steps):
    free = Update(linear_regression, optax.adamw(0.1, weight_decay=0.5))
    frozen = Update(linear_regression, free.optimizer, frozen=Frozen("^weights$", steps))
    state, batch = state_and_batch(frozen)
    step = jax.jit(make_step(frozen))
    begun = state.params["weights"]
    for _ in range(2):
        state, metrics = step(state, batch)
        norms = dict(zip(make_step(frozen).gradient_paths(state)[GRADIENT_NORMS], metrics[GRADIENT_NORMS], strict=True))
        assert norms.get("weights", 0) == 0 and norms["bias"] > 0
    np.testing.assert_array_equal(state.params["weights"], begun)
    assert state.params["bias"] != 0
    then, _ = step(state, batch)
    if steps is None:
        np.testing.assert_array_equal(then.params["weights"], begun)
    else:
        chex.assert_trees_all_close(then.params, jax.jit(make_step(free))(state, batch)[0].params, rtol=1e-6)


def test_what_is_to_be_frozen_has_to_be_there():
    frozen = Update(linear_regression, optax.sgd(0.1), frozen=Frozen("vision/"))
    with pytest.raises(UserError, match="'vision/'"):
        state_and_batch(frozen)
    state, batch = state_and_batch(SGD)
    with pytest.raises(UserError, match="'vision/'"):
        make_step(frozen)(state, batch)


def test_the_optimizer_knows_only_what_learns():
    """Adapters of rank 2 beside a frozen product of 64 × 64 (Hu et al. 2021)."""

    def init(key):
        down, up = jax.random.normal(key, (64, 2)), jnp.zeros((2, 64))
        return {"params": {f"layer_{i}": {"base": jax.random.normal(key, (64, 64)), "down": down, "up": up} for i in range(2)}}

    def objective(params, state, batch, key):
        for layer in params.values():
            batch = batch @ (layer["base"] + layer["down"] @ layer["up"])
        return jnp.mean(batch**2), Aux()

    adapters = Update(objective, optax.adamw(0.01), frozen=Frozen("/base$"))
    state = init_state(init, [adapters], seed=0)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * 4 and sum(leaf.size for leaf in moments) == 2 * 4 * 128
    after, metrics = jax.jit(make_step(adapters))(state, jnp.ones((4, 64)))
    assert len(metrics[GRADIENT_NORMS]) == 4
    for before, layer in zip(state.params.values(), after.params.values()):
        np.testing.assert_array_equal(layer["base"], before["base"])
        assert (layer["up"] != before["up"]).any()

    def of_adapters(learning):
        whole = {name: {**layer, "base": state.params[name]["base"]} for name, layer in learning.items()}
        return objective(whole, state, jnp.ones((4, 64)), state.key)[0]

    alone = {name: {"down": layer["down"], "up": layer["up"]} for name, layer in state.params.items()}
    moved, _ = optax.adamw(0.01).update(jax.grad(of_adapters)(alone), optax.adamw(0.01).init(alone), alone)
    for name, layer in optax.apply_updates(alone, moved).items():
        for part, values in layer.items():
            np.testing.assert_allclose(after.params[name][part], values, rtol=1e-5, atol=1e-7)


def test_given_parameters_may_be_a_part_and_the_rest_is_initialised():
    init = lambda key: {"params": {"tower": {"a": jnp.zeros(2), "b": jnp.ones(2)}, "head": jax.random.normal(key, (3,))}}
    whole = init_state(init, [SGD], seed=0)
    given = {"tower": {"a": np.full(2, 7, np.float32)}}
    for shardings in (None, lambda state: jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state)):
        state = init_state(init, [SGD], seed=0, params=given, shardings=shardings)
        expected = {"tower": {"a": jnp.full(2, 7.0), "b": jnp.ones(2)}, "head": whole.params["head"]}
        chex.assert_trees_all_equal(state.params, expected)
        with pytest.raises(KeyError, match="tail"):
            init_state(init, [SGD], seed=0, params={"tail": given}, shardings=shardings)


@pytest.mark.parametrize("seed", [0, 2**31 + 5])
def test_a_seed_is_split_into_one_key_for_parameters_and_one_for_steps(seed):
    state = init_state(lambda key: {"params": jax.random.normal(key, (3,))}, [SGD], seed=seed)
    of_init, of_steps = jax.random.split(jax.random.key(seed))
    np.testing.assert_array_equal(state.params, jax.random.normal(of_init, (3,)))
    assert state.key == of_steps


@pytest.mark.parametrize("decay", [0.9, lambda step: jnp.minimum(0.9, step / 2)])
def test_the_average_of_parameters_follows_its_recursion(decay):
    update = Update(linear_regression, optax.sgd(0.1), ema=decay)
    state, batch = state_and_batch(update)
    step = jax.jit(make_step(update))
    expected = state.params
    for number in range(3):
        state, _ = step(state, batch)
        now = min(0.9, number / 2) if callable(decay) else decay
        expected = jax.tree.map(lambda e, p, now=now: now * e + (1 - now) * p, expected, state.params)
    chex.assert_trees_all_close(state.ema, expected, rtol=1e-6)
    assert state.eval_params is not state.params and state.eval_variables["params"]["bias"] == state.ema["bias"]


def test_gradients_are_averaged_over_a_mapped_axis():
    state, batch = state_and_batch(SGD)
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    mapped = jax.vmap(make_step(SGD, axis_name="data"), in_axes=(None, 0), axis_name="data")
    after, _ = mapped(state, halves)
    whole, _ = make_step(SGD)(state, batch)
    for half in range(2):
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[half], after.params), whole.params, rtol=1e-5)


def test_a_step_is_traced_once():
    state, batch = state_and_batch(SGD)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_step(SGD).__call__, n=1))
    for _ in range(3):
        state, _ = step(state, batch)


def test_every_step_update_repeat_and_part_has_its_own_key():
    def draw(params, state, batch, key):
        drawn = jax.random.uniform(key)
        return params["weights"].sum() * 0, Aux({"draw": drawn, "square": drawn**2})

    updates = Update(draw, optax.sgd(0.1), name="first", repeats=2), Update(draw, optax.sgd(0.1), name="second")
    state, batch = state_and_batch(*updates)
    step, seen = jax.jit(make_step(*updates, accumulate=2)), []
    for _ in range(3):
        state, metrics = step(state, batch)
        for name in ("first", "second"):
            assert metrics[f"{name}/square"] > metrics[f"{name}/draw"] ** 2 + 1e-5
            seen.append(float(metrics[f"{name}/draw"]))
    assert len(set(seen)) == 6


@pytest.mark.parametrize("change", [lambda w: w.at[0].add(1e-7), lambda w: w[::-1]])
def test_the_digest_sees_every_bit_and_its_place(change):
    params = {"weights": jnp.array([0.1, 0.2, 0.3]), "bias": jnp.zeros(())}
    assert parameters_sha256(params) == parameters_sha256(dict(reversed(params.items())))
    assert parameters_sha256(params) != parameters_sha256(params | {"weights": change(params["weights"])})


def test_updates_that_are_made_less_often_see_the_last_parts():
    """Part i of three has every third row from row i on."""

    def sees(name):
        objective = lambda params, state, batch, key: (params["bias"], Aux({"sum": batch.sum(), "square": batch.sum() ** 2}))
        return Update(objective, optax.sgd(0.0), name=name, repeats={"thrice": 3, "twice": 2, "once": 1}[name])

    updates = tuple(map(sees, ("thrice", "twice", "once")))
    state, _ = state_and_batch(*updates)
    _, metrics = jax.jit(make_step(*updates))(state, np.float32([1, 10, 100, 2, 20, 200]))
    expected = {"thrice": [3, 30, 300], "twice": [30, 300], "once": [300]}
    for name, sums in expected.items():
        np.testing.assert_allclose(metrics[f"{name}/sum"], np.mean(sums), rtol=1e-6)
        np.testing.assert_allclose(metrics[f"{name}/square"], np.mean(np.square(sums)), rtol=1e-6)


def test_updates_are_told_apart_and_move_what_is_there():
    with pytest.raises(UserError, match="called critic, critic"):
        make_step(
            Update(linear_regression, optax.sgd(0.1), of="critic"), Update(linear_regression, optax.sgd(0.1), name="critic")
        )
    with pytest.raises(UserError, match="called nothing"):
        make_step()
    with pytest.raises(UserError, match="no parameters 'critic' to update: the entries are weights, bias"):
        state_and_batch(Update(linear_regression, optax.sgd(0.1), of="critic"))
    state, batch = state_and_batch(SGD)
    with pytest.raises(UserError, match="8 rows on a device cannot be cut into 3 equal parts"):
        make_step(SGD, accumulate=3)(state, batch)


def test_a_target_follows_what_learns_and_is_read_by_the_objective():
    """Temporal differences of a linear value function, whose target is an average (Lillicrap et al. 2015, equation of θ')."""

    def squared_error(params, state, batch, key):
        target = batch["reward"] + 0.9 * batch["after"] @ state.ema["value"]
        return jnp.mean((batch["before"] @ params - target) ** 2), Aux()

    update = Update(squared_error, optax.sgd(0.1), of="value", ema=0.95)
    init = lambda key: {"params": {"value": jnp.ones(3), "policy": jnp.full(2, 5.0)}}
    state = init_state(init, [update], seed=0)
    assert state.ema.keys() == {"value"}
    random = np.random.default_rng(0)
    step, value, target = jax.jit(make_step(update)), np.ones(3), np.ones(3)
    for _ in range(4):
        batch = {"reward": random.normal(size=8), "before": random.normal(size=(8, 3)), "after": random.normal(size=(8, 3))}
        state, _ = step(state, jax.tree.map(np.float32, batch))
        error = batch["before"] @ value - batch["reward"] - 0.9 * batch["after"] @ target
        value = value - 0.1 * 2 * batch["before"].T @ error / 8
        target = 0.95 * target + 0.05 * value
    np.testing.assert_allclose(state.params["value"], value, rtol=1e-5)
    np.testing.assert_allclose(state.ema["value"], target, rtol=1e-5)
    assert state.eval_params["value"] is state.ema["value"] and state.params["policy"].tolist() == [5, 5]
    assert state.eval_params["policy"] is state.params["policy"]


def test_statistics_of_one_network_are_left_alone_by_the_update_of_another():
    def counts(name):
        def objective(params, state, batch, key):
            return jnp.sum(params**2), Aux(variables={"batch_stats": {name: state.variables["batch_stats"][name] + 1}})

        return Update(objective, optax.sgd(0.1), of=name, repeats=2 if name == "critic" else 1)

    both = counts("critic"), counts("generator")
    names = [update.of for update in both]
    init = lambda key: {
        "params": dict.fromkeys(names, jnp.ones(2)),
        "batch_stats": dict.fromkeys(names, jnp.zeros(())),
        "cache": jnp.full((), 7),
    }
    state = init_state(init, both, seed=0)
    state, _ = jax.jit(make_step(both[0]))(state, {"x": np.zeros((4, 1))})
    assert jax.device_get(state.variables) == {"batch_stats": {"critic": 2, "generator": 0}, "cache": 7}
    state, _ = jax.jit(make_step(*both, accumulate=2))(state, {"x": np.zeros((4, 1))})
    assert jax.device_get(state.variables) == {"batch_stats": {"critic": 6, "generator": 2}, "cache": 7}


def sam_by_hand(params: dict, batches: list[dict], rate: float, radius: float) -> dict:
    """Foret et al. 2021, algorithm 1, with momentum-free descent."""
    gradient = jax.grad(lambda params, batch: linear_regression(params, None, batch, None)[0])
    for batch in batches:
        ascent = gradient(params, batch)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(ascent)))
        worst = jax.tree.map(lambda p, g, norm=norm: p + radius * g / norm, params, ascent)
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient(worst, batch))
    return params


def test_sharpness_aware_minimisation_by_optax_as_two_steps_or_as_one():
    ascend = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    two = Update(linear_regression, optax.contrib.sam(optax.sgd(0.1), ascend, sync_period=2))
    state, batch = state_and_batch(two)
    batches = [jax.tree.map(lambda x, i=i: np.roll(x, i) + 0.1 * i, batch) for i in range(3)]
    expected = sam_by_hand(state.params, batches, 0.1, 0.05)
    step = jax.jit(make_step(two))
    for each in batches:
        for _ in range(2):
            state, _ = step(state, each)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5)

    one = Update(linear_regression, optax.contrib.sam(optax.sgd(0.1), ascend, sync_period=2, opaque_mode=True))

    @jax.jit
    def opaque_step(state, batch):
        def grad_fn(params, _):
            return gradients(one, state.replace(params=params), batch, state.key)[0]

        grads, aux = gradients(one, state, batch, state.key)
        return apply_gradients(one, state, grads, grad_fn=grad_fn).replace(step=state.step + 1), aux.metrics

    state, _ = state_and_batch(one)
    for each in batches:
        state, metrics = opaque_step(state, each)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5)
    assert int(state.step) == 3 and metrics.keys() == {"loss", "error"}


@pytest.mark.parametrize("ema", [None, 0.5])
def test_parameters_are_brought_back_after_every_move(ema):
    box = lambda params: {**params, "weights": jnp.clip(params["weights"], -0.1, 0.1)}
    clipped = Update(linear_regression, optax.sgd(0.5), project=box, repeats=2, ema=ema)
    state, batch = state_and_batch(clipped)
    state = state.replace(params=box(state.params), ema=box(state.ema) if ema else None)
    step, free = jax.jit(make_step(clipped)), jax.jit(make_step(Update(linear_regression, optax.sgd(0.5))))
    for _ in range(3):
        expected, halves = state, [{name: values[part::2] for name, values in batch.items()} for part in range(2)]
        for half in halves:
            moved, _ = free(expected.replace(ema=None), half)
            assert (np.abs(moved.params["weights"]) > 0.1).any()
            expected = expected.replace(params=box(moved.params))
        state, _ = step(state, batch)
        chex.assert_trees_all_close(state.params, expected.params, rtol=1e-6)
        assert (np.abs(state.eval_params["weights"]) <= 0.1).all()


def test_a_mean_is_weighted_by_its_count_over_parts_and_repeats():
    def objective(params, state, batch, key):
        ended = batch["ended"]
        return params["weights"].sum(), Aux({"return": Mean((ended * batch["return"]).sum(), ended.sum())})

    update = Update(objective, optax.sgd(0.1), repeats=2)
    state, _ = state_and_batch(update)
    random = np.random.default_rng(0)
    batch = {"ended": random.random(8) < 0.4, "return": random.normal(size=8).astype(np.float32)}
    _, metrics = jax.jit(make_step(update, accumulate=2))(state, batch)
    np.testing.assert_allclose(
        metrics["return"].total / metrics["return"].count, batch["return"][batch["ended"]].mean(), rtol=1e-6
    )
    _, metrics = jax.jit(make_step(update))(state, batch | {"ended": np.zeros(8, bool)})
    assert metrics["return"].count == 0 == metrics["return"].total
