"""SigLIP: sigmoid loss for language–image pre-training (Zhai et al. 2023, arXiv:2303.15343).

An image tower and a text tower learn to say of every image and every text of a batch whether they belong together. Then each finds the other among hundreds, and a picture is classified by texts that name the classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Gt, Lt
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from jaxdl import figures, launch, pretrained
from jaxdl.data import Cached, Source, open_told, scenes, train_batches
from jaxdl.data.image import ImageProcessor, random_flip, random_resized_crop
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.losses import sigmoid_loss
from jaxdl.metrics import accuracy, recall_at
from jaxdl.models.siglip import VARIANTS, SigLIP, TextTower, VisionTower
from jaxdl.nn import ATTENTIONS
from jaxdl.training import OPTIMIZERS, Aux, Batch, Execution, Layout, Run, TrainState, fit, start

TEMPLATES = ("a photo of {}", "a picture of {}", "this is {}", "{}")
"""Captions of a labelled picture, and the prompts that its class is recognised by."""

Augment = Callable[[UInt8[np.ndarray, "H W C"], np.random.Generator], UInt8[np.ndarray, "h w C"]]
AUGMENTATIONS: dict[str, Augment] = {
    "none": lambda image, rng: image,
    "flip": random_flip,
    "crop": lambda image, rng: random_flip(random_resized_crop(image, rng, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3)), rng),
}

Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "B T"]]


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes."""

    steps: Annotated[int, Ge(1)] = 3000
    batch_size: Annotated[int, Ge(1)] = 128
    learning_rate: Annotated[float, Gt(0)] = 0.02
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.025
    evaluate_every: Annotated[int, Ge(1)] = 500
    optimizer: Literal[*OPTIMIZERS] = "muon"
    """AdamW, which the presets with the paper's settings take, or Muon."""
    init: str = ""
    """Fine-tune from these weights: a folder with config.json and *.safetensors, or a name on the Hugging Face hub. The sizes below are then its own."""
    variant: Literal[("", *VARIANTS)] = ""
    """A published size. Empty: the sizes that follow."""
    resolution: Annotated[int, Ge(1)] = 32
    """Side of the square that every picture is resized to, in pixels: a multiple of the patch."""
    patch: Annotated[int, Ge(1)] = 8
    """Side of a patch, in pixels."""
    width: Annotated[int, Ge(1)] = 64
    """Width of the image tower, and of the embeddings."""
    depth: Annotated[int, Ge(1)] = 2
    """Blocks of the image tower."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Attention heads of both towers; they divide the widths."""
    text_width: Annotated[int, Ge(1)] = 64
    """Width of the text tower."""
    text_depth: Annotated[int, Ge(1)] = 1
    """Blocks of the text tower."""
    text_length: Annotated[int, Ge(2)] = 18
    """Tokens of a text, the one for its end included; longer ones are cut."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of activations that are dropped in both towers."""
    attention: Literal[*ATTENTIONS] = "plain"
    """Of both towers: the plain form, or the flash form in tiles."""
    remat: bool = False
    """Compute the activations of a block again in the backward pass, and keep only what goes from block to block: less memory, a third more time."""
    scan_layers: bool = False
    """Compile one block of each tower and run it as often as it is deep: quick to compile for deep towers."""
    tokenizer: str = ""
    """A published tokenizer.json or spiece.model. Empty: one is trained on the captions and kept in the run."""
    vocabulary: Annotated[int, Ge(300)] = 1000
    """Largest vocabulary of a tokenizer that is trained."""
    chunk_size: Annotated[int, Ge(0)] = 0
    """Texts that a device compares its images with at a time, to save memory. 0: all of its own texts."""
    augment: Literal[*AUGMENTATIONS] = "none"
    """What is done to training pictures: nothing, mirroring, or mirroring and random crops. Mirroring makes "left of" wrong."""
    eval_examples: Annotated[int, Ge(2)] = 256
    """Held-out pictures with distinct captions for retrieval."""


# The paper's own training: batches of 32k, β2 = 0.95, learning rate 1e-3, weight decay 1e-4, 40 billion examples seen.
_PAPER = Config(
    steps=1_220_703, batch_size=32_768, optimizer="adamw", learning_rate=1e-3, weight_decay=1e-4, warmup=0.01,
    precision="bf16", evaluate_every=10_000, eval_examples=1000, vocabulary=32_000, text_length=64, chunk_size=1024,
)  # fmt: skip

