"""What is seen inside of a step is what is there, and looking changes nothing."""

import dataclasses
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import STRATEGIES

from jaxdl.data import Source, train_batches
from jaxdl.errors import UserError
from jaxdl.figures import OCTAVES
from jaxdl.nn import Transformer, TransformerBlock, stack_blocks
from jaxdl.training import (
    Aux,
    Execution,
    Frozen,
    Interrupted,
    LayerStats,
    Layout,
    Run,
    Update,
    fit,
    init_state,
    inspect_step,
    make_step,
    parameters_sha256,
)
from jaxdl.training.inspection import distribute_inspection, record
from jaxdl.training.logging import read_metrics


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(Rectified(name="hidden")(x))


class Rectified(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(7, name="dense")(x))


X = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
BATCH = {"x": jnp.asarray(X), "y": jnp.asarray(Y)}
PARAMS = MLP().init(jax.random.key(0), BATCH["x"])["params"]


def loss(params, state, batch, key):
    return jnp.mean((MLP().apply({"params": params}, batch["x"]) - batch["y"]) ** 2), Aux()


ADAM = Update(loss, optax.adam(0.01))


def begun(update: Update = ADAM):
    return init_state(lambda key: {"params": PARAMS}, [update], seed=0)


def by_numpy(values: np.ndarray) -> dict:
    """Mean, deviation, share of zeros and histogram, the last with numpy's own bins."""
    values = np.asarray(values, np.float64).ravel()
    edges = 2.0 ** np.arange(OCTAVES.start, OCTAVES.stop + 1)
    positive, _ = np.histogram(values, edges)
    negative, _ = np.histogram(-values[values < 0], edges)
    histogram = np.concatenate([negative[::-1], positive]) / values.size
    return {"mean": values.mean(), "std": values.std(), "zeros": (values == 0).mean(), "histogram": histogram}


def assert_same_statistics(ours: dict, values: np.ndarray) -> None:
    expected = by_numpy(values)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], value, rtol=2e-4, atol=1e-7, err_msg=name)


def forward(params: dict, taps: dict) -> dict:
    """The network without Flax, with something to add to everything that it computes."""
    out = {"hidden/dense": X @ params["hidden"]["dense"]["kernel"] + params["hidden"]["dense"]["bias"] + taps["hidden/dense"]}
    out["hidden"] = jnp.maximum(out["hidden/dense"], 0) + taps["hidden"]
    out["out"] = out["hidden"] @ params["out"]["kernel"] + params["out"]["bias"] + taps["out"]
    return out


@pytest.fixture(scope="module")
def seen() -> dict:
    return jax.jit(inspect_step(make_step(ADAM)))(begun(), BATCH).row()


def test_activations_are_those_computed_by_hand(seen):
    activations = forward(PARAMS, {name: 0.0 for name in ("hidden/dense", "hidden", "out")})
    assert list(seen["activations"]) == ["hidden/dense", "hidden", "out", "MLP"]
    for name, values in activations.items():
        assert_same_statistics(seen["activations"][name], values)
    assert_same_statistics(seen["activations"]["MLP"], activations["out"])
    assert seen["activations"]["hidden"]["zeros"] > 0.2 and sum(seen["activations"]["hidden"]["histogram"]) < 0.8


def test_gradients_by_activations_are_those_by_explicit_taps(seen):
    zeros = {name: jnp.zeros(values.shape) for name, values in forward(PARAMS, dict.fromkeys(seen["activations"], 0.0)).items()}
    gradients = jax.grad(lambda taps: jnp.mean((forward(PARAMS, taps)["out"] - Y) ** 2))(zeros)
    for name, values in gradients.items():
        assert_same_statistics(seen["gradients"][name], values)
    assert seen["gradients"]["hidden/dense"]["zeros"] == seen["activations"]["hidden"]["zeros"]


