"""Figures of classes, texts, attention, convolutions and layers show what they were given."""

import time

import numpy as np
import pytest

from jaxdl import figures

random = np.random.default_rng(0)


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_xticklabels()]


def test_a_confusion_matrix_has_shares_of_rows():
    labels, predictions = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    axis = figures.confusion_matrix(labels, predictions, ["a$b$", "c", "never"], noun="names").axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.75, 0.25, 0], [0.5, 0.5, 0], [0, 0, 0]])
    assert texts(axis) == ["75", "25", "50", "50"] and axis.get_title() == "6 held-out names, 66.67% right"
    assert ticks(axis) == ["a$b$", "c", "never"]


def test_a_thousand_classes_are_a_histogram_and_the_worst_confusions():
    classes = [f"class {index}" for index in range(1000)]
    labels = np.repeat(np.arange(1000), 50)
    predictions = labels.copy()
    for index in range(30):  # Of the class 7 · index, `index + 1` are taken for the next one.
        predictions[350 * index : 351 * index + 1] = 7 * index + 1
    started = time.perf_counter()
    figure = figures.confusion_matrix(labels, predictions, classes)
    figures.pixels(figure)
    assert time.perf_counter() - started < 2
    histogram, table = figure.axes
    assert sum(bar.get_height() for bar in histogram.patches) == 1000
    assert histogram.patches[-1].get_height() == 1000 - sum(index + 1 > 2 for index in range(30))  # Above 95 %.
    cells = np.reshape(texts(table)[3:], (20, 3)).tolist()
    worst = range(29, 9, -1)
    assert cells == [[f"class {7 * index}", f"class {7 * index + 1}", f"{index + 1} of 50"] for index in worst]


def test_many_classes_without_a_mistake_or_an_example():
    classes = [str(index) for index in range(60)]
    right = figures.confusion_matrix(np.arange(60), np.arange(60), classes)
    assert right.axes[1].get_title() == "nothing was confused"
    figures.pixels(figures.confusion_matrix(np.zeros(0, int), np.zeros(0, int), classes))


def test_mistakes_are_those_of_highest_confidence_first():
    logits = random.normal(size=(40, 3)) * 4
    labels = random.integers(0, 3, 40)
    asked: list[int] = []

    def image(index: int) -> np.ndarray:
        asked.append(index)
        return np.full((4, 4, 1), index, np.uint8)

    figure = figures.mistakes(image, logits, labels, ["x", "y", "z"])
    confidence = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1)
    wrong = [index for index in np.argsort(-confidence) if logits[index].argmax() != labels[index]][:24]
    assert asked == wrong
    shown = [int(axis.images[0].get_array()[0, 0]) for axis in figure.axes if axis.images]
    assert shown == wrong
    first = wrong[0]
    assert figure.axes[0].get_title() == f"{'xyz'[logits[first].argmax()]} {confidence[first]:.0%}\nis {'xyz'[labels[first]]}"
    assert figures.mistakes(image, logits, logits.argmax(1), ["x", "y", "z"]) is None


def test_retrieval_marks_what_belongs_together():
    images, words = random.integers(0, 256, (10, 6, 6, 3), np.uint8), [f"text {index}" for index in range(10)]
    similarity = np.eye(10) + 0.1 * random.random((10, 10))
    drawn = figures.retrieval(images, words, similarity)
    assert list(drawn) == ["similarity", "image_to_text", "text_to_image"]
    np.testing.assert_allclose(drawn["similarity"].axes[0].images[0].get_array(), similarity)
    for index, axis in enumerate(drawn["image_to_text"].axes[1::2]):
        assert axis.texts[0].get_text().endswith(f"text {index}") and axis.texts[0].get_color() == "tab:green"
        assert {text.get_color() for text in axis.texts[1:]} == {"0.4"} and len(axis.texts) == 5
    for index, axis in enumerate(drawn["text_to_image"].axes[::6]):
        np.testing.assert_array_equal(axis.images[0].get_array(), images[index])
        assert axis.spines["left"].get_linewidth() == 3


