"""Images and texts that belong together, and an image tower and a text tower that learn to match them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge
from jaxtyping import Array, Float, Key, PyTree

from jaxdl import pretrained
from jaxdl.data import CAPTIONED_IMAGES, Cached, CaptionedImage, Source
from jaxdl.data.augment import Example, random_flip, random_resized_crop
from jaxdl.data.image import ImageProcessor
from jaxdl.data.images import template_captions
from jaxdl.data.text import Tokenizer
from jaxdl.models.siglip import SigLIP, TextTower, VisionTower
from jaxdl.tasks.kept import kept_tokenizer
from jaxdl.tasks.resized import resized
from jaxdl.tasks.retrieval import Embedder, Inputs, Matching, rank_texts
from jaxdl.training import (
    OPTIMIZERS,
    Aux,
    Batch,
    Model,
    Run,
    TrainState,
    configured,
    load_model,
    published_folder,
    setup_training,
    train,
)

Augment = Callable[[Example, np.random.Generator], Example]
AUGMENTATIONS: dict[str, Augment] = {
    "none": lambda example, rng: example,
    "flip": random_flip,
    "crop": lambda example, rng: random_flip(random_resized_crop(example, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)), rng),
}


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """The size of an image tower, and what its training images are like."""

    resolution: Annotated[int, Ge(1)] = 32
    """Side of the square that every image is resized to, in pixels: a multiple of the patch."""
    patch_size: Annotated[int, Ge(1)] = 8
    """Side of a patch, in pixels."""
    width: Annotated[int, Ge(1)] = 64
    """Width of the image tower, and of the embeddings that come out of it."""
    depth: Annotated[int, Ge(1)] = 2
    """Blocks of the image tower."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Attention heads of a tower; they divide its width."""
    augment: Literal[*AUGMENTATIONS] = "none"
    """What is done to training images: nothing, mirroring, or mirroring and random crops (50 to 100 % of the area). Boxes follow; after mirroring "left of" is wrong."""

    def vision_fields(self) -> dict[str, int]:
        """The sizes as a `VisionTower` takes them."""
        sizes = dict(patch_size=self.patch_size, width=self.width, depth=self.depth, mlp_dim=4 * self.width)
        return sizes | dict(num_heads=self.num_heads)


@dataclasses.dataclass(frozen=True)
class TwoTowers(ImageTower):
    """The sizes of an image tower and a text tower, and how they are trained and measured."""

    text_width: Annotated[int, Ge(1)] = 64
    """Width of the text tower."""
    text_depth: Annotated[int, Ge(1)] = 1
    """Blocks of the text tower."""
    text_length: Annotated[int, Ge(2)] = 18
    """Tokens of a text, the one for its end included; longer ones are cut."""
    tokenizer: str = ""
    """A published tokenizer.json or spiece.model. Empty: one is trained on the captions and kept in the run."""
    vocab_size: Annotated[int, Ge(300)] = 1000
    """Largest vocabulary of a tokenizer that is trained."""
    optimizer: Literal[*OPTIMIZERS] = "muon"
    """AdamW, which the presets with the papers' settings take, or Muon."""
    chunk_size: Annotated[int, Ge(0)] = 0
    """Texts that a device compares its images with at a time, to save memory. 0: all of its own texts."""
    eval_examples: Annotated[int, Ge(2)] = 256
    """Held-out images with distinct captions for retrieval."""

    def text_fields(self) -> dict[str, int]:
        """The sizes as a `TextTower` takes them, but for the vocabulary."""
        sizes = dict(width=self.text_width, depth=self.text_depth, mlp_dim=4 * self.text_width)
        return sizes | dict(num_heads=self.num_heads, features=self.width)


_SMALL = dict(data="builtin:scenes", steps=3000, batch_size=128, learning_rate=0.02, warmup=0.025, evaluate_every=500)
SETTINGS: dict[str, dict[str, Any]] = {
    "default": _SMALL,
    "digits": _SMALL | dict(data="builtin:digits", steps=400, text_length=8),
    "photos": _SMALL | dict(
        resolution=96, patch_size=16, width=128, depth=4, text_width=128, text_depth=2, text_length=24, vocab_size=4000,
        steps=1200, augment="crop", eval_examples=500, weight_decay=0.1, evaluate_every=300,
    ),
    "finetune": _SMALL | dict(
        steps=2000, batch_size=64, optimizer="adamw", learning_rate=1e-5, augment="crop", precision="bf16", eval_examples=500,
    ),
}  # fmt: skip
"""Settings of runs in which families of two towers can be compared with each other: three small ones, and for published weights."""


def open_pairs(run: Run) -> tuple[Source[CaptionedImage], Source[CaptionedImage]]:
    """The images to train on and those held out, as the run's config names them, without those that have no caption. Raises `UserError` for data that is not there, or has neither captions nor classes."""
    config = run.config
    options = dict(data_dir=config.data_dir, resolution=config.resolution)
    train, held_out = CAPTIONED_IMAGES.open(config.data, config.eval_data, **options)
    run.reads(train, held_out)
    return Cached(train), held_out


