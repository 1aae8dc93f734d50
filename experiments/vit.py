"""ViT: an image is worth 16×16 words (Dosovitskiy et al. 2021, arXiv:2010.11929).

A Transformer reads the patches of a picture and says what is on it. It knows nothing about pictures beforehand, so it lives on much data, on augmentation (mixup, CutMix, RandAugment), or on weights that were trained on other pictures (`--init`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from jaxdl import figures, launch, pretrained
from jaxdl.data import Source, open_labelled, some, train_batches
from jaxdl.data.augment import cutmix, mixup, rand_augment
from jaxdl.data.image import ImageProcessor, random_crop, random_flip, random_resized_crop
from jaxdl.losses import soft_cross_entropy
from jaxdl.metrics import accuracy, classify
from jaxdl.models.vit import POOLS, POSITIONS, VARIANTS, ViT, adapt
from jaxdl.nn import ATTENTIONS, attention_weights, stack_blocks
from jaxdl.training import OPTIMIZERS, Aux, Batch, Execution, Run, fit, matrices, start
from jaxdl.training.processes import is_first, whole

Augment = Callable[[UInt8[np.ndarray, "H W C"], np.random.Generator], UInt8[np.ndarray, "h w C"]]
AUGMENTATIONS: dict[str, Augment] = {
    # An eighth of the side: the four pixels of CIFAR-10 in He et al. 2016, section 4.2.
    "shift": lambda image, rng: random_crop(image, rng, min(image.shape[:2]) // 8),
    "crop": random_resized_crop,
    "flip": random_flip,
    "randaugment": rand_augment,
}

Mix = Callable[..., tuple[Float[np.ndarray, "H W C"], float]]
"""`(first, second, rng)` to a picture made of both, and the share of the first: `mixup` or `cutmix`."""


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes."""

    data: str = "builtin:digits"
    steps: Annotated[int, Ge(1)] = 1500
    batch_size: Annotated[int, Ge(1)] = 64
    learning_rate: Annotated[float, Gt(0)] = 0.01
    weight_decay: Annotated[float, Ge(0)] = 0.1
    evaluate_every: Annotated[int, Ge(1)] = 300
    optimizer: Literal[*OPTIMIZERS] = "muon"
    """AdamW, which the presets with the papers' settings take, or Muon."""
    init: str = ""
    """Fine-tune from these weights: a folder with config.json and *.safetensors, or a name on the Hugging Face hub. Sizes, pool and positions are then its own: these are interpolated to the resolution, and the head is a new one if the number of classes is another."""
    variant: Literal[("", *VARIANTS)] = ""
    """A published size. Empty: the sizes that follow."""
    resolution: Annotated[int, Ge(0)] = 0
    """Side of the square that every picture is brought to, in pixels: a multiple of the patch. 0: height and width of the first picture, or with --init that of its training."""
    patch: Annotated[int, Ge(1)] = 2
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
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of activations that are dropped."""
    stochastic_depth: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the examples that the last block is skipped for; fewer skip those before it."""
    attention: Literal[*ATTENTIONS] = "plain"
    """The plain form, or the flash form in tiles."""
    remat: bool = False
    """Compute the activations of a block again in the backward pass: less memory, a third more time."""
    scan_layers: bool = False
    """Compile one block and run it as often as the model is deep: quick to compile for deep models."""
    augment: tuple[Literal[*AUGMENTATIONS], ...] = ("shift",)
    """What is done to training pictures, in this order: moved by up to an eighth of their side, cropped (8 to 100 % of the area), mirrored, or distorted by two of RandAugment's distortions."""
    mixup: Annotated[float, Ge(0)] = 0.0
    """The α of mixup, which adds up a training picture and another one. 0: it does not."""
    cutmix: Annotated[float, Ge(0)] = 0.0
    """The α of CutMix, which puts a rectangle of another picture into a training picture. 0: it does not. With both, each is done to half of the pictures."""
    label_smoothing: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of a target that is spread over all classes."""


# Beyer et al. 2022 (arXiv:2205.01580), section 2: 90 passes over 1,281,167 pictures. Their decay of 1e-4 is a share of the weights at the peak of the schedule, where the learning rate is 1e-3.
_PLAIN = Config(
    data="tfds:imagenet2012", resolution=224, steps=112_600, batch_size=1024, optimizer="adamw", learning_rate=1e-3, warmup=0.0888,
    weight_decay=0.1, pool="mean", positions="sincos", augment=("crop", "flip", "randaugment"), mixup=0.2, precision="bf16",
    attention="flash", evaluate_every=5000,
)  # fmt: skip

PRESETS = {
    "default": Config(),
    "mnist": Config(preset="mnist", data="tfds:mnist", patch=4, steps=2000, evaluate_every=500),
    "cifar10": Config(
        preset="cifar10", data="tfds:cifar10", patch=4, width=128, steps=1800, evaluate_every=600, pool="mean", augment=("shift", "flip"),
    ),
    "s16": dataclasses.replace(_PLAIN, preset="s16", variant="S/16"),
    "b16": dataclasses.replace(_PLAIN, preset="b16", variant="B/16"),
    "finetune": Config(
        preset="finetune", init="google/vit-base-patch16-224-in21k", data="tfds:cifar10", steps=2000, batch_size=64,
        optimizer="adamw", learning_rate=3e-5, weight_decay=0.01, augment=("crop", "flip"), precision="bf16", evaluate_every=500,
    ),
}  # fmt: skip


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, draws, and returns what is in its `result.json`."""
    with Run.open(workdir, "vit", config, execution) as run:
        source, held_out = open_labelled(config.data, config.eval_data, data_dir=config.data_dir)
        module, params, process = build(config, source)
        transform = functools.partial(
            example,
            source=source,
            augment=[AUGMENTATIONS[name] for name in config.augment],
            # What is left of a random crop is seen whole, and not cropped once more.
            process=dataclasses.replace(process, fit="squash", shorter_side=None) if "crop" in config.augment else process,
            mixes=[
                functools.partial(mix, alpha=alpha) for mix, alpha in ((mixup, config.mixup), (cutmix, config.cutmix)) if alpha
            ],
        )
        batches = train_batches(source, transform, batch_size=config.batch_size, seed=config.seed, **run.shard)
        image = jnp.asarray(process(source[0]["image"]))[None]
        step, state = start(
            config,
            run.layout,
            functools.partial(loss, module, config.label_smoothing),
            lambda schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay, b2=0.999, mask=matrices),
            lambda key: module.init(key, image),
            params,
        )

        predict = run.layout.inference(lambda variables, images: module.apply(variables, images).logits)
        scores = lambda state: classify(functools.partial(predict, {"params": state.measured}), held_out, process)
        evaluate = lambda state: {"test_accuracy": accuracy(*scores(state))}
        state = fit(step, state, batches, run, steps=config.steps, evaluate=evaluate, evaluate_every=config.evaluate_every)
        logits, labels = scores(state)
        figures.confusion_matrix(labels, logits.argmax(1), held_out.classes, run.figures / "confusion.png")
        figures.mistakes(held_out, logits, labels, run.figures / "mistakes.png")
        params = jax.tree.map(whole, state.measured)
        if is_first():
            draw(module, params, process, held_out, logits, labels, run.figures / "attention_rollout.png")
        return run.finish(state, {"test_accuracy": accuracy(logits, labels)})


