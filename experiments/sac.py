"""SAC: the soft actor-critic (Haarnoja et al. 2018, arXiv:1801.01290), with twin critics and a temperature that is learned too (Haarnoja et al. 2018, arXiv:1812.05905).

An agent of continuous actions learns from what it remembers to get much reward and to be as random as it can while it does. On the pendulum, what it gets stands beside the optimum, which dynamic programming finds.
"""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt, Le
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import launch
from jaxdl.environments import Environment
from jaxdl.errors import UserError
from jaxdl.models.agents import SquashedActor, TwinCritic
from jaxdl.tasks.agents import RULES, Judge, act_once, begin_many, bounded, finished, open_environment, remember
from jaxdl.tasks.pendulum import best_returns
from jaxdl.training import Aux, Batch, Metrics, Run, TrainState, configured, init_state, make_step, over_seeds, train


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Agents, launch.Ask):
    """What this experiment computes. `steps` are updates, `batch_size` the moments in each."""

    updates: Annotated[int, Ge(1)] = 8
    """Made after each action in all environments."""
    memory: Annotated[int, Ge(1)] = 50_000
    """Moments that are remembered, of all environments of an agent."""
    warm: Annotated[int, Ge(1)] = 800
    """Moments of random actions that the memory begins with."""
    tau: Annotated[float, Gt(0), Le(1)] = 0.01
    """How far the target critics go towards the critics in each update."""
    width: Annotated[int, Ge(1)] = 64
    """Of the hidden layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps % self.updates:
            raise UserError(f"--steps {self.steps} is no multiple of --updates {self.updates}: choose one")
        if not self.environments <= self.warm <= self.memory:
            raise UserError(
                f"--warm {self.warm}: choose at least {self.environments} (--environments) and at most --memory {self.memory}"
            )


_PENDULUM = Config(
    environment="pendulum", steps=16_000, batch_size=128, learning_rate=1e-3, warmup=0.0, clip=1e3, weight_decay=0.0,
    evaluate_every=1_600,
)  # fmt: skip

PRESETS = {
    "default": _PENDULUM,
    "mountain_car": dataclasses.replace(_PENDULUM, environment="mountain_car_continuous", steps=32_000, evaluate_every=3_200, seeds=4),
    # The paper's sizes, for environments of Gymnasium's such as gymnasium:HalfCheetah-v5.
    "large": dataclasses.replace(
        _PENDULUM, steps=1_000_000, batch_size=256, learning_rate=3e-4, tau=0.005, width=256, memory=1_000_000, warm=10_000,
        environments=1, updates=1, seeds=1, evaluate_every=20_000,
    ),
}  # fmt: skip


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    environment = open_environment(run, "continuous", "ppo and dqn", images=False, layouts=("jit", "fsdp"))
    size = environment.action_space.shape[0]
    actor, critic = SquashedActor(size, config.width, config.dtype), TwinCritic(config.width, config.dtype)
    optimizer = lambda schedule: optax.adamw(schedule, weight_decay=config.weight_decay)
    update = lambda objective, part, **fields: configured(config, objective, optimizer, of=part, **fields)
    updates = [
        update(functools.partial(critic_loss, actor, critic), "critic", ema=1 - config.tau),  # The average is the target.
        update(functools.partial(actor_loss, actor, critic), "actor"),
        update(functools.partial(temperature_loss, actor, -float(size)), "temperature", ema=None),
    ]
    learn = make_step(*updates, accumulate=config.accumulate)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Acts once in each environment, remembers what came of it, and learns from what it remembers: so many updates."""
        acting = functools.partial(act, actor, environment, state.params["actor"])
        episodes, row = act_once(environment, acting, state.carry["environments"])
        carry = {"environments": episodes, "replay": state.carry["replay"].add(row)}
        state, metrics = jax.lax.scan(revise, state.replace(carry=carry), None, config.updates)
        return state, jax.tree.map(lambda x: x.mean(0), metrics) | finished(row)

    def revise(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 3)
        return learn(state, state.carry["replay"].sample(key, config.batch_size, discount=config.discount))

    def init(key: Key[Array, ""]) -> dict[str, PyTree]:
        one, other = jax.random.split(key)
        seen, action = jnp.zeros((1, *environment.observation_space.shape)), jnp.zeros((1, size))
        networks = {"actor": actor.init(one, seen)["params"], "critic": critic.init(other, seen, action)["params"]}
        return {"params": networks | {"temperature": jnp.zeros(())}}

    def begin(key: Key[Array, ""]) -> PyTree:
        return remember(environment, begin_many(environment, key, config.environments), config.warm, config.memory)

    state = init_state(init, updates, seed=config.seed, seeds=config.seeds, carry=begin, shardings=run.layout.state_shardings)

    def greedy(variables: PyTree, seen: Float[Array, "E *shape"]) -> Array:
        return bounded(environment.action_space, actor.apply({"params": variables["params"]["actor"]}, seen).mode())

    bounds = {"optimal": best_returns} if config.environment == "pendulum" else {}
    judge = Judge(run, environment, greedy, bounds)

    def conclude(variables: PyTree, key: Key[Array, ""]) -> dict[str, Any]:
        found = judge.conclude(variables, config.seeds * config.environments / config.updates)
        regret = {"regret": found["optimal_return"] - judge.returns(variables).mean()} if bounds else {}
        return found | regret

    answer = judge.answer(config.ask)
    step = over_seeds(step, config.seeds)
    return train(run, step, state, None, evaluate=judge.evaluate, show=judge.show, conclude=conclude, answer=answer)


