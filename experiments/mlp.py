"""A multi-layer perceptron from first principles: backpropagation written out (Rumelhart, Hinton and Williams 1986, Nature 323), stochastic gradient descent written out, and what each of the usual ingredients is good for.

The gradients are a chain of hand-written vector-Jacobian products (`jaxdl.models.mlp`), which jax is told to use instead of its own; `--backward jax` lets it differentiate, with the same result. After training, the same network learns from few examples with everything, and with one ingredient left out at a time: normalisation of the data, the L2 penalty, dropout, the noise of minibatches.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Len, Lt
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdl import figures, launch
from jaxdl.data import LabelledImage, Source, evenly_spaced
from jaxdl.data.image import ImageProcessor
from jaxdl.losses import cross_entropy
from jaxdl.models.mlp import LOSSES, MLP, sgd
from jaxdl.tasks.classification import Classification, fit_processor, open_images
from jaxdl.training import (
    Aux,
    Batch,
    Report,
    Run,
    TrainState,
    Update,
    configured,
    init_state,
    make_step,
    setup_training,
    train,
)

STUDY_SEEDS, STUDY_POINTS, STUDY_TESTED = 3, 40, 2000
"""Of the study of ingredients: runs of each recipe, points of its curves, and held-out examples that it is measured on at most."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Ask):
    """What this experiment computes. Weight decay is the strength λ of the penalty λ/2 ‖W‖² of the kernels (L2)."""

    hidden: Annotated[tuple[Annotated[int, Ge(1)], ...], Len(1)] = (256, 128)
    """Widths of the hidden layers."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.2
    """Share of the hidden activations that are dropped."""
    backward: Literal["hand", "jax"] = "hand"
    """Whose gradients are used: the hand-written chain's, or jax's own."""
    resolution: Annotated[int, Ge(0)] = 0
    """Side of the square that every image is resized to, in pixels. 0: height and width of the first one."""
    study_steps: Annotated[int, Ge(0)] = 800
    """Steps of each run in which an ingredient is left out. 0: no such runs."""
    study_examples: Annotated[int, Ge(10)] = 200
    """Training examples of those runs: few, so that there is something to regularise."""


_BASE = Config(
    data="builtin:digits",
    steps=3000,
    batch_size=64,
    learning_rate=0.1,
    warmup=0.0,
    weight_decay=1e-3,
    clip=10.0,
    evaluate_every=500,
)
PRESETS = {
    "default": _BASE,
    "mnist": dataclasses.replace(_BASE, data="tfds:mnist", steps=9375, batch_size=128, evaluate_every=1875),
    # 800 hidden units, as Simard, Steinkraus and Platt 2003 have them, in two layers.
    "mnist_800": dataclasses.replace(
        _BASE, data="tfds:mnist", steps=18_750, batch_size=128, evaluate_every=3750, hidden=(800, 800)
    ),
}


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, leaves ingredients out, draws, and returns what is in `result.json`."""
    source, held_out = open_images(run)
    process = fit_processor(source, config.resolution)
    batches = run.batches(source, lambda example, rng: {"image": process(example.image), "label": np.int32(example.label)})

    module = MLP(config.hidden, len(source.info.classes), config.dropout, config.backward, dtype=config.dtype)
    image = jnp.asarray(process(source[0].image)[None])
    update = configured(config, functools.partial(objective, module), lambda schedule: sgd(schedule, config.weight_decay))
    step, state = setup_training(config, run.layout, update, init=lambda key: module.init(key, image))

    recognised = Classification(run, module.apply, held_out, process)

    def study(variables: PyTree, key: Key[Array, ""]) -> Report:
        run.say(f"leaving out one ingredient at a time: {STUDY_SEEDS} runs of {config.study_steps:,} steps for each")
        curves = {name: learn(recipe, config, module, process, source, held_out) for name, recipe in recipes(config).items()}
        name_of = lambda recipe: f"test_accuracy_of_{config.study_examples}/{recipe.replace(' ', '_')}"
        accuracies = {name_of(recipe): float(curve.accuracy[:, -1].mean()) for recipe, curve in curves.items()}
        return accuracies | {"left_out": draw_study(curves, config)}

    conclude = study if config.study_steps else None
    how = dict(show=recognised.show, conclude=conclude, answer=recognised.answer(config.ask))
    return train(run, step, state, batches, evaluate=recognised.evaluate, **how)