def build(config: Config, source: Source) -> tuple[ViT, PyTree | None, ImageProcessor]:
    """The module, its published parameters if there are any, and what turns held-out pictures into its input."""
    fields = dict(
        attention=ATTENTIONS[config.attention],
        dropout=config.dropout,
        remat=config.remat,
        dtype=jnp.bfloat16 if config.precision == "bf16" else None,
    )
    more = dict(stochastic_depth=config.stochastic_depth, scan=config.scan_layers)
    if config.init:
        module, params = pretrained.load(config.init, ViT, param_dtype=jnp.float32, **fields)
        process = pretrained.load_image_processor(config.init)
        if config.resolution:
            process = dataclasses.replace(process, size=(config.resolution,) * 2, shorter_side=None)
        module, params = adapt(module.clone(**more), params, size=process.size, classes=len(source.classes))
        return module, stack_blocks(params) if config.scan_layers else params, process

    fields |= dict(classes=len(source.classes), pool=config.pool, positions=config.positions, **more)
    if config.variant:
        module = ViT.variant(config.variant, **fields)
    else:
        module = ViT(config.patch, config.width, config.depth, config.num_heads, **fields)
    size = config.resolution or source[0]["image"].shape[:2]
    process = ImageProcessor.standardising((each["image"] for each in some(source, 10_000)), size, fit="crop")
    return module, None, process


