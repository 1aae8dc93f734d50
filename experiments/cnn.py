"""A small convolutional network from first principles, after LeNet-5 (LeCun et al. 1998, Proceedings of the IEEE 86).

Its convolutions are computed in three ways that give the same: by a loop over the places of the kernel, by unfolding the image into one matrix product, and by XLA's own (`--method`). After training, what each costs on this machine is measured and drawn, beside the filters that were learned and what they see.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Len, Lt
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import figures, launch
from jaxdl.data import LabelledImage, Source
from jaxdl.data.augment import random_shift
from jaxdl.data.image import ImageProcessor
from jaxdl.losses import cross_entropy
from jaxdl.models.lenet import LeNet
from jaxdl.nn.convolution import Method
from jaxdl.tasks.classification import Classification, fit_processor, open_images
from jaxdl.training import Aux, Batch, Report, Run, TrainState, configured, setup_training, to_host, train

METHODS = {"fastest": "fastest\n(chosen by layer)", "taps": "loop over\nthe kernel", "unfold": "unfolding", "lax": "XLA"}
"""The ways to compute a convolution, and what they are called in figures."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Ask):
    """What this experiment computes."""

    channels: Annotated[tuple[Annotated[int, Ge(1)], ...], Len(1)] = (32, 64)
    """Widths of the convolutions; each is followed by a maximum over 2×2 pixels."""
    hidden: tuple[Annotated[int, Ge(1)], ...] = (128,)
    """Widths of the dense layers before the last one."""
    kernel_size: Annotated[int, Ge(1)] = 3
    """Side of the kernels, in pixels."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Share of the dense layers' activations that are dropped."""
    shift: Annotated[int, Ge(0)] = 1
    """How far training images are moved at random, in pixels; what comes in is black."""
    method: Literal[get_args(Method)] = "fastest"
    """How convolutions are computed: by a loop over the kernel's places, by unfolding, by XLA, or whichever is fastest."""
    resolution: Annotated[int, Ge(0)] = 0
    """Side of the square that every image is resized to, in pixels. 0: height and width of the first one."""
    timing_rounds: Annotated[int, Ge(0)] = 5
    """How often each way of computing convolutions is timed at the end. 0: not at all."""


_BASE = Config(data="builtin:digits", steps=1500, batch_size=64, learning_rate=2e-3, weight_decay=1e-2, evaluate_every=300)
# Ten passes over 60,000 images.
_MNIST = dataclasses.replace(_BASE, data="tfds:mnist", steps=4690, batch_size=128, evaluate_every=938, shift=2, kernel_size=5)

