"""A small convolutional network from first principles, after LeNet-5 (LeCun et al. 1998, Proceedings of the IEEE 86).

Its convolutions are computed in three ways that give the same: by a loop over the places of the kernel, by unfolding the image into one matrix product, and by XLA's own (`--method`). After training, what each costs on this machine is measured and drawn, beside the filters that were learned and what they see.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Len, Lt
from jaxtyping import Array, Float, Key, PyTree, UInt8

from jaxdl import figures, launch
from jaxdl.data import Source, open_labelled, some, train_batches
from jaxdl.data.image import ImageProcessor, random_crop
from jaxdl.losses import cross_entropy
from jaxdl.metrics import accuracy, classify
from jaxdl.models.lenet import LeNet
from jaxdl.nn.convolution import Method
from jaxdl.training import Aux, Batch, Execution, Run, fit, start
from jaxdl.training.processes import whole

METHODS = get_args(Method)


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes."""

    data: str = "builtin:digits"
    steps: Annotated[int, Ge(1)] = 1500
    batch_size: Annotated[int, Ge(1)] = 64
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    weight_decay: Annotated[float, Ge(0)] = 1e-2
    evaluate_every: Annotated[int, Ge(1)] = 300
    channels: Annotated[tuple[Annotated[int, Ge(1)], ...], Len(1)] = (32, 64)
    """Widths of the convolutions; each is followed by a maximum over 2×2 pixels."""
    hidden: tuple[Annotated[int, Ge(1)], ...] = (128,)
    """Widths of the dense layers before the last one."""
    kernel_size: Annotated[int, Ge(1)] = 3
    """Side of the kernels, in pixels."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Share of the dense layers' activations that are dropped."""
    shift: Annotated[int, Ge(0)] = 1
    """How far training pictures are moved at random, in pixels; what comes in is black."""
    method: Literal[METHODS] = "fastest"
    """How convolutions are computed: by a loop over the kernel's places, by unfolding, by XLA, or whichever is fastest."""
    resolution: Annotated[int, Ge(0)] = 0
    """Side of the square that every picture is resized to, in pixels. 0: height and width of the first one."""
    timing_rounds: Annotated[int, Ge(0)] = 5
    """How often each way of computing convolutions is timed at the end. 0: not at all."""


