"""PPO: proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), in the form of OpenAI's baselines (Huang et al. 2022, https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details).

An agent acts for a while in several environments, and then learns from what it saw, some times over, without moving far from the policy that acted. Environments, learning and all agents are one compiled program.
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
from jaxdl.environments import Box, Discrete, Environment
from jaxdl.errors import UserError
from jaxdl.losses import (
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    policy_change,
    standardized,
)
from jaxdl.models.agents import ActorCritic
from jaxdl.tasks.agents import RULES, Judge, begin_many, finished, open_environment, unroll
from jaxdl.training import (
    Aux,
    Batch,
    Metrics,
    Run,
    TrainState,
    configured,
    cut_batch,
    init_state,
    make_step,
    over_seeds,
    train,
)


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Agents, launch.Ask):
    """What this experiment computes. `steps` are updates, `batch_size` the rows of a minibatch."""

    horizon: Annotated[int, Ge(1)] = 128
    """Actions in each environment before something is learned from them."""
    epochs: Annotated[int, Ge(1)] = 4
    """How often everything that was seen is learned from."""
    decay: Annotated[float, Ge(0), Le(1)] = 0.95
    """The λ of generalized advantage estimation: 0 trusts the values, 1 the rewards."""
    clip_range: Annotated[float, Gt(0)] = 0.2
    """How far probabilities may move, as a ratio to 1, and values, before that is no longer rewarded (ε)."""
    entropy: Annotated[float, Ge(0)] = 0.01
    """Weight of the policy's entropy, which keeps it from deciding too soon."""
    value_weight: Annotated[float, Ge(0)] = 0.5
    """Weight of the squared error of values."""
    width: Annotated[int, Ge(1)] = 64
    """Of the hidden layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.environments * self.horizon % self.batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} does not divide the {self.environments * self.horizon} rows of {self.environments} environments over {self.horizon} steps: choose one that does"
            )
        if self.steps % self.updates:
            raise UserError(
                f"--steps {self.steps} is no multiple of the {self.updates} updates after each collection: choose one"
            )

    @property
    def updates(self) -> int:
        """Made of what was collected once."""
        return self.epochs * (self.environments * self.horizon // self.batch_size)


_CARTPOLE = Config(
    steps=6400, batch_size=128, learning_rate=2.5e-3, warmup=0.0, clip=0.5, weight_decay=0.0, environments=4, evaluate_every=800
)
_PENDULUM = dataclasses.replace(
    _CARTPOLE, environment="pendulum", steps=16_000, batch_size=256, learning_rate=1e-3, environments=8, horizon=256, epochs=10,
    discount=0.9, entropy=0.0, evaluate_every=1600,
)  # fmt: skip

PRESETS = {
    "default": _CARTPOLE,
    "acrobot": dataclasses.replace(_CARTPOLE, environment="acrobot", environments=8, batch_size=256, steps=3200),
    "pendulum": _PENDULUM,
    "catch": dataclasses.replace(
        _CARTPOLE, environment="catch", environments=8, batch_size=256, steps=800, evaluate_every=160, seeds=4
    ),
    "breakout": dataclasses.replace(
        _CARTPOLE, environment="breakout", environments=64, batch_size=1024, steps=4800, learning_rate=2e-3, seeds=2, width=128
    ),
}


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    environment = open_environment(run, "both")
    module, axis_name = build(config, environment), run.layout.axis_name
    optimizer = lambda schedule: optax.adamw(schedule, eps=1e-5, weight_decay=config.weight_decay)
    update = configured(config, functools.partial(objective, module, config), optimizer)
    learn = make_step(update, accumulate=config.accumulate, axis_name=axis_name)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Acts, and learns from it: so many updates."""
        acting = functools.partial(act, module, environment, state.params)
        episodes, seen = unroll(environment, acting, state.carry["environments"], config.horizon)
        rows = judged(module, config, state.params, seen)
        state, metrics = jax.lax.scan(functools.partial(epoch, rows), state, jnp.arange(config.epochs))
        metrics = jax.tree.map(lambda x: x.mean((0, 1)), metrics) | finished(seen, axis_name)
        return state.replace(carry={"environments": episodes}), metrics

    def epoch(rows: Batch, state: TrainState, number: Array) -> tuple[TrainState, Metrics]:
        """Learns once from every row, in an order of its own."""
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(state.key, state.step), number), len(rows["value"]))
        parts = cut_batch(jax.tree.map(lambda x: x[order], rows), config.updates // config.epochs)
        one = lambda state, part: learn(state, part | {"advantage": standardized(part["advantage"], axis_name)})
        return jax.lax.scan(one, state, parts)

    state = init_state(
        lambda key: module.init(key, jnp.zeros((1, *environment.observation_space.shape))),
        [update],
        seed=config.seed,
        seeds=config.seeds,
        carry=lambda key: {"environments": begin_many(environment, key, config.environments)},
        shardings=run.layout.state_shardings,
    )
    judge = Judge(run, environment, functools.partial(greedy, module, environment))

    def conclude(variables: PyTree, key: Key[Array, ""]) -> dict[str, Any]:
        return judge.conclude(variables, config.seeds * config.environments * config.horizon / config.updates)

    answer = judge.answer(config.ask)
    step = over_seeds(step, config.seeds)
    return train(run, step, state, None, evaluate=judge.evaluate, show=judge.show, conclude=conclude, answer=answer)


def build(config: Config, environment: Environment) -> ActorCritic:
    """Policy and value for the spaces of an environment."""
    space, axes = environment.action_space, len(environment.observation_space.shape)
    discrete = isinstance(space, Discrete)
    return ActorCritic(
        space.count if discrete else space.shape[0], discrete, axes, config.width, "relu" if axes == 3 else "tanh", config.dtype
    )


def act(
    module: ActorCritic, environment: Environment, params: PyTree, seen: Float[Array, "E *shape"], keys: Key[Array, "E"]
) -> tuple[Array, dict[str, Array]]:
    """Draws from the policy. What was drawn is kept as it was, and clipped to its bounds only to act."""
    policy = module.apply({"params": params}, seen, method="policy")
    drawn = jax.vmap(lambda policy, key: policy.sample(key))(policy, keys)
    return within(environment, drawn), {"drawn": drawn, "log_prob": policy.log_prob(drawn)}


def greedy(module: ActorCritic, environment: Environment, variables: PyTree, seen: Float[Array, "E *shape"]) -> Array:
    """The likeliest actions."""
    return within(environment, module.apply(variables, seen, method="policy").mode())


def within(environment: Environment, action: Array) -> Array:
    """Continuous actions within their bounds."""
    space = environment.action_space
    return jnp.clip(action, *space.bounds) if isinstance(space, Box) else action


def judged(module: ActorCritic, config: Config, params: PyTree, seen: dict[str, Array]) -> dict[str, Array]:
    """Of rows `T E ...` those `T·E ...` that are learned from, with values, advantages and targets."""
    value = functools.partial(module.apply, {"params": params}, method="value")
    values, next_values = value(seen["observation"]), value(seen["next_observation"])
    ends = seen["terminated"], seen["ended"]
    advantages = generalized_advantages(seen["reward"], values, next_values, *ends, config.discount, config.decay)
    rows = {name: seen[name] for name in ("observation", "drawn", "log_prob")}
    rows |= {"value": values, "advantage": advantages, "target": advantages + values}
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def objective(
    module: ActorCritic, config: Config, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """The clipped surrogate, the error of values, and the entropy (Schulman et al. 2017, eq. 9); advantages are standardised."""
    policy, values = module.apply({"params": params}, batch["observation"])
    log_ratio = policy.log_prob(batch["drawn"]) - batch["log_prob"]
    surrogate = clipped_surrogate(log_ratio, batch["advantage"], config.clip_range)
    error = clipped_value_loss(values, batch["value"], batch["target"], config.clip_range)
    entropy = policy.entropy().mean()
    divergence, clipped = policy_change(log_ratio, config.clip_range)
    metrics = {
        "policy_loss": surrogate,
        "value_loss": error,
        "entropy": entropy,
        "approximate_kl": divergence,
        "clip_fraction": clipped,
        "explained_variance": explained_variance(batch["value"], batch["target"]),
    }
    return surrogate + config.value_weight * error - config.entropy * entropy, Aux(metrics)


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="agents",
    summary="PPO learns to balance a pole, from discrete or continuous actions, eight agents and their worlds in one program.",
    paper="Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347",
    minutes=0.5,
    expects={"worst_return": (475, None)},
    rules=RULES,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