PRESETS = {
    "default": _BASE,
    "mnist": dataclasses.replace(_MNIST, channels=(16, 32)),
    # The paper's own widths (section II-B), with ReLU and the maximum.
    "lenet5": dataclasses.replace(_MNIST, channels=(6, 16), hidden=(120, 84), dropout=0.0),
}


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, times, draws, and returns what is in `result.json`."""
    source, held_out = open_images(run)
    process = fit_processor(source, config.resolution)
    batches = run.batches(source, functools.partial(row, process=process, shift=config.shift))

    widths = config.channels, config.hidden, len(source.info.classes)
    module = LeNet(*widths, config.kernel_size, config.dropout, config.method, dtype=config.dtype)
    image = jnp.asarray(process(source[0].image)[None])
    optimizer = functools.partial(optax.adamw, weight_decay=config.weight_decay)
    update = configured(config, functools.partial(objective, module), optimizer)
    step, state = setup_training(config, run.layout, update, init=lambda key: module.init(key, image))

    recognised = Classification(run, module.apply, held_out, process)

    def show(variables: PyTree, key: Key[Array, ""]) -> Report:
        params = jax.tree.map(to_host, variables["params"])
        kernel = params["convolutions_0"]["kernel"]
        seen = what_channels_see(module, params, process, held_out)
        return recognised.show(variables, key) | {"filters": figures.filters(kernel), "feature_maps": seen}

    def compare_methods(variables: PyTree, key: Key[Array, ""]) -> Report:
        params = jax.tree.map(to_host, variables["params"])
        images = np.stack([process(held_out[index % len(held_out)].image) for index in range(config.batch_size)])
        times = time_methods(module, params, images, config.timing_rounds)
        least = ", ".join(f"{name} {1e3 * min(of['loss and gradients']):.3g} ms" for name, of in times.items())
        run.say(f"loss and gradients of a batch of {config.batch_size}, least of {config.timing_rounds} rounds: {least}")
        title = "the same network, its convolutions computed in four ways"
        label = f"milliseconds for a batch of {config.batch_size}"
        return {"methods": figures.timings({METHODS[name]: of for name, of in times.items()}, title=title, ylabel=label)}

    conclude = compare_methods if config.timing_rounds else None
    how = dict(show=show, conclude=conclude, answer=recognised.answer(config.ask))
    return train(run, step, state, batches, evaluate=recognised.evaluate, **how)


def row(example: LabelledImage, rng: np.random.Generator, *, process: ImageProcessor, shift: int) -> dict[str, np.ndarray]:
    """An image, moved at random and standardised, and its class."""
    return {"image": process(random_shift(example, rng, shift).image), "label": np.int32(example.label)}


def objective(
    module: LeNet, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """Cross-entropy, in nats."""
    logits = module.apply({"params": params}, batch["image"], train=True, rngs={"dropout": key})
    return cross_entropy(logits, batch["label"]), Aux({"train_accuracy": (logits.argmax(-1) == batch["label"]).mean()})


Times = dict[str, dict[str, list[float]]]
"""By method the seconds of each round, `forward` and for `loss and gradients`."""


def time_methods(module: LeNet, params: PyTree, images: Float[np.ndarray, "B H W C"], rounds: int) -> Times:
    """Runs the same batch by each method, in turns, so that whatever else the machine does meets all of them."""
    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    labels = jnp.zeros(len(images), jnp.int32)
    given = jax.device_put(params), jnp.asarray(images)
    for method in METHODS:
        apply = module.clone(method=method).apply
        forward = lambda params, images, apply=apply: apply({"params": params}, images)
        loss = lambda params, images, forward=forward: cross_entropy(forward(params, images), labels)
        programs = {"forward": jax.jit(forward), "loss and gradients": jax.jit(jax.value_and_grad(loss))}
        calls[method] = {name: functools.partial(program, *given) for name, program in programs.items()}
        jax.block_until_ready([call() for call in calls[method].values()])  # Compiles.
    times: Times = {method: {name: [] for name in of} for method, of in calls.items()}
    for _ in range(rounds):
        for method, of in calls.items():
            for name, call in of.items():
                started = time.perf_counter()
                jax.block_until_ready(call())
                times[method][name].append(time.perf_counter() - started)
    return times


def what_channels_see(module: LeNet, params: PyTree, process: ImageProcessor, held_out: Source[LabelledImage]) -> Any:
    """What the first channels of each convolution make of one image of each of some classes."""
    images: dict[int, np.ndarray] = {}
    for example in held_out:
        images.setdefault(example.label, example.image)
        if len(images) == min(4, len(held_out.info.classes)):
            break
    prepared = np.stack([process(image) for image in images.values()])
    maps = jax.jit(functools.partial(module.apply, method="feature_maps"))({"params": params}, prepared)
    return figures.feature_maps(list(images.values()), [np.asarray(each, np.float32) for each in jax.device_get(maps)])


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="first principles",
    summary="A small convolutional network whose convolutions are computed by loops, by unfolding and by XLA, and timed.",
    paper="LeCun, Bottou, Bengio and Haffner 1998, Gradient-based learning applied to document recognition, Proc. IEEE 86, https://doi.org/10.1109/5.726791",
    minutes=1,
    expects={"test_accuracy": (0.98, None)},
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
