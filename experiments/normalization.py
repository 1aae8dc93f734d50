"""Batch, layer, instance, group and RMS normalisation, and none, in one convolutional network (Ioffe and Szegedy 2015; Ba et al. 2016; Ulyanov et al. 2016; Wu and He 2018; Zhang and Sennrich 2019).

Every normalisation is trained with large and with small batches, at several learning rates, from several seeds, all in one run. The question is that of Wu and He (section 4.1): which of them need large batches?

What is compared is the same number of epochs, not of updates: one step of this run brings `batch_size` new examples to every network; a network with large batches makes one update from them, one with small batches makes `batch_size / small_batch` updates, one after the other. At equal updates small batches would have seen a fraction of the data. As in the paper the learning rate is proportional to the batch; which rate that is, is chosen for each normalisation and batch size by examples that are held out of training, not by the test set.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Lt, MinLen
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxdl import figures, launch
from jaxdl.data import LabelledImage, Source, Subset
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.files import replace_text
from jaxdl.losses import cross_entropy
from jaxdl.nn import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, convolve, max_pool
from jaxdl.tasks.classification import open_images
from jaxdl.training import Batch, LayerStats, Layout, Metrics, Report, Run, TrainState, Update, init_state, is_first, train
from jaxdl.training.inspection import Inspect, record
from jaxdl.training.logging import read_metrics
from jaxdl.training.step import Step

GROUPS = 4
"""Of group normalisation: 2 channels in each where the network is narrowest. The paper's 32 groups are for 64 channels and more."""

NORMS: dict[str, Callable[..., nn.Module] | None] = {
    "none": None,
    "batch": BatchNorm,
    "layer": LayerNorm,  # Over the channels of a place, as in ConvNeXt; over places too it is a group norm of one group.
    "instance": functools.partial(InstanceNorm, affine=True),
    "group": functools.partial(GroupNorm, GROUPS),
    "rms": RMSNorm,
}

MOMENTUM = 0.9
"""Wu and He 2018, section 4.1."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes."""

    small_batch: Annotated[int, Ge(1)] = 2
    """Examples in an update of the networks with small batches; it divides --batch-size."""
    factors: Annotated[tuple[float, ...], MinLen(1)] = (0.3, 1.0, 3.0)
    """The learning rates that are tried, as multiples of --learning-rate. They are for --batch-size examples; small batches have as much less as they are smaller."""
    seeds: Annotated[int, Ge(1)] = 3
    """Networks of each kind, each with its own start and its own order of the data."""
    resolution: Annotated[int, Ge(2)] = 8
    """Side of the square that every image is resized to, in pixels."""
    width: Annotated[int, Ge(1)] = 8
    """Channels of the first convolutions, a multiple of 4; they double where the image is halved."""
    depth: Annotated[int, Ge(1)] = 6
    """Convolutions."""
    validation: Annotated[float, Gt(0), Lt(1)] = 0.2
    """Share of the training data that the learning rates are chosen by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.small_batch:
            raise UserError(
                f"--small-batch {self.small_batch} does not divide --batch-size {self.batch_size}: choose one that does"
            )
        if self.width % GROUPS:
            raise UserError(f"--width {self.width} cannot be split into {GROUPS} groups: choose a multiple of {GROUPS}")
        if min(self.factors) <= 0:
            raise UserError(f"--factors {self.factors}: a learning rate is above 0")
        if self.accumulate > 1:
            raise UserError("--accumulate changes what a batch normalisation sees: choose --batch-size and --small-batch instead")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Large and small, once if they are the same."""
        return tuple(dict.fromkeys((self.batch_size, self.small_batch)))

    @property
    def cells(self) -> tuple[tuple[str, int], ...]:
        """What is compared: normalisation and batch size."""
        return tuple((norm, size) for norm in NORMS for size in self.batch_sizes)


