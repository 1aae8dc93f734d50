"""DQN: deep Q-networks (Mnih et al. 2015, https://doi.org/10.1038/nature14236), double (van Hasselt et al. 2016), dueling (Wang et al. 2016), and by flags with prioritised replay (Schaul et al. 2016) and targets of several steps.

An agent learns what each action is worth from moments that it remembers, measured by its own values as they were a while ago. That while is one step of this program: the target network is what the parameters were when the step began.

The error is squared, not Huber's, and the network has layer normalisation: with Huber's loss and without it (`--loss huber --no-norm --steps 12800 --seeds 3`) the three poles stood for 13 steps, where random actions have 25. Huber's loss is near a median of targets, and a pole that hardly ever falls has few that know of the end.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt, Le
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import figures, launch
from jaxdl.environments import Environment
from jaxdl.errors import UserError
from jaxdl.losses import q_targets, td_errors
from jaxdl.models.agents import QNetwork
from jaxdl.tasks.agents import RULES, Judge, act_once, begin_many, finished, open_environment, remember
from jaxdl.training import Aux, Batch, Metrics, Run, TrainState, configured, init_state, make_step, over_seeds, train
from jaxdl.training.logging import read_metrics

LOSSES = {"squared": jnp.square, "huber": optax.huber_loss}


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Agents, launch.Ask):
    """What this experiment computes. `steps` are updates, `batch_size` the moments in each; between two updates there is one action in each environment."""

    sync: Annotated[int, Ge(1)] = 64
    """Updates between two target networks."""
    memory: Annotated[int, Ge(1)] = 10_000
    """Moments that are remembered, of all environments of an agent."""
    warm: Annotated[int, Ge(1)] = 1_000
    """Moments of random actions that the memory begins with."""
    epsilon: Annotated[float, Ge(0), Le(1)] = 0.05
    """Share of actions at random, once it has come down from 1."""
    exploration: Annotated[float, Gt(0), Le(1)] = 0.3
    """Share of the steps in which it comes down."""
    double: bool = True
    """Choose by the network which action the target values."""
    dueling: bool = True
    """Tell the value of a state from the advantage of an action."""
    norm: bool = True
    """Layer normalisation."""
    loss: Literal[*LOSSES] = "squared"
    """Of the error: its square, or Huber's."""
    prioritized: Annotated[float, Ge(0), Le(1)] = 0.0
    """Exponent α by which moments are drawn in proportion to their error; 0: all alike."""
    n_step: Annotated[int, Ge(1)] = 1
    """Rewards that a target has of its own."""
    width: Annotated[int, Ge(1)] = 128
    """Of the hidden layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps % self.sync:
            raise UserError(f"--steps {self.steps} is no multiple of --sync {self.sync}: choose one")
        if not self.n_step * self.environments <= self.warm <= self.memory:
            raise UserError(
                f"--warm {self.warm}: choose at least {self.n_step * self.environments} (--n-step times --environments) and at most --memory {self.memory}"
            )


_CARTPOLE = Config(
    steps=38_400,
    batch_size=128,
    learning_rate=5e-4,
    warmup=0.0,
    clip=10.0,
    weight_decay=0.0,
    evaluate_every=3_200,
    environments=8,
)

PRESETS = {
    "default": _CARTPOLE,
    "acrobot": dataclasses.replace(_CARTPOLE, environment="acrobot", steps=19_200),
    "mountain_car": dataclasses.replace(_CARTPOLE, environment="mountain_car", n_step=5),
    "catch": dataclasses.replace(_CARTPOLE, environment="catch", steps=3_200, evaluate_every=640, seeds=4),
    "breakout": dataclasses.replace(_CARTPOLE, environment="breakout", seeds=2, memory=50_000, sync=128, n_step=3),
}


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    environment = open_environment(run, "discrete", "ppo and sac", layouts=("jit", "fsdp"))
    axes = len(environment.observation_space.shape)
    module = QNetwork(environment.action_space.count, axes, config.width, config.dueling, config.norm, config.dtype)
    values = lambda params, seen: module.apply({"params": params}, seen)
    optimizer = lambda schedule: optax.adamw(schedule, weight_decay=config.weight_decay)
    update = configured(config, functools.partial(objective, module, config), optimizer)
    learn = make_step(update, accumulate=config.accumulate)
    epsilon = optax.linear_schedule(1.0, config.epsilon, round(config.exploration * config.steps))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The life of a target network: so many updates."""
        state, metrics = jax.lax.scan(functools.partial(live, state.params), state, None, config.sync)
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    def live(target: PyTree, state: TrainState, _: None) -> tuple[TrainState, Metrics]:
        """Acts once in each environment, remembers what came of it, and learns from what it remembers."""
        acting = functools.partial(act, module, environment, state.params, epsilon(state.step))
        episodes, row = act_once(environment, acting, state.carry["environments"])
        replay = state.carry["replay"].add(row)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        weighted = 0.4 + 0.6 * state.step / config.steps if config.prioritized else None  # Schaul et al. 2016, section 3.4.
        batch = replay.sample(key, config.batch_size, discount=config.discount, steps=config.n_step, weighted=weighted)
        following = batch["next_observation"]
        online = values(state.params, following) if config.double else None
        batch["target"] = q_targets(batch["reward"], batch["discount"], values(target, following), online)
        if config.prioritized:
            errors = td_errors(values(state.params, batch["observation"]), batch["action"], batch["target"])
            replay = replay.prioritize(batch, (jnp.abs(errors) + 1e-3) ** config.prioritized)
        state, metrics = learn(state.replace(carry={"environments": episodes, "replay": replay}), batch)
        return state, metrics | finished(row)

    def begin(key: Key[Array, ""]) -> PyTree:
        return remember(environment, begin_many(environment, key, config.environments), config.warm, config.memory)

    state = init_state(
        lambda key: module.init(key, jnp.zeros((1, *environment.observation_space.shape))),
        [update],
        seed=config.seed,
        seeds=config.seeds,
        carry=begin,
        shardings=run.layout.state_shardings,
    )
    judge = Judge(run, environment, lambda variables, seen: module.apply(variables, seen).argmax(-1))

    def conclude(variables: PyTree, key: Key[Array, ""]) -> dict[str, Any]:
        return judge.conclude(variables, config.seeds * config.environments) | {"q_values": draw_values(run)}

    answer = judge.answer(config.ask)
    step = over_seeds(step, config.seeds)
    return train(run, step, state, None, evaluate=judge.evaluate, show=judge.show, conclude=conclude, answer=answer)


