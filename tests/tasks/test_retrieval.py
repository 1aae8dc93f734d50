"""What images and texts are asked for each other, and what counts as found."""

import jax
import numpy as np
import pytest
from captioned import Listed
from PIL import Image

from jaxdl.data import CAPTIONED_IMAGES, scenes
from jaxdl.data.images import TEMPLATES
from jaxdl.errors import UserError
from jaxdl.tasks.retrieval import Embedder, Matching, Retrieval, rank_texts, zero_shot_tasks


def test_retrieval_takes_the_first_images_whose_first_captions_differ():
    source = Listed([("a", "x"), ("b",), ("a", "y"), ("c",), ("d",)])
    found = Retrieval.among(source, 3)
    assert found.texts == ["a", "b", "c"] and [image[0, 0, 0] for image in found.images] == [0, 20, 60]
    assert len(Retrieval.among(source, 99).texts) == 4
    assert Retrieval.among(Listed([("a",)], [0], ("a",)), 3) is None


def test_a_class_is_asked_for_by_the_captions_that_it_has_and_an_absent_one_by_the_templates():
    source = Listed([("capital a",), ("small a",), ("capital c",)], [0, 0, 2], ("a", "b", "c"))
    (task,) = zero_shot_tasks(source)
    assert task.prompts == [["capital a", "small a"], [text.format("b") for text in TEMPLATES], ["capital c"]]
    assert task.labels.tolist() == [0, 0, 2] and zero_shot_tasks(Listed([("a",)])) == []
    (digits,) = zero_shot_tasks(CAPTIONED_IMAGES.open("builtin:digits")[1])
    assert [prompts[0] for prompts in digits.prompts][:2] == ["a photo of zero", "a photo of one"]
    assert all(len(prompts) == len(TEMPLATES) for prompts in digits.prompts) and len(digits.labels) == 360


def test_of_scenes_colour_and_shape_of_what_is_alone_are_asked_for():
    _, held_out = CAPTIONED_IMAGES.open("builtin:scenes")
    color, shape = zero_shot_tasks(held_out)
    assert len(color.prompts) == len(scenes.COLORS) and len(shape.prompts) == len(scenes.SHAPES)
    for number in range(0, len(color.source), 25):
        caption = color.source.annotations(number).captions[1]  # "a large red ring"
        assert caption in color.prompts[color.labels[number]] and caption in shape.prompts[shape.labels[number]]
        assert sum(caption in prompts for prompts in color.prompts) == 1
    alone = [index for index in range(len(held_out)) if held_out.annotations(index).captions[2].startswith("one ")]
    assert color.source.indices.tolist() == alone


class Known(Embedder):
    """An embedder that knows the answers: texts and images are unit vectors by the first letter and by the grey level."""

    def __init__(self):
        """It needs no module."""

    def texts(self, variables, texts):
        return np.stack([np.eye(5, dtype=np.float32)["abcde".index(text[0])] for text in texts])

    def images(self, variables, images):
        return np.stack([np.eye(5, dtype=np.float32)[int(image[0, 0, 0]) // 20] for image in images])


def test_what_matches_is_counted_as_found_and_scores_are_computed_once():
    matching = Matching(Known(), Listed([("a",), ("b",), ("e",), ("d",)]), 10)
    variables, key = {}, jax.random.key(0)
    found = matching.evaluate(variables, key)
    # The third image is a "c", and there is no such text: it is found at no similarity at all.
    assert found["image_to_text_recall_at_1"] == 0.75 and found["text_to_image_recall_at_1"] == 0.75
    assert matching.scores(variables) is matching.scores(variables)
    assert set(matching.show(variables, key)) == {"similarity", "image_to_text", "text_to_image"}
    labelled = Matching(Known(), Listed([("a",), ("b",), ("e",)], [0, 1, 2], ("a", "b", "e")), 10)
    assert labelled.evaluate({}, key) == {"zero_shot_accuracy": pytest.approx(2 / 3)}
    assert set(labelled.show({}, key)) == {"zero_shot_class"}


def test_texts_are_ranked_by_what_they_are_to_an_image_file(tmp_path):
    class Colours(Embedder):
        """Red, green and blue are three directions, for images and for texts."""

        def __init__(self):
            """It has no module."""

        def images(self, variables, images):
            return np.stack([image.mean((0, 1)) / np.linalg.norm(image.mean((0, 1))) for image in images])

        def texts(self, variables, texts):
            return np.eye(3)[[("red", "green", "blue").index(text) for text in texts]]

    file = tmp_path / "mostly_blue.png"
    Image.fromarray(np.tile(np.uint8([10, 60, 200]), (4, 4, 1))).save(file)
    said = []
    rank_texts(Colours(), [str(file), "red", "blue", "green"], said.append)({})
    assert [line.split()[-1] for line in said[0].splitlines()[1:]] == ["blue", "green", "red"]
    assert rank_texts(Colours(), (), said.append) is None
    with pytest.raises(UserError, match="at least one text"):
        rank_texts(Colours(), [str(file)], said.append)
    with pytest.raises(UserError, match="does not exist"):
        rank_texts(Colours(), [str(tmp_path / "none.png"), "red"], said.append)
