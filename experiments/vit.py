"""ViT: an image is worth 16×16 words (Dosovitskiy et al. 2021, arXiv:2010.11929).

A Transformer reads the patches of a picture and says what is on it. It knows nothing about pictures beforehand, so it lives on much data, on augmentation (mixup, CutMix, RandAugment), or on weights that were trained on other pictures (`--init`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le, Lt
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import figures, launch, pretrained
from jaxdl.data import LabelledImage, Source
from jaxdl.data.augment import cutmix, mixup, rand_augment, random_flip, random_resized_crop, random_shift
from jaxdl.data.image import ImageProcessor
from jaxdl.losses import soft_cross_entropy
from jaxdl.models.vit import POOLS, POSITIONS, VARIANTS, ViT, adapt
from jaxdl.nn import attention_weights, stack_blocks
from jaxdl.tasks.classification import Classification, fit_processor, open_images
from jaxdl.training import (
    OPTIMIZERS,
    Aux,
    Batch,
    Model,
    Report,
    Run,
    TrainState,
    configured,
    decay_mask,
    load_model,
    published_folder,
    setup_training,
    to_host,
    train,
)

Augment = Callable[[LabelledImage, np.random.Generator], LabelledImage]
AUGMENTATIONS: dict[str, Augment] = {
    # An eighth of the side: the four pixels of CIFAR-10 in He et al. 2016, section 4.2.
    "shift": lambda example, rng: random_shift(example, rng, min(example.image.shape[:2]) // 8),
    "crop": random_resized_crop,
    "flip": random_flip,
    "randaugment": lambda example, rng: dataclasses.replace(example, image=rand_augment(example.image, rng)),
}

Mix = Callable[..., tuple[Float[np.ndarray, "H W C"], float]]
"""`(first, second, rng)` to an image made of both, and the share of the first: `mixup` or `cutmix`."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Transformer, launch.Init, launch.Ask):
    """What this experiment computes."""

    optimizer: Literal[*OPTIMIZERS] = "adamw"
    """AdamW, which the presets with the papers' settings take, or Muon."""
    variant: Literal[("", *VARIANTS)] = ""
    """A published size. Empty: the sizes that follow."""
    resolution: Annotated[int, Ge(0)] = 0
    """Side of the square that every image is brought to, in pixels: a multiple of the patch. 0: height and width of the first image, or with --init that of its training."""
    patch_size: Annotated[int, Ge(1)] = 4
    """Side of a patch, in pixels."""
    width: Annotated[int, Ge(1)] = 64
    """Of the residual stream."""
    depth: Annotated[int, Ge(1)] = 4
    """Blocks."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Attention heads; they divide the width."""
    pool: Literal[POOLS] = "class"
    """How the places become one vector: by a class token, their mean, or attention with a learned query (MAP)."""
    positions: Literal[POSITIONS] = "learned"
    """Learned, or fixed sines and cosines of row and column."""
    stochastic_depth: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the examples that the last block is skipped for; fewer skip those before it."""
    augment: tuple[Literal[*AUGMENTATIONS], ...] = ()
    """What is done to training images, in this order: moved by up to an eighth of their side, cropped (8 to 100 % of the area), mirrored, or distorted by two of RandAugment's distortions."""
    mixup: Annotated[float, Ge(0)] = 0.0
    """The α of mixup, which adds up a training image and another one. 0: it does not."""
    cutmix: Annotated[float, Ge(0)] = 0.0
    """The α of CutMix, which puts a rectangle of another image into a training image. 0: it does not. With both, each is done to half of the images."""
    label_smoothing: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of a target that is spread over all classes."""


_SMALL = Config(
    data="builtin:digits", steps=1500, batch_size=64, learning_rate=0.01, weight_decay=0.1, evaluate_every=300, optimizer="muon",
    patch_size=2, augment=("shift",),
)  # fmt: skip
# Beyer et al. 2022 (arXiv:2205.01580), section 2: 90 passes over 1,281,167 images. Their decay of 1e-4 is a share of the weights at the peak of the schedule, where the learning rate is 1e-3.
_PLAIN = Config(
    data="tfds:imagenet2012", resolution=224, steps=112_600, batch_size=1024, learning_rate=1e-3, warmup=0.0888, weight_decay=0.1,
    pool="mean", positions="sincos", augment=("crop", "flip", "randaugment"), mixup=0.2, precision="bf16", attention="flash",
    evaluate_every=5000,
)  # fmt: skip

PRESETS = {
    "default": _SMALL,
    "mnist": dataclasses.replace(_SMALL, data="tfds:mnist", patch_size=4, steps=2000, evaluate_every=500),
    "cifar10": dataclasses.replace(
        _SMALL, data="tfds:cifar10", patch_size=4, width=128, steps=1800, evaluate_every=600, pool="mean", augment=("shift", "flip")
    ),
    "s16": dataclasses.replace(_PLAIN, variant="S/16"),
    "b16": dataclasses.replace(_PLAIN, variant="B/16"),
    "finetune": Config(
        init="google/vit-base-patch16-224-in21k", data="tfds:cifar10", steps=2000, batch_size=64, learning_rate=3e-5,
        weight_decay=0.01, augment=("crop", "flip"), precision="bf16", evaluate_every=500,
    ),
}  # fmt: skip


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, draws, and returns what is in `result.json`."""
    source, held_out = open_images(run)
    module, params, process = build(config, source)
    batches = run.batches(source, transform_of(config, source, process))
    image = jnp.asarray(process(source[0].image))[None]
    update = configured(
        config,
        functools.partial(objective, module, config.label_smoothing),
        lambda schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay, b2=0.999, mask=decay_mask),
    )
    step, state = setup_training(config, run.layout, update, init=lambda key: module.init(key, image), params=params)

    recognised = Classification(run, lambda variables, images: module.apply(variables, images).logits, held_out, process)

    def show(variables: PyTree, key: Key[Array, ""]) -> Report:
        params = jax.tree.map(to_host, variables["params"])
        return recognised.show(variables, key) | {"attention_rollout": rollout(module, params, recognised, variables)}

    model = Model(module, process=process)
    return train(
        run, step, state, batches, evaluate=recognised.evaluate, show=show, answer=recognised.answer(config.ask), model=model
    )