PRESETS = {
    "default": Config(),
    "digits": Config(preset="digits", data="builtin:digits", steps=400, text_length=8),
    "photos": Config(
        preset="photos", resolution=96, patch=16, width=128, depth=4, text_width=128, text_depth=2, text_length=24, vocabulary=4000,
        steps=1200, augment="crop", eval_examples=500, weight_decay=0.1, evaluate_every=300,
    ),
    "b16_224": dataclasses.replace(_PAPER, preset="b16_224", variant="B/16", resolution=224),
    "b16_256": dataclasses.replace(_PAPER, preset="b16_256", variant="B/16", resolution=256),
    "l16_256": dataclasses.replace(_PAPER, preset="l16_256", variant="L/16", resolution=256),
    "so400m_14_224": dataclasses.replace(_PAPER, preset="so400m_14_224", variant="So400m/14", resolution=224, text_length=16),
    "finetune": Config(
        preset="finetune", init="google/siglip-base-patch16-224", steps=2000, batch_size=64, optimizer="adamw", learning_rate=1e-5,
        augment="crop", precision="bf16", eval_examples=500,
    ),
}  # fmt: skip


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, draws, and returns what is in its `result.json`."""
    return train(SIGLIP, config, workdir, execution)


@dataclasses.dataclass(frozen=True)
class Family:
    """What is a family's own in this experiment. CLIP's is in `experiments/clip.py`."""

    name: str
    """Of the experiment, and of the preset of `ImageProcessor`."""
    module: type[nn.Module]
    towers: Callable[..., nn.Module]
    """`(config, tokenizer, **fields)`: the module of the sizes that the config says, for the tokens of that tokenizer."""
    objective: Callable[..., Float[Array, ""]]
    loss: Callable[..., tuple[Float[Array, ""], Aux]]
    """`(module, objective, params, variables, batch, key)`, with the objective as the layout spreads it over devices."""
    optimizer: Callable[[Config, optax.Schedule], optax.GradientTransformation]


def train(family: Family, config: Config, workdir: str | Path, execution: Execution) -> dict[str, Any]:
    """The experiment of any family of two towers."""
    with Run.open(workdir, family.name, config, execution) as run:
        how = dict(data_dir=config.data_dir, resolution=config.resolution)
        source, held_out = open_told(config.data, config.eval_data, lambda told: "text" in told, **how)
        for spec, opened in ((config.data, source), (config.eval_data or config.data, held_out)):
            if not (opened.classes or (hasattr(opened, "texts") and len(opened))):
                raise UserError(f"{spec} has neither captions nor labels: choose a data set of pictures that has")
            if left_out := getattr(opened, "left_out", 0):
                run.say(f"{spec}: {left_out:,} of {left_out + len(opened):,} pictures have no caption and are left out")
        with run.first_process_first():
            module, params, process, tokenize = build(family, config, source, run.directory)
        embed = Embedder(module, process, tokenize, run.layout)
        retrieval, tasks = Retrieval.among(held_out, config.eval_examples), zero_shot_tasks(held_out)

        transform = functools.partial(
            pair, augment=AUGMENTATIONS[config.augment], process=process, tokenize=tokenize, classes=source.classes
        )
        batches = train_batches(Cached(source), transform, batch_size=config.batch_size, seed=config.seed, **run.shard)
        images, tokens = jnp.asarray(process(source[0]["image"]))[None], jnp.asarray(tokenize([""]))
        objective = run.layout.over_batch(functools.partial(family.objective, chunk_size=config.chunk_size or None))
        step, state = start(
            config,
            run.layout,
            functools.partial(family.loss, module, objective),
            functools.partial(family.optimizer, config),
            lambda key: module.init(key, images, tokens),
            params,
        )

        evaluate = functools.partial(measure, embed, retrieval, tasks)
        state = fit(step, state, batches, run, steps=config.steps, evaluate=evaluate, evaluate_every=config.evaluate_every)
        metrics = evaluate(state)
        draw(embed, retrieval, tasks, state, run.figures)
        return run.finish(state, metrics)


def build(
    family: Family, config: Config, source: Source, directory: Path
) -> tuple[nn.Module, PyTree | None, ImageProcessor, Tokenize]:
    """The module, its published parameters if there are any, and what turns pictures and texts into its input."""
    fields = dict(
        attention=ATTENTIONS[config.attention],
        dropout=config.dropout,
        remat=config.remat,
        dtype=jnp.bfloat16 if config.precision == "bf16" else None,
    )
    if config.init:
        module, params = pretrained.load(config.init, family.module, param_dtype=jnp.float32, scan=config.scan_layers, **fields)
        process, tokenizer = pretrained.load_processors(config.init)
        return module, params, process, functools.partial(tokenizer, length=len(params["text"]["positions"]["table"]))

    tokenizer = load_tokenizer(config, source, directory)
    module = family.towers(config, tokenizer, scan=config.scan_layers, **fields)
    process = ImageProcessor.preset(family.name, config.resolution)
    return module, None, process, functools.partial(tokenizer, length=config.text_length)


def towers(config: Config, tokenizer: Tokenizer, **fields: Any) -> SigLIP:
    """The published size that the config names, with the vocabulary of the tokenizer, or the sizes that it gives."""
    if config.variant:
        module = SigLIP.variant(config.variant, **fields)
        return module.clone(text=module.text.clone(vocabulary=tokenizer.vocabulary))
    vision = dict(patch=config.patch, width=config.width, depth=config.depth, hidden=4 * config.width)
    text = dict(width=config.text_width, depth=config.text_depth, hidden=4 * config.text_width)
    fields |= dict(num_heads=config.num_heads)
    return SigLIP(
        VisionTower(**vision, **fields), TextTower(vocabulary=tokenizer.vocabulary, features=config.width, **text, **fields)
    )


def load_tokenizer(config: Config, source: Source, directory: Path) -> Tokenizer:
    """The published one, the run's own, or a new one, trained on the captions and kept in the run."""
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer)
    if not (directory / "tokenizer.json").exists():
        if source.classes:
            texts = [template.format(name) for name in source.classes for template in TEMPLATES]
        else:
            texts = [text for index in range(min(len(source), 10_000)) for text in source.texts(index)]
        Tokenizer.train(texts, vocabulary=config.vocabulary).save(directory)
    return Tokenizer.load(directory)