def act(
    actor: SquashedActor, environment: Environment, params: PyTree, seen: Float[Array, "E *shape"], keys: Key[Array, "E"]
) -> tuple[Array, dict[str, Array]]:
    """Draws from the policy. What is remembered is what was drawn, between −1 and 1."""
    drawn = jax.vmap(lambda policy, key: policy.sample(key))(actor.apply({"params": params}, seen), keys)
    return bounded(environment.action_space, drawn), {"action": drawn}


def critic_loss(
    actor: SquashedActor, critic: TwinCritic, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """The squared error of both values, by the smaller one of both targets and the entropy of what is done next (arXiv:1812.05905, eq. 5). A time limit is no end."""
    action, log_prob = actor.apply({"params": state.params["actor"]}, batch["next_observation"]).sample_and_log_prob(key)
    following = critic.apply({"params": state.ema["critic"]}, batch["next_observation"], action).min(-1)
    soft = following - jnp.exp(state.params["temperature"]) * log_prob
    target = jax.lax.stop_gradient(batch["reward"] + batch["discount"] * soft)
    values = critic.apply({"params": params}, batch["observation"], batch["action"])
    return jnp.square(values - target[:, None]).sum(-1).mean(), Aux({"value": values.mean()})


def actor_loss(
    actor: SquashedActor, critic: TwinCritic, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """`α log π(a|s) − min Q(s, a)` of actions as they are drawn (eq. 9)."""
    action, log_prob = actor.apply({"params": params}, batch["observation"]).sample_and_log_prob(key)
    values = critic.apply({"params": state.params["critic"]}, batch["observation"], action).min(-1)
    return (jnp.exp(state.params["temperature"]) * log_prob - values).mean(), Aux({"entropy": -log_prob.mean()})


def temperature_loss(
    actor: SquashedActor, entropy: float, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """`−α (log π(a|s) + H)`, of the logarithm of α: it rises while the entropy is below `H`, −1 for each number of an action (eq. 18)."""
    _, log_prob = actor.apply({"params": state.params["actor"]}, batch["observation"]).sample_and_log_prob(key)
    return -(jnp.exp(params) * (log_prob + entropy)).mean(), Aux({"temperature": jnp.exp(params)})


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="agents",
    summary="SAC learns to swing a pendulum up and hold it, eight agents in one program, beside the optimum of dynamic programming.",
    paper="Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications, arXiv:1812.05905",
    minutes=2,
    expects={"mean_return": (-160, None)},
    rules=RULES,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
