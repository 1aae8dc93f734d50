"""Questions about images that are answered in words: what annotations give to ask, one of it to learn from, and how good answers are.

The words are PaliGemma's (Beyer et al. 2024, arXiv:2407.07726, section 3.2): `answer en …?`, `caption en`, `detect ring`, of which the answers name boxes by location tokens (`jaxdl.data.location_tokens`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Array, Key, PyTree, UInt8

from jaxdl import figures
from jaxdl.data import AnnotatedImage, Source, evenly_spaced
from jaxdl.data.image import ImageProcessor
from jaxdl.data.location_tokens import boxes_to_words, words_to_boxes
from jaxdl.files import replace_text
from jaxdl.metrics import bleu, matched_iou
from jaxdl.tasks.annotated import open_annotated
from jaxdl.tasks.memory import Latest
from jaxdl.training import Report, Run, is_first

Category = Literal["answer", "caption", "detect"]
CATEGORIES = get_args(Category)


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked about an image, and what is right."""

    category: Category
    prompt: str
    answers: tuple[str, ...]
    """Any of them."""


Ask = Callable[[AnnotatedImage], list[Question]]
"""All that can be asked about an image."""


def questions_about(
    example: AnnotatedImage, classes: Sequence[str], categories: Sequence[Category] = CATEGORIES, *, every_caption: bool = True
) -> list[Question]:
    """All that can be asked about an example. Of its captions only the first is right unless `every_caption`. Boxes of the class that is asked for come in the order of the data; where the answer to a question names boxes, it asks for them."""
    category = lambda answer: "detect" if len(words_to_boxes(answer)[0]) else "answer"
    found = [Question(category(answer), as_prompt(question), (answer,)) for question, answer in example.questions]
    if example.captions:
        found.append(Question("caption", "caption en", example.captions[: None if every_caption else 1]))
    if example.boxes is not None:
        names = np.array(classes)[example.boxes.labels]
        for name in sorted(set(names.tolist())):
            places = boxes_to_words(example.boxes[names == name].xyxy)
            found.append(Question("detect", f"detect {name}", (" ; ".join(f"{place} {name}" for place in places),)))
    elif example.label is not None:
        found.append(Question("answer", as_prompt("what is this?"), (classes[example.label],)))
    return [question for question in found if question.category in categories]


def as_prompt(question: str) -> str:
    """The prompt for a question; anything else is a prompt already."""
    return f"answer en {question}" if question.endswith("?") and not question.startswith("answer ") else question


def draw_question(offered: Sequence[Question], rng: np.random.Generator) -> Question:
    """One of the questions, with one answer: first a category is drawn, so that each is as frequent as the others, then one of it."""
    categories = sorted({question.category for question in offered})
    category = categories[rng.integers(len(categories))]
    offered = [question for question in offered if question.category == category]
    question = offered[rng.integers(len(offered))]
    return dataclasses.replace(question, answers=(question.answers[rng.integers(len(question.answers))],))


