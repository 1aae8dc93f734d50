"""PaliGemma: an image and a question go in, an answer in words comes out (Beyer et al. 2024, arXiv:2407.07726; PaliGemma 2: Steiner et al. 2024, arXiv:2412.03555).

One model answers questions, describes images, and says where things are: whatever is asked is text before the answer, and whatever is answered is text, boxes too, in words for places. SigLIP's image tower looks, and Gemma's decoder reads the patches and the question as a whole and writes. What is asked, and how answers are scored, is in `jaxdl.tasks.vision_language`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le, MinLen
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from jaxdl import figures, launch, pretrained
from jaxdl.data import AnnotatedImage, Source
from jaxdl.data.image import ImageProcessor, decode
from jaxdl.data.location_tokens import WORDS, words_to_boxes
from jaxdl.data.prompts import PromptProcessor
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.files import local_path
from jaxdl.losses import cross_entropy, sigmoid_loss
from jaxdl.models.gemma import Gemma
from jaxdl.models.paligemma import PaliGemma, answer
from jaxdl.models.siglip import SigLIP, VisionTower, image_processor
from jaxdl.tasks import image_text
from jaxdl.tasks.image_text import AUGMENTATIONS, ImageTower, TwoTowers
from jaxdl.tasks.kept import kept_tokenizer
from jaxdl.tasks.vision_language import (
    CATEGORIES,
    Answering,
    Category,
    EvalSet,
    Question,
    as_prompt,
    draw_question,
    open_questions,
    questions_about,
)
from jaxdl.training import (
    NOT_IDENTITY,
    OPTIMIZERS,
    Aux,
    Batch,
    Frozen,
    Layout,
    Model,
    Report,
    Run,
    TrainState,
    configured,
    decay_mask,
    is_first,
    load_model,
    published_folder,
    setup_training,
    train,
)


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, launch.Transformer, launch.Init, launch.Ask, ImageTower):
    """What this experiment computes."""

    optimizer: Literal[*OPTIMIZERS] = "muon"
    """AdamW, or Muon, which learns faster in short runs."""
    tasks: Annotated[tuple[Category, ...], MinLen(1)] = CATEGORIES
    """What is learned, each as often as the others where the data has it: to answer questions, to describe images, to say where things are."""
    captions: Literal["first", "any"] = "first"
    """Of an image's captions, the one to learn: the first, which in scenes is the most telling one, or any of them."""
    tower: str = ""
    """Begin with the image tower of a finished run of experiments.siglip, or of published SigLIP weights. Its sizes are then its own."""
    pretrain: Annotated[int, Ge(0)] = 1500
    """Where neither --init nor --tower names a tower: steps in which one learns by SigLIP on the same data first, as a run of its own in DIR/tower. The data has to have captions or labels then. 0: it begins at random, and learns from answers alone, which takes much longer."""
    freeze: Annotated[float, Ge(0), Le(1)] = 0.25
    """Share of the steps in which the image tower stays as it is, and only what is around it learns; after them all do. A tower that begins at random is not frozen."""
    text_width: Annotated[int, Ge(1)] = 96
    """Width of the decoder."""
    text_depth: Annotated[int, Ge(1)] = 3
    """Blocks of the decoder."""
    text_heads: Annotated[int, Ge(1)] = 4
    """Heads of the decoder's queries; keys and values have one for all of them."""
    head_width: Annotated[int, Ge(2)] = 24
    """Width of a head of the decoder: even, for its rotary positions."""
    length: Annotated[int, Ge(4)] = 28
    """Tokens of a question and its answer together. Longer answers are cut."""
    vocab_size: Annotated[int, Ge(100)] = 300
    """Largest vocabulary of a tokenizer that is trained, without the words for places and outlines."""
    eval_examples: Annotated[int, Ge(1)] = 256
    """Held-out images, each with one question of every kind."""
    ask: tuple[str, ...] = dataclasses.field(default=(), metadata=NOT_IDENTITY)
    """An image file, and what to ask about it. A finished run answers at once, and so do the weights of --init with --steps 0. What ends with a question mark is asked as `answer en ...?`, anything else, such as `detect ring` or `caption en`, is given as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ask) == 1:
            raise UserError("--ask wants an image file and at least one question: --ask scene.png 'what color is the ring?'")
        if self.init and self.tower:
            raise UserError("--init has an image tower, and so has --tower: give one of them")


_SMALL = Config(data="builtin:scenes", steps=3000, batch_size=32, learning_rate=0.01, warmup=0.05, evaluate_every=1000)

PRESETS = {
    "default": _SMALL,
    # A folder of photos with captions, such as Flickr8k.
    "photos": dataclasses.replace(
        _SMALL, tasks=("caption",), captions="any", resolution=96, patch_size=16, width=128, depth=4, text_width=128,
        head_width=32, steps=1500, pretrain=1200, augment="crop", dropout=0.1, vocab_size=2000, length=36, evaluate_every=500,
    ),
    # Published weights, whose decoder learns a task.
    "finetune": dataclasses.replace(
        _SMALL, init="google/paligemma-3b-pt-224", steps=1000, batch_size=16, optimizer="adamw", learning_rate=1e-5,
        weight_decay=1e-6, freeze=1.0, resolution=224, length=128, precision="bf16", remat=True, evaluate_every=250,
    ),
    # No training: --ask IMAGE QUESTION.
    "published": dataclasses.replace(_SMALL, init="google/paligemma-3b-mix-224", steps=0, length=128, precision="bf16"),
}  # fmt: skip


def main(config: Config, run: Run) -> dict[str, Any]:
    """Trains (or goes on training), measures, answers, draws, and returns what is in `result.json`. Weights of `--init` that have no steps to learn only answer, and nothing is returned."""
    image = decode(local_path(config.ask[0])) if config.ask else None
    if config.init and config.ask and not config.steps:
        with run.first_process_first():
            parts = initial_parts(config, "")
            process, prompts = published_processors(config, parts)
        ask(config, run, image, Answerer(config, parts.module, run.layout, process, prompts), {"params": parts.params})
        return {}

    asked = functools.partial(questions_of, config)
    source, held_out = open_questions(run, asked, f"have nothing for --tasks {' '.join(config.tasks)}")
    tower = config.tower or (pretrain(config, run) if config.pretrain and not config.init else "")
    with run.first_process_first():
        parts = initial_parts(config, tower)
        process, prompts = published_processors(config, parts) if config.init else new_processors(config, parts, source, run)
    module = parts.module or build(config, parts.vision, prompts)

    arrays = functools.partial(row, process=process, prompts=prompts, length=prompts.num_image_tokens + config.length)
    batches = run.batches(source, functools.partial(draw_row, config=config, classes=source.info.classes, arrays=arrays))
    eval_set = EvalSet.of(held_out, functools.partial(asked, classes=held_out.info.classes), config.eval_examples, process)
    rows = [arrays(image, question) for image, question in zip(eval_set.images, eval_set.questions)]
    update = configured(
        config,
        functools.partial(objective, module),
        lambda schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay, mask=decay_mask, embeddings=0.5),
        frozen=frozen(config) if config.init or tower else None,
    )
    init = lambda key: module.init(key, *(jnp.asarray(rows[0][name])[None] for name in ("image", "tokens", "prefix")))
    step, state = setup_training(config, run.layout, update, init=init, params=parts.params)

    losses = run.layout.inference(functools.partial(answer_losses, module), batch_size=32)
    answerer = Answerer(config, module, run.layout, process, prompts)
    answering = Answering(run, eval_set, answerer)

    def evaluate(variables: PyTree, key: Key[Array, ""]) -> Report:
        return {"validation_loss": float(losses(variables, rows).mean())} | answering.evaluate(variables, key)

    return train(
        run, step, state, batches,
        evaluate=evaluate,
        show=answering.show,
        conclude=answering.conclude,
        answer=functools.partial(ask, config, run, image, answerer) if config.ask else None,
        model=Model(module, prompts, process),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TowerConfig(launch.Config, launch.Transformer, TwoTowers):
    """What the run computes that the image tower comes from."""


def pretrain(config: Config, run: Run) -> str:
    """Trains the image tower by SigLIP, in `DIR/tower`: what comes before everything else in the report, too (stage 0). Returns that folder. Raises `UserError` if the data has nothing to learn from for that."""
    directory = run.directory / "tower"
    if (directory / "result.json").exists():
        return str(directory)
    shared = [field.name for part in (launch.Data, launch.Transformer, ImageTower) for field in dataclasses.fields(part)]
    settings = image_text.SETTINGS["default"] | {name: getattr(config, name) for name in (*shared, "seed", "precision")}
    settings |= dict(steps=config.pretrain, evaluate_every=config.pretrain, text_width=config.width)
    first = TowerConfig(**settings)
    execution = dataclasses.replace(run.execution, overwrite=False, export="")
    with Run.open(directory, f"{run.experiment}_tower", first, execution) as stage:
        try:
            source, held_out = image_text.open_pairs(stage)
        except UserError as error:
            raise UserError(
                f"{error} (for the image tower, which learns first; --tower names one that has learned, --pretrain 0 does without)"
            ) from None
        with stage.first_process_first():
            inputs = image_text.new_inputs(stage, source, image_processor(first.resolution))
        module = image_text.new_siglip(first, inputs.tokenizer.vocab_size, **first.layer_fields())
        optimizer = lambda schedule: OPTIMIZERS[first.optimizer](schedule, first.weight_decay)
        towers = image_text.Towers(module, None, inputs)
        image_text.train_towers(stage, source, held_out, towers, sigmoid_loss, optimizer)
    return str(directory)


class InitialParts(NamedTuple):
    """What is there before the tokenizer is."""

    module: PaliGemma | None
    """The whole model, where its weights were trained before."""
    vision: VisionTower
    params: PyTree | None
    """Of the module, of its image tower alone, or none."""
    side: int
    """Of the images, in pixels."""

    @property
    def num_patches(self) -> int:
        return (self.side // self.vision.patch_size) ** 2


def initial_parts(config: Config, tower: str) -> InitialParts:
    """The model that `--init` names, the image tower of the run or the weights `tower`, or a new one."""
    fields = config.layer_fields()
    side = lambda vision, params: vision.patch_size * math.isqrt(len(params["vision"]["positions"]["table"]))
    if config.init:
        module, params = load_model(config.init, PaliGemma, param_dtype=jnp.float32, **fields)
        return InitialParts(module, module.vision, params, side(module.vision, params))
    if tower:
        towers, params = load_model(tower, SigLIP, param_dtype=jnp.float32, **fields)
        vision = {name: part for name, part in params["vision"].items() if name != "head"}
        return InitialParts(None, towers.vision.clone(head=False), {"vision": vision}, side(towers.vision, params))
    return InitialParts(None, VisionTower(head=False, **config.vision_fields(), **fields), None, config.resolution)


def published_processors(config: Config, parts: InitialParts) -> tuple[ImageProcessor, PromptProcessor]:
    """Those of the weights that `--init` names. Raises `UserError` if the tokenizer has tokens that the weights do not know."""
    folder = published_folder(config.init)
    prompts = PromptProcessor.extending(pretrained.load_tokenizer(folder), parts.num_patches, WORDS)
    if prompts.image_token != parts.module.image_token or prompts.vocab_size > parts.module.text.vocab_size:
        raise UserError(f"--init {config.init}: its tokenizer and its weights do not belong together")
    return pretrained.load_image_processor(folder), prompts


def new_processors(
    config: Config, parts: InitialParts, source: Source[AnnotatedImage], run: Run
) -> tuple[ImageProcessor, PromptProcessor]:
    """SigLIP's for images, and for text the run's own, which is trained on questions and answers if it is not there yet."""

    def trained() -> Tokenizer:
        chosen = np.linspace(0, len(source) - 1, min(len(source), 2000)).astype(int).tolist()
        offered = (each for index in chosen for each in questions_of(config, source.annotations(index), source.info.classes))
        return Tokenizer.train([text for each in offered for text in (each.prompt, *each.answers)], config.vocab_size)

    tokenizer = kept_tokenizer(run.directory, trained)
    return image_processor(parts.side), PromptProcessor.extending(tokenizer, parts.num_patches, WORDS)


def build(config: Config, vision: VisionTower, prompts: PromptProcessor) -> PaliGemma:
    """The module around an image tower, for the tokens of that processor."""
    decoder = Gemma(
        prompts.vocab_size, config.text_width, config.text_depth, config.text_heads, 1, config.head_width, 4 * config.text_width,
        **config.layer_fields(),
    )  # fmt: skip
    return PaliGemma(vision, decoder, prompts.image_token)


def frozen(config: Config) -> Frozen | None:
    """The image tower, for its share of the steps."""
    steps = round(config.freeze * config.steps)
    return Frozen("^vision/", None if steps == config.steps else steps) if steps else None


def questions_of(config: Config, example: AnnotatedImage, classes: Sequence[str]) -> list[Question]:
    """What the config wants to be asked about an example."""
    return questions_about(example, classes, config.tasks, every_caption=config.captions == "any")


def draw_row(
    example: AnnotatedImage,
    rng: np.random.Generator,
    *,
    config: Config,
    classes: Sequence[str],
    arrays: Callable[[UInt8[np.ndarray, "H W C"], Question], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """A row of a batch: one question about an example, which is left as it is where augmentation has cut off all that could be asked about."""
    for each in (AUGMENTATIONS[config.augment](example, rng), example):
        if offered := questions_of(config, each, classes):
            return arrays(each.image, draw_question(offered, rng))
    raise UserError(
        f"an example of {config.data} has nothing for --tasks {' '.join(config.tasks)}: choose others, or leave it out"
    )


def row(
    image: UInt8[np.ndarray, "H W C"], question: Question, *, process: ImageProcessor, prompts: PromptProcessor, length: int
) -> dict[str, np.ndarray]:
    """An image, a question and its first answer as the model takes them. `learned` is true for the tokens of the answer."""
    try:
        rows = prompts([question.prompt], question.answers[:1], length)
    except UserError as error:
        raise UserError(f"{error} (--length)") from None
    return {"image": process(image), "tokens": rows.tokens[0], "prefix": rows.prefix[0], "learned": rows.answer[0]}


def objective(
    module: PaliGemma, params: PyTree, state: TrainState, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """Cross-entropy of the answer's tokens, the mean over each answer and then over answers, in nats."""
    return answer_losses(module, {"params": params}, batch, train=True, rngs={"dropout": key}).mean(), Aux()