class Towers(NamedTuple):
    """Two towers, ready to be trained."""

    module: nn.Module
    params: PyTree | None
    """None where they begin at random."""
    inputs: Inputs


def load_towers(name: str, expected: type[nn.Module], **fields: Any) -> Towers:
    """Those of a finished run, of a folder, or of the hub, with what prepares their inputs; `fields` are the module's. Raises `UserError` where `load_model` does, and for weights of another family than `expected`."""
    module, params = load_model(name, expected, param_dtype=jnp.float32, **fields)
    process, tokenizer = pretrained.load_processors(published_folder(name))
    return Towers(module, params, Inputs(process, tokenizer, len(params["text"]["positions"]["table"])))


def new_inputs(run: Run, source: Source[CaptionedImage], process: ImageProcessor) -> Inputs:
    """Inputs with the tokenizer that the run's config names, or the one that the run keeps, which is trained on the captions if it is not there yet."""
    config = run.config
    if config.tokenizer:
        tokenizer = pretrained.load_tokenizer(config.tokenizer)
    else:
        tokenizer = kept_tokenizer(run.directory, lambda: Tokenizer.train(caption_texts(source), config.vocab_size))
    return Inputs(process, tokenizer, config.text_length)


def caption_texts(source: Source[CaptionedImage]) -> list[str]:
    """What a tokenizer is trained on: the captions of the first 10,000 images; those that come from classes once each, and those of all classes."""
    captions = [text for index in range(min(len(source), 10_000)) for text in source.annotations(index).captions]
    if not source.info.classes:
        return captions
    return list(dict.fromkeys(itertools.chain(*template_captions(source.info.classes), captions)))


def new_siglip(config: TwoTowers, vocab_size: int, **fields: Any) -> SigLIP:
    """SigLIP of the config's sizes; `fields` are those of both towers."""
    vision = VisionTower(**config.vision_fields(), **fields)
    return SigLIP(vision, TextTower(vocab_size=vocab_size, **config.text_fields(), **fields))


def train_towers(
    run: Run,
    source: Source[CaptionedImage],
    held_out: Source[CaptionedImage],
    towers: Towers,
    loss: Callable[..., Float[Array, ""]],
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
    ask: Sequence[str] = (),
    **fields: Any,
) -> dict[str, Any]:
    """Trains two towers as the run's config says, measures, draws, and returns what is in `result.json`.

    `loss` compares the images of a batch with its texts: it takes the entries of the module's output, in their order, `chunk_size` and `axis_name`. `ask` is an image file and texts that the finished model ranks. `fields` are further ones of the update, such as `project`.
    """
    config, (module, params, inputs) = run.config, towers
    compare = run.layout.shard_objective(functools.partial(loss, chunk_size=config.chunk_size or None))
    update = configured(config, functools.partial(objective, module, compare), optimizer, **fields)
    image, tokens = jnp.asarray(inputs.process(source[0].image))[None], jnp.asarray(inputs.tokens([""]))
    init = lambda key: module.init(key, image, tokens)
    step, state = setup_training(config, run.layout, update, init=init, params=params)
    batches = run.batches(source, functools.partial(row, augment=AUGMENTATIONS[config.augment], inputs=inputs))
    answer = rank_texts(Embedder(module, inputs, run.layout), ask, run.say)
    held_out, process = resized(held_out, inputs.process)
    matching = Matching(
        Embedder(module, dataclasses.replace(inputs, process=process), run.layout), held_out, config.eval_examples
    )
    model = Model(module, inputs.tokenizer, inputs.process)
    return train(run, step, state, batches, evaluate=matching.evaluate, show=matching.show, answer=answer, model=model)


def row(example: CaptionedImage, rng: np.random.Generator, *, augment: Augment, inputs: Inputs) -> dict[str, np.ndarray]:
    """An image and one of its captions, drawn at random, as the model takes them."""
    image = inputs.process(augment(example, rng).image)
    caption = example.captions[rng.integers(len(example.captions))]
    return {"image": image, "tokens": inputs.tokens([caption])[0]}


def objective(
    module: nn.Module,
    compare: Callable[..., Float[Array, ""]],
    params: PyTree,
    state: TrainState,
    batch: Batch,
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], Aux]:
    """How badly the images and texts of a batch are matched. To look at: scale (the inverse of the temperature) and, where there is one, bias of the logits."""
    out = vars(module.apply({"params": params}, batch["image"], batch["tokens"], train=True, rngs={"dropout": key}))
    bias = {"logit_bias": out["bias"]} if "bias" in out else {}
    return compare(*out.values()), Aux({"logit_scale": jnp.exp(out["log_temperature"]), **bias})