def objective(module: MLP, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Aux]:
    """Cross-entropy, in nats. Its L2 penalty is in the optimizer, which adds that gradient."""
    logits = module.apply({"params": params}, batch["image"], train=True, rngs={"dropout": key})
    value = LOSSES[module.backward](logits, batch["label"])
    return value, Aux({"train_accuracy": (logits.argmax(-1) == batch["label"]).mean()})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The ingredients of a run in the study."""

    normalised: bool
    weight_decay: float
    dropout: float
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Curves:
    """What came of a recipe at `steps`, for each seed: loss of the training examples, without dropout, and loss and accuracy on held-out ones."""

    steps: Int[np.ndarray, "P"]
    loss: Float[np.ndarray, "S P"]
    test_loss: Float[np.ndarray, "S P"]
    accuracy: Float[np.ndarray, "S P"]


def recipes(config: Config) -> dict[str, Recipe]:
    """All ingredients, and each of them left out.

    Without normalisation the network sees the grey levels as they are, from 0 to 255. Without the noise of minibatches, whose rows are drawn with replacement, each step sees all examples; the number of steps is the same.
    """
    everything = Recipe(True, config.weight_decay, config.dropout, min(config.batch_size, config.study_examples))
    return {
        "everything": everything,
        "without normalisation": dataclasses.replace(everything, normalised=False),
        "without L2": dataclasses.replace(everything, weight_decay=0.0),
        "without dropout": dataclasses.replace(everything, dropout=0.0),
        "without minibatches": dataclasses.replace(everything, batch_size=config.study_examples),
    }


def learn(
    recipe: Recipe,
    config: Config,
    module: MLP,
    process: ImageProcessor,
    source: Source[LabelledImage],
    held_out: Source[LabelledImage],
) -> Curves:
    """Follows a recipe from several seeds at once, on one device. Depends on the config and the data alone."""
    prepare = process if recipe.normalised else lambda image: process.resize(image).astype(np.float32)

    def arrays(source: Source[LabelledImage], count: int) -> tuple[Float[Array, "B H W C"], Int[Array, "B"]]:
        chosen = list(evenly_spaced(source, count))
        return jnp.stack([prepare(one.image) for one in chosen]), jnp.array([one.label for one in chosen])

    (images, labels), (test_images, test_labels) = arrays(source, config.study_examples), arrays(held_out, STUDY_TESTED)
    module = module.clone(dropout=recipe.dropout)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.study_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), sgd(schedule, recipe.weight_decay))
    update = Update(functools.partial(objective, module), optimizer)
    step = make_step(update)

    def one_step(state: TrainState, key: Key[Array, ""]) -> tuple[TrainState, None]:
        whole = recipe.batch_size >= len(images)
        rows = jnp.arange(len(images)) if whole else jax.random.randint(key, (recipe.batch_size,), 0, len(images))
        return step(state, {"image": images[rows], "label": labels[rows]})[0], None

    @jax.jit
    @jax.vmap
    def some_steps(state: TrainState, keys: Key[Array, "P"]) -> tuple[TrainState, tuple[Float[Array, ""], ...]]:
        state, _ = jax.lax.scan(one_step, state, keys)
        logits, test_logits = (module.apply({"params": state.params}, x) for x in (images, test_images))
        right = (test_logits.argmax(-1) == test_labels).mean()
        return state, (cross_entropy(logits, labels), cross_entropy(test_logits, test_labels), right)

    each = max(config.study_steps // STUDY_POINTS, 1)
    seeds = [(config.seed + number) % 2**32 for number in range(STUDY_SEEDS)]
    begins = [init_state(lambda key: module.init(key, images[:1]), [update], seed=seed) for seed in seeds]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *begins)
    keys = jnp.stack([jax.random.split(jax.random.key(seed + 1), config.study_steps) for seed in seeds])
    steps, rows = range(each, config.study_steps + 1, each), []
    for last in steps:
        state, measured = some_steps(state, keys[:, last - each : last])
        rows.append(measured)
    return Curves(np.array(steps), *(np.stack(values, 1) for values in zip(*jax.device_get(rows))))


def draw_study(curves: dict[str, Curves], config: Config) -> Any:
    """Training loss, held-out loss and held-out mistakes of each recipe: mean and range over the seeds."""
    panels = {
        "loss of the training examples, without dropout": lambda curve: curve.loss,
        "loss of held-out examples": lambda curve: curve.test_loss,
        "share of held-out examples that are mistaken": lambda curve: 1 - curve.accuracy,
    }
    lines = {title: {name: (curve.steps, of(curve)) for name, curve in curves.items()} for title, of in panels.items()}
    seeds = f"lines are means of {STUDY_SEEDS} seeds, bands their range"
    title = f"one ingredient left out, {config.study_examples} training examples; {seeds}"
    return figures.curves(lines, title=title, log=True)


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="first principles",
    summary="A multi-layer perceptron with hand-written gradients and SGD, and what each ingredient of its training is good for.",
    paper="Rumelhart, Hinton and Williams 1986, Learning representations by back-propagating errors, Nature 323, https://doi.org/10.1038/323533a0",
    minutes=1,
    expects={"test_accuracy": (0.97, None)},
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
