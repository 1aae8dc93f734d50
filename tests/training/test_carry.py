"""What a step carries beside parameters: environments and memories that lie over devices, a teacher that nothing changes."""

from dataclasses import dataclass
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import DEVICES, STRATEGIES, on_one_device
from jax.sharding import PartitionSpec

from jaxdl.errors import UserError
from jaxdl.training import Aux, Execution, Layout, Mean, Run, TrainState, Update, distribute, fit, init_state, make_step
from jaxdl.training.cost import bytes_per_device
from jaxdl.training.parallel import Rules

WORLDS, CAPACITY = 16, 3
RULES: Rules = [("^carry/worlds/", PartitionSpec("data"))]


@dataclass(frozen=True)
class Config:
    seed: int = 0


def worlds(key: jax.Array) -> dict:
    """Each has a key of its own, so that it does the same wherever it lies."""
    return {
        "worlds": {
            "key": jax.random.split(key, WORLDS),
            "position": jnp.linspace(-1, 1, WORLDS),
            "age": jnp.arange(WORLDS, dtype=jnp.int32) % 3,
            "memory": jnp.zeros((WORLDS, CAPACITY)),
            "ended": jnp.zeros(WORLDS, bool),
        },
        "cursor": jnp.zeros((), jnp.int32),
    }


def act(params, state, batch, key):
    """Every world moves, is remembered, and begins anew at the age of five; what is learned is to foresee memories."""
    carry, cursor = state.carry["worlds"], state.carry["cursor"]
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, state.step)))(carry["key"])
    position = jnp.where(carry["ended"], 0.0, 0.9 * carry["position"]) + 0.1 * noise
    age = jnp.where(carry["ended"], 0, carry["age"] + 1)
    memory = carry["memory"].at[:, cursor % CAPACITY].set(position)
    ended = age >= 5
    moved = {"key": carry["key"], "position": position, "age": age, "memory": memory, "ended": ended}
    error = params["w"] * memory - memory**2 - params["b"]
    returns = Mean(jnp.where(ended, position, 0.0).sum(), ended.sum())
    counted = {"statistics": {"calls": state.variables["statistics"]["calls"] + 1}}
    return jnp.mean(error**2), Aux({"return": returns}, counted, {"worlds": moved, "cursor": cursor + 1})


ACT = Update(act, optax.adam(0.01))


def begin(layout: Layout) -> TrainState:
    params = {"w": jnp.ones(()), "b": jnp.zeros(())}
    init = lambda key: {"params": params, "statistics": {"calls": jnp.zeros((), jnp.int32)}}
    return init_state(init, [ACT], seed=0, carry=worlds, shardings=layout.state_shardings)


def after_seven_steps(layout: Layout) -> tuple[TrainState, list[float]]:
    state, returns = begin(layout), []
    step = distribute(make_step(ACT, axis_name=layout.axis_name), state, layout)
    for _ in range(7):
        state, metrics = step(state, None)
        returns.append(float(metrics["return"].total / metrics["return"].count))
    return state, returns


def plain(tree):
    """With keys as numbers."""
    numbers = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.device_get(jax.tree.map(numbers, tree))


@pytest.mark.eight_devices
def test_worlds_on_eight_devices_are_those_on_one():
    expected, returns = after_seven_steps(on_one_device())
    assert np.isnan(returns).sum() < 7 and int(expected.carry["cursor"]) == 7 == int(expected.variables["statistics"]["calls"])
    for strategy in STRATEGIES:
        state, others = after_seven_steps(Layout(strategy, rules=RULES))
        chex.assert_trees_all_equal_dtypes(plain(state), plain(expected))
        chex.assert_trees_all_close(plain(state), plain(expected), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(others, returns, rtol=1e-5, err_msg=strategy)
        assert bytes_per_device(state.carry["worlds"]) * DEVICES == bytes_per_device(expected.carry["worlds"])
        assert state.carry["cursor"].dtype == jnp.int32 and state.carry["cursor"].sharding.is_fully_replicated


@pytest.mark.eight_devices
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_worlds_go_on_where_they_were(strategy, tmp_path):
    def run(directory: Path, steps: int) -> TrainState:
        with Run.open(directory, "worlds", Config(), Execution(parallel=strategy), rules=RULES) as opened:
            return fit(make_step(ACT, axis_name=opened.layout.axis_name), begin(opened.layout), None, opened, steps=steps)

    whole = run(tmp_path / "whole", 7)
    run(tmp_path / "cut", 3)
    chex.assert_trees_all_equal(plain(run(tmp_path / "cut", 7)), plain(whole))


@pytest.mark.eight_devices
def test_a_memory_may_be_cut_along_another_axis_than_its_first():
    """Time first, worlds second, as replay buffers often are."""

    def remember(params, state, batch, key):
        rows = state.carry["memory"].at[state.step].set(state.carry["memory"].sum(0) + params["w"])
        return jnp.mean(rows**2), Aux(carry={"memory": rows})

    update = Update(remember, optax.sgd(0.01))
    carry = lambda key: {"memory": jnp.zeros((4, WORLDS)).at[0].set(jnp.arange(WORLDS))}
    results = []
    for layout in (
        on_one_device(),
        *(Layout(strategy, rules=[("memory", PartitionSpec(None, "data"))]) for strategy in STRATEGIES),
    ):
        state = init_state(
            lambda key: {"params": {"w": jnp.ones(())}}, [update], seed=0, carry=carry, shardings=layout.state_shardings
        )
        step = distribute(make_step(update, axis_name=layout.axis_name), state, layout)
        for _ in range(3):
            state, _ = step(state, None)
        results.append(jax.device_get((state.params, state.carry)))
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], rtol=1e-5)