PRESETS = {
    "default": Config(),
    # Ten passes over 60,000 pictures.
    "mnist": Config(
        preset="mnist", data="tfds:mnist", steps=4690, batch_size=128, evaluate_every=938, shift=2, channels=(16, 32), kernel_size=5
    ),
    # The paper's own widths (section II-B), with ReLU and the maximum.
    "lenet5": Config(
        preset="lenet5", data="tfds:mnist", steps=4690, batch_size=128, evaluate_every=938, shift=2, channels=(6, 16), hidden=(120, 84),
        kernel_size=5, dropout=0.0,
    ),
}  # fmt: skip


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, times, draws, and returns what is in its `result.json`."""
    with Run.open(workdir, "cnn", config, execution) as run:
        source, held_out = open_labelled(config.data, config.eval_data, data_dir=config.data_dir)
        size = config.resolution or source[0]["image"].shape[:2]
        process = ImageProcessor.standardising((each["image"] for each in some(source, 10_000)), size)
        transform = functools.partial(example, process=process, shift=config.shift)
        batches = train_batches(source, transform, batch_size=config.batch_size, seed=config.seed, **run.shard)

        module = LeNet(
            config.channels,
            config.hidden,
            len(source.classes),
            config.kernel_size,
            config.dropout,
            config.method,
            dtype=jnp.bfloat16 if config.precision == "bf16" else None,
        )
        image = jnp.asarray(process(source[0]["image"])[None])
        step, state = start(
            config,
            run.layout,
            functools.partial(loss, module),
            functools.partial(optax.adamw, weight_decay=config.weight_decay),
            lambda key: module.init(key, image),
        )

        predict = run.layout.inference(module.apply)
        scores = lambda state: classify(functools.partial(predict, {"params": state.measured}), held_out, process)
        evaluate = lambda state: {"test_accuracy": accuracy(*scores(state))}
        state = fit(step, state, batches, run, steps=config.steps, evaluate=evaluate, evaluate_every=config.evaluate_every)
        logits, labels = scores(state)
        metrics = {"test_accuracy": accuracy(logits, labels)}
        figures.confusion_matrix(labels, logits.argmax(1), held_out.classes, run.figures / "confusion.png")
        figures.mistakes(held_out, logits, labels, run.figures / "mistakes.png")
        params = jax.tree.map(whole, state.measured)
        draw_filters(params["convolutions_0"]["kernel"], run.figures / "filters.png")
        draw_feature_maps(module, params, process, held_out, run.figures / "feature_maps.png")
        if config.timing_rounds:
            shown = np.stack([process(held_out[index % len(held_out)]["image"]) for index in range(config.batch_size)])
            times = time_methods(module, params, shown, config.timing_rounds)
            draw_times(times, config, run.figures / "methods.png")
            least = ", ".join(f"{method} {1e3 * min(seconds):.3g} ms" for method, (_, seconds) in times.items())
            run.say(f"loss and gradients of a batch of {config.batch_size}, least of {config.timing_rounds} rounds: {least}")
        return run.finish(state, metrics)


def example(example: dict[str, Any], rng: np.random.Generator, *, process: ImageProcessor, shift: int) -> dict[str, np.ndarray]:
    """A picture, moved at random and standardised, and its class."""
    return {"image": process(random_crop(example["image"], rng, shift)), "label": np.int32(example["label"])}


def loss(
    module: LeNet, params: PyTree, variables: dict[str, PyTree], batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """Cross-entropy, in nats."""
    logits = module.apply({"params": params}, batch["image"], train=True, rngs={"dropout": key})
    return cross_entropy(logits, batch["label"]), Aux({"train_accuracy": (logits.argmax(-1) == batch["label"]).mean()})


Times = dict[str, tuple[list[float], list[float]]]
"""By method the seconds of each round, of a forward pass and of loss with gradients."""


def time_methods(module: LeNet, params: PyTree, images: Float[np.ndarray, "B H W C"], rounds: int) -> Times:
    """Runs the same batch by each method, in turns, so that whatever else the machine does meets all of them."""
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    labels = jnp.zeros(len(images), jnp.int32)
    given = jax.device_put(params), jnp.asarray(images)
    for method in METHODS:
        apply = module.clone(method=method).apply
        forward = jax.jit(lambda params, images, apply=apply: apply({"params": params}, images))
        gradient = jax.jit(
            jax.value_and_grad(lambda params, images, apply=apply: cross_entropy(apply({"params": params}, images), labels))
        )
        calls[method] = (functools.partial(forward, *given), functools.partial(gradient, *given))
        jax.block_until_ready([call() for call in calls[method]])  # Compiles.
    times: Times = {method: ([], []) for method in METHODS}
    for _ in range(rounds):
        for method in METHODS:
            for call, seconds in zip(calls[method], times[method]):
                started = time.perf_counter()
                jax.block_until_ready(call())
                seconds.append(time.perf_counter() - started)
    return times


def draw_filters(kernel: Float[np.ndarray, "h w I O"], path: Path) -> None:
    """The kernels of the first convolution as pictures, of coloured images in colour."""
    count = min(kernel.shape[-1], 32)
    columns = min(count, 8)
    figure, axes = figures.subplots(-(-count // columns), columns, 1.1, 1.1)
    largest = np.abs(kernel).max()
    for axis, index in zip(axes, range(count)):
        weights = kernel[..., index]
        if weights.shape[-1] == 3:
            drawn = axis.imshow(0.5 + weights / (2 * largest), interpolation="nearest")
        else:
            drawn = axis.imshow(weights.mean(-1), cmap="coolwarm", vmin=-largest, vmax=largest, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
    figure.suptitle("kernels of the first convolution", fontsize=10)
    if kernel.shape[2] == 1:
        figure.colorbar(drawn, ax=list(axes), shrink=0.8, label="weight")
    figures.save(figure, path)


def draw_feature_maps(module: LeNet, params: PyTree, process: ImageProcessor, held_out: Source, path: Path) -> None:
    """What the first channels of each convolution see in one picture of each of some classes."""
    pictures: dict[int, UInt8[np.ndarray, "H W C"]] = {}
    for index in range(len(held_out)):
        pictures.setdefault(held_out[index]["label"], held_out[index]["image"])
        if len(pictures) == min(4, len(held_out.classes)):
            break
    images = np.stack([process(picture) for picture in pictures.values()])
    maps = jax.device_get(jax.jit(functools.partial(module.apply, method="feature_maps"))({"params": params}, images))
    shown = 6
    columns = 1 + shown * len(maps)
    figure, axes = figures.subplots(len(pictures), columns, 0.95, 1.05)
    for number, (row, picture) in enumerate(zip(axes.reshape(-1, columns), pictures.values())):
        figures.show(row[0], picture)
        for layer, values in enumerate(maps):
            for channel in range(min(shown, values.shape[-1])):
                axis = row[1 + layer * shown + channel]
                values_seen = np.asarray(values[number, ..., channel], np.float32)
                axis.imshow(values_seen, cmap="magma", vmin=0, vmax=max(float(values[..., channel].max()), 1e-6))
                axis.set(xticks=[], yticks=[])
                if number == 0:
                    axis.set_title(f"conv {layer + 1}\nchannel {channel + 1}", fontsize=7)
    axes[0].set_title("picture\n", fontsize=7)
    figure.suptitle("what channels see: dark is nothing, bright is much", fontsize=10)
    figures.save(figure, path)


def draw_times(times: Times, config: Config, path: Path) -> None:
    """Bars of the least times, with the medians as marks."""
    names = {"fastest": "fastest\n(chosen by layer)", "taps": "loop over\nthe kernel", "unfold": "unfolding", "lax": "XLA"}
    figure, (axis,) = figures.subplots(1, 1, 6.4, 3.8)
    places = np.arange(len(times))
    for offset, part, label in ((-0.2, 0, "forward"), (0.2, 1, "loss and gradients")):
        seconds = [1e3 * np.array(both[part]) for both in times.values()]
        axis.bar(places + offset, [s.min() for s in seconds], 0.38, label=label)
        axis.plot(places + offset, [np.median(s) for s in seconds], "k_", markersize=14)
        for place, s in zip(places + offset, seconds):
            above = dict(xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8)
            axis.annotate(f"{s.min():.1f}", (place, np.median(s)), **above)
    axis.set_xticks(places, [names[method] for method in times], fontsize=9)
    axis.set(ylabel=f"milliseconds for a batch of {config.batch_size}")
    axis.margins(y=0.15)
    axis.set_title("the same network, its convolutions computed in four ways\n(bars: least time, lines: median)", fontsize=10)
    axis.legend(fontsize=8)
    figures.save(figure, path)


EXPERIMENT = launch.Experiment(
    name="cnn",
    summary="A small convolutional network whose convolutions are computed by loops, by unfolding and by XLA, and timed.",
    paper="LeCun, Bottou, Bengio and Haffner 1998, Gradient-based learning applied to document recognition, Proc. IEEE 86",
    result="test accuracy of 0.99 on scikit-learn's digits",
    minutes=1,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
