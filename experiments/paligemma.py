"""PaliGemma: a picture and a question go in, an answer in words comes out (Beyer et al. 2024, arXiv:2407.07726; PaliGemma 2: Steiner et al. 2024, arXiv:2412.03555).

One model answers questions, describes pictures, and says where things are: whatever is asked is text before the answer, and whatever is answered is text, boxes too, in words for places. SigLIP's image tower looks, and Gemma's decoder reads the patches and the question as a whole and writes.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Gt, Le, Lt, MinLen
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from experiments import siglip
from jaxdl import figures, launch, pretrained
from jaxdl.data import Cached, Source, open_told, some, train_batches
from jaxdl.data.image import ImageProcessor, decode
from jaxdl.data.paligemma import TextProcessor, boxes, places
from jaxdl.data.scenes import SHAPES
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.losses import cross_entropy
from jaxdl.metrics import bleu, matched_iou
from jaxdl.models.gemma import Gemma
from jaxdl.models.paligemma import PaliGemma, answer
from jaxdl.models.siglip import SigLIP, VisionTower
from jaxdl.nn import ATTENTIONS
from jaxdl.training import (
    ASIDE,
    OPTIMIZERS,
    Aux,
    Batch,
    Execution,
    Frozen,
    Layout,
    Run,
    TrainState,
    fit,
    load_run,
    matrices,
    start,
)
from jaxdl.training.processes import is_first

Kind = Literal["answer", "caption", "detect"]
KINDS = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class Config(launch.Config):
    """What this experiment computes."""

    steps: Annotated[int, Ge(0)] = 3000
    """Updates of the parameters. 0: the weights of --init answer --ask as they are."""
    batch_size: Annotated[int, Ge(1)] = 32
    learning_rate: Annotated[float, Gt(0)] = 0.01
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.05
    evaluate_every: Annotated[int, Ge(1)] = 1000
    optimizer: Literal[*OPTIMIZERS] = "muon"
    """AdamW, or Muon, which learns faster in short runs."""
    tasks: Annotated[tuple[Kind, ...], MinLen(1)] = KINDS
    """What is learned, each as often as the others where the data has it: to answer questions, to describe pictures, to say where things are."""
    captions: Literal["first", "any"] = "first"
    """Of a picture's captions, the one to learn: the first, which in scenes is the most telling one, or any of them."""
    init: str = ""
    """Fine-tune from these weights: a folder with config.json and *.safetensors, or a name on the Hugging Face hub. The sizes below are then its own, and so is the tokenizer."""
    tower: str = ""
    """Begin with the image tower of a finished run of experiments.siglip, or of published SigLIP weights. Its sizes are then its own."""
    pretrain: Annotated[int, Ge(0)] = 1500
    """Where neither --init nor --tower names a tower: steps of experiments.siglip on the same data, which make one first, as a run of its own in DIR/tower. The data has to have captions or labels then. 0: it begins at random, and learns from answers alone, which takes much longer."""
    freeze: Annotated[float, Ge(0), Le(1)] = 0.25
    """Share of the steps in which the image tower stays as it is, and only what is around it learns; after them all do. A tower that begins at random is not frozen."""
    resolution: Annotated[int, Ge(1)] = 32
    """Side of the square that every picture is resized to, in pixels: a multiple of the patch."""
    patch: Annotated[int, Ge(1)] = 8
    """Side of a patch, in pixels."""
    width: Annotated[int, Ge(1)] = 64
    """Width of the image tower."""
    depth: Annotated[int, Ge(1)] = 2
    """Blocks of the image tower."""
    num_heads: Annotated[int, Ge(1)] = 4
    """Attention heads of the image tower; they divide its width."""
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
    vocabulary: Annotated[int, Ge(100)] = 300
    """Largest vocabulary of a tokenizer that is trained, without the words for places and outlines."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of activations that are dropped."""
    attention: Literal[*ATTENTIONS] = "plain"
    """Of tower and decoder: the plain form, or the flash form in tiles."""
    remat: bool = False
    """Compute the activations of a block again in the backward pass: less memory, a third more time."""
    scan_layers: bool = False
    """Compile one block of tower and decoder and run it as often as they are deep: quick to compile for deep ones."""
    augment: Literal[*siglip.AUGMENTATIONS] = "none"
    """What is done to training pictures: nothing, mirroring, or mirroring and random crops. Both make places and "left of" wrong."""
    eval_examples: Annotated[int, Ge(1)] = 256
    """Held-out pictures, each with one task of every kind."""
    ask: tuple[str, ...] = dataclasses.field(default=(), metadata=ASIDE)
    """An image file, and what to ask about it. A finished run answers at once. What ends with a question mark is asked as `answer en ...?`, anything else, such as `detect ring` or `caption en`, is given as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ask) == 1:
            raise UserError("--ask wants an image file and at least one question: --ask scene.png 'what color is the ring?'")
        if self.init and self.tower:
            raise UserError("--init has an image tower, and so has --tower: give one of them")


PRESETS = {
    "default": Config(),
    # A folder of photos with captions, such as Flickr8k.
    "photos": Config(
        preset="photos", tasks=("caption",), captions="any", resolution=96, patch=16, width=128, depth=4, text_width=128,
        head_width=32, steps=1500, pretrain=1200, augment="crop", dropout=0.1, vocabulary=2000, length=36, evaluate_every=500,
    ),
    # Published weights, whose decoder learns a task.
    "finetune": Config(
        preset="finetune", init="google/paligemma-3b-pt-224", steps=1000, batch_size=16, optimizer="adamw", learning_rate=1e-5,
        weight_decay=1e-6, freeze=1.0, resolution=224, length=128, precision="bf16", remat=True, evaluate_every=250,
    ),
    # No training: --ask IMAGE QUESTION.
    "published": Config(preset="published", init="google/paligemma-3b-mix-224", steps=0, length=128, precision="bf16"),
}  # fmt: skip


def main(config: Config, workdir: str | Path, execution: Execution = Execution()) -> dict[str, Any]:
    """Trains (or goes on training) in `workdir`, measures, answers, draws, and returns what is in its `result.json`. Where there are no steps it only answers, returns nothing, and leaves its `config.json` and the picture of boxes that were found."""
    if not config.steps and not (config.init and config.ask):
        raise UserError("--steps 0 trains nothing: it is for published weights, --init, that are to answer --ask")
    image = decode(Path(config.ask[0]).expanduser()) if config.ask else None
    with Run.open(workdir, "paligemma", config, execution) as run:
        if config.steps:
            source, held_out = open_tasks(config, run)
            exam = Exam.of(held_out, config)
        if config.pretrain and not config.init and not config.tower:
            config = dataclasses.replace(config, tower=str(pretrain(config, run.directory / "tower", execution)))
        with run.first_process_first():
            begun = begin(config)
        if not config.steps:
            answerer = Answerer(config, begun.module, run.layout, *processors(config, begun))
            ask(image, config.ask[1:], answerer, begun.params, run)
            return {}
        with run.first_process_first():
            process, text = processors(config, begun, source, run.directory)
        module = begun.module or build(config, begun.vision, text)

        arrays = functools.partial(row, process=process, text=text, length=text.patches + config.length)
        drawn = functools.partial(draw_task, config=config, classes=source.classes)
        transform = lambda example, rng: arrays(*drawn(example, rng))
        batches = train_batches(Cached(source), transform, batch_size=config.batch_size, seed=config.seed, **run.shard)
        rows = [arrays(image, task) for image, task in zip(exam.images, exam.tasks)]
        step, state = start(
            config,
            run.layout,
            functools.partial(loss, module),
            lambda schedule: OPTIMIZERS[config.optimizer](schedule, config.weight_decay, mask=matrices, embeddings=0.5),
            lambda key: module.init(key, *(jnp.asarray(rows[0][name])[None] for name in ("image", "tokens", "prefix"))),
            begun.params,
            frozen(config),
        )

        each = run.layout.inference(functools.partial(losses, module), batch_size=32)
        answerer = Answerer(config, module, run.layout, process, text)

        def examine(state: TrainState) -> tuple[dict[str, float], list[str]]:
            said = answerer(state.measured, exam.images, [task.question for task in exam.tasks])
            return {"validation_loss": float(each({"params": state.measured}, rows).mean())} | exam.marks(said), said

        evaluate = lambda state: examine(state)[0]
        state = fit(step, state, batches, run, steps=config.steps, evaluate=evaluate, evaluate_every=config.evaluate_every)
        if image is not None:
            ask(image, config.ask[1:], answerer, state.measured, run)
            if run.result:
                return run.result
        metrics, said = examine(state)
        if is_first():
            exam.write(said, run.directory / "answers.txt")
            exam.draw(said, run.figures)
        return run.finish(state, metrics)


def pretrain(config: Config, directory: Path, execution: Execution) -> Path:
    """Makes the run of experiments.siglip that the image tower comes from: what comes before everything else in the report, too (stage 0). Raises `UserError` if the data has nothing to learn from for that."""
    same = ("data", "eval_data", "data_dir", "seed", "precision", "resolution", "patch", "width", "depth", "num_heads", "attention", "remat", "scan_layers", "dropout", "augment")  # fmt: skip
    settings = {name: getattr(config, name) for name in same} | dict(text_width=config.width)
    if not (directory / "result.json").exists():
        first = siglip.Config(preset="tower", steps=config.pretrain, evaluate_every=config.pretrain, **settings)
        try:
            siglip.main(first, directory, dataclasses.replace(execution, overwrite=False))
        except UserError as error:
            raise UserError(
                f"{error} (for the image tower, which learns first; --tower names one that has learned, --pretrain 0 does without)"
            ) from None
    return directory


class Begun(NamedTuple):
    """What is there before the tokenizer is."""

    module: PaliGemma | None
    """The whole model, where its weights are published."""
    vision: VisionTower
    params: PyTree | None
    """Of the module, of its image tower alone, or none."""
    side: int
    """Of the images, in pixels."""

    @property
    def patches(self) -> int:
        return (self.side // self.vision.patch) ** 2


def begin(config: Config) -> Begun:
    """The model that `--init` names, the image tower that `--tower` names, or a new one."""
    fields: dict[str, Any] = layer_fields(config)
    if config.init:
        module, params = pretrained.load(config.init, PaliGemma, param_dtype=jnp.float32, scan=config.scan_layers, **fields)
        side = module.vision.patch * math.isqrt(len(params["vision"]["positions"]["table"]))
        return Begun(module, module.vision, params, side)
    if config.tower:
        towers, params = siglip_towers(config.tower)
        vision = {name: part for name, part in params["vision"].items() if name != "head"}
        side = towers.vision.patch * math.isqrt(len(vision["positions"]["table"]))
        return Begun(None, towers.vision.clone(head=False, **fields), {"vision": vision}, side)
    sizes = dict(patch=config.patch, width=config.width, depth=config.depth, hidden=4 * config.width)
    vision = VisionTower(num_heads=config.num_heads, head=False, scan=config.scan_layers, **sizes, **fields)
    return Begun(None, vision, None, config.resolution)


def layer_fields(config: Config) -> dict[str, Any]:
    """How tower and decoder compute."""
    dtype = jnp.bfloat16 if config.precision == "bf16" else None
    return dict(attention=ATTENTIONS[config.attention], dropout=config.dropout, remat=config.remat, dtype=dtype)


def siglip_towers(name: str) -> tuple[SigLIP, PyTree]:
    """The towers of a run of experiments.siglip, or published ones."""
    if (Path(name).expanduser() / "checkpoints").is_dir():
        told, variables = load_run(name)
        if told["experiment"] != "siglip":
            raise UserError(f"--tower {name} is a run of experiments.{told['experiment']}: give one of experiments.siglip")
        trained = siglip.Config(**told["config"])
        if trained.init:
            module, _ = pretrained.load(trained.init)
        else:
            module = siglip.towers(trained, Tokenizer.load(trained.tokenizer or Path(name).expanduser()))
        return module.clone(vision=module.vision.clone(scan=trained.scan_layers)), variables["params"]
    return pretrained.load(name, SigLIP, param_dtype=jnp.float32)


def processors(
    config: Config, begun: Begun, source: Source | None = None, directory: Path | None = None
) -> tuple[ImageProcessor, TextProcessor]:
    """The published ones; or SigLIP's for images, and for text the run's own, or a new one, trained on questions and answers and kept in the run."""
    if config.init:
        text = TextProcessor.extending(pretrained.load_tokenizer(config.init), begun.patches)
        if text.image != begun.module.image_token or text.vocabulary > begun.module.text.vocabulary:
            raise UserError(f"--init {config.init}: its tokenizer and its weights do not belong together")
        return pretrained.load_image_processor(config.init), text
    if not (directory / "tokenizer.json").exists():
        offered = (task for example in some(source, 2000) for task in tasks(example, config, source.classes))
        Tokenizer.train([text for task in offered for text in (task.question, *task.answers)], config.vocabulary).save(directory)
    return ImageProcessor.preset("siglip", begun.side), TextProcessor.extending(Tokenizer.load(directory), begun.patches)


def build(config: Config, vision: VisionTower, text: TextProcessor) -> PaliGemma:
    """The module around an image tower, for the tokens of that processor."""
    decoder = Gemma(
        text.vocabulary, config.text_width, config.text_depth, config.text_heads, 1, config.head_width, 4 * config.text_width,
        scan=config.scan_layers, **layer_fields(config),
    )  # fmt: skip
    return PaliGemma(vision, decoder, text.image)


def frozen(config: Config) -> Frozen | None:
    """The image tower, for its share of the steps, if it has learned anything before."""
    steps = round(config.freeze * config.steps) if config.init or config.tower else 0
    return Frozen("^vision/", None if steps == config.steps else steps) if steps else None


FIELDS = ("text", "questions", "boxes", "labels")
"""Of scenes, what tasks are made of."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked about a picture, and what is right."""

    kind: Kind
    question: str
    answers: tuple[str, ...]
    """Any of them."""


