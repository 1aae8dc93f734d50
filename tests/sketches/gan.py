"""A generative adversarial network learns a ring of eight Gaussians (Goodfellow et al. 2014, arXiv:1406.2661; hinge loss and spectrally bounded weights: Miyato et al. 2018, arXiv:1802.05957)."""

import dataclasses
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import figures, launch
from jaxdl.data.sources import Info, Source
from jaxdl.training import Aux, Batch, Report, Run, TrainState, configured, setup_training, train

CENTRES = np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], 1).astype(np.float32)
DEVIATION = 0.05


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes. A batch is shared out to the critic's updates."""

    critic_updates: Annotated[int, Ge(1)] = 5
    """Updates of the critic for each one of the generator."""
    width: Annotated[int, Ge(1)] = 64
    """Width of the hidden layers."""
    noise: Annotated[int, Ge(1)] = 8
    """Width of what the generator makes points of."""


PRESETS = {
    "default": Config(
        steps=1500, batch_size=640, learning_rate=2e-3, warmup=0.0, clip=10.0, ema_decay=0.99, evaluate_every=500, show_every=500
    )
}


class Ring(Source):
    """A source of points around eight centres, point for point a function of its number."""

    info = Info(spec="ring")

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> Float[np.ndarray, "2"]:
        random = np.random.default_rng(index)
        return CENTRES[index % 8] + DEVIATION * random.standard_normal(2, np.float32)


class Layers(nn.Module):
    """Two hidden layers."""

    width: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B F"]:
        for _ in range(2):
            x = nn.leaky_relu(nn.Dense(self.width)(x), 0.2)
        return nn.Dense(self.features)(x)


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    batches = run.batches(Ring(), lambda point, rng: {"point": point})
    generator, critic = Layers(config.width, 2), Layers(config.width, 1)
    make = lambda params, keys: generator.apply({"params": params}, jax.vmap(lambda key: jax.random.normal(key, (config.noise,)))(keys))
    judge = lambda params, points: critic.apply({"params": params}, points)[:, 0]

    def init(key: Key[Array, ""]) -> dict[str, PyTree]:
        one, other = jax.random.split(key)
        networks = {"generator": generator.init(one, jnp.zeros((1, config.noise))), "critic": critic.init(other, jnp.zeros((1, 2)))}
        return {"params": {name: variables["params"] for name, variables in networks.items()}}

    def critic_loss(params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Aux]:
        real, keys = batch["point"], jax.random.split(key, len(batch["point"]))
        fake = make(state.params["generator"], keys)
        return (nn.relu(1 - judge(params, real)) + nn.relu(1 + judge(params, fake))).mean(), Aux()

    def generator_loss(params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Aux]:
        keys = jax.random.split(key, len(batch["point"]))
        return -judge(state.params["critic"], make(params, keys)).mean(), Aux()

    bounded = lambda params: jax.tree.map(lambda w: w / jnp.maximum(jnp.linalg.norm(w, 2) / 3, 1) if w.ndim == 2 else w, params)
    # At first the gradients of true and generated points cancel: a smaller epsilon would make steps of what rounding leaves.
    adam = lambda schedule: optax.adam(schedule, b1=0.5, eps=1e-4)
    step, state = setup_training(
        config,
        run.layout,
        configured(config, critic_loss, adam, of="critic", repeats=config.critic_updates, ema=None, project=bounded),
        configured(config, generator_loss, adam, of="generator"),
        init=init,
    )
    sample = run.layout.sample(lambda variables, keys: make(variables["params"]["generator"], keys), 256)

    def evaluate(variables: PyTree, key: Key[Array, ""]) -> Report:
        distances = np.linalg.norm(sample(variables, key, 2000)[:, None] - CENTRES, axis=-1)
        good = distances.min(1) < 3 * DEVIATION  # Of true points 0.9889 are so near.
        return {"modes": len(set(distances.argmin(1)[good])), "good_samples": good.mean()}

    def show(variables: PyTree, key: Key[Array, ""]) -> Report:
        true = np.stack([Ring()[index] for index in range(500)])
        return {"points": figures.scatter({"true": true, "generated": sample(variables, key, 500)})}

    return train(run, step, state, batches, evaluate=evaluate, show=show)


EXPERIMENT = launch.Experiment(
    main, PRESETS, field="generation", summary="A generator and a critic play for a ring of points.",
    paper="Goodfellow et al. 2014, arXiv:1406.2661", minutes=0.5, expects={"modes": (7, None)},
)  # fmt: skip

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