def test_a_queue_is_filled_in_parts_and_over_repeats_in_the_order_of_the_rows():
    def enqueue(params, state, batch, key):
        return params["w"] ** 2, Aux(carry={"queue": jnp.concatenate([state.carry["queue"][len(batch) :], batch])})

    update = Update(enqueue, optax.sgd(0.1), repeats=2)
    carry = lambda key: {"queue": jnp.zeros(10, jnp.int32)}
    state = init_state(lambda key: {"params": {"w": jnp.ones(())}}, [update], seed=0, carry=carry)
    state, _ = jax.jit(make_step(update, accumulate=2))(state, np.arange(8, dtype=np.int32))
    assert state.carry["queue"].tolist() == [0, 0, 0, 4, 2, 6, 1, 5, 3, 7] and state.carry["queue"].dtype == jnp.int32


WIDTH = 64


def distil(params, state, batch, key):
    teacher = jnp.tanh(batch @ state.constants["teacher"]["kernel"])
    return jnp.mean((batch @ params["kernel"] - teacher) ** 2), Aux()


DISTIL = Update(distil, optax.sgd(0.5, momentum=0.9))


def teacher(seed: int) -> dict:
    return {"teacher": {"kernel": np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8}}


def with_teacher(layout: Layout, seed: int = 0) -> TrainState:
    init = lambda key: {"params": {"kernel": jnp.zeros((WIDTH, WIDTH))}}
    return init_state(init, [DISTIL], seed=0, constants=teacher(seed), shardings=layout.state_shardings)


@pytest.mark.eight_devices
def test_a_teacher_has_no_optimizer_state_and_lies_as_parameters_do():
    x = np.random.default_rng(1).normal(size=(3, 16, WIDTH)).astype(np.float32)
    kernel, velocity, taught = np.zeros((WIDTH, WIDTH)), 0.0, teacher(0)["teacher"]["kernel"]
    for rows in x.astype(np.float64):
        gradient = 2 * rows.T @ (rows @ kernel - np.tanh(rows @ taught)) / (16 * WIDTH)
        velocity = 0.9 * velocity + gradient
        kernel = kernel - 0.5 * velocity
    for layout in (on_one_device(), *map(Layout, STRATEGIES)):
        state = with_teacher(layout)
        assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == WIDTH**2
        step = distribute(make_step(DISTIL, axis_name=layout.axis_name), state, layout)
        for rows in x:
            state, _ = step(state, layout.place_batch(rows))
        np.testing.assert_allclose(state.params["kernel"], kernel, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(state.constants["teacher"]["kernel"], taught)
        parts = DEVICES if layout.strategy == "fsdp" else 1
        assert bytes_per_device(state.constants) == 4 * WIDTH**2 // parts


def test_a_checkpoint_is_without_the_teacher_and_refuses_another(tmp_path):
    class Rows:
        def __next__(self):
            return np.ones((4, WIDTH), np.float32)

        def get_state(self):
            return {}

        def set_state(self, state):
            pass

    def run(steps: int, seed: int) -> TrainState:
        with Run.open(tmp_path, "student", Config()) as opened:
            return fit(make_step(DISTIL), with_teacher(opened.layout, seed), Rows(), opened, steps=steps)

    run(1, 0)
    stored = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "1" / "state").rglob("*") if path.is_file())
    assert stored < 1.5 * 4 * WIDTH**2  # Kernel and velocity are almost all zeros, and compressed; a teacher's numbers are not.
    state = run(2, 0)
    np.testing.assert_array_equal(state.constants["teacher"]["kernel"], teacher(0)["teacher"]["kernel"])
    with pytest.raises(UserError, match=r"began with other constants, such as a teacher's weights.*--overwrite"):
        run(3, 1)