def tasks(example: dict[str, Any], config: Config, classes: Sequence[str]) -> list[Task]:
    """All that can be asked about an example, in the words that PaliGemma was trained with. Boxes of the kind that is asked for come in the order of the data; where the answer to a question names boxes, it asks for them."""
    kind = lambda answer: "detect" if len(boxes(answer)[0]) else "answer"
    found = [Task(kind(answer), asked(question), (answer,)) for question, answer in example.get("questions", ())]
    if "text" in example:
        found.append(Task("caption", "caption en", example["text"][: 1 if config.captions == "first" else None]))
    if "boxes" in example:
        edges, names = example["boxes"][:, [1, 0, 3, 2]], np.array(classes or SHAPES)[example["labels"]]
        for name in sorted(set(names)):
            words = " ; ".join(f"{place} {name}" for place in places(edges[names == name]))
            found.append(Task("detect", f"detect {name}", (words,)))
    elif "label" in example:
        found.append(Task("answer", asked("what is this?"), (classes[example["label"]],)))
    return [task for task in found if task.kind in config.tasks]


def open_tasks(config: Config, run: Run) -> tuple[Source, Source]:
    """To train on and held out: pictures about which something of `--tasks` can be asked. Those of a folder about which nothing can are left out. Raises `UserError` if there are no others."""
    how = dict(data_dir=config.data_dir, resolution=config.resolution, fields=FIELDS)
    source, held_out = open_told(config.data, config.eval_data, lambda told: bool(tasks(told, config, ())), **how)
    wanted = f"nothing for --tasks {' '.join(config.tasks)}"
    for spec, opened in ((config.data, source), (config.eval_data or config.data, held_out)):
        if not len(opened):
            raise UserError(f"{spec} has {wanted}: choose others")
        if left_out := getattr(opened, "left_out", 0):
            run.say(f"{spec}: {left_out:,} of {left_out + len(opened):,} pictures have {wanted} and are left out")
    return source, held_out


