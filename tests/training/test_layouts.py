"""On eight virtual devices every layout trains as one device does."""

import dataclasses
import functools
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from eight_devices import DEVICES, STRATEGIES, on_one_device
from jax.sharding import PartitionSpec

from jaxdl.errors import UserError
from jaxdl.losses import sigmoid_loss
from jaxdl.models.siglip import SigLIP, TextTower, VisionTower
from jaxdl.nn import BatchNorm
from jaxdl.training import Aux, Execution, Layout, Run, Update, distribute, fit, init_state, make_step
from jaxdl.training.cost import bytes_per_device, compile_step


def layouts() -> dict[str, Layout]:
    return {"one": on_one_device()} | {strategy: Layout(strategy) for strategy in STRATEGIES}


class Towers(nn.Module):
    """The least that can be trained by SigLIP's loss: of images and of tokens, unit vectors, and a scale and a bias."""

    @nn.compact
    def __call__(self, images, tokens):
        images = nn.Dense(32)(nn.gelu(nn.Dense(64)(images.reshape(len(images), -1))))
        texts = nn.Dense(32)(nn.LayerNorm()(nn.Embed(64, 32)(tokens).mean(1)))
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        scale, bias = (
            self.param("scale", nn.initializers.constant(1.0), ()),
            self.param("bias", nn.initializers.constant(-3.0), ()),
        )
        return unit(images), unit(texts), scale, bias


OPTIMIZERS = {"adamw": optax.adamw(1e-3), "muon": optax.contrib.muon(1e-2)}


def batches(count: int, size: int = 16):
    """The same pairs, in another order each time."""
    random = np.random.default_rng(0)
    images, tokens = random.uniform(-1, 1, (size, 8, 8, 3)), random.integers(0, 64, (size, 6))
    for number in range(count):
        order = random.permutation(size) if number else slice(None)
        yield {"image": images[order].astype(np.float32), "tokens": tokens[order].astype(np.int32)}


def train(layout: Layout, optimizer: optax.GradientTransformation, steps: int, accumulate: int = 1):
    loss = layout.shard_objective(functools.partial(sigmoid_loss, chunk_size=1))

    def objective(params, state, batch, key):
        return loss(*Towers().apply({"params": params}, batch["image"], batch["tokens"])), Aux()

    update = Update(objective, optax.chain(optax.clip_by_global_norm(1.0), optimizer), ema=0.9)
    first = next(batches(1))
    state = init_state(
        lambda key: Towers().init(key, first["image"], first["tokens"]),
        [update],
        seed=0,
        shardings=layout.state_shardings,
    )
    step = make_step(update, accumulate=accumulate, axis_name=layout.axis_name)
    step, losses = distribute(step, state, layout), []
    for batch in batches(steps):
        state, metrics = step(state, layout.place_batch(batch))
        losses.append(float(metrics["loss"]))
    return state, np.array(losses)


@pytest.mark.eight_devices
@pytest.mark.parametrize(("optimizer", "accumulate"), [("adamw", 2), ("muon", 1)])
def test_twenty_steps_are_those_of_one_device_and_parts_hold_the_same_rows(optimizer, accumulate):
    results = {name: train(layout, OPTIMIZERS[optimizer], 20, accumulate) for name, layout in layouts().items()}
    state, losses = results.pop("one")
    assert losses[-1] < losses[0]
    for name, (other, others) in results.items():
        np.testing.assert_allclose(others, losses, rtol=1e-5, err_msg=name)
        for part in ("params", "ema"):
            ours, theirs = jax.device_get((getattr(other, part), getattr(state, part)))
            chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.eight_devices