def act(
    module: QNetwork,
    environment: Environment,
    params: PyTree,
    epsilon: Float[Array, ""],
    seen: Float[Array, "E *shape"],
    keys: Key[Array, "E"],
) -> tuple[Array, dict]:
    """The best actions, but for a share of them, which are random."""
    best = module.apply({"params": params}, seen).argmax(-1)

    def one(best: Array, key: Key[Array, ""]) -> Array:
        chance, which = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(chance, epsilon), environment.action_space.sample(which), best)

    return jax.vmap(one)(best, keys), {}


def objective(
    module: QNetwork, config: Config, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """The error of what actions were said to be worth, by their targets."""
    values = module.apply({"params": params}, batch["observation"])
    errors = td_errors(values, batch["action"], batch["target"])
    metrics = {"value": values.max(-1).mean(), "largest_value": values.max()}
    return (batch["weight"] * LOSSES[config.loss](errors)).mean(), Aux(metrics)


def draw_values(run: Run) -> Any:
    """What the best action is said to be worth, in the course of training, beside what nothing can be worth more than if no reward is above 1."""
    rows = [row for row in read_metrics(run.directory / "metrics.jsonl") if "value" in row]
    steps = [row["step"] for row in rows]
    lines = {name.replace("_", " "): (steps, [row[name] for row in rows]) for name in ("value", "largest_value")}
    bound = {"1 / (1 − γ)": 1 / (1 - run.config.discount)}
    return figures.curves({"value of the best action, mean over agents": lines}, levels=bound)


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="agents",
    summary="A double dueling DQN learns to balance a pole from what it remembers, eight agents in one program.",
    paper="Mnih et al. 2015, Human-level control through deep reinforcement learning, https://doi.org/10.1038/nature14236; van Hasselt et al. 2016, arXiv:1509.06461; Wang et al. 2016, arXiv:1511.06581",
    minutes=2,
    expects={"median_return": (475, None)},
    rules=RULES,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