def build(config: Config, source: Source[LabelledImage]) -> tuple[ViT, PyTree | None, ImageProcessor]:
    """The module, its parameters if they were trained before, and what turns held-out images into its input."""
    fields, more = config.layer_fields(), dict(stochastic_depth=config.stochastic_depth, scan=config.scan_layers)
    classes = len(source.info.classes)
    if config.init:
        module, params = load_model(config.init, ViT, param_dtype=jnp.float32, **fields | dict(scan=False))
        process = pretrained.load_image_processor(published_folder(config.init))
        if config.resolution:
            process = dataclasses.replace(process, size=(config.resolution,) * 2, shorter_side=None)
        module, params = adapt(module.clone(**more), params, size=process.size, num_classes=classes)
        return module, stack_blocks(params) if config.scan_layers else params, process

    fields |= more | dict(num_classes=classes, pool=config.pool, positions=config.positions)
    if config.variant:
        module = ViT.variant(config.variant, **fields)
    else:
        module = ViT(config.patch_size, config.width, config.depth, config.num_heads, **fields)
    return module, None, fit_processor(source, config.resolution, resize_mode="crop")


def transform_of(config: Config, source: Source[LabelledImage], process: ImageProcessor) -> Callable[..., dict[str, np.ndarray]]:
    """How an example becomes a row of a batch, as the config has it."""
    mixes = [functools.partial(mix, alpha=alpha) for mix, alpha in ((mixup, config.mixup), (cutmix, config.cutmix)) if alpha]
    # What is left of a random crop is seen whole, and not cropped once more.
    process = dataclasses.replace(process, resize_mode="stretch", shorter_side=None) if "crop" in config.augment else process
    augment = [AUGMENTATIONS[name] for name in config.augment]
    return functools.partial(row, source=source, augment=augment, process=process, mixes=mixes)


def row(
    example: LabelledImage,
    rng: np.random.Generator,
    *,
    source: Source[LabelledImage],
    augment: Sequence[Augment],
    process: ImageProcessor,
    mixes: Sequence[Mix],
) -> dict[str, np.ndarray]:
    """An image as the model takes it, and how much it is of each class: of one, unless it is mixed with another.

    The other is drawn from the whole data set, as the papers have it, and not from the batch: then the result does not depend on how batches are cut and spread, but twice as many images are read.
    """

    def prepared(example: LabelledImage) -> tuple[Float[np.ndarray, "H W C"], Float[np.ndarray, "K"]]:
        for change in augment:
            example = change(example, rng)
        target = np.zeros(len(source.info.classes), np.float32)
        target[example.label] = 1
        return process(example.image), target

    image, target = prepared(example)
    if mixes:
        other, other_target = prepared(source[int(rng.integers(len(source)))])
        image, share = mixes[rng.integers(len(mixes))](image, other, rng)
        target = (share * target + (1 - share) * other_target).astype(np.float32)
    return {"image": image, "target": target}


def objective(
    module: ViT, smoothing: float, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """Cross-entropy with the targets, in nats."""
    logits = module.apply({"params": params}, batch["image"], train=True, rngs={"dropout": key}).logits
    value = soft_cross_entropy(logits, batch["target"], smoothing=smoothing)
    return value, Aux({"train_accuracy": (logits.argmax(-1) == batch["target"].argmax(-1)).mean()})


def rollout(module: ViT, params: PyTree, recognised: Classification, variables: PyTree) -> Any:
    """Where the answers come from, by attention rollout, for two images of each of some classes."""
    (logits, labels), held_out, process = recognised.scores(variables), recognised.held_out, recognised.process
    classes = held_out.info.classes
    chosen = np.concatenate([np.flatnonzero(labels == label)[:2] for label in range(min(10, len(classes)))])
    images = [held_out[int(index)].image for index in chosen]
    shares = looks(module, params, np.stack([process(image) for image in images]))
    titles = figures.verdicts(logits[chosen], labels[chosen], classes)
    return figures.rollout_maps([process.resize(image) for image in images], shares, titles)


def looks(module: ViT, params: PyTree, images: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B rows columns"]:
    """How much of each patch has come to the answer, by attention rollout; for each image the shares sum to 1.

    One image after another: the weights of all blocks are there at once, and those of many images may be more than fits.
    """
    return np.concatenate([_looks_at(module, params, image[None]) for image in images])


def _looks_at(module: ViT, params: PyTree, images: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B rows columns"]:
    weights = jax.device_get(attention_weights(module, params, jnp.asarray(images)))
    rollout = figures.attention_rollout(np.stack(weights[: module.depth]))
    match module.pool:
        case "class":
            shares = rollout[:, 0, 1:]
        case "mean":
            shares = rollout.mean(1)
        case "map":
            shares = (weights[-1].mean(1) @ rollout)[:, 0]
    shares = shares / shares.sum(1, keepdims=True)
    return shares.reshape(len(images), images.shape[1] // module.patch_size, images.shape[2] // module.patch_size)


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="vision",
    summary="A Transformer on the patches of an image learns to say what is on it.",
    paper="Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, arXiv:2010.11929",
    minutes=1,
    expects={"test_accuracy": (0.97, None)},
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