def test_fsdp_keeps_an_eighth_of_a_model_of_ordinary_sizes_on_each_device():
    module = SigLIP(
        VisionTower(patch_size=8, width=192, depth=1, num_heads=4, mlp_dim=768),
        TextTower(vocab_size=512, features=192, width=128, depth=1, num_heads=4, mlp_dim=512),
    )
    images, tokens = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 16), jnp.int32)
    update = Update(line_loss, optax.adam(1e-3), ema=0.9)
    make = functools.partial(init_state, lambda key: module.init(key, images, tokens), [update], seed=0)
    layout = Layout("fsdp")
    state = make(shardings=layout.state_shardings)
    for part in (state.params, state.ema, state.opt_state):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(part))
        assert bytes_per_device(part) <= whole / DEVICES * 1.1
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(part))
        assert held == bytes_per_device(part)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(make().params), atol=1e-6)


@pytest.mark.eight_devices
def test_a_state_that_is_to_be_cut_is_never_whole_on_a_device():
    rows, columns = 4096, 512
    whole = rows * columns * 4
    layout, update = Layout("fsdp"), Update(line_loss, optax.adam(1e-3))

    def make(key):
        return {"params": {"kernel": nn.initializers.normal()(key, (rows, columns))}}

    abstract = jax.eval_shape(lambda: init_state(make, [update], seed=0))
    compiled = (
        jax.jit(lambda: init_state(make, [update], seed=0), out_shardings=layout.state_shardings(abstract)).lower().compile()
    )
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes < 3 * whole / DEVICES * 1.1
    assert memory.temp_size_in_bytes < whole / 2


@pytest.mark.eight_devices
def test_a_rule_decides_before_the_shape_does():
    layout = Layout("fsdp", rules=[("query/kernel$", PartitionSpec(None, "data")), ("key", PartitionSpec())])
    params = {name: {"kernel": jnp.zeros((1024, 64))} for name in ("query", "key", "value")}
    momentum = Update(line_loss, optax.sgd(0.1, momentum=0.9))
    state = init_state(lambda key: {"params": params}, [momentum], seed=0, shardings=layout.state_shardings)
    specs = {name: state.params[name]["kernel"].sharding.spec for name in params}
    assert specs == {"query": PartitionSpec(None, "data"), "key": PartitionSpec(), "value": PartitionSpec("data")}
    assert state.opt_state["params"][0].trace["query"]["kernel"].sharding.spec == PartitionSpec(None, "data")