def asked(question: str) -> str:
    """The prompt for a question; anything else is a prompt already."""
    return f"answer en {question}" if question.endswith("?") and not question.startswith("answer ") else question


def draw_task(
    example: dict[str, Any], rng: np.random.Generator, *, config: Config, classes: Sequence[str]
) -> tuple[UInt8[np.ndarray, "H W C"], Task]:
    """One of an example's tasks, with one answer: first a kind is drawn, then one of that kind."""
    offered = tasks(example, config, classes)
    if not offered:
        raise UserError(
            f"an example of {config.data} has nothing for --tasks {' '.join(config.tasks)}: choose others, or leave it out"
        )
    kinds = sorted({task.kind for task in offered})
    kind = kinds[rng.integers(len(kinds))]
    offered = [task for task in offered if task.kind == kind]
    task = offered[rng.integers(len(offered))]
    image = siglip.AUGMENTATIONS[config.augment](example["image"], rng)
    return image, dataclasses.replace(task, answers=(task.answers[rng.integers(len(task.answers))],))


def row(
    image: UInt8[np.ndarray, "H W C"], task: Task, *, process: ImageProcessor, text: TextProcessor, length: int
) -> dict[str, np.ndarray]:
    """A picture, a question and its first answer as the model takes them. `learned` is true for the tokens of the answer."""
    try:
        rows = text([task.question], task.answers[:1], length)
    except UserError as error:
        raise UserError(f"{error} (--length)") from None
    return {"image": process(image), "tokens": rows.tokens[0], "prefix": rows.prefix[0], "learned": rows.answer[0]}


