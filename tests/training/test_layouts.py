"""On eight virtual devices every layout trains as one device does. The first test runs the others in a process that has them."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec
from tiny_families import FAMILIES, Family
from tiny_siglip import assert_same_parameters

from experiments import siglip
from jaxdl.errors import UserError
from jaxdl.launch import Training
from jaxdl.losses import sigmoid_loss
from jaxdl.models.siglip import SigLIP, TextTower, VisionTower
from jaxdl.nn import BatchNorm
from jaxdl.training import (
    Aux,
    Execution,
    Layout,
    Run,
    TrainState,
    data_mesh,
    distribute,
    fit,
    init_state,
    make_step,
    start,
)
from jaxdl.training.cost import bytes_per_device, compile_step

DEVICES = 8
eight_devices = pytest.mark.skipif(jax.device_count() != DEVICES, reason="run in a process with eight devices, by the first test")
STRATEGIES = ("jit", "fsdp", "pmap")


@pytest.mark.skipif(jax.device_count() == DEVICES, reason="this is the process")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_tests_of_this_file_pass_on_eight_devices(chosen):
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", chosen, __file__]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "passed" in done.stdout and ", 1 skipped" in done.stdout


def layouts() -> dict[str, Layout]:
    one = Layout("jit", data_mesh(jax.devices()[:1]))
    return {"one": one} | {strategy: Layout(strategy) for strategy in STRATEGIES}


MODULE = SigLIP(
    VisionTower(patch=8, width=32, depth=1, num_heads=2, hidden=64),
    TextTower(vocabulary=64, features=32, width=32, depth=1, num_heads=2, hidden=64),
)
OPTIMIZERS = {"adamw": optax.adamw(1e-3), "muon": optax.contrib.muon(1e-2)}


def batches(count: int, size: int = 16):
    random = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "image": random.uniform(-1, 1, (size, 16, 16, 3)).astype(np.float32),
            "tokens": random.integers(0, 64, (size, 6)).astype(np.int32),
        }


def train(layout: Layout, optimizer: optax.GradientTransformation, steps: int, accumulate: int = 1):
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    first = next(batches(1))
    state = init_state(
        lambda key: MODULE.init(key, *map(jnp.asarray, (first["image"][:1], first["tokens"][:1]))),
        clipped,
        seed=0,
        ema=True,
        shardings=layout.state_shardings,
    )
    objective = layout.over_batch(functools.partial(sigmoid_loss, chunk_size=1))
    step = make_step(
        functools.partial(siglip.loss, MODULE, objective),
        clipped,
        accumulate=accumulate,
        ema_decay=0.9,
        axis_name=layout.axis_name,
    )
    step, losses = distribute(step, state, layout), []
    for batch in batches(steps):
        state, metrics = step(state, layout.place_batch(batch))
        losses.append(float(metrics["loss"]))
    return state, np.array(losses)


@eight_devices
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_steps_are_those_of_one_device(optimizer):
    results = {name: train(layout, OPTIMIZERS[optimizer], 20) for name, layout in layouts().items()}
    state, losses = results.pop("one")
    assert losses[-1] < losses[0]
    for name, (other, others) in results.items():
        np.testing.assert_allclose(others, losses, rtol=1e-5, err_msg=name)
        assert_same_parameters(other.params, state.params, name)


@eight_devices
def test_accumulated_parts_hold_the_same_rows_in_every_layout():
    results = {name: train(layout, optax.sgd(0.1), 3, accumulate=2) for name, layout in layouts().items()}
    expected, losses = results.pop("one")
    for name, (state, others) in results.items():
        np.testing.assert_allclose(others, losses, rtol=1e-5, err_msg=name)
        chex.assert_trees_all_close(jax.device_get(state.ema), jax.device_get(expected.ema), rtol=1e-4, atol=1e-6)


def two_steps(family: Family, layout: Layout, accumulate: int) -> tuple[TrainState, list[float]]:
    """The state after them, and the losses. The second step goes on from a state that a layout has left."""
    batches = family.batches(2)
    inputs = family.inputs(batches[0])
    step, state = start(
        Training(learning_rate=0.5, warmup=0.0, accumulate=accumulate),
        layout,
        family.loss(family.module, layout),
        lambda schedule: optax.sgd(schedule, momentum=0.9),
        lambda key: family.module.init(key, *(jnp.asarray(array[:1]) for array in inputs)),
        frozen=family.frozen,
    )
    step, losses = distribute(step, state, layout), []
    for batch in batches:
        state, metrics = step(state, layout.place_batch(batch))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def on_one_device(name: str, accumulate: int) -> tuple[TrainState, list[float]]:
    return two_steps(FAMILIES[name], layouts()["one"], accumulate)


# `fsdp` differs from `jit` in where arrays lie, and parts of batches add a loop. All pairs take five times as long.
SOME = {("gpt", "fsdp"), ("vit", "pmap"), ("translation", "fsdp"), ("paligemma", "pmap"), ("clip", "fsdp")}


@eight_devices
@pytest.mark.parametrize(
    ("name", "strategy", "accumulate"),
    [
        pytest.param(name, strategy, accumulate, marks=[] if (name, strategy) in SOME and accumulate == 2 else pytest.mark.slow)
        for name, strategy, accumulate in itertools.product(FAMILIES, STRATEGIES, (1, 2))
    ],
)
def test_two_steps_of_every_family_are_those_of_one_device(name, strategy, accumulate):
    family = FAMILIES[name]
    found, losses = two_steps(family, Layout(strategy), accumulate)
    expected, wanted = on_one_device(name, accumulate if family.compares else 1)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_same_parameters(found.params, expected.params)
    cut = [leaf for leaf in jax.tree.leaves(found.params) if not leaf.sharding.is_fully_replicated]
    assert (len(cut) > 4) == (strategy == "fsdp")


@eight_devices
def test_fsdp_keeps_an_eighth_of_the_default_model_on_each_device(tmp_path):
    config = siglip.Config()
    module = SigLIP(
        VisionTower(
            patch=config.patch, width=config.width, depth=config.depth, num_heads=config.num_heads, hidden=4 * config.width
        ),
        TextTower(
            vocabulary=config.vocabulary,
            features=config.width,
            width=config.text_width,
            depth=config.text_depth,
            num_heads=config.num_heads,
            hidden=4 * config.text_width,
        ),
    )
    images, tokens = jnp.zeros((1, config.resolution, config.resolution, 3)), jnp.zeros((1, config.text_length), jnp.int32)
    make = functools.partial(init_state, lambda key: module.init(key, images, tokens), optax.adam(1e-3), seed=0, ema=True)
    layout = Layout("fsdp")
    state = make(shardings=layout.state_shardings)
    for part in (state.params, state.ema, state.opt_state):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(part))
        assert bytes_per_device(part) <= whole / DEVICES * 1.1
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(part))
        assert held == bytes_per_device(part)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(make().params), atol=1e-6)


@eight_devices
def test_a_state_that_is_to_be_cut_is_never_whole_on_a_device():
    rows, columns = 4096, 512
    whole = rows * columns * 4
    layout, optimizer = Layout("fsdp"), optax.adam(1e-3)

    def make(key):
        return {"params": {"kernel": nn.initializers.normal()(key, (rows, columns))}}

    abstract = jax.eval_shape(lambda: init_state(make, optimizer, seed=0))
    compiled = (
        jax.jit(lambda: init_state(make, optimizer, seed=0), out_shardings=layout.state_shardings(abstract)).lower().compile()
    )
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes < 3 * whole / DEVICES * 1.1
    assert memory.temp_size_in_bytes < whole / 2


@eight_devices
def test_a_rule_decides_before_the_shape_does():
    layout = Layout("fsdp", rules=[("query/kernel$", PartitionSpec(None, "data")), ("key", PartitionSpec())])
    params = {name: {"kernel": jnp.zeros((1024, 64))} for name in ("query", "key", "value")}
    state = init_state(lambda key: {"params": params}, optax.sgd(0.1, momentum=0.9), seed=0, shardings=layout.state_shardings)
    specs = {name: state.params[name]["kernel"].sharding.spec for name in params}
    assert specs == {"query": PartitionSpec(None, "data"), "key": PartitionSpec(), "value": PartitionSpec("data")}
    assert state.opt_state[0].trace["query"]["kernel"].sharding.spec == PartitionSpec(None, "data")


@eight_devices
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_texts_around_the_ring_give_the_loss_and_the_gradient_of_the_whole_batch(chunk_size):
    random = np.random.default_rng(0)
    images, texts = (
        jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in random.normal(size=(2, 32, 16)).astype(np.float32)
    )
    arguments = images, texts, jnp.float32(1.5), jnp.float32(-3.0)
    ring = Layout("jit").over_batch(functools.partial(sigmoid_loss, chunk_size=chunk_size))
    value, gradients = jax.jit(jax.value_and_grad(ring, argnums=(0, 1, 2, 3)))(*arguments)
    expected, wanted = jax.value_and_grad(sigmoid_loss, argnums=(0, 1, 2, 3))(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    chex.assert_trees_all_close(gradients, wanted, rtol=1e-5, atol=1e-6)


@eight_devices
def test_no_device_holds_the_matrix_of_all_pairs():
    size = 2048
    arguments = jnp.zeros((size, 8)), jnp.zeros((size, 8)), jnp.zeros(()), jnp.zeros(())
    layout = Layout("jit")
    placed = [jax.device_put(x, layout.by_rows if x.ndim else layout.replicated) for x in arguments]
    compiled = jax.jit(jax.value_and_grad(layout.over_batch(sigmoid_loss), argnums=(0, 1))).lower(*placed).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size * size * 4 / DEVICES


class Normalized(nn.Module):
    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(1)(BatchNorm(axis_name=self.axis_name)(nn.Dense(8)(x), train=train))


@eight_devices
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_statistics_are_those_of_the_whole_batch(strategy):
    def after_two_steps(layout: Layout):
        module = Normalized(layout.axis_name)

        def loss(params, variables, batch, key):
            out, updated = module.apply({"params": params, **variables}, batch["x"], train=True, mutable=["batch_stats"])
            return jnp.mean((out[:, 0] - batch["y"]) ** 2), Aux(variables=updated)

        x = np.random.default_rng(0).normal(size=(2, 16, 4)).astype(np.float32)
        state = init_state(lambda key: Normalized(None).init(key, jnp.asarray(x[0]), train=True), optax.sgd(0.1), seed=0)
        state = layout.place_state(state)
        step = distribute(make_step(loss, optax.sgd(0.1), axis_name=layout.axis_name), state, layout)
        for rows in x:
            state, _ = step(state, layout.place_batch({"x": rows, "y": rows[:, 0] ** 2}))
        return jax.device_get((state.params, state.variables))

    every = layouts()
    chex.assert_trees_all_close(after_two_steps(every[strategy]), after_two_steps(every["one"]), rtol=2e-5, atol=1e-6)


@eight_devices
def test_each_device_of_pmap_has_its_own_chance():
    layout = Layout("pmap")

    def loss(params, variables, batch, key):
        draw = jax.random.uniform(key)
        return params["w"].sum() * 0, Aux({"square_of_mean": jax.lax.pmean(draw, "data") ** 2, "mean_of_squares": draw**2})

    state = init_state(lambda key: {"params": {"w": jnp.zeros(1)}}, optax.sgd(0.1), seed=0)
    step = distribute(make_step(loss, optax.sgd(0.1), axis_name="data"), layout.place_state(state), layout)
    _, metrics = step(layout.place_state(state), layout.place_batch({"x": np.zeros(8, np.float32)}))
    assert metrics["mean_of_squares"] > metrics["square_of_mean"] + 1e-3


@dataclasses.dataclass(frozen=True)
class LineConfig:
    preset: str = "default"


class Line:
    """Batches of points on a line, which know where they are."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        x = np.random.default_rng(self.position).normal(size=(16, 1024)).astype(np.float32)
        return {"x": x, "y": x.sum(1)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def line_loss(params, variables, batch, key):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), Aux()


