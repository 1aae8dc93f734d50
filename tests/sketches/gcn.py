"""A graph convolutional network tells the communities of a stochastic block model apart from a few labels (Kipf and Welling 2017, arXiv:1609.02907)."""

import dataclasses
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdl import figures, launch
from jaxdl.losses import cross_entropy
from jaxdl.training import Aux, Batch, Report, Run, TrainState, configured, setup_training, train

COMMUNITIES, LABELLED = 4, 5
"""How many there are, and of how many nodes of each the label is known."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes. A step sees the whole graph."""

    nodes: Annotated[int, Ge(40)] = 400
    """Nodes of the graph."""
    inside: Annotated[float, Gt(0)] = 0.06
    """Probability of an edge within a community."""
    between: Annotated[float, Gt(0)] = 0.01
    """Probability of an edge between two."""
    hidden: Annotated[int, Ge(1)] = 32
    """Width of the hidden layer."""


PRESETS = {"default": Config(steps=300, learning_rate=0.01, weight_decay=5e-4, evaluate_every=100, show_every=150)}


class GCN(nn.Module):
    """Two layers `D^−½ (A + I) D^−½ X W` (eq. 2 and 9)."""

    hidden: int
    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "N F"], edges: Int[Array, "2 M"]) -> tuple[Float[Array, "N C"], Float[Array, "N H"]]:
        hidden = nn.relu(self.spread(nn.Dense(self.hidden, use_bias=False)(x), edges))
        return self.spread(nn.Dense(self.num_classes, use_bias=False)(hidden), edges), hidden

    def spread(self, x: Float[Array, "N D"], edges: Int[Array, "2 M"]) -> Float[Array, "N D"]:
        """Sums over neighbours and the node itself, each by the root of both degrees."""
        senders, receivers = edges
        total = lambda values: jax.ops.segment_sum(values, receivers, len(x))
        root = jax.lax.rsqrt(1 + total(jnp.ones(len(senders))))[:, None]
        return root * (total((root * x)[senders]) + root * x)


def block_model(config: Config) -> tuple[Int[np.ndarray, "2 M"], Int[np.ndarray, "N"]]:
    """Edges in both directions, and communities."""
    random = np.random.default_rng(config.seed)
    communities = random.integers(0, COMMUNITIES, config.nodes)
    chance = np.where(communities[:, None] == communities, config.inside, config.between)
    upper = np.triu(random.random(chance.shape) < chance, 1)
    return np.stack(np.nonzero(upper | upper.T)).astype(np.int32), communities


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    edges, communities = block_model(config)
    known = np.concatenate([np.flatnonzero(communities == each)[:LABELLED] for each in range(COMMUNITIES)])
    unknown = np.setdiff1d(np.arange(config.nodes), known)
    module = GCN(config.hidden, COMMUNITIES)
    graph = {"x": np.eye(config.nodes, dtype=np.float32), "edges": edges}
    predict = jax.jit(lambda variables: module.apply(variables, **graph))

    def objective(params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Aux]:
        logits, _ = module.apply({"params": params}, **state.constants)
        return cross_entropy(logits[known], jnp.asarray(communities[known])), Aux()

    update = configured(config, objective, lambda schedule: optax.adamw(schedule, weight_decay=config.weight_decay))
    init = lambda key: module.init(key, **graph)
    step, state = setup_training(config, run.layout, update, init=init, constants=graph)

    def evaluate(variables: PyTree, key: Key[Array, ""]) -> Report:
        found = np.asarray(predict(variables)[0]).argmax(1)
        return {"accuracy": (found == communities)[unknown].mean(), "chance": np.bincount(communities[known]).max() / len(known)}

    def show(variables: PyTree, key: Key[Array, ""]) -> Report:
        hidden = np.asarray(predict(variables)[1], np.float64)
        flat = (hidden - hidden.mean(0)) @ np.linalg.svd(hidden - hidden.mean(0), full_matrices=False)[2][:2].T
        names = [f"community {each}" for each in range(COMMUNITIES)]
        return {"nodes": figures.scatter({"hidden layer": flat.astype(np.float32)}, labels={"hidden layer": communities}, classes=names)}

    return train(run, step, state, None, evaluate=evaluate, show=show)


EXPERIMENT = launch.Experiment(
    main, PRESETS, field="graphs", summary="A graph network finds communities from a few labels.",
    paper="Kipf and Welling 2017, arXiv:1609.02907", minutes=0.5, expects={"accuracy": (0.6, None)},
)  # fmt: skip

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