@pytest.mark.eight_devices
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_texts_around_the_ring_give_the_loss_and_the_gradient_of_the_whole_batch(chunk_size):
    random = np.random.default_rng(0)
    images, texts = (
        jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in random.normal(size=(2, 32, 16)).astype(np.float32)
    )
    arguments = images, texts, jnp.float32(1.5), jnp.float32(-3.0)
    ring = Layout("jit").shard_objective(functools.partial(sigmoid_loss, chunk_size=chunk_size))
    value, gradients = jax.jit(jax.value_and_grad(ring, argnums=(0, 1, 2, 3)))(*arguments)
    expected, wanted = jax.value_and_grad(sigmoid_loss, argnums=(0, 1, 2, 3))(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    chex.assert_trees_all_close(gradients, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.eight_devices
def test_no_device_holds_the_matrix_of_all_pairs():
    size = 2048
    arguments = jnp.zeros((size, 8)), jnp.zeros((size, 8)), jnp.zeros(()), jnp.zeros(())
    layout = Layout("jit")
    placed = [jax.device_put(x, layout.batch_sharding if x.ndim else layout.replicated) for x in arguments]
    compiled = jax.jit(jax.value_and_grad(layout.shard_objective(sigmoid_loss), argnums=(0, 1))).lower(*placed).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size * size * 4 / DEVICES


class Normalized(nn.Module):
    axis_name: str | None

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(1)(BatchNorm(axis_name=self.axis_name)(nn.Dense(8)(x), train=train))


@pytest.mark.eight_devices
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_statistics_are_those_of_the_whole_batch(strategy):
    def after_two_steps(layout: Layout):
        module = Normalized(layout.axis_name)

        def loss(params, state, batch, key):
            out, updated = module.apply({"params": params, **state.variables}, batch["x"], train=True, mutable=["batch_stats"])
            return jnp.mean((out[:, 0] - batch["y"]) ** 2), Aux(variables=updated)

        x = np.random.default_rng(0).normal(size=(2, 16, 4)).astype(np.float32)
        update = Update(loss, optax.sgd(0.1))
        state = init_state(lambda key: Normalized(None).init(key, jnp.asarray(x[0]), train=True), [update], seed=0)
        state = layout.place_state(state)
        step = distribute(make_step(update, axis_name=layout.axis_name), state, layout)
        for rows in x:
            state, _ = step(state, layout.place_batch({"x": rows, "y": rows[:, 0] ** 2}))
        return jax.device_get((state.params, state.variables))

    every = layouts()
    chex.assert_trees_all_close(after_two_steps(every[strategy]), after_two_steps(every["one"]), rtol=2e-5, atol=1e-6)


@pytest.mark.eight_devices
def test_each_device_of_pmap_has_its_own_randomness():
    layout = Layout("pmap")

    def loss(params, state, batch, key):
        draw = jax.random.uniform(key)
        return params["w"].sum() * 0, Aux({"square_of_mean": jax.lax.pmean(draw, "data") ** 2, "mean_of_squares": draw**2})

    update = Update(loss, optax.sgd(0.1))
    state = init_state(lambda key: {"params": {"w": jnp.zeros(1)}}, [update], seed=0)
    step = distribute(make_step(update, axis_name="data"), layout.place_state(state), layout)
    _, metrics = step(layout.place_state(state), layout.place_batch({"x": np.zeros(8, np.float32)}))
    assert metrics["mean_of_squares"] > metrics["square_of_mean"] + 1e-3


@dataclasses.dataclass(frozen=True)
class LineConfig:
    seed: int = 0


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


def line_loss(params, state, batch, key):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2), Aux()


@pytest.mark.eight_devices
def test_a_checkpoint_of_one_layout_goes_on_in_another(tmp_path):
    update = Update(line_loss, optax.adam(0.01))

    def run(directory: Path, steps: int, layout: Layout):
        with Run.open(directory, "line", LineConfig(), Execution(log_every=1)) as opened:
            opened.layout = layout
            state = init_state(lambda key: {"params": {"w": jnp.zeros(1024)}}, [update], seed=0, shardings=layout.state_shardings)
            return fit(make_step(update, axis_name=layout.axis_name), state, Line(), opened, steps=steps)

    every = layouts()
    expected = run(tmp_path / "straight", 4, every["one"])
    for steps, name in enumerate(("fsdp", "one", "pmap", "jit"), start=1):
        state = run(tmp_path / "changing", steps, every[name])
        assert state.params["w"].sharding.is_fully_replicated == (name != "fsdp")
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-5, atol=1e-7)


@pytest.mark.eight_devices
def test_a_batch_that_the_devices_do_not_divide_is_refused():
    with pytest.raises(UserError, match="a batch of 12 cannot be spread over 8 devices"):
        Layout("jit").place_batch({"x": np.zeros((12, 3), np.float32)})


@pytest.mark.eight_devices
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_operations_are_counted_for_all_devices(strategy):
    layout, update = Layout(strategy), Update(line_loss, optax.sgd(0.1))
    state = layout.place_state(init_state(lambda key: {"params": {"w": jnp.zeros(1024)}}, [update], seed=0))
    step = distribute(make_step(update, axis_name=layout.axis_name), state, layout)
    _, cost = compile_step(step, state, layout.place_batch(next(Line())))
    assert cost.flops == 2 * 2 * 16 * 1024  # One product forward and one for the kernel's gradient.
    assert cost.devices == DEVICES
    assert cost.parameter_bytes == 4 * 1024 // (DEVICES if strategy == "fsdp" else 1)


@pytest.mark.eight_devices
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
