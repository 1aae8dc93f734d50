"""Q-networks."""

import functools

import optax
from family import Family, Learner, integers, normal

from experiments import dqn
from families.ppo import AGENTS, METRICS
from jaxdl.models.agents import QNetwork
from jaxdl.training import Update

FAMILY = Family(
    dqn.EXPERIMENT,
    tiny=AGENTS | dict(batch_size=8, sync=1, warm=8, memory=32, width=8),
    metrics=METRICS,
    figures={"film", "returns", "q_values"},
    learner=Learner(
        QNetwork(3, width=32, dueling=False),
        {
            "observation": normal(4),
            "action": integers(3),
            "target": normal(),
            "weight": lambda rng, rows: rng.random(rows).astype("float32"),
        },
        lambda batch: (batch["observation"],),
        lambda module, layout: [
            Update(functools.partial(dqn.objective, module, dqn.PRESETS["default"]), optax.sgd(0.1, momentum=0.9))
        ],
    ),
    refused=[
        (
            dict(environment="pendulum"),
            "pendulum has continuous actions of shape 1, and dqn chooses discrete actions: ppo and sac can",
        ),
        (dict(sync=3), "--steps 2 is no multiple of --sync 3"),
        (dict(warm=64), "at most --memory 32"),
        (dict(parallel="pmap"), "--parallel pmap: dqn draws from one memory"),
    ],
)