def captions(example: dict[str, Any], classes: Sequence[str]) -> tuple[str, ...]:
    """An example's own captions, or those that its class makes."""
    return example["text"] if "text" in example else tuple(template.format(classes[example["label"]]) for template in TEMPLATES)


def pair(
    example: dict[str, Any],
    rng: np.random.Generator,
    *,
    augment: Augment,
    process: ImageProcessor,
    tokenize: Tokenize,
    classes: Sequence[str],
) -> dict[str, np.ndarray]:
    """A picture and one of its captions, drawn at random, as the model takes them."""
    image = process(augment(example["image"], rng))
    texts = captions(example, classes)
    return {"image": image, "tokens": tokenize([texts[rng.integers(len(texts))]])[0]}


def loss(
    module: SigLIP,
    objective: Callable[..., Float[Array, ""]],
    params: PyTree,
    variables: dict[str, PyTree],
    batch: Batch,
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], Aux]:
    """The sigmoid loss of a batch, with scale (the inverse of the temperature) and bias of the logits to look at."""
    out = module.apply({"params": params}, batch["image"], batch["tokens"], train=True, rngs={"dropout": key})
    value = objective(out.image_embeddings, out.text_embeddings, out.log_temperature, out.bias)
    return value, Aux({"logit_scale": jnp.exp(out.log_temperature), "logit_bias": out.bias})


SIGLIP = Family(
    "siglip",
    SigLIP,
    towers,
    sigmoid_loss,
    loss,
    lambda config, schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay),
)


class Embedder:
    """Embeddings of held-out pictures and texts."""

    def __init__(self, module: nn.Module, process: ImageProcessor, tokenize: Tokenize, layout: Layout):
        self.process, self.tokenize = process, tokenize
        self._images = layout.inference(functools.partial(module.apply, method="embed_images"))
        self._texts = layout.inference(functools.partial(module.apply, method="embed_texts"))

    def images(self, params: PyTree, images: Iterable[UInt8[np.ndarray, "_ _ _"]]) -> Float[np.ndarray, "I D"]:
        return self._images({"params": params}, map(self.process, images))

    def texts(self, params: PyTree, texts: Sequence[str]) -> Float[np.ndarray, "J D"]:
        return self._texts({"params": params}, self.tokenize(texts))


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Pictures that belong to distinct texts, place by place."""

    images: list[UInt8[np.ndarray, "_ _ _"]]
    texts: list[str]

    @classmethod
    def among(cls, source: Source, count: int) -> "Retrieval | None":
        """The first `count` examples whose first captions differ; None if the source is labelled, since its captions repeat."""
        if source.classes:
            return None
        chosen: dict[str, np.ndarray] = {}
        for index in range(len(source)):
            example = source[index]
            chosen.setdefault(example["text"][0], example["image"])
            if len(chosen) == count:
                break
        return cls(list(chosen.values()), list(chosen))

    def similarity(self, embed: Embedder, params: PyTree) -> Float[np.ndarray, "I J"]:
        return embed.images(params, self.images) @ embed.texts(params, self.texts).T


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Classification by text: a class is the mean of the embeddings of its prompts (Radford et al. 2021, section 3.1.4)."""

    name: str
    source: Source
    indices: list[int]
    labels: Int[np.ndarray, "I"]
    prompts: list[list[str]]

    def scores(self, embed: Embedder, params: PyTree, count: int | None = None) -> Float[np.ndarray, "I C"]:
        """Cosine similarity of the first `count` pictures (all of them by default) to each class."""
        classes = np.stack([embed.texts(params, prompts).mean(axis=0) for prompts in self.prompts])
        classes /= np.linalg.norm(classes, axis=1, keepdims=True)
        return embed.images(params, (self.source[index]["image"] for index in self.indices[:count])) @ classes.T


