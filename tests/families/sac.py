"""SAC."""

from family import Family

from experiments import sac
from families.ppo import AGENTS, METRICS

FAMILY = Family(
    sac.EXPERIMENT,
    tiny=AGENTS | dict(environment="mountain_car_continuous", batch_size=8, updates=1, warm=8, memory=32, width=8),
    metrics=METRICS,
    figures={"film", "returns"},
    refused=[
        (dict(environment="cartpole"), "cartpole has 2 discrete actions, and sac chooses continuous actions: ppo and dqn can"),
        (dict(updates=3), "--steps 2 is no multiple of --updates 3"),
        (dict(parallel="pmap"), "--parallel pmap: sac draws from one memory"),
    ],
)