def answer_losses(module: PaliGemma, variables: PyTree, batch: Batch, **options: Any) -> Float[Array, "B"]:
    """The mean over the tokens of each answer."""
    out = module.apply(variables, batch["image"], batch["tokens"], batch["prefix"], **options)
    one = lambda logits, tokens, learned: cross_entropy(logits[:-1], tokens[1:], mask=learned[1:])
    return jax.vmap(one)(out.logits, batch["tokens"], batch["learned"])


class Answerer:
    """Images and prompts to answers, greedily: in batches, of prompts filled up to a few lengths, so that few programs are compiled."""

    def __init__(self, config: Config, module: PaliGemma, layout: Layout, process: ImageProcessor, prompts: PromptProcessor):
        self.process, self.prompts = process, prompts

        def write(variables: PyTree, batch: Batch) -> Int[Array, "B T"]:
            images, tokens, valid = (batch[name] for name in ("image", "tokens", "valid"))
            return answer(module, variables, images, tokens, valid, steps=config.length, end=prompts.end)

        self._writer = functools.cache(lambda rows: layout.inference(write, rows))

    def __call__(self, variables: PyTree, images: Iterable[UInt8[np.ndarray, "_ _ _"]], prompts: Sequence[str]) -> list[str]:
        num_patches = self.prompts.num_image_tokens
        longest = self.prompts(prompts).tokens.shape[1] - num_patches
        rows = self.prompts(prompts, length=num_patches + -(-longest // 8) * 8)
        batch = (
            {"image": self.process(image), "tokens": tokens, "valid": valid}
            for image, tokens, valid in zip(images, rows.tokens, rows.valid)
        )
        return self.prompts.decode(self._writer(min(64, len(prompts)))(variables, batch))


def ask(config: Config, run: Run, image: UInt8[np.ndarray, "H W 3"], answerer: Answerer, variables: PyTree) -> None:
    """Answers `--ask`, and draws the boxes that answers name."""
    prompts = list(map(as_prompt, config.ask[1:]))
    said = answerer(variables, [image] * len(prompts), prompts)
    for prompt, s in zip(prompts, said):
        run.say(f"{prompt}\n  → {s}")
    drawn = [(prompt, found) for prompt, found in zip(prompts, map(words_to_boxes, said)) if len(found[0])]
    if drawn and is_first():
        titles, found = zip(*drawn)
        file = figures.save(figures.boxes([image] * len(drawn), titles, found), run.figures / "asked")
        run.say(f"the boxes are drawn in {file}")


EXPERIMENT = launch.Experiment(
    main,
    PRESETS,
    field="vision and language",
    summary="A vision-language model learns to answer questions about images, to describe them, and to say where things are.",
    paper="Beyer et al. 2024, PaliGemma: A versatile 3B VLM for transfer, arXiv:2407.07726",
    minutes=3,
    expects={"answer_exact_match": (0.9, None), "caption_exact_match": (0.7, None), "detect_mean_iou": (0.45, None)},
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