def loss(
    module: PaliGemma, params: PyTree, variables: dict[str, PyTree], batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Aux]:
    """Cross-entropy of the answer's tokens, the mean over each answer and then over answers, in nats."""
    return losses(module, {"params": params}, batch, train=True, rngs={"dropout": key}).mean(), Aux()


def losses(module: PaliGemma, variables: PyTree, batch: Batch, **how: Any) -> Float[Array, "B"]:
    """The mean over the tokens of each answer."""
    out = module.apply(variables, batch["image"], batch["tokens"], batch["prefix"], **how)
    one = lambda logits, tokens, learned: cross_entropy(logits[:-1], tokens[1:], mask=learned[1:])
    return jax.vmap(one)(out.logits, batch["tokens"], batch["learned"])


class Answerer:
    """Pictures and questions to answers, greedily: in batches, of questions filled up to a few lengths, so that few programs are compiled."""

    def __init__(self, config: Config, module: PaliGemma, layout: Layout, process: ImageProcessor, text: TextProcessor):
        self.process, self.text = process, text

        def write(variables: PyTree, batch: Batch) -> Int[Array, "B T"]:
            images, tokens, valid = (batch[name] for name in ("image", "tokens", "valid"))
            return answer(module, variables, images, tokens, valid, steps=config.length, end=text.end)

        self._writer = functools.cache(lambda rows: layout.inference(write, rows))

    def __call__(self, params: PyTree, images: Iterable[UInt8[np.ndarray, "_ _ _"]], questions: Sequence[str]) -> list[str]:
        longest = self.text(questions).tokens.shape[1] - self.text.patches
        rows = self.text(questions, length=self.text.patches + -(-longest // 8) * 8)
        batch = (
            {"image": self.process(image), "tokens": tokens, "valid": valid}
            for image, tokens, valid in zip(images, rows.tokens, rows.valid)
        )
        return self.text.decode(self._writer(min(64, len(questions)))({"params": params}, batch))


@dataclasses.dataclass(frozen=True)
class Exam:
    """Tasks about held-out pictures, place by place."""

    images: list[UInt8[np.ndarray, "_ _ _"]]
    tasks: list[Task]

    @classmethod
    def of(cls, held_out: Source, config: Config) -> "Exam":
        """Of each picture one task of every kind. Raises `UserError` where the data has none."""
        images, chosen = [], []
        for number, example in enumerate(some(held_out, config.eval_examples)):
            offered = tasks(example, config, held_out.classes)
            for kind in config.tasks:
                if of_kind := [task for task in offered if task.kind == kind]:
                    images.append(example["image"])
                    chosen.append(of_kind[number % len(of_kind)])
        if not chosen:
            raise UserError(f"{config.eval_data or config.data} has nothing for --tasks {' '.join(config.tasks)}: choose others")
        return cls(images, chosen)

    def marks(self, said: Sequence[str]) -> dict[str, float]:
        """Of answers and captions the share that is right word by word, of captions with several versions BLEU; of boxes the mean IoU, where one that was not found, or is not there, counts as 0, and the share above ½."""
        found: dict[str, float] = {}
        pairs = {kind: [(s, task) for s, task in zip(said, self.tasks) if task.kind == kind] for kind in KINDS}
        for kind in ("answer", "caption"):
            if pairs[kind]:
                found[f"{kind}_exact_match"] = float(np.mean([_same(s, task) for s, task in pairs[kind]]))
        if any(len(task.answers) > 1 for _, task in pairs["caption"]):
            found["caption_bleu"], _ = bleu([s for s, _ in pairs["caption"]], [task.answers for _, task in pairs["caption"]])
        if pairs["detect"]:
            each = np.concatenate([matched_iou(boxes(s)[0], boxes(task.answers[0])[0]) for s, task in pairs["detect"]])
            found |= {"detect_mean_iou": float(each.mean()), "detect_above_half": float((each > 0.5).mean())}
        return found

    def write(self, said: Sequence[str], path: Path) -> None:
        """What was asked, what is right, and what was said."""
        lines = [f"{task.question}\n  right  {' | '.join(task.answers)}\n  said   {s}\n" for s, task in zip(said, self.tasks)]
        path.write_text("\n".join(lines), encoding="utf-8")

    def draw(self, said: Sequence[str], directory: Path) -> None:
        """Some pictures with what was said about them, and some with the boxes that were found."""
        told = list(zip(self.images, self.tasks, said))
        if spoken := [one for one in told if one[1].kind != "detect"][:16]:
            images, about, answers = zip(*spoken)
            right = [s if _same(s, task) else task.answers[0] for s, task in zip(answers, about)]
            figures.answers(images, [task.question for task in about], answers, right, directory / "answers.png")
        if detected := [one for one in told if one[1].kind == "detect"][:16]:
            images, about, answers = zip(*detected)
            true = [boxes(task.answers[0])[0] for task in about]
            titles = [task.question for task in about]
            figures.boxes(images, titles, [boxes(s) for s in answers], directory / "boxes.png", true=true)


def _same(said: str, task: Task) -> bool:
    plain = lambda text: " ".join(text.lower().split())
    return plain(said) in map(plain, task.answers)


def ask(image: UInt8[np.ndarray, "H W 3"], questions: Sequence[str], answerer: Answerer, params: PyTree, run: Run) -> None:
    """Answers `--ask`, and draws the boxes that answers name."""
    questions = list(map(asked, questions))
    said = answerer(params, [image] * len(questions), questions)
    for question, s in zip(questions, said):
        run.say(f"{question}\n  → {s}")
    drawn = [(question, boxes(s)) for question, s in zip(questions, said) if len(boxes(s)[0])]
    if drawn and is_first():
        titles, found = zip(*drawn)
        figures.boxes([image] * len(drawn), titles, found, run.figures / "asked.png")
        run.say(f"the boxes are drawn in {run.figures / 'asked.png'}")


EXPERIMENT = launch.Experiment(
    name="paligemma",
    summary="A vision-language model learns to answer questions about pictures, to describe them, and to say where things are.",
    paper="Beyer et al. 2024, PaliGemma: A versatile 3B VLM for transfer (arXiv:2407.07726)",
    result="0.95 of the answers to questions about held-out scenes right, 0.80 of the captions word by word, boxes with a mean IoU of 0.53",
    minutes=3,
    presets=PRESETS,
    main=main,
)

if __name__ == "__main__":
    launch.launch(EXPERIMENT)
