"""How well images and texts find each other: retrieval, and classification by texts that name the classes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from jaxdl import figures
from jaxdl.data import CaptionedImage, Source, Subset, scenes
from jaxdl.data.image import ImageProcessor, decode
from jaxdl.data.images import template_captions
from jaxdl.data.text import Tokenizer
from jaxdl.errors import UserError
from jaxdl.files import local_path
from jaxdl.metrics import accuracy, recall_at
from jaxdl.tasks.memory import Latest
from jaxdl.training import Layout, Report


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What turns images and texts into the inputs of two towers."""

    process: ImageProcessor
    tokenizer: Tokenizer
    text_length: int

    def tokens(self, texts: Sequence[str]) -> Int[np.ndarray, "B T"]:
        """A row for each text."""
        return self.tokenizer(texts, length=self.text_length)


class Embedder:
    """Embeddings of images and texts, of unit length."""

    def __init__(self, module: nn.Module, inputs: Inputs, layout: Layout):
        self.inputs = inputs
        self._images = layout.inference(functools.partial(module.apply, method="embed_images"))
        self._texts = layout.inference(functools.partial(module.apply, method="embed_texts"))

    def images(self, variables: PyTree, images: Iterable[UInt8[np.ndarray, "_ _ _"]]) -> Float[np.ndarray, "I D"]:
        return self._images(variables, map(self.inputs.process, images))

    def texts(self, variables: PyTree, texts: Sequence[str]) -> Float[np.ndarray, "J D"]:
        return self._texts(variables, self.inputs.tokens(texts))


def rank_texts(embed: Embedder, asked: Sequence[str], say: Callable[[str], None]) -> Callable[[PyTree], None] | None:
    """Says of an image file, the first that is asked about, how well each of the texts after it fits, the best one first; for `train`, None where nothing is asked. Raises `UserError` for what is no image, and if there is no text."""
    if not asked:
        return None
    if len(asked) == 1:
        raise UserError(
            f"--ask {asked[0]}: give an image file and at least one text: --ask cat.jpg 'a photo of a cat' 'a photo of a dog'"
        )
    (file, *texts), image = asked, decode(local_path(asked[0]))

    def answer(variables: PyTree) -> None:
        (similarity,) = embed.images(variables, [image]) @ embed.texts(variables, texts).T
        lines = [f"  {similarity[index]:+.3f}  {texts[index]}" for index in np.argsort(-similarity)]
        say("\n".join([f"{file}, cosine similarity to", *lines]))

    return answer


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Images and texts of which the i-th belong together, and no others."""

    images: list[UInt8[np.ndarray, "_ _ _"]]
    texts: list[str]

    @classmethod
    def among(cls, source: Source[CaptionedImage], count: int) -> "Retrieval | None":
        """The first `count` examples whose first captions differ; None if the source has classes, since its captions repeat."""
        if source.info.classes:
            return None
        chosen: dict[str, int] = {}
        for index in range(len(source)):
            chosen.setdefault(source.annotations(index).captions[0], index)
            if len(chosen) == count:
                break
        return cls([source[index].image for index in chosen.values()], list(chosen))

    def similarity(self, embed: Embedder, variables: PyTree) -> Float[np.ndarray, "I I"]:
        """Cosine similarity of each image to each text."""
        return embed.images(variables, self.images) @ embed.texts(variables, self.texts).T


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Classification by text: a class is the mean of the embeddings of its prompts (Radford et al. 2021, section 3.1.4)."""

    name: str
    source: Source[CaptionedImage]
    labels: Int[np.ndarray, "I"]
    prompts: list[list[str]]
    """Of each class."""

    def scores(self, embed: Embedder, variables: PyTree) -> Float[np.ndarray, "I C"]:
        """Cosine similarity of each image to each class."""
        classes = np.stack([embed.texts(variables, prompts).mean(axis=0) for prompts in self.prompts])
        classes /= np.linalg.norm(classes, axis=1, keepdims=True)
        return embed.images(variables, (example.image for example in self.source)) @ classes.T