PRESETS = {
    "default": Config(
        data="builtin:digits", steps=180, batch_size=64, learning_rate=0.1, weight_decay=0.0, clip=1e6, evaluate_every=36
    ),
    "mnist": Config(
        data="tfds:mnist", steps=1500, batch_size=64, learning_rate=0.1, weight_decay=0.0, clip=1e6, evaluate_every=250,
        resolution=28, width=16,
    ),
}  # fmt: skip


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    if not run.execution.inspect_every:  # To look inside is what this is for.
        run.execution = dataclasses.replace(run.execution, inspect_every=max(config.steps // 20, 1))
    source, test = open_images(run, resolution=config.resolution)
    order = np.random.default_rng(0).permutation(len(source))
    cut = round(config.validation * len(source))
    if cut == 0:
        raise UserError(f"--validation {config.validation} of {len(source)} examples is none: choose a larger share")
    held_out, rest = Subset(source, order[:cut]), Subset(source, order[cut:])

    process = ImageProcessor.symmetric(config.resolution)
    transform = lambda example, rng: {"image": process(example.image), "label": np.int32(example.label)}
    batches = run.batches(rest, transform, batch_size=config.seeds * config.batch_size)
    sizes = config.width, config.depth, len(source.info.classes)
    modules = {norm: Network(norm, *sizes, config.dtype) for norm in NORMS}
    # The sweep makes all moves itself; what it keeps of them is one momentum for each parameter.
    kept = Update(lambda *given: (jnp.zeros(()), None), optax.trace(MOMENTUM), ema=config.ema_decay or None)
    init = functools.partial(init_networks, modules, config)
    state = init_state(init, [kept], seed=config.seed, shardings=run.layout.state_shardings)

    scores = Scores(modules, config, process, run.layout)

    def evaluate(variables: PyTree, key: Key[Array, ""]) -> Report:
        found = scores(variables, held_out)
        return {f"validation_accuracy/{name(*cell)}": float(values.mean(1).max()) for cell, values in found.items()}

    def conclude(variables: PyTree, key: Key[Array, ""]) -> Report:
        outcomes = choose(config, scores(variables, held_out), scores(variables, test))
        run.say(table(config, outcomes))
        if is_first():
            every = {name(*cell): dataclasses.asdict(outcome) for cell, outcome in outcomes.items()}
            replace_text(run.directory / "sweep.json", json.dumps(every, default=np.ndarray.tolist, indent=1) + "\n")
        chosen = {f"test_accuracy/{name(*cell)}": float(outcome.chosen.mean()) for cell, outcome in outcomes.items()}
        return chosen | (draw(config, outcomes, run) if is_first() else {})

    step, inspect = make_sweep(modules, config, run.layout), inspect_middle(modules, config, run.layout)
    return train(run, step, state, batches, evaluate=evaluate, conclude=conclude, inspect=inspect)


def name(norm: str, size: int) -> str:
    """Of a cell, in metrics and in the state."""
    return f"{norm}/batch_{size}"


class Convolution(nn.Module):
    """3×3, from He et al. 2015's start.

    As one matrix product of all that the kernel sees: `vmap` over networks makes a batch of products of it, and of XLA's convolution one with groups, which took a CPU two to three times as long.
    """

    features: int
    use_bias: bool
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W O"]:
        start = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
        kernel = self.param("kernel", start, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = convolve(x, kernel, method="unfold")
        return y if bias is None else y + bias


class Block(nn.Module):
    """Convolution, normalisation, ReLU."""

    features: int
    norm: str
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B H W O"]:
        # A bias ahead of a mean that is subtracted does nothing, and the normalisations have their own, but for RMS.
        x = Convolution(self.features, self.norm in ("none", "rms"), self.dtype, name="convolution")(x)
        if self.norm != "none":
            norm = NORMS[self.norm](dtype=self.dtype, name="norm")
            x = norm(x, train=train) if self.norm == "batch" else norm(x)
        return nn.relu(x)


class Network(nn.Module):
    """Blocks without residual connections, so that nothing but the normalisation keeps signals alive; the image is halved after every second one as long as its side is 8 or more. Then a linear map of all places to the classes: their mean would be nearly the same for all images after an instance normalisation."""

    norm: str
    width: int
    depth: int
    num_classes: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        features = self.width
        for index in range(self.depth):
            x = Block(features, self.norm, self.dtype, name=f"block_{index}")(x, train=train)
            if index % 2 == 1 and x.shape[1] >= 8 and index < self.depth - 1:
                x, features = max_pool(x, 2), 2 * features
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x.reshape(len(x), -1))


def init_networks(modules: dict[str, Network], config: Config, key: Key[Array, ""]) -> dict[str, PyTree]:
    """All networks: by normalisation and batch size, stacked over learning rates and seeds. Networks that differ in their seed differ in their start, and no others do."""
    image = jnp.zeros((1, config.resolution, config.resolution, 3))

    def stacked(module: Network) -> PyTree:
        seeds = jax.vmap(lambda key: module.init(key, image, train=False))(jax.random.split(key, config.seeds))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(config.factors), *x.shape)), seeds)

    collections: dict[str, PyTree] = {"params": {}, "batch_stats": {}}
    for norm, size in config.cells:
        for collection, values in stacked(modules[norm]).items():
            collections[collection][name(norm, size)] = values
    return collections


