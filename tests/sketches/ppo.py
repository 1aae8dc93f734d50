"""Proximal policy optimisation balances a pole (Schulman et al. 2017, arXiv:1707.06347), environments and all in one compiled step."""

import dataclasses
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import figures, launch, training
from jaxdl.training import Aux, Batch, Metrics, Report, Run, TrainState
from sketches.pole import LONGEST, ActorCritic, begin, move

DISCOUNT, LAMBDA, CLIP = 0.99, 0.95, 0.2


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes. `batch_size` is the number of environments."""

    horizon: Annotated[int, Ge(1)] = 64
    """Time steps of each environment in a step of training."""
    epochs: Annotated[int, Ge(1)] = 4
    """Passes over what was seen."""
    parts: Annotated[int, Ge(1)] = 4
    """Parts that it is cut into, by environments."""
    entropy: Annotated[float, Gt(0)] = 0.01
    """Weight of the policy's entropy."""


PRESETS = {"default": Config(steps=60, batch_size=32, learning_rate=3e-3, clip=0.5, warmup=0.0, evaluate_every=20, show_every=30)}


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    module, axis_name = ActorCritic(), run.layout.axis_name

    def objective(params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Aux]:
        logits, values = module.apply({"params": params}, batch["seen"])
        log_probabilities = nn.log_softmax(logits)
        taken = jnp.take_along_axis(log_probabilities, batch["action"][..., None], -1)[..., 0]
        ratio, gain = jnp.exp(taken - batch["taken"]), batch["advantage"]
        policy = -jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * gain).mean()  # eq. 7
        entropy = -(jnp.exp(log_probabilities) * log_probabilities).sum(-1).mean()
        return policy + 0.5 * jnp.square(values - batch["target"]).mean() - config.entropy * entropy, Aux({"entropy": entropy})

    update = training.configured(config, objective, lambda schedule: optax.adam(lambda count: schedule(count // (config.epochs * config.parts))))

    def act(params: PyTree, environment: dict[str, Array], _: None) -> tuple[dict[str, Array], dict[str, Array]]:
        key, chosen = jax.random.split(environment["key"])
        logits, value = module.apply({"params": params}, environment["pole"])
        action = jax.random.categorical(chosen, logits)
        after, fallen = move({**environment, "key": key}, action)
        ended, taken = after["time"] == 0, nn.log_softmax(logits)[action]
        seen = dict(seen=environment["pole"], action=action, taken=taken, value=value, fallen=fallen, ended=ended)
        return after, seen | {"length": environment["time"] + 1}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        play = lambda each: jax.lax.scan(lambda one, _: act(state.params, one, _), each, None, config.horizon)
        environments, seen = jax.vmap(play)(state.carry["environments"])
        last = module.apply({"params": state.params}, environments["pole"])[1]
        after = jnp.concatenate([seen["value"][:, 1:], last[:, None]], 1)
        # A time-out is cut like a fall here, since the pole of the next moment is a new one (a bootstrap would be exact).
        surprise = 1 + DISCOUNT * jnp.where(seen["ended"], 0, after) - seen["value"]
        back = lambda total, now: ((total := now[0] + DISCOUNT * LAMBDA * jnp.where(now[1], 0, total)), total)
        gain = jax.lax.scan(back, jnp.zeros(len(last)), (surprise.T, seen["ended"].T), reverse=True)[1].T
        rows = {name: seen[name] for name in ("seen", "action", "taken")} | {"advantage": gain, "target": gain + seen["value"]}
        parts = training.cut_batch(rows, config.parts)

        def learn(state: TrainState, number: Array) -> tuple[TrainState, Metrics]:
            part = jax.tree.map(lambda x: x[number % config.parts], parts)
            grads, aux = training.gradients(update, state, part, state.key, axis_name=axis_name)
            return training.apply_gradients(update, state, grads), aux.metrics

        state, metrics = jax.lax.scan(learn, state, jnp.arange(config.epochs * config.parts))
        ended = training.Mean((seen["length"] * seen["ended"]).sum().astype(jnp.float32), seen["ended"].sum().astype(jnp.float32))
        metrics = {name: value.mean() for name, value in metrics.items()} | {"episode_length": ended}
        if axis_name is not None:
            metrics["episode_length"] = jax.lax.psum(ended, axis_name)
        return state.replace(step=state.step + 1, carry={"environments": environments}), metrics

    state = training.init_state(
        lambda key: module.init(key, jnp.zeros(4)), [update], seed=config.seed, shardings=run.layout.state_shardings,
        carry=lambda key: {"environments": jax.vmap(begin)(jax.random.split(key, config.batch_size))},
    )  # fmt: skip

    @jax.jit
    def watch(params: PyTree, keys: Key[Array, "N"]) -> Float[Array, "N T"]:
        """The angle of poles that the policy balances, each until it has fallen."""
        play = lambda one: jax.lax.scan(lambda one, _: act(params, one, _), one, None, LONGEST)[1]
        seen = jax.vmap(play)(jax.vmap(begin)(keys))
        standing = jnp.cumsum(seen["ended"], 1) - seen["ended"] == 0
        return jnp.where(standing, seen["seen"][..., 2], jnp.nan)

    def evaluate(variables: PyTree, key: Key[Array, ""]) -> Report:
        return {"balanced": (~jnp.isnan(watch(variables["params"], jax.random.split(key, 64)))).sum(1).mean()}

    def show(variables: PyTree, key: Key[Array, ""]) -> Report:
        angles = jax.device_get(watch(variables["params"], jax.random.split(key, 5)))
        lines = {f"pole {number}": (jnp.arange(LONGEST), each) for number, each in enumerate(angles)}
        return {"angles": figures.curves({"angle of the pole": jax.device_get(lines)}, xlabel="time step", final=False)}

    return training.train(run, step, state, None, evaluate=evaluate, show=show)


EXPERIMENT = launch.Experiment(
    main, PRESETS, field="agents", summary="A policy learns to balance a pole.", paper="Schulman et al. 2017, arXiv:1707.06347",
    minutes=0.5, expects={"balanced": (150, None)}, rules=(("^carry/environments/", PartitionSpec("data")),),
)  # fmt: skip

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