def test_the_update_ratio_is_that_of_the_parameters_before_and_after():
    update = Update(loss, optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01)))
    step, state = make_step(update), begun(update)
    row = jax.jit(inspect_step(step))(state, BATCH).row()["parameters"]
    after, metrics = jax.jit(step)(state, BATCH)
    for index, (path, before) in enumerate(jax.tree_util.tree_leaves_with_path(PARAMS)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        moved = np.linalg.norm(jax.tree.leaves(after.params)[index] - before)
        norm = np.linalg.norm(before)
        np.testing.assert_allclose(row[name]["norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(row[name]["gradient_norm"], metrics["gradient_norms"][index], rtol=1e-4)
        if norm == 0:
            assert row[name]["update_ratio"] is None and name.endswith("bias")
        else:
            np.testing.assert_allclose(row[name]["update_ratio"], moved / norm, rtol=1e-4)


def test_of_a_batch_in_parts_the_first_part_is_seen():
    update = Update(loss, optax.sgd(0.1))
    step, state = make_step(update, accumulate=4), begun(update)
    row = jax.jit(inspect_step(step))(state, BATCH).row()
    part = {name: values[::4] for name, values in BATCH.items()}
    assert row["activations"] == jax.jit(inspect_step(make_step(update)))(state, part).row()["activations"]
    after, _ = jax.jit(step)(state, BATCH)
    moved = np.linalg.norm(after.params["out"]["kernel"] - PARAMS["out"]["kernel"]) / np.linalg.norm(PARAMS["out"]["kernel"])
    np.testing.assert_allclose(row["parameters"]["out/kernel"]["update_ratio"], moved, rtol=1e-4)


def test_of_several_updates_each_is_seen_by_its_name_and_moves_as_the_step_moves_it(seen):
    of = lambda name: lambda params, state, batch, key: loss(params, state, batch, key)
    updates = (
        Update(of("one"), optax.adam(0.01), of="one", repeats=2),
        Update(of("two"), optax.sgd(0.1), of="two", name="other", frozen=Frozen("^out/")),
    )
    state = init_state(lambda key: {"params": {"one": PARAMS, "two": PARAMS}}, updates, seed=0)
    step = make_step(*updates)
    row = jax.jit(inspect_step(step))(state, BATCH).row()
    calls = list(seen["activations"])
    assert list(row["activations"]) == [f"{name}/{call}" for name in ("one", "other") for call in calls]
    for name, part in (("one", 0), ("other", 1)):  # The first of two parts, and the last.
        alone = jax.jit(inspect_step(make_step(ADAM)))(begun(), {name: values[part::2] for name, values in BATCH.items()}).row()
        for call in calls:
            for field, value in alone["activations"][call].items():
                np.testing.assert_allclose(row["activations"][f"{name}/{call}"][field], value, rtol=1e-4, err_msg=call)
    after, _ = jax.jit(step)(state, BATCH)
    for name, entry in (("one", "one"), ("other", "two")):
        kernels = [params[entry]["out"]["kernel"] for params in (state.params, after.params)]
        ratio = np.linalg.norm(kernels[1] - kernels[0]) / np.linalg.norm(kernels[0])
        np.testing.assert_allclose(row["parameters"][f"{name}/out/kernel"]["update_ratio"], ratio, rtol=1e-3)
    assert row["parameters"]["other/out/kernel"]["gradient_norm"] > 0 == row["parameters"]["other/out/kernel"]["update_ratio"]


def stats(module: nn.Module, params: dict, x: jax.Array, result=lambda out: out) -> dict:
    objective = lambda params: jnp.mean(jnp.exp(result(module.apply({"params": params}, x)) / 4))

    def see(params):
        calls, grads = record(objective, params)
        return LayerStats.of(calls, params, grads, params)

    return jax.jit(see)(params).row()


def test_the_blocks_of_a_scan_are_seen_together_and_remat_hides_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 8)), jnp.float32)
    make = lambda **options: Transformer(2, TransformerBlock(2, 16, parent=None), **options)
    params = make().init(jax.random.key(0), x)["params"]
    apart = stats(make(), params, x)
    together = stats(make(scan=True, remat=True), stack_blocks(params), x)
    assert not any("#" in name for name in together["activations"])
    for kind in ("activations", "gradients"):
        for name, found in together[kind].items():
            blocks = [apart[kind][name.replace("blocks", f"block_{layer}")] for layer in range(2)]
            mean = np.mean([block["mean"] for block in blocks])
            square = np.mean([block["std"] ** 2 + block["mean"] ** 2 for block in blocks])
            np.testing.assert_allclose(found["mean"], mean, rtol=1e-3, atol=1e-7, err_msg=name)
            np.testing.assert_allclose(found["std"], (square - mean**2) ** 0.5, rtol=1e-3, atol=1e-7, err_msg=name)
            np.testing.assert_allclose(found["histogram"], np.mean([b["histogram"] for b in blocks], 0), atol=0.02, err_msg=name)