def loss(
    module: Network, params: PyTree, stats: PyTree, images: Float[Array, "B H W C"], labels: Int[Array, "B"]
) -> tuple[Float[Array, ""], PyTree]:
    """Cross-entropy of one network, and its new batch statistics."""
    variables = {"params": params, "batch_stats": stats}
    logits, updated = module.apply(variables, images, train=True, mutable=["batch_stats"])
    return cross_entropy(logits, labels), updated.get("batch_stats", {})


@dataclasses.dataclass(frozen=True)
class Descent:
    """Gradient descent with momentum of one network, on one batch."""

    module: Network
    clip: float
    weight_decay: float

    def __call__(
        self,
        network: tuple[PyTree, PyTree, PyTree],
        rate: Float[Array, ""],
        images: Float[Array, "B H W C"],
        labels: Int[Array, "B"],
    ) -> tuple[tuple[PyTree, PyTree, PyTree], Float[Array, ""]]:
        """Parameters, batch statistics and momentum after an update, and the loss before it. A network that diverges stops where it is: its neighbours go on."""
        params, stats, momentum = network
        (value, stats), grads = jax.value_and_grad(functools.partial(loss, self.module), has_aux=True)(
            params, stats, images, labels
        )
        clip = optax.clip_by_global_norm(self.clip)
        grads, _ = clip.update(grads, clip.init(params))
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, grads)
        finite = jnp.isfinite(optax.tree.norm(momentum))
        move = lambda p, m: jnp.where(finite, p - rate * (m + self.weight_decay * p), p)
        return (jax.tree.map(move, params, momentum), stats, momentum), value


def make_sweep(modules: dict[str, Network], config: Config, layout: Layout) -> Step:
    """A step of all networks: `(state, batch) -> (state, metrics)`. Every device trains all of them on the whole batch: they are small."""
    schedule = config.schedule()
    factors = jnp.asarray(config.factors)

    def train(norm: str, size: int, networks: PyTree, peak: Float[Array, ""], batch: Batch) -> tuple[PyTree, Float[Array, ""]]:
        """The networks of one cell, and the least loss over learning rates, averaged over seeds and updates."""
        updates = config.batch_size // size
        descend = Descent(modules[norm], config.clip, config.weight_decay)
        over_seeds = jax.vmap(descend, in_axes=(0, None, 0, 0))
        over_rates = jax.vmap(over_seeds, in_axes=(0, 0, None, None))
        update = lambda networks, part: over_rates(networks, peak * factors / updates, part["image"], part["label"])
        parts = jax.tree.map(lambda x: x.reshape(len(x), updates, size, *x.shape[2:]).swapaxes(0, 1), batch)
        networks, losses = jax.lax.scan(update, networks, parts)
        # A network that diverged counts as one that knows nothing.
        losses = jnp.where(jnp.isfinite(losses), losses, np.log(modules[norm].num_classes))
        return networks, losses.mean((0, 2)).min()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch, peak = by_seed(batch, config, layout), jnp.asarray(schedule(state.step), jnp.float32)
        params, stats, momentum, losses = {}, {}, {}, []
        for norm, size in config.cells:
            cell = name(norm, size)
            networks, loss = train(norm, size, networks_of(state, cell), peak, batch)
            params[cell], stats[cell], momentum[cell] = networks
            losses.append(loss)
        ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - config.ema_decay)
        variables = {"batch_stats": {cell: values for cell, values in stats.items() if values}}
        metrics = {"loss": jnp.stack(losses).mean(), "learning_rate": peak}
        opt_state = {"params": optax.TraceState(momentum)}
        moved = state.replace(step=state.step + 1, params=params, opt_state=opt_state, variables=variables, ema=ema)
        return moved, metrics

    return step


