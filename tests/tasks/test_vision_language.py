"""Questions about images: true ones, all of them as often, scored as a person would."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxdl import launch
from jaxdl.data import ANNOTATED_IMAGES, AnnotatedImage
from jaxdl.data.location_tokens import words_to_boxes
from jaxdl.data.scenes import SHAPES, scene
from jaxdl.errors import UserError
from jaxdl.tasks.image_text import ImageTower
from jaxdl.tasks.vision_language import (
    CATEGORIES,
    Answering,
    EvalSet,
    Question,
    as_prompt,
    draw_question,
    open_questions,
    questions_about,
)
from jaxdl.training import Run

BLACK = np.zeros((8, 8, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class Config(launch.Config, ImageTower):
    """Of a run that only opens data."""


def example(number: int = 0) -> AnnotatedImage:
    return ANNOTATED_IMAGES.open("builtin:scenes")[1][number]


def test_the_questions_about_a_scene_are_true():
    for number in range(20):
        things = scene(1, number).things
        asked = questions_about(example(number), SHAPES)
        (caption,) = (each for each in asked if each.category == "caption")
        assert caption.prompt == "caption en" and caption.answers == example(number).captions
        detected = {each.prompt: words_to_boxes(each.answers[0]) for each in asked if each.category == "detect"}
        assert detected.keys() == {f"detect {thing.shape}" for thing in things}
        for prompt, (found, names) in detected.items():
            shape = prompt.removeprefix("detect ")
            those = [thing for thing in things if thing.shape == shape]
            assert names == [shape] * len(those)
            expected = [(t.x - t.radius, t.y - t.radius, t.x + t.radius, t.y + t.radius) for t in those]
            np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=1 / 1024)
        prompts = [each.prompt for each in asked if each.category == "answer"]
        assert prompts and all(prompt.startswith("answer en ") and prompt.endswith("?") for prompt in prompts)


def test_only_what_is_wanted_is_asked():
    (one,) = questions_about(example(), SHAPES, ("caption",), every_caption=False)
    assert one.answers == example().captions[:1]
    labelled = AnnotatedImage(BLACK, label=1)
    assert questions_about(labelled, ("cat", "dog")) == [Question("answer", "answer en what is this?", ("dog",))]
    own = AnnotatedImage(BLACK, questions=(("detect dot", "<loc0001><loc0001><loc0009><loc0009> dot"), ("how dark?", "very")))
    assert [each.category for each in questions_about(own, ())] == ["detect", "answer"]
    assert questions_about(own, (), ("caption",)) == []


def test_a_prompt_stays_one():
    assert as_prompt("what is it?") == as_prompt("answer en what is it?") == "answer en what is it?"
    assert as_prompt("detect ring") == "detect ring"


def test_every_category_is_drawn_as_often_as_the_others_with_one_answer():
    offered, random = questions_about(example(), SHAPES), np.random.default_rng(0)
    drawn = [draw_question(offered, random) for _ in range(600)]
    assert all(abs(sum(each.category == category for each in drawn) - 200) < 50 for category in CATEGORIES)
    assert all(len(each.answers) == 1 for each in drawn)
    assert {each.answers[0] for each in drawn if each.category == "caption"} == set(example().captions)


def test_scores_are_those_that_one_would_give():
    square = "<loc0000><loc0000><loc0512><loc0512> ring"
    eval_set = EvalSet(
        [BLACK] * 6,
        [
            Question("answer", "a?", ("red",)),
            Question("answer", "b?", ("two",)),
            Question("caption", "caption en", ("a red ring", "one ring")),
            Question("detect", "detect ring", (square,)),
            Question("detect", "detect ring", (f"{square} ; {square}",)),
            Question("detect", "detect ring", (square,)),
        ],
    )
    narrower = "<loc0000><loc0000><loc0512><loc0384> ring"
    said = ["Red", "three", "one  ring", square, narrower, "nothing"]
    found = eval_set.score(said)
    assert found["answer_exact_match"] == 0.5 and found["caption_exact_match"] == 1
    np.testing.assert_allclose(found["detect_mean_iou"], (1 + 0.75 + 0 + 0) / 4, atol=1e-5)
    assert found["detect_above_half"] == 0.5 and found["caption_bleu"] < 100
    assert eval_set.figures(said).keys() == {"answers", "boxes"}
    assert EvalSet([BLACK], eval_set.questions[:1]).figures(["red"]).keys() == {"answers"}


def test_of_each_held_out_image_one_question_of_each_category_is_in_turn_asked():
    _, held_out = ANNOTATED_IMAGES.open("builtin:scenes")
    found = EvalSet.of(held_out, lambda example: questions_about(example, SHAPES), 40)
    assert [each.category for each in found.questions] == list(CATEGORIES) * 40
    assert len({each.prompt for each in found.questions if each.category == "answer"}) > 15


def test_answers_are_asked_for_once_and_left_in_the_run(tmp_path):
    calls = []

    def answer(variables, images, prompts):
        calls.append(prompts)
        return ["red"] * len(prompts)

    eval_set = EvalSet([BLACK], [Question("answer", "answer en what color?", ("red", "scarlet"))])
    variables, key = {"params": {}}, jax.random.key(0)
    with Run.open(tmp_path / "run", "toy", Config()) as run:
        answering = Answering(run, eval_set, answer)
        reports = [part(variables, key) for part in (answering.evaluate, answering.conclude, answering.show)]
    assert calls == [["answer en what color?"]] and reports[0] == {"answer_exact_match": 1.0} and reports[1] == {}
    assert (tmp_path / "run" / "answers.txt").read_text() == "answer en what color?\n  right  red | scarlet\n  said   red\n"


def test_of_a_folder_only_images_with_something_to_ask_remain(tmp_path, monkeypatch):
    rows = {"train": [{"text": "black"}, {"questions": [["how dark?", "very"]]}], "val": [{"questions": [["how dark?", "very"]]}]}
    for split, each in rows.items():
        (tmp_path / split).mkdir()
        Image.fromarray(BLACK).save(tmp_path / split / "a.png")
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": "a.png"} | row) for row in each))
    told = []
    monkeypatch.setattr(Run, "say", lambda run, text: told.append(text))
    ask = lambda categories: lambda example, classes: questions_about(example, classes, categories)
    with Run.open(tmp_path / "run", "toy", Config(data=f"folder:{tmp_path}")) as run:
        train, held_out = open_questions(run, ask(("answer",)), "have nothing to answer")
        with pytest.raises(UserError, match="its images have nothing to describe: choose other data"):
            open_questions(run, ask(("caption",)), "have nothing to describe")
    assert (len(train), len(held_out)) == (1, 1) and train[0].questions == (("how dark?", "very"),)
    assert told == [f"folder:{tmp_path}: 1 of 2 have nothing to answer and are left out"]