def zero_shot_tasks(source: Source) -> list[ZeroShot]:
    """What can be asked of a source: its classes; for scenes, the colour and the shape of a thing that is alone; else nothing."""
    if isinstance(source, scenes.Scenes):
        described = [scenes.scene(source.seed, index) for index in range(len(source))]
        alone = [index for index, scene in enumerate(described) if len(scene.things) == 1]
        things = [described[index].things[0] for index in alone]
        name = lambda color, shape: [f"a {size} {color} {shape}" for size in scenes.SIZES]
        by_color = [[text for shape in scenes.SHAPES for text in name(color, shape)] for color in scenes.COLORS]
        by_shape = [[text for color in scenes.COLORS for text in name(color, shape)] for shape in scenes.SHAPES]
        colors = np.array([list(scenes.COLORS).index(thing.color) for thing in things])
        shapes = np.array([scenes.SHAPES.index(thing.shape) for thing in things])
        return [ZeroShot("color", source, alone, colors, by_color), ZeroShot("shape", source, alone, shapes, by_shape)]
    if source.classes:
        labels = np.array([source[index]["label"] for index in range(len(source))])
        prompts = [[template.format(name) for template in TEMPLATES] for name in source.classes]
        return [ZeroShot("class", source, list(range(len(source))), labels, prompts)]
    return []


def measure(embed: Embedder, retrieval: Retrieval | None, tasks: list[ZeroShot], state: TrainState) -> dict[str, float]:
    """Recall in both directions, and zero-shot accuracy with its parts, as far as the data allows."""
    metrics: dict[str, float] = {}
    if retrieval:
        similarity = retrieval.similarity(embed, state.measured)
        metrics |= {f"image_to_text_recall_at_{k}": value for k, value in recall_at(similarity).items()}
        metrics |= {f"text_to_image_recall_at_{k}": value for k, value in recall_at(similarity.T).items()}
    parts = {task.name: accuracy(task.scores(embed, state.measured), task.labels) for task in tasks}
    if parts:
        metrics["zero_shot_accuracy"] = float(np.mean(list(parts.values())))
    if len(parts) > 1:
        metrics |= {f"zero_shot_accuracy_{name}": value for name, value in parts.items()}
    return metrics


def draw(embed: Embedder, retrieval: Retrieval | None, tasks: list[ZeroShot], state: TrainState, directory: Path) -> None:
    """The similarity matrix, what was found both ways, and classifications."""
    if retrieval:
        similarity = retrieval.similarity(embed, state.measured)
        shown = range(min(8, len(retrieval.texts)))
        figures.similarity_matrix(similarity[:64, :64], directory / "similarity.png", title="held-out pictures and texts")
        figures.ranked_texts(
            [retrieval.images[i] for i in shown], retrieval.texts, similarity[shown], shown, directory / "image_to_text.png"
        )
        figures.ranked_images(
            [retrieval.texts[i] for i in shown], retrieval.images, similarity.T[shown], shown, directory / "text_to_image.png"
        )
    for task in tasks:
        scores = task.scores(embed, state.measured, 8)
        pictures = [task.source[index]["image"] for index in task.indices[:8]]
        figures.ranked_texts(
            pictures, [prompts[0] for prompts in task.prompts], scores, task.labels[:8], directory / f"zero_shot_{task.name}.png"
        )


EXPERIMENT = launch.Experiment(
    name="siglip",
    summary="An image and a text tower learn which pictures and texts belong together, pair by pair.",
    paper="Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343",
    result="recall@1 of 0.75 both ways among 256 held-out pictures, zero-shot colour and shape of 1.00",
    minutes=2,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