class Shared(nn.Module):
    """One layer used twice, one whose result nobody uses, and several results."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5, name="twice")
        nn.Dense(2, name="unused")(x)
        return {"y": layer(layer(x)), "label": jnp.argmax(x, -1)}


def test_repeated_calls_are_numbered_and_what_the_loss_does_not_need_is_left_out():
    params = Shared().init(jax.random.key(0), X)["params"]
    row = stats(Shared(), params, jnp.asarray(X), lambda out: out["y"])
    assert list(row["activations"]) == list(row["gradients"]) == ["twice", "twice#2", "Shared/y"]
    assert row["parameters"]["unused/kernel"]["gradient_norm"] == 0
    first = X @ np.asarray(params["twice"]["kernel"])
    assert_same_statistics(row["activations"]["twice"], first)
    assert_same_statistics(row["activations"]["twice#2"], first @ np.asarray(params["twice"]["kernel"]))


def test_a_mean_far_from_zero_does_not_swallow_the_deviation():
    class Far(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("scale", nn.initializers.ones, ()) + 1000

    row = stats(Far(), {"scale": jnp.ones(())}, jnp.asarray(X), lambda out: out - 1000)
    np.testing.assert_allclose(row["activations"]["Far"]["std"], (X + np.float32(1000)).astype(np.float64).std(), rtol=1e-3)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


class Rows(Source):
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict:
        return {"x": X[index % 16] + index, "y": Y[index % 16]}


def train(directory: Path, every: int, steps: int = 12, stop_at: int = 0, make=None, finish: bool = False) -> str:
    evaluated = 0

    def evaluate(variables, key):
        nonlocal evaluated
        evaluated += 1
        if evaluated == stop_at:
            os.kill(os.getpid(), 15)
        return {}

    with Run.open(directory, "mlp", Config(), Execution(inspect_every=every)) as run:
        state = init_state(lambda key: {"params": MLP().init(key, jnp.asarray(X))["params"]}, [ADAM], seed=0)
        batches = train_batches(Rows(), lambda example, rng: example, batch_size=8, seed=0)
        step = make_step(ADAM) if make is None else make(make_step(ADAM))
        state = fit(step, state, batches, run, steps=steps, evaluate=evaluate, evaluate_every=1)
        if finish:
            run.finish(state, {})
    return parameters_sha256(state.params)


def test_looking_changes_no_bit_and_a_resumed_run_sees_what_a_straight_one_sees(tmp_path):
    blind = train(tmp_path / "blind", every=0)
    assert not (tmp_path / "blind" / "layers.jsonl").exists()
    assert train(tmp_path / "seeing", every=3) == blind
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", every=3, stop_at=7)
    with (tmp_path / "cut" / "layers.jsonl").open("a") as file:
        file.write('{"step": 9, "activations": "of a later step that was lost"}\n{"step": 12, "acti')
    assert train(tmp_path / "cut", every=3, finish=True) == blind
    straight, resumed = (read_metrics(tmp_path / name / "layers.jsonl") for name in ("seeing", "cut"))
    assert [row["step"] for row in straight] == [1, 3, 6, 9, 12]
    assert resumed == straight
    for picture in ("stats", "updates", "activations", "gradients"):
        assert (tmp_path / "cut" / "figures" / f"layer_{picture}.png").stat().st_size > 10_000


def test_who_is_asked_to_look_and_cannot_says_so(tmp_path):
    with pytest.raises(UserError, match=r"--inspect-every 2: mlp does not say how to look inside of its steps"):
        train(tmp_path, every=2, make=lambda step: lambda state, batch: step(state, batch))


@pytest.mark.eight_devices
def test_on_several_devices_every_layout_sees_the_whole_batch(seen):
    for strategy in STRATEGIES:
        layout = Layout(strategy)
        step, state = make_step(ADAM, axis_name=layout.axis_name), layout.place_state(begun())
        row = distribute_inspection(inspect_step(step), state, layout)(state, layout.place_batch({"x": X, "y": Y})).row()
        for kind in ("activations", "gradients"):
            for name, summary in seen[kind].items():
                for field, value in summary.items():
                    np.testing.assert_allclose(
                        row[kind][name][field], value, rtol=1e-3, atol=1e-7, err_msg=f"{strategy} {name} {field}"
                    )
        for name, norms in seen["parameters"].items():
            for field, value in norms.items():
                if value is None:
                    assert row["parameters"][name][field] is None
                else:
                    np.testing.assert_allclose(
                        row["parameters"][name][field], value, rtol=1e-3, err_msg=f"{strategy} {name} {field}"
                    )
