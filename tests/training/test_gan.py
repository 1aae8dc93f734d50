"""A GAN's step, five moves of a critic and one of a generator, is the loop that one would write by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eight_devices import STRATEGIES, on_one_device

from jaxdl.training import Aux, Layout, Update, distribute, init_state, make_step

CRITIC, GENERATOR = optax.adam(0.01, b1=0.5), optax.sgd(0.05, momentum=0.9)
SLOPE, DECAY, BOX = 0.2, 0.9, 0.3


def generate(params, latents):
    return jnp.tanh(latents @ params["kernel"]) + params["bias"]


def criticise(params, x):
    return jax.nn.leaky_relu(x @ params["kernel"], SLOPE).sum(-1)


def critic_loss(params, state, batch, key):
    fake = generate(state.params["generator"], batch["latents"])
    real, made = criticise(params, batch["x"]).mean(), criticise(params, fake).mean()
    return made - real, Aux({"distance": real - made})


def generator_loss(params, state, batch, key):
    return -criticise(state.params["critic"], generate(params, batch["latents"])).mean(), Aux()


UPDATES = (
    Update(
        critic_loss, CRITIC, of="critic", repeats=5, project=lambda params: jax.tree.map(lambda w: jnp.clip(w, -BOX, BOX), params)
    ),
    Update(generator_loss, GENERATOR, of="generator", ema=DECAY),
)


def init(key):
    one, two = jax.random.split(key)
    generator = {"kernel": jax.random.normal(one, (4, 3)), "bias": jnp.zeros(3)}
    return {"params": {"generator": generator, "critic": {"kernel": 0.1 * jax.random.normal(two, (3, 6))}}}


def batches(steps: int, rows: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    draw = lambda width: random.normal(size=(rows, width)).astype(np.float32)
    return [{"x": 1 + draw(3), "latents": draw(4)} for _ in range(steps)]


def by_hand(params: dict, given: list[dict[str, np.ndarray]]) -> tuple[dict, dict, dict, list[float]]:
    """Parameters, optimizers' states and the generator's average, by numpy's own gradients, and the mean distance of each step."""
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    critic, generator = params["critic"], params["generator"]
    states = {"critic": CRITIC.init(critic), "generator": GENERATOR.init(generator)}
    average, distances = dict(generator), []
    for batch in given:
        seen = []
        for part in range(5):
            x, z = batch["x"][part::5].astype(np.float64), batch["latents"][part::5].astype(np.float64)
            fake = np.tanh(z @ generator["kernel"]) + generator["bias"]
            slope = lambda inputs, kernel=critic["kernel"]: np.where(inputs @ kernel > 0, 1, SLOPE)
            value = lambda inputs, kernel=critic["kernel"]: (slope(inputs) * (inputs @ kernel)).sum(-1).mean()
            gradient = (fake.T @ slope(fake) - x.T @ slope(x)) / len(x)
            seen.append(value(x) - value(fake))
            moves, states["critic"] = CRITIC.update({"kernel": gradient}, states["critic"])
            critic = {"kernel": np.clip(critic["kernel"] + moves["kernel"], -BOX, BOX)}
        # The generator sees the last part, and the critic as it has become.
        activation = np.tanh(z @ generator["kernel"])
        fake = activation + generator["bias"]
        by_fake = -np.where(fake @ critic["kernel"] > 0, 1, SLOPE) @ critic["kernel"].T / len(z)
        gradient = {"kernel": z.T @ (by_fake * (1 - activation**2)), "bias": by_fake.sum(0)}
        moves, states["generator"] = GENERATOR.update(gradient, states["generator"])
        generator = {name: generator[name] + moves[name] for name in generator}
        average = {name: DECAY * average[name] + (1 - DECAY) * generator[name] for name in generator}
        distances.append(np.mean(seen))
    return {"critic": critic, "generator": generator}, states, average, distances


def train(layout: Layout, rows: int, steps: int = 4, accumulate: int = 1):
    state = init_state(init, UPDATES, seed=0, shardings=layout.state_shardings)
    step = distribute(make_step(*UPDATES, accumulate=accumulate, axis_name=layout.axis_name), state, layout)
    distances = []
    for batch in batches(steps, rows):
        before = state
        state, metrics = step(state, layout.place_batch(batch))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state, before.ema)))
        distances.append(float(metrics["critic/distance"]))
    assert metrics.keys() == {
        *(f"critic/{name}" for name in ("loss", "distance", "gradient_norm", "gradient_norms")),
        *(f"generator/{name}" for name in ("loss", "gradient_norm", "gradient_norms")),
    }
    return state, distances


def assert_as_by_hand(state, distances, rows):
    params, states, average, wanted = by_hand(init_state(init, UPDATES, seed=0).params, batches(4, rows))
    pairs = (state.params, params), (state.opt_state, states), (state.ema, {"generator": average})
    for ours, theirs in pairs:
        theirs = jax.tree.map(lambda wanted, given: np.asarray(wanted, given.dtype), theirs, ours)
        chex.assert_trees_all_close(jax.device_get(ours), theirs, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(distances, wanted, rtol=1e-4, atol=1e-6)
    assert int(state.step) == 4 and int(state.opt_state["critic"][0].count) == 20


@pytest.mark.parametrize("accumulate", [1, 2])
def test_five_critics_and_a_generator_are_the_loop_by_hand(accumulate):
    assert_as_by_hand(*train(on_one_device(), 40, accumulate=accumulate), 40)


@pytest.mark.eight_devices
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_eight_devices_too(strategy):
    assert_as_by_hand(*train(Layout(strategy), 80, accumulate=2), 80)
