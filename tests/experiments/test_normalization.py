"""Many networks in one step are trained as each would be alone, and the learning rate is not chosen by the test set."""

import dataclasses
import itertools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import normalization
from experiments.normalization import EXPERIMENT, MOMENTUM, PRESETS, Config, Network, choose, make_sweep
from jaxdl import launch
from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.training import Layout, TrainState, Update, data_mesh, init_state
from jaxdl.training.logging import read_metrics

BASE = PRESETS["default"]
TINY = dataclasses.replace(
    BASE,
    steps=2,
    batch_size=4,
    small_batch=2,
    factors=(1.0, 3.0),
    seeds=2,
    width=4,
    depth=1,
    warmup=0.0,
    evaluate_every=1,
    learning_rate=0.5,
)


def batch(config: Config) -> dict:
    random = np.random.default_rng(0)
    rows = config.seeds * config.batch_size
    images = random.normal(size=(rows, config.resolution, config.resolution, 3)).astype(np.float32)
    return {"image": images, "label": random.integers(0, 10, rows).astype(np.int32)}


def first_state(modules: dict, config: Config) -> TrainState:
    kept = Update(lambda *given: None, optax.trace(MOMENTUM))
    return init_state(lambda key: normalization.init_networks(modules, config, key), [kept], seed=0)


def one_step(norms: dict, config: Config, layout: Layout, monkeypatch):
    """Networks before and after a step, and the statistics of its layers."""
    monkeypatch.setattr(normalization, "NORMS", norms)
    modules = {norm: Network(norm, config.width, config.depth, 10) for norm in norms}
    state = layout.place_state(first_state(modules, config))
    placed = layout.place_batch(batch(config))
    see, step = normalization.inspect_middle(modules, config, layout), make_sweep(modules, config, layout)
    if layout.strategy == "pmap":
        see, step = (jax.pmap(fn, axis_name=layout.axis_name, in_axes=(None, 0), out_axes=None) for fn in (see, step))
    after, _ = jax.jit(step)(state, placed)
    return modules, state, after, jax.jit(see)(state, placed).row()


def trained_alone(module: Network, params, stats, images, labels, size: int, rate: float):
    """One network, batch after batch of `size`, by optax."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-rate))
    opt_state = optimizer.init(params)

    def loss(params, stats, images, labels):
        logits, updated = module.apply({"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, labels), updated["batch_stats"]

    for start in range(0, len(images), size):
        part = jnp.asarray(images[start : start + size]), jnp.asarray(labels[start : start + size])
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, *part)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, stats


@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_each_network_is_trained_as_it_would_be_alone(monkeypatch, strategy):
    config = dataclasses.replace(TINY, batch_size=6, clip=0.5, weight_decay=0.1)
    layout = Layout(strategy, data_mesh(jax.devices()[:1]))
    modules, before, after, row = one_step({"batch": normalization.NORMS["batch"]}, config, layout, monkeypatch)
    data = batch(config)
    for size, (index, seed) in itertools.product(config.batch_sizes, ((0, 0), (1, 1))):
        cell, rate = f"batch/batch_{size}", config.learning_rate * config.factors[index] * size / config.batch_size
        one = lambda tree: jax.tree.map(lambda x: x[index, seed], tree[cell])
        rows = slice(seed * config.batch_size, (seed + 1) * config.batch_size)
        start = one(before.params), one(before.variables["batch_stats"])
        expected = trained_alone(modules["batch"], *start, data["image"][rows], data["label"][rows], size, rate)
        found = one(after.params), one(after.variables["batch_stats"])
        chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-5)
        if (size, index, seed) == (config.batch_size, normalization.middle_of(config.factors), 0):
            kernel, moved = (params["block_0"]["convolution"]["kernel"] for params in (start[0], expected[0]))
            ratio = jnp.linalg.norm(moved - kernel) / jnp.linalg.norm(kernel)
            np.testing.assert_allclose(row["parameters"]["batch/block_0/convolution/kernel"]["update_ratio"], ratio, rtol=1e-3)


def test_a_network_that_diverges_stops_and_the_others_go_on(monkeypatch):
    config = dataclasses.replace(TINY, factors=(1.0, 1e30), seeds=1, depth=1)
    monkeypatch.setattr(normalization, "NORMS", {"none": None})
    modules = {"none": Network("none", config.width, config.depth, 10)}
    state = first_state(modules, config)
    step = jax.jit(make_sweep(modules, config, Layout("jit", data_mesh(jax.devices()[:1]))))
    for _ in range(4):
        state, metrics = step(state, batch(config))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)) and np.isfinite(metrics["loss"])


def test_the_learning_rate_is_chosen_by_validation_whatever_the_test_set_says():
    validation = {("none", 4): np.array([[0.5, 0.7], [0.9, 0.4], [0.6, 0.6]])}
    test = {("none", 4): np.array([[1.0, 1.0], [0.2, 0.4], [1.0, 1.0]])}
    outcome = choose(dataclasses.replace(BASE, factors=(0.1, 1.0, 10.0)), validation, test)["none", 4]
    assert outcome.rate == 0.1 and list(outcome.chosen) == [0.2, 0.4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    launch.run(EXPERIMENT, dataclasses.replace(TINY, seeds=1, factors=(1.0,), depth=1), directory)
    return directory


def test_a_run_leaves_a_number_for_each_normalization_and_batch_size(finished):
    metrics = json.loads((finished / "result.json").read_text())["metrics"]
    norms = ("none", "batch", "layer", "instance", "group", "rms")
    parts = ("validation", "test")
    assert set(metrics) == {f"{part}_accuracy/{norm}/batch_{size}" for part in parts for norm in norms for size in (4, 2)}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert json.loads((finished / "sweep.json").read_text()).keys() == {
        f"{norm}/batch_{size}" for norm in norms for size in (4, 2)
    }
    for name in ("accuracy", "validation", "inside_by_normalization", "layer_stats"):
        assert (finished / "figures" / f"{name}.png").stat().st_size > 10_000


def test_it_looks_inside_without_being_asked(finished):
    rows = read_metrics(finished / "layers.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert 0.3 < rows[0]["activations"]["layer/block_0"]["zeros"] < 0.7
    # Each channel of each example: mean 0 and deviation 1, whatever comes in.
    assert abs(rows[0]["activations"]["instance/block_0/norm"]["mean"]) < 1e-4
    assert abs(rows[0]["activations"]["instance/block_0/norm"]["std"] - 1) < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"small_batch": 3}, "--small-batch 3 does not divide --batch-size 64"),
        ({"width": 6}, "--width 6 cannot be split into 4 groups"),
        ({"factors": (1.0, -1.0)}, "a learning rate is above 0"),
        ({"factors": ()}, "--factors"),
        ({"accumulate": 2}, "--accumulate changes what a batch normalisation sees"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **fields)


def test_flags_reach_the_config(tmp_path):
    flags = ["--workdir", str(tmp_path), "--factors", "0.5", "2", "--small-batch", "4"]
    _, config, *_ = launch.parse(normalization.EXPERIMENT, flags)
    assert config.factors == (0.5, 2.0) and config.batch_sizes == (64, 4)