@eight_devices
def test_a_checkpoint_of_one_layout_goes_on_in_another(tmp_path):
    optimizer = optax.adam(0.01)

    def run(directory: Path, steps: int, layout: Layout):
        with Run.open(directory, "line", LineConfig(), Execution(log_every=1)) as opened:
            opened.layout = layout
            state = init_state(
                lambda key: {"params": {"w": jnp.zeros(1024)}}, optimizer, seed=0, shardings=layout.state_shardings
            )
            return fit(make_step(line_loss, optimizer, axis_name=layout.axis_name), state, Line(), opened, steps=steps)

    every = layouts()
    expected = run(tmp_path / "straight", 4, every["one"])
    for steps, name in enumerate(("fsdp", "one", "pmap", "jit"), start=1):
        state = run(tmp_path / "changing", steps, every[name])
        assert state.params["w"].sharding.is_fully_replicated == (name != "fsdp")
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-5, atol=1e-7)


@eight_devices
def test_a_batch_that_the_devices_do_not_divide_is_refused():
    with pytest.raises(UserError, match="a batch of 12 cannot be spread over 8 devices"):
        Layout("jit").place_batch({"x": np.zeros((12, 3), np.float32)})


@eight_devices
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_operations_are_counted_for_all_devices(strategy):
    layout = Layout(strategy)
    state = layout.place_state(init_state(lambda key: {"params": {"w": jnp.zeros(1024)}}, optax.sgd(0.1), seed=0))
    step = distribute(make_step(line_loss, optax.sgd(0.1), axis_name=layout.axis_name), state, layout)
    _, cost = compile_step(step, state, layout.place_batch(next(Line())))
    assert cost.flops == 2 * 2 * 16 * 1024  # One product forward and one for the kernel's gradient.
    assert cost.devices == DEVICES
    assert cost.parameter_bytes == 4 * 1024 // (DEVICES if strategy == "fsdp" else 1)


@eight_devices
def test_inference_gives_every_row_once_whether_or_not_the_devices_divide_them():
    for rows, batch_size in ((24, 16), (5, 5), (7, 3)):
        apply = Layout("fsdp").inference(lambda variables, x: x * variables["scale"], batch_size)
        x = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
        np.testing.assert_array_equal(apply({"scale": jnp.float32(2)}, iter(x)), 2 * x)
        product = Layout("fsdp").inference(lambda variables, batch: batch["x"] * batch["y"] * variables["scale"], batch_size)
        found = product({"scale": jnp.float32(2)}, ({"x": row, "y": row + 1} for row in x))
        np.testing.assert_array_equal(found, 2 * x * (x + 1))
    with pytest.raises(UserError, match="empty"):
        apply({"scale": jnp.float32(2)}, [])
