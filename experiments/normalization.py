"""Batch, layer, instance, group and RMS normalisation, and none, in one convolutional network (Ioffe and Szegedy 2015; Ba et al. 2016; Ulyanov et al. 2016; Wu and He 2018; Zhang and Sennrich 2019).

Every normalisation is trained with large and with small batches, at several learning rates, from several seeds, all in one run. The question is that of Wu and He (section 4.1): which of them need large batches?

What is compared is the same number of epochs, not of updates: one step of this run brings `batch_size` new examples to every network; a network with large batches makes one update from them, one with small batches makes `batch_size / small_batch` updates, one after the other. At equal updates small batches would have seen a fraction of the data. As in the paper the learning rate is proportional to the batch; which rate that is, is chosen for each normalisation and batch size by examples that are held out of training, not by the test set.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
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
from jaxdl.data import Source, open_labelled, train_batches
from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.nn import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm, convolve, max_pool
from jaxdl.training import Batch, Execution, Inside, Layout, Run, TrainState, fit, init_state
from jaxdl.training.inside import Look, record
from jaxdl.training.logging import read_metrics, replace_text
from jaxdl.training.processes import is_first
from jaxdl.training.step import Metrics, Step

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

    data: str = "builtin:digits"
    steps: Annotated[int, Ge(1)] = 180
    batch_size: Annotated[int, Ge(1)] = 64
    small_batch: Annotated[int, Ge(1)] = 2
    """Examples in an update of the networks with small batches; it divides --batch-size."""
    learning_rate: Annotated[float, Gt(0)] = 0.1
    factors: Annotated[tuple[float, ...], MinLen(1)] = (0.3, 1.0, 3.0)
    """The learning rates that are tried, as multiples of --learning-rate. They are for --batch-size examples; small batches have as much less as they are smaller."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    clip: Annotated[float, Gt(0)] = 1e6
    evaluate_every: Annotated[int, Ge(1)] = 36
    seeds: Annotated[int, Ge(1)] = 3
    """Networks of each kind, each with its own start and its own order of the data."""
    resolution: Annotated[int, Ge(2)] = 8
    """Side of the square that every picture is resized to, in pixels."""
    width: Annotated[int, Ge(1)] = 8
    """Channels of the first convolutions, a multiple of 4; they double where the picture is halved."""
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
    "default": Config(),
    "mnist": Config(preset="mnist", data="tfds:mnist", resolution=28, width=16, steps=1500, evaluate_every=250),
}


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, draws, and returns what is in its `result.json`."""
    # To look inside is what this is for.
    every = execution.inspect_every or max(config.steps // 20, 1)
    with Run.open(workdir, "normalization", config, dataclasses.replace(execution, inspect_every=every)) as run:
        source, test = open_labelled(config.data, config.eval_data, data_dir=config.data_dir, resolution=config.resolution)
        order = np.random.default_rng(0).permutation(len(source))
        cut = round(config.validation * len(source))
        if cut == 0:
            raise UserError(f"--validation {config.validation} of {len(source)} examples is none: choose a larger share")
        held_out, rest = Part(source, order[:cut]), Part(source, order[cut:])

        process = ImageProcessor.preset("siglip", config.resolution)
        transform = lambda example, rng: {"image": process(example["image"]), "label": np.int32(example["label"])}
        rows = config.seeds * config.batch_size
        batches = train_batches(rest, transform, batch_size=rows, seed=config.seed, **run.shard)
        dtype = jnp.bfloat16 if config.precision == "bf16" else None
        modules = {norm: Network(norm, config.width, config.depth, len(source.classes), dtype) for norm in NORMS}
        state = init_state(
            functools.partial(init, modules, config),
            optax.trace(MOMENTUM),
            seed=config.seed,
            ema=config.ema_decay > 0,
            shardings=run.layout.state_shardings,
        )
        step = make_sweep(modules, config, run.layout)

        scores = Scores(modules, config, process, run.layout)
        evaluate = lambda state: {
            f"validation_accuracy/{name(*cell)}": values.mean(1).max() for cell, values in scores(state, held_out).items()
        }
        state = fit(
            step,
            state,
            batches,
            run,
            steps=config.steps,
            evaluate=evaluate,
            evaluate_every=config.evaluate_every,
            look=look_at_middle(modules, config, run.layout),
        )
        outcomes = choose(config, scores(state, held_out), scores(state, test))
        if is_first():
            run.say(table(config, outcomes))
            draw(config, outcomes, run)
            every = {name(*cell): dataclasses.asdict(outcome) for cell, outcome in outcomes.items()}
            replace_text(run.directory / "sweep.json", json.dumps(every, default=np.ndarray.tolist, indent=1) + "\n")
        metrics = {f"test_accuracy/{name(*cell)}": float(outcome.chosen.mean()) for cell, outcome in outcomes.items()}
        return run.finish(state, metrics)


def name(norm: str, size: int) -> str:
    """Of a cell, in metrics and in the state."""
    return f"{norm}/batch_{size}"


class Part:
    """Some examples of a source."""

    def __init__(self, source: Source, indices: Int[np.ndarray, "N"]):
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[int(self.indices[index])]


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
    """Blocks without residual connections, so that nothing but the normalisation keeps signals alive; the picture is halved after every second one as long as its side is 8 or more. Then a linear map of all places to the classes: their mean would be nearly the same for all pictures after an instance normalisation."""

    norm: str
    width: int
    depth: int
    classes: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B K"]:
        features = self.width
        for index in range(self.depth):
            x = Block(features, self.norm, self.dtype, name=f"block_{index}")(x, train=train)
            if index % 2 == 1 and x.shape[1] >= 8 and index < self.depth - 1:
                x, features = max_pool(x, 2), 2 * features
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x.reshape(len(x), -1))


def init(modules: dict[str, Network], config: Config, key: Key[Array, ""]) -> dict[str, PyTree]:
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
        losses = jnp.where(jnp.isfinite(losses), losses, np.log(modules[norm].classes))
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
        return TrainState(state.step + 1, params, optax.TraceState(momentum), variables, state.key, ema), metrics

    return step


def networks_of(state: TrainState, cell: str) -> tuple[PyTree, PyTree, PyTree]:
    """Parameters, batch statistics and momentum of a cell."""
    return state.params[cell], state.variables["batch_stats"].get(cell, {}), state.opt_state.trace[cell]


def by_seed(batch: Batch, config: Config, layout: Layout) -> Batch:
    """The whole batch on every device, each seed its own rows: leaves are `seeds batch_size …`."""
    if layout.axis_name is not None:
        batch = jax.lax.all_gather(batch, layout.axis_name, tiled=True)
    else:
        batch = jax.lax.with_sharding_constraint(batch, layout.replicated)
    return jax.tree.map(lambda x: x.reshape(config.seeds, config.batch_size, *x.shape[1:]), batch)


def look_at_middle(modules: dict[str, Network], config: Config, layout: Layout) -> Look:
    """Looks inside of one network of each normalisation: large batches, the learning rate in the middle, the first seed."""
    middle = middle_of(config.factors)

    def look_inside(state: TrainState, batch: Batch) -> Inside:
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
            parts[norm] = Inside.of(calls, params, grads, after)
        return Inside.joined(parts)

    return look_inside


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

    def __call__(self, state: TrainState, source: Source) -> dict[tuple[str, int], Float[np.ndarray, "L S"]]:
        examples = [source[index] for index in range(len(source))]
        labels = np.array([example["label"] for example in examples])
        variables = {"params": state.measured, **state.variables}
        found = self._predict(variables, (self.process(example["image"]) for example in examples))
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


def draw(config: Config, outcomes: dict[tuple[str, int], Outcome], run: Run) -> None:
    """Accuracy by normalisation and learning rate, accuracy over training, and what went on inside."""
    draw_accuracy(config, outcomes, run.figures / "accuracy.png")
    draw_validation(config, read_metrics(run.directory / "metrics.jsonl"), outcomes, run.figures / "validation.png")
    draw_inside(config, read_metrics(run.directory / "inside.jsonl"), run.figures / "inside_by_normalization.png")


def draw_accuracy(config: Config, outcomes: dict[tuple[str, int], Outcome], path: Path) -> None:
    """A heat map for each batch size: mean over seeds, and half of the range."""
    rates = [config.learning_rate * factor for factor in config.factors]
    # Colours tell the good ones apart; what failed altogether is dark in any case.
    best = max(outcome.test.mean(1).max() for outcome in outcomes.values())
    figure, axes = figures.subplots(1, len(config.batch_sizes), 1.6 + 0.95 * len(rates), 4)
    for axis, size in zip(axes, config.batch_sizes):
        means = np.array([outcomes[norm, size].test.mean(1) for norm in NORMS])
        drawn = axis.imshow(means, vmin=best - 0.06, vmax=best, aspect="auto", cmap="viridis", interpolation="nearest")
        for row, norm in enumerate(NORMS):
            outcome = outcomes[norm, size]
            for column, values in enumerate(outcome.test):
                color = "black" if means[row, column] > best - 0.03 else "white"
                text = f"{values.mean():.3f}\n± {(values.max() - values.min()) / 2:.3f}"
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
            axis.add_patch(frame(outcome.index, row))
        axis.set_xticks(range(len(rates)), [f"{rate:.3g}" for rate in rates], fontsize=8)
        axis.set_yticks(range(len(NORMS)), list(NORMS), fontsize=8)
        axis.set_xlabel(f"learning rate for {config.batch_size} examples", fontsize=8)
        axis.set_title(f"batches of {size}", fontsize=10)
    figure.colorbar(drawn, ax=list(axes), label="test accuracy", extend="min")
    figure.suptitle(
        f"Test accuracy after equal epochs: mean ± half of the range over {config.seeds} seeds. Red: chosen by validation",
        fontsize=9,
    )
    figures.save(figure, path)


def frame(column: int, row: int) -> Any:
    """Around an entry of a heat map."""
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.44, row - 0.42), 0.88, 0.84, fill=False, edgecolor="tab:red", linewidth=2)


def draw_validation(config: Config, rows: Sequence[dict[str, Any]], outcomes: dict[tuple[str, int], Outcome], path: Path) -> None:
    """Error on validation data over training, each normalisation at its best learning rate at the time; the last points are of the end."""
    figure, axes = figures.subplots(1, len(config.batch_sizes), 4, 3.2)
    for axis, size in zip(axes, config.batch_sizes):
        for norm in NORMS:
            key = f"eval/validation_accuracy/{name(norm, size)}"
            points = [
                (row["step"] * config.batch_size, 1 - row[key]) for row in rows if key in row and row["step"] < config.steps
            ]
            points.append((config.steps * config.batch_size, 1 - outcomes[norm, size].validation.mean(1).max()))
            axis.plot(*zip(*points), marker=".", linewidth=1, label=norm)
        axis.set(xlabel="examples seen", ylabel="error on validation data (log)", yscale="log")
        axis.set_title(f"batches of {size}", fontsize=10)
        axis.grid(alpha=0.3, which="both")
    low, high = min(axis.get_ylim()[0] for axis in axes), max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)
    axes[0].legend(fontsize=8)
    figures.save(figure, path)


def draw_inside(config: Config, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each normalisation, a line for each block, dark for the first and bright for the last."""
    if not rows:
        return
    import matplotlib

    blocks = [f"block_{index}" for index in range(config.depth)]
    panels: tuple[tuple[str, str, Callable[[dict[str, Any], str, str], float | None]], ...] = (
        ("deviation of\nactivations", "log", lambda row, norm, block: row["activations"].get(f"{norm}/{block}", {}).get("std")),
        ("share of zeros\nafter ReLU", "linear", lambda row, norm, block: row["activations"].get(f"{norm}/{block}", {}).get("zeros")),
        ("deviation of gradients\nby activations", "log", lambda row, norm, block: row["gradients"].get(f"{norm}/{block}", {}).get("std")),
        ("kernels: length of\nupdate / of weights", "log", lambda row, norm, block: row["parameters"][f"{norm}/{block}/convolution/kernel"]["update_ratio"]),
    )  # fmt: skip
    steps = [row["step"] for row in rows]
    figure, axes = figures.subplots(len(panels), len(NORMS), 2.0, 1.7)
    for (title, scale, value), line in zip(panels, axes.reshape(len(panels), -1)):
        values = {
            norm: np.array([[value(row, norm, block) or np.nan for row in rows] for block in blocks], float) for norm in NORMS
        }
        if scale == "linear":
            values = {norm: np.nan_to_num(array) for norm, array in values.items()}
        seen = np.concatenate([array[np.isfinite(array)] for array in values.values()])
        for norm, axis in zip(NORMS, line):
            for index, points in enumerate(values[norm]):
                color = matplotlib.colormaps["viridis"](index / max(config.depth - 1, 1))
                axis.plot(steps, points, linewidth=1, color=color)
            axis.set_yscale(scale)
            if scale == "linear":
                axis.set_ylim(-0.02, 1.02)
            elif seen.size:
                axis.set_ylim(10 ** np.floor(np.log10(seen.min())), 10 ** np.ceil(np.log10(seen.max())))
            axis.tick_params(which="both", labelsize=6, labelleft=norm == next(iter(NORMS)))
            axis.grid(alpha=0.3)
        line[0].set_ylabel(title, fontsize=8)
    for axis in axes[-len(NORMS) :]:
        axis.axhline(1e-3, color="tab:red", linestyle="--", linewidth=1)
        axis.set_xlabel("step", fontsize=8)
    for norm, axis in zip(NORMS, axes):
        axis.set_title(norm, fontsize=10)
    rate = config.learning_rate * config.factors[middle_of(config.factors)]
    figure.suptitle(
        f"Inside of one network of each kind (batches of {config.batch_size}, learning rate {rate:.3g}): "
        "blocks from the first (dark) to the last (bright); dashed: 1e-3, a rule of thumb",
        fontsize=9,
    )
    figures.save(figure, path)


EXPERIMENT = launch.Experiment(
    name="normalization",
    summary="Six ways to normalise, or not, in one network: which of them need large batches, and what they do inside.",
    paper="Wu and He 2018, Group Normalization, arXiv:1803.08494",
    result="test accuracy of 0.96 to 0.98 with any of them; without one, no learning at the higher rates",
    minutes=2,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