def zero_shot_tasks(source: Source[CaptionedImage]) -> list[ZeroShot]:
    """What can be asked of held-out images: their classes; of generated scenes, the colour and the shape of a thing that is alone; of others nothing."""
    if source.info.spec == "builtin:scenes":
        return _of_scenes(source)
    if not source.info.classes:
        return []
    annotated = [source.annotations(index) for index in range(len(source))]
    prompts = [list(texts) for texts in template_captions(source.info.classes)]
    for label in range(len(prompts)):
        own = dict.fromkeys(text for each in annotated if each.label == label for text in each.captions)
        prompts[label] = list(own) or prompts[label]
    return [ZeroShot("class", source, np.array([each.label for each in annotated]), prompts)]


def _of_scenes(source: Source[CaptionedImage]) -> list[ZeroShot]:
    described = [scenes.scene(scenes.SEEDS["test"], index) for index in range(len(source))]
    alone = [index for index, scene in enumerate(described) if len(scene.things) == 1]
    names = lambda color, shape: [f"a {size} {color} {shape}" for size in scenes.SIZES]
    by_color = [[text for shape in scenes.SHAPES for text in names(color, shape)] for color in scenes.COLORS]
    by_shape = [[text for color in scenes.COLORS for text in names(color, shape)] for shape in scenes.SHAPES]
    colors = np.array([list(scenes.COLORS).index(described[index].things[0].color) for index in alone])
    shapes = np.array([scenes.SHAPES.index(described[index].things[0].shape) for index in alone])
    chosen = Subset(source, alone)
    return [ZeroShot("color", chosen, colors, by_color), ZeroShot("shape", chosen, shapes, by_shape)]


class Matching:
    """How well held-out images and texts find each other: what `train` takes as `evaluate` and `show`."""

    def __init__(self, embed: Embedder, held_out: Source[CaptionedImage], eval_examples: int):
        self.embed = embed
        self.retrieval, self.tasks = Retrieval.among(held_out, eval_examples), zero_shot_tasks(held_out)
        self.scores = Latest(self._scores)
        """`(variables)` to the similarities of retrieval, if there is any, and the scores of each task; computed once for the same variables."""

    def _scores(self, variables: PyTree) -> tuple[Float[np.ndarray, "I I"] | None, list[Float[np.ndarray, "_ _"]]]:
        similarity = self.retrieval and self.retrieval.similarity(self.embed, variables)
        return similarity, [task.scores(self.embed, variables) for task in self.tasks]

    def evaluate(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """Recall in both directions, and zero-shot accuracy with its parts, as far as the data allows."""
        similarity, scores = self.scores(variables)
        found: Report = {}
        if similarity is not None:
            found |= {f"image_to_text_recall_at_{k}": value for k, value in recall_at(similarity).items()}
            found |= {f"text_to_image_recall_at_{k}": value for k, value in recall_at(similarity.T).items()}
        parts = {task.name: accuracy(each, task.labels) for task, each in zip(self.tasks, scores)}
        if parts:
            found["zero_shot_accuracy"] = float(np.mean(list(parts.values())))
        if len(parts) > 1:
            found |= {f"zero_shot_accuracy_{name}": value for name, value in parts.items()}
        return found

    def show(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """The similarities, what was found both ways, and classifications."""
        similarity, scores = self.scores(variables)
        drawn = {} if similarity is None else dict(figures.retrieval(self.retrieval.images, self.retrieval.texts, similarity))
        for task, each in zip(self.tasks, scores):
            images = [task.source[index].image for index in range(min(8, len(task.source)))]
            names = [prompts[0] for prompts in task.prompts]
            drawn[f"zero_shot_{task.name}"] = figures.ranked_texts(images, names, each[:8], task.labels[:8])
        return drawn