def test_attention_has_a_map_for_each_head_of_each_block():
    weights = random.dirichlet(np.ones(4), (2, 3, 4))
    axes = figures.attention_maps(weights, ["a", "$b$", "c", "$d$"], title="t").axes
    for place, axis in enumerate(axes):
        np.testing.assert_allclose(axis.images[0].get_array(), weights[place // 3, place % 3])
        assert axis.get_title() == f"block {place // 3 + 1}, head {place % 3 + 1}" and ticks(axis)[1] == "$b$"


def test_cross_attention_goes_from_what_is_written_to_what_is_read():
    weights = random.dirichlet(np.ones(5), (2, 3))
    figure = figures.cross_attention(weights, ["x", "y", "end"], ["a", "b", "c", "d", "e"])
    for axis, map_ in zip(figure.axes, weights):
        np.testing.assert_allclose(axis.images[0].get_array(), map_)
        assert ticks(axis) == list("abcde") and [label.get_text() for label in axis.get_yticklabels()] == ["x", "y", "end"]


def test_rollout_maps_lie_below_their_images():
    images, shares = random.integers(0, 256, (13, 6, 6, 1), np.uint8), random.dirichlet(np.ones(4), 13).reshape(13, 2, 2)
    figure = figures.rollout_maps(images, shares, [f"title {index}" for index in range(13)])
    drawn = [axis for axis in figure.axes if axis.images]
    for index in range(13):
        row, column = divmod(index, 10)
        above, below = figure.axes[20 * row + column], figure.axes[20 * row + 10 + column]
        np.testing.assert_array_equal(above.images[0].get_array(), images[index, ..., 0])
        np.testing.assert_allclose(below.images[0].get_array(), 4 * shares[index])
        assert above.get_title() == f"title {index}"
    assert len(drawn) == 2 * 13


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_filters_are_in_colour_where_they_read_three_channels(channels):
    kernel = random.normal(size=(3, 3, channels, 40))
    axes = [axis for axis in figures.filters(kernel).axes if axis.images]
    assert len(axes) == 32
    drawn = np.asarray(axes[5].images[0].get_array())
    if channels == 3:
        np.testing.assert_allclose(drawn, 0.5 + kernel[..., 5] / (2 * np.abs(kernel).max()))
    else:
        np.testing.assert_allclose(drawn, kernel[..., 5].mean(-1))


def test_feature_maps_stand_beside_their_image():
    images = random.integers(0, 256, (2, 8, 8, 3), np.uint8)
    maps = [random.random((2, 8, 8, 9)), random.random((2, 4, 4, 2))]
    axes = np.reshape(figures.feature_maps(images, maps, channels=3).axes, (2, 1 + 3 + 2))
    for number, row in enumerate(axes):
        np.testing.assert_array_equal(row[0].images[0].get_array(), images[number])
        np.testing.assert_allclose(row[3].images[0].get_array(), maps[0][number, ..., 2], rtol=1e-6)
        np.testing.assert_allclose(row[5].images[0].get_array(), maps[1][number, ..., 1], rtol=1e-6)
    assert axes[0, 5].get_title() == "conv 2\nchannel 2"


def test_predictions_of_a_prefix_show_the_right_class():
    readings = [random.dirichlet(np.ones(6), 3), random.dirichlet(np.ones(6), 4)]
    readings[0][:, 5] = 0  # The right one is never among the likeliest.
    first, second = figures.prefix_predictions(["a b", "word"], readings, [5, 1], list("uvwxyz")).axes
    assert ticks(first) == ["a", "␣", "b"] and first.get_yticklabels()[3].get_text() == "z"
    assert first.get_yticklabels()[3].get_color() == "tab:green"
    shown = ["uvwxyz".index(label.get_text()) for label in second.get_yticklabels()]
    np.testing.assert_allclose(second.images[0].get_array(), readings[1][:, shown].T)


def test_texts_stand_in_the_row_of_their_class():
    marked = np.array([False, True, False, False, False, True])
    (axis,) = figures.texts_by_class(["a", "b", "c", "d", "", "f"], marked, ["x", "y"], title="t", shown=2).axes
    drawn = {text.get_text(): (*text.get_position(), text.get_color()) for text in axis.texts}
    assert drawn["b"] == (1, 0, "tab:orange") and drawn["d"] == (0, 1, "black") and drawn["∅"] == (1, 1, "black")
    assert "c" not in drawn and drawn["y"][1] == 1


def test_segmentations_are_green_where_they_are_right():
    true = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0]])
    predicted = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    (axis,) = figures.segmentations(["abcd", "efgh", "ijkl"], predicted, true, title="t").axes
    colors = {text.get_text(): text.get_color() for text in axis.texts if text.get_position()[0] == 1}
    assert colors["ab cd"] == "tab:green" and colors["e fgh"] == "tab:red" and not any("ijkl" in text for text in colors)


def test_wanted_symbols_are_circled():
    probabilities = random.dirichlet(np.ones(5), 4)
    axis = figures.symbol_probabilities(probabilities, ["3", "·", "!", "$"], np.array([0, 0, 3, 1])).axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), probabilities[:, 1:].T)
    assert axis.collections[0].get_offsets().tolist() == [[2, 2], [3, 0]] and ticks(axis) == ["3", "·", "!", "$"]


def statistics(scale: float) -> dict:
    half = len(figures.OCTAVES)
    histogram = np.zeros(2 * half)
    histogram[half + figures.OCTAVES.index(-2)], histogram[half - 1 - figures.OCTAVES.index(-1)] = 0.75, 0.25
    return {"std": scale, "zeros": 0.5, "histogram": histogram.tolist()}


def test_statistics_of_layers_are_drawn_layer_by_layer():
    rows = [
        {
            "step": step,
            "activations": {"a": statistics(10.0), "a/same": statistics(10.0), "b": statistics(0.1)},
            "gradients": {"a": statistics(1.0), "a/same": statistics(1.0), "b": statistics(0.01)},
            "parameters": {"b/kernel": {"update_ratio": 1e-2}, "a/kernel": {"update_ratio": 1e-4}},
        }
        for step in (1, 10, 20)
    ]
    drawn = figures.layer_stats(rows)
    assert set(drawn) == {"layer_stats", "layer_activations", "layer_gradients", "layer_updates"}
    deviations = drawn["layer_stats"].axes[0]
    np.testing.assert_allclose(deviations.images[0].get_array(), [[1, 1, 1], [-1, -1, -1]])  # Without the repeated one.
    histogram = np.square(drawn["layer_activations"].axes[0].images[0].get_array())
    np.testing.assert_allclose(histogram[:, 0], [0.25, 0, 0, 0.75, 0], atol=1e-12)  # −½, −¼, 0, ¼, ½.
    assert [label.get_text() for label in drawn["layer_activations"].axes[0].get_yticklabels()] == ["2⁻¹", "0", "−2⁻¹"]
    lines, colors = drawn["layer_updates"].axes[:2]
    np.testing.assert_allclose([line.get_ydata()[0] for line in lines.lines[:2]], [1e-4, 1e-2])  # As layers are called.
    np.testing.assert_allclose(colors.images[0].get_array()[:, 0], [-4, -2])
    assert figures.layer_stats([]) == {}
    for figure in drawn.values():
        figures.pixels(figure)
