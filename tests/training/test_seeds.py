"""Several seeds in one program are the runs of each."""

import json
from dataclasses import dataclass

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdl.errors import UserError
from jaxdl.training import Aux, Mean, Run, Update, init_state, make_step, over_seeds, parameters_sha256, train
from jaxdl.training.logging import read_metrics

SEEDS = 3
random = np.random.default_rng(0)
BATCHES = [{"x": random.normal(size=(12, 5)).astype(np.float32)} for _ in range(4)]


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, use_bias=False)(x)  # A bias before the normalisation has no gradient but rounding, which Adam blows up.
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(1)(nn.Dropout(0.3, deterministic=False)(nn.tanh(x)))[:, 0]


def objective(params, state, batch, key):
    out, updated = Network().apply(
        {"params": params, **state.variables}, batch["x"], rngs={"dropout": key}, mutable=["batch_stats"]
    )
    wrong = jnp.abs(out - batch["x"].sum(1))
    large = wrong > 1
    aux = Aux({"largest": wrong.max(), "error": Mean((wrong * large).sum(), large.sum())}, updated, state.carry + 1)
    return jnp.mean(wrong**2), aux


UPDATE = Update(objective, optax.adam(0.01), ema=0.9)
STEP = make_step(UPDATE)


def begin(seed: int, seeds: int | None = None):
    init = lambda key: Network().init({"params": key, "dropout": key}, BATCHES[0]["x"])
    carry = lambda key: jax.random.randint(key, (), 0, 100)
    return init_state(init, [UPDATE], seed=seed, seeds=seeds, carry=carry, constants={"half": np.float32(0.5)})


@pytest.mark.parametrize("batches", ["shared", "own"])
def test_each_seed_is_a_run_of_its_own(batches):
    state, step = begin(7, SEEDS), jax.jit(over_seeds(STEP, SEEDS, batches))
    singles, single = [begin(7 + seed) for seed in range(SEEDS)], jax.jit(STEP)
    for number, batch in enumerate(BATCHES):
        state, metrics = step(state, batch)
        found = []
        for seed, before in enumerate(singles):
            rows = batch if batches == "shared" else {"x": batch["x"][4 * seed : 4 * seed + 4]}
            singles[seed], each = single(before, rows)
            found.append(each)
        for name in ("loss", "largest", "gradient_norm"):
            values = np.array([each[name] for each in found])
            np.testing.assert_allclose(metrics[name], values.mean(), rtol=1e-5)
            np.testing.assert_allclose(metrics[f"{name}_spread"], values.std(ddof=1), rtol=1e-4)
        totals, counts = zip(*((each["error"].total, each["error"].count) for each in found))
        np.testing.assert_allclose(metrics["error"].total / metrics["error"].count, sum(totals) / sum(counts), rtol=1e-5)
        assert int(state.step) == number + 1 and state.step.ndim == 0
    for seed, one in enumerate(singles):
        for part in ("params", "opt_state", "variables", "ema", "carry"):
            ours = jax.tree.map(lambda leaf, seed=seed: leaf[seed], getattr(state, part))
            chex.assert_trees_all_close(ours, getattr(one, part), rtol=1e-5, atol=1e-6)
    assert state.constants == {"half": 0.5}


def test_a_single_seed_has_no_spread_and_rows_must_be_shared_out():
    _, metrics = jax.jit(over_seeds(STEP, 1))(begin(0, 1), BATCHES[0])
    assert metrics["loss_spread"] == 0 and metrics["loss"] > 0
    with pytest.raises(UserError, match="a batch of 12 cannot be shared out to 5 seeds"):
        over_seeds(STEP, 5, "own")(begin(0, 5), BATCHES[0])


@dataclass(frozen=True)
class Config:
    seed: int = 7
    steps: int = 4
    evaluate_every: int = 2
    show_every: int = 0


class Batches:
    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return BATCHES[self.position - 1]

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def test_a_run_logs_and_measures_the_mean_and_the_spread(tmp_path):
    seen = []

    def evaluate(variables, key):
        assert key.ndim == 0 and variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (SEEDS, 6)
        seen.append(jax.device_get(variables["params"]["Dense_0"]["kernel"])[:, 0, 0])
        return {"corner": seen[-1], "of_all": seen[-1].max(), "odd": Mean(np.float32(6), np.int32(4)), "none": Mean(0.0, 0)}

    def run(directory, steps):
        with Run.open(directory, "seeds", Config(steps=steps)) as opened:
            return train(opened, over_seeds(STEP, SEEDS), begin(7, SEEDS), Batches(), evaluate=evaluate)

    result = run(tmp_path / "whole", 4)
    assert len(seen) == 2
    expected = {"corner": seen[1].mean(), "corner_spread": seen[1].std(ddof=1), "of_all": seen[1].max(), "odd": 1.5}
    assert result["metrics"] == pytest.approx(expected, rel=1e-5)
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/corner_spread" in row] == [2, 4]
    assert all("loss_spread" in row and "error" in row for row in rows if "loss" in row)
    state, step = begin(7, SEEDS), jax.jit(over_seeds(STEP, SEEDS))
    for batch in BATCHES:
        state, _ = step(state, batch)
    assert parameters_sha256(state.params) == result["parameters_sha256"]
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == result
