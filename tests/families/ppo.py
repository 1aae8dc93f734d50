"""PPO."""

import functools

import jax.numpy as jnp
from family import Family, Learner, descend, integers, normal

from experiments import ppo
from jaxdl.models.agents import ActorCritic

RETURNS = {f"{name}_return" for name in ("mean", "median", "worst", "iqm", "random")}
METRICS = RETURNS | {"deviation_of_returns", "iqm_return_low", "iqm_return_high", "environment_steps_per_second"}
AGENTS = dict(seeds=2, environments=4, episodes=3)

FAMILY = Family(
    ppo.EXPERIMENT,
    tiny=AGENTS | dict(batch_size=16, horizon=4, epochs=1, width=8),
    metrics=METRICS,
    figures={"film", "returns"},
    learner=Learner(
        ActorCritic(3, True, width=32),
        {
            "observation": normal(4),
            "drawn": integers(3),
            "log_prob": lambda rng, rows: -abs(normal()(rng, rows)),
            "advantage": normal(),
            "value": normal(),
            "target": normal(),
        },
        lambda batch: (batch["observation"],),
        lambda module, layout: [descend(functools.partial(ppo.objective, module, ppo.PRESETS["default"]))],
        init=lambda module, key, inputs: module.init(key, jnp.asarray(inputs[0])),
    ),
    refused=[
        (dict(environment="cartpol"), "did you mean 'cartpole'"),
        (dict(batch_size=12), "--batch-size 12 does not divide the 16 rows"),
        (dict(epochs=3), "--steps 2 is no multiple of the 3 updates"),
        (dict(data="builtin:digits"), "choose an --environment"),
        (dict(ask=("mine",)), "--ask 'mine': give numbers"),
    ],
)