def example(
    example: dict[str, Any],
    rng: np.random.Generator,
    *,
    source: Source,
    augment: Sequence[Augment],
    process: ImageProcessor,
    mixes: Sequence[Mix],
) -> dict[str, np.ndarray]:
    """A picture as the model takes it, and how much it is of each class: of one, unless it is mixed with another.

    The other is drawn from the whole data set, as the papers have it, and not from the batch: then the result does not depend on how batches are cut and spread, but twice as many pictures are read.
    """

    def prepared(example: dict[str, Any]) -> tuple[Float[np.ndarray, "H W C"], Float[np.ndarray, "K"]]:
        image = example["image"]
        for change in augment:
            image = change(image, rng)
        target = np.zeros(len(source.classes), np.float32)
        target[example["label"]] = 1
        return process(image), target

    image, target = prepared(example)
    if mixes:
        other, other_target = prepared(source[int(rng.integers(len(source)))])
        image, share = mixes[rng.integers(len(mixes))](image, other, rng)
        target = (share * target + (1 - share) * other_target).astype(np.float32)
    return {"image": image, "target": target}


def loss(
    module: ViT, smoothing: float, params: PyTree, variables: dict[str, PyTree], batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """Cross-entropy with the targets, in nats."""
    logits = module.apply({"params": params}, batch["image"], train=True, rngs={"dropout": key}).logits
    value = soft_cross_entropy(logits, batch["target"], smoothing=smoothing)
    return value, Aux({"train_accuracy": (logits.argmax(-1) == batch["target"].argmax(-1)).mean()})


def draw(
    module: ViT,
    params: PyTree,
    process: ImageProcessor,
    held_out: Source,
    logits: Float[np.ndarray, "I C"],
    labels: Int[np.ndarray, "I"],
    path: Path,
) -> None:
    """Where the answers come from, by attention rollout, for two pictures of each of some classes."""
    chosen = np.concatenate([np.flatnonzero(labels == label)[:2] for label in range(min(10, len(held_out.classes)))])
    pictures = [held_out[int(index)]["image"] for index in chosen]
    images = np.stack([process(picture) for picture in pictures])
    chances = np.asarray(jax.nn.softmax(logits[chosen]))
    titles = [
        f"{held_out.classes[row.argmax()]} {row.max():.0%}" + ("" if row.argmax() == label else f"\nis {held_out.classes[label]}")
        for row, label in zip(chances, labels[chosen])
    ]
    figures.looked_at([process.resize(picture) for picture in pictures], looks(module, params, images), titles, path)


def looks(module: ViT, params: PyTree, images: Float[np.ndarray, "B H W C"]) -> Float[np.ndarray, "B rows columns"]:
    """How much of each patch has come to the answer, by attention rollout; for each picture the shares sum to 1.

    One picture after another: the weights of all blocks are there at once, and those of many pictures may be more than fits.
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
    return shares.reshape(len(images), images.shape[1] // module.patch, images.shape[2] // module.patch)


EXPERIMENT = launch.Experiment(
    name="vit",
    summary="A Transformer on the patches of a picture learns to say what is on it.",
    paper="Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, arXiv:2010.11929",
    result="test accuracy of 0.98 on scikit-learn's digits",
    minutes=1,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