def networks_of(state: TrainState, cell: str) -> tuple[PyTree, PyTree, PyTree]:
    """Parameters, batch statistics and momentum of a cell."""
    return state.params[cell], state.variables["batch_stats"].get(cell, {}), state.opt_state["params"].trace[cell]


def by_seed(batch: Batch, config: Config, layout: Layout) -> Batch:
    """The whole batch on every device, each seed its own rows: leaves are `seeds batch_size …`."""
    if layout.axis_name is not None:
        batch = jax.lax.all_gather(batch, layout.axis_name, tiled=True)
    else:
        batch = jax.lax.with_sharding_constraint(batch, layout.replicated)
    return jax.tree.map(lambda x: x.reshape(config.seeds, config.batch_size, *x.shape[1:]), batch)


def inspect_middle(modules: dict[str, Network], config: Config, layout: Layout) -> Inspect:
    """Statistics of one network of each normalisation: large batches, the learning rate in the middle, the first seed."""
    middle = middle_of(config.factors)

    def inspect(state: TrainState, batch: Batch) -> LayerStats:
        batch = jax.tree.map(lambda x: x[0], by_seed(batch, config, layout))
        rate = config.schedule()(state.step) * config.factors[middle]
        parts = {}
        for norm, module in modules.items():
            networks = networks_of(state, name(norm, config.batch_size))
            params, stats, momentum = jax.tree.map(lambda x: x[middle, 0], networks)
            objective = lambda params, stats, module=module: loss(module, params, stats, batch["image"], batch["label"])[0]
            calls, grads = record(objective, params, stats)
            descend = Descent(module, config.clip, config.weight_decay)
            (after, *_), _ = descend((params, stats, momentum), rate, batch["image"], batch["label"])
            parts[norm] = LayerStats.of(calls, params, grads, after)
        return LayerStats.joined(parts)

    return inspect