def open_questions(
    run: Run, ask: Callable[[AnnotatedImage, Sequence[str]], list[Question]], reason: str
) -> tuple[Source[AnnotatedImage], Source[AnnotatedImage]]:
    """Images to train on and held-out ones, as the run's config names them, about which `ask(example, classes)` has something to ask. Of a folder the others are left out, since they "have nothing …", as `reason` says; in other data all images have the same annotations. Raises `UserError` for data that is not there, and where there is nothing to ask."""
    return open_annotated(run, lambda example, classes: bool(ask(example, classes)), reason)


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Questions about held-out images, each with its image."""

    images: list[UInt8[np.ndarray, "_ _ _"]]
    questions: list[Question]

    @classmethod
    def of(cls, held_out: Source[AnnotatedImage], ask: Ask, count: int, process: ImageProcessor | None = None) -> "EvalSet":
        """Of each of `count` images one question of every category that there is, now this one and now that. Where `process` stretches images, they are kept as small as it makes them."""
        keep = process.resize if process and process.resize_mode == "stretch" else lambda image: image
        images, chosen = [], []
        for number, example in enumerate(evenly_spaced(held_out, count)):
            offered, image = ask(example), keep(example.image)
            for category in CATEGORIES:
                if of_category := [question for question in offered if question.category == category]:
                    images.append(image)
                    chosen.append(of_category[number % len(of_category)])
        return cls(images, chosen)

    def score(self, said: Sequence[str]) -> dict[str, float]:
        """Of answers and captions the share that is right word by word, of captions with several versions BLEU; of boxes the mean IoU, where one that was not found, or is not there, counts as 0, and the share above ½."""
        found: dict[str, float] = {}
        pairs = {name: [(s, each) for s, each in zip(said, self.questions) if each.category == name] for name in CATEGORIES}
        for name in ("answer", "caption"):
            if pairs[name]:
                found[f"{name}_exact_match"] = float(np.mean([_is_right(*pair) for pair in pairs[name]]))
        if any(len(each.answers) > 1 for _, each in pairs["caption"]):
            found["caption_bleu"], _ = bleu([s for s, _ in pairs["caption"]], [each.answers for _, each in pairs["caption"]])
        if pairs["detect"]:
            boxes = lambda text: words_to_boxes(text)[0]
            ious = np.concatenate([matched_iou(boxes(s), boxes(each.answers[0])) for s, each in pairs["detect"]])
            found |= {"detect_mean_iou": float(ious.mean()), "detect_above_half": float((ious > 0.5).mean())}
        return found

    def write(self, said: Sequence[str], path: Path) -> None:
        """What was asked, what is right, and what was said."""
        lines = [f"{each.prompt}\n  right  {' | '.join(each.answers)}\n  said   {s}\n" for s, each in zip(said, self.questions)]
        replace_text(path, "\n".join(lines))

    def figures(self, said: Sequence[str]) -> Report:
        """Some images with what was said about them, and some with the boxes that were found."""
        every = list(zip(self.images, self.questions, said))
        drawn: Report = {}
        if spoken := [each for each in every if each[1].category != "detect"][:16]:
            images, asked, answers = zip(*spoken)
            right = [s if _is_right(s, question) else question.answers[0] for s, question in zip(answers, asked)]
            drawn["answers"] = figures.answers(images, [question.prompt for question in asked], answers, right)
        if detected := [each for each in every if each[1].category == "detect"][:16]:
            images, asked, answers = zip(*detected)
            true = [words_to_boxes(question.answers[0])[0] for question in asked]
            titles = [question.prompt for question in asked]
            drawn["boxes"] = figures.boxes(images, titles, [words_to_boxes(s) for s in answers], true=true)
        return drawn


def _is_right(said: str, question: Question) -> bool:
    plain = lambda text: " ".join(text.lower().split())
    return plain(said) in map(plain, question.answers)


Answer = Callable[[PyTree, Sequence[UInt8[np.ndarray, "_ _ _"]], Sequence[str]], list[str]]
"""`(variables, images, prompts)` to what a model with these variables says to each prompt about its image."""


class Answering:
    """How well questions about held-out images are answered: what `train` takes as `evaluate`, `show` and `conclude`."""

    def __init__(self, run: Run, eval_set: EvalSet, answer: Answer):
        self.run, self.eval_set = run, eval_set
        prompts = [question.prompt for question in eval_set.questions]
        self.said = Latest(lambda variables: answer(variables, eval_set.images, prompts))
        """`(variables)` to what is said to each question; computed once for the same variables."""

    def evaluate(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """The scores of `EvalSet.score`."""
        return dict(self.eval_set.score(self.said(variables)))

    def show(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """The figures `answers` and `boxes`."""
        return self.eval_set.figures(self.said(variables))

    def conclude(self, variables: PyTree, key: Key[Array, ""]) -> Report:
        """Leaves all answers in the run's `answers.txt`."""
        said = self.said(variables)
        if is_first():
            self.eval_set.write(said, self.run.directory / "answers.txt")
        return {}