def middle_of(factors: Sequence[float]) -> int:
    """Where the middle one is in order of size; of two the smaller."""
    return int(np.argsort(factors)[(len(factors) - 1) // 2])


class Scores:
    """The accuracy of all networks on a source: by cell, over learning rates and seeds."""

    def __init__(self, modules: dict[str, Network], config: Config, process: ImageProcessor, layout: Layout):
        self.process = process

        def predict(variables: PyTree, images: Float[Array, "B H W 3"]) -> dict[str, Int[Array, "B L S"]]:
            def classes(norm: str, cell: str) -> Int[Array, "B L S"]:
                apply = lambda params, stats: modules[norm].apply({"params": params, "batch_stats": stats}, images, train=False)
                each = jax.vmap(jax.vmap(apply))
                logits = each(variables["params"][cell], variables["batch_stats"].get(cell, {}))
                return jnp.moveaxis(logits.argmax(-1), -1, 0)

            return {name(*cell): classes(cell[0], name(*cell)) for cell in config.cells}

        self._predict, self.cells = layout.inference(predict), config.cells

    def __call__(self, variables: PyTree, source: Source[LabelledImage]) -> dict[tuple[str, int], Float[np.ndarray, "L S"]]:
        labels = np.array([example.label for example in source])
        found = self._predict({"batch_stats": {}, **variables}, (self.process(example.image) for example in source))
        return {cell: (found[name(*cell)] == labels[:, None, None]).mean(0) for cell in self.cells}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one cell: accuracies over learning rates and seeds, and the learning rate that was chosen."""

    validation: Float[np.ndarray, "L S"]
    test: Float[np.ndarray, "L S"]
    index: int
    rate: float

    @property
    def chosen(self) -> Float[np.ndarray, "S"]:
        """Test accuracy of each seed at the learning rate that is best on validation data."""
        return self.test[self.index]


def choose(config: Config, validation: dict, test: dict) -> dict[tuple[str, int], Outcome]:
    """The learning rate of each cell, by the mean over seeds of validation accuracy; of equal ones the first."""
    best = {cell: int(values.mean(1).argmax()) for cell, values in validation.items()}
    return {
        cell: Outcome(validation[cell], test[cell], index, config.learning_rate * config.factors[index])
        for cell, index in best.items()
    }


def table(config: Config, outcomes: dict[tuple[str, int], Outcome]) -> str:
    """Test accuracies as lines of text: mean over seeds and range."""
    lines = ["test accuracy at the learning rate that validation chose, mean (range) over seeds:"]
    lines.append(f"  {'':<9}" + "".join(f"{f'batch {size}':<34}" for size in config.batch_sizes))
    for norm in NORMS:
        cells = [outcomes[norm, size] for size in config.batch_sizes]
        texts = [f"{o.chosen.mean():.3f} ({o.chosen.min():.3f} to {o.chosen.max():.3f}) at {o.rate:.3g}" for o in cells]
        lines.append(f"  {norm:<9}" + "".join(f"{text:<34}" for text in texts))
    return "\n".join(lines)


def draw(config: Config, outcomes: dict[tuple[str, int], Outcome], run: Run) -> Report:
    """Accuracy by normalisation and learning rate, error over training, and what went on inside."""
    rates = [config.learning_rate * factor for factor in config.factors]
    title_of = {size: f"batches of {size}" for size in config.batch_sizes}
    accuracies = {title: np.stack([outcomes[norm, size].test for norm in NORMS]) for size, title in title_of.items()}
    chosen = {title: np.array([outcomes[norm, size].index for norm in NORMS]) for size, title in title_of.items()}
    accuracy = figures.heatmaps(
        accuracies, list(NORMS), [f"{rate:.3g}" for rate in rates], chosen=chosen, label="test accuracy",
        xlabel=f"learning rate for {config.batch_size} examples",
        title=f"Test accuracy after equal epochs: mean ± half of the range over {config.seeds} seeds. Red: chosen by validation",
    )  # fmt: skip
    rows = read_metrics(run.directory / "metrics.jsonl")
    errors = {
        title: {norm: error_over_training(config, rows, norm, size, outcomes[norm, size]) for norm in NORMS}
        for size, title in title_of.items()
    }
    validation = figures.curves(
        errors, xlabel="examples seen", ylabel="error on validation data (log)", log=True, share_y=True, final=False
    )
    return {"accuracy": accuracy, "validation": validation, "inside_by_normalization": draw_layers(config, run)}


def error_over_training(
    config: Config, rows: Sequence[dict[str, Any]], norm: str, size: int, outcome: Outcome
) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Examples seen and error on validation data, at the best learning rate at the time; the last point is of the end."""
    key = f"eval/validation_accuracy/{name(norm, size)}"
    points = [(row["step"], 1 - row[key]) for row in rows if key in row and row["step"] < config.steps]
    steps, errors = zip(*points, (config.steps, 1 - outcome.validation.mean(1).max()))
    return np.array(steps, float) * config.batch_size, np.array(errors, float)


def draw_layers(config: Config, run: Run) -> Any:
    """A column for each normalisation, a line for each block, dark for the first and bright for the last."""
    rows = read_metrics(run.directory / "layers.jsonl")
    of_call = lambda kind, what: lambda row, place: row[kind].get(place, {}).get(what)
    panels: dict[str, Callable[[dict[str, Any], str], float | None]] = {
        "deviation of\nactivations": of_call("activations", "std"),
        "share of zeros\nafter ReLU": of_call("activations", "zeros"),
        "deviation of gradients\nby activations": of_call("gradients", "std"),
        "kernels: length of\nupdate / of weights": lambda row, place: row["parameters"][f"{place}/convolution/kernel"][
            "update_ratio"
        ],
    }
    blocks = [f"block_{index}" for index in range(config.depth)]
    values = {
        title: {norm: np.array([[value(row, f"{norm}/{block}") for row in rows] for block in blocks], float) for norm in NORMS}
        for title, value in panels.items()
    }
    rate = config.learning_rate * config.factors[middle_of(config.factors)]
    return figures.layer_curves(
        [row["step"] for row in rows], values, shares=["share of zeros\nafter ReLU"],
        levels={"kernels: length of\nupdate / of weights": 1e-3},
        title=f"Inside of one network of each kind (batches of {config.batch_size}, learning rate {rate:.3g}): "
        "blocks from the first (dark) to the last (bright); dashed: 1e-3, a rule of thumb",
    )  # fmt: skip


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="first principles",
    summary="Six ways to normalise, or not, in one network: which of them need large batches, and what they do inside.",
    paper="Wu and He 2018, Group Normalization, arXiv:1803.08494",
    minutes=2,
    expects={f"test_accuracy/{norm}/batch_64": (0.94, None) for norm in NORMS if norm != "none"},
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
