"""What is written is what was drawn, whatever the texts."""

import numpy as np
import pytest
from PIL import Image

from jaxdl import figures
from jaxdl.errors import UserError
from jaxdl.figures.canvas import legend_label

HOSTILE = [
    "$x_1$ costs 5$ and 7$", "a$b$c", "an unbalanced { and $\\frac{1}{$", "漢字 🙂", "\x00\ud800\t", "$", "_hidden", "", "a\nb\u2028c",
    "שלום", "x" * 5000,
]  # fmt: skip


def ink(text: str) -> int:
    """How many columns of pixels a text darkens."""
    figure, (axis,) = figures.subplots(1, 1, 4, 1)
    axis.set_axis_off()
    axis.text(0, 0.5, text, fontsize=12)
    return int((figures.pixels(figure) < 128).any((0, 2)).sum())


def test_dollars_in_a_text_are_no_mathematics():
    """As mathematics `$x_1$` would lose two signs and an underscore, and be narrower than the same text without them."""
    assert ink("$x_1$ costs 5$ and 7$") > ink("x_1 costs 5 and 7") > ink("x1 costs 5 and 7")


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_drawn_anywhere(text):
    figure, axes = figures.subplots(2, 1, 4, 3)
    for axis in axes:
        axis.plot([1, 10], [1, 100], label=legend_label(text))
        axis.legend(title=text)
        axis.annotate(text, (1, 1))
        axis.set(xlabel=text, ylabel=text, title=text)
    axes[0].set_xticks([1, 10], [text, "b"])  # Formatted by a function,
    axes[1].xaxis.set_major_formatter(lambda value, place: text)
    axes[1].set_yscale("log")
    figure.suptitle(text)
    figures.pixels(figure)
    figures.pixels(figure)  # Twice is as once.
    assert "\x00" not in axes[1].xaxis.get_major_formatter()(1)


@pytest.mark.parametrize("text", ["_hidden", "__", "", "shown"])
def test_a_legend_has_every_name(text):
    """Matplotlib leaves out those that begin with an underscore."""
    x = np.arange(3.0)
    drawn = (
        figures.curves({"panel": {text: (x, x)}}, title="", final=False),
        figures.scaling({"panel": {text: ([1, 2, 3], x + 1)}}, columns=1, xlabel="", ylabel=""),
        figures.scatter({"panel": np.eye(2)}, labels={"panel": np.zeros(2, int)}, classes=[text]),
    )
    for figure in drawn:
        figures.pixels(figure)
        legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
        assert [label.get_text() for legend in legends for label in legend.get_texts()] == [text]


def test_powers_along_logarithmic_axes_stay_mathematics():
    figure, (axis,) = figures.subplots(1, 1, 4, 3)
    axis.plot([1, 2], [1e-3, 1e3])
    axis.set(yscale="log")
    figures.pixels(figure)
    powers = [tick.label1 for tick in axis.yaxis.get_major_ticks()]
    assert any("10^{" in label.get_text() for label in powers) and all(label.get_parse_math() for label in powers)
    assert not axis.title.get_parse_math()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_image_is_written_as_it_is(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    path = figures.save(image, tmp_path / "new" / "samples_at_0.5")
    assert path == tmp_path / "new" / "samples_at_0.5.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)).reshape(image.shape), image)
    assert figures.pixels(image) is image


def test_a_figure_is_written_as_its_pixels(tmp_path):
    figure, (full, empty) = figures.subplots(1, 2, 2, 1)
    full.plot([0, 1], [0, 1])
    drawn = figures.pixels(figure)
    assert drawn.shape == (110, 440, 3)
    path = figures.save(figure, tmp_path / "line.png")
    assert path.name == "line.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), drawn)
    assert full.axison and not empty.axison


@pytest.mark.parametrize("channels", [1, 3])
def test_an_animation_is_written_frame_by_frame(tmp_path, channels):
    frames = np.full((5, 6, 8, channels), 255, np.uint8)
    frames[np.arange(5), :, np.arange(5)] = 0
    path = figures.save(figures.Animation(frames, 20), tmp_path / "walk")
    assert path == tmp_path / "walk.gif"
    with Image.open(path) as read:
        assert read.n_frames == 5 and read.info["loop"] == 0 and read.info["duration"] == 50
        for index in range(5):
            read.seek(index)
            np.testing.assert_array_equal(np.asarray(read.convert("L")), frames[index, ..., 0])


def test_pixels_of_an_animation_are_frames_side_by_side():
    frames = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    shown = figures.pixels(figures.Animation(frames))
    assert shown.shape == (2, 24, 1)
    assert shown[0, ::3, 0].tolist() == np.linspace(0, 19, 8).round().tolist()
    assert figures.pixels(figures.Animation(frames[:2])).shape == (2, 6, 1)


def test_what_is_no_picture_is_refused():
    frames = np.zeros((2, 3, 4, 3), np.uint8)
    for given in ((frames[:0],), (frames[..., :2],), (frames, 0), (frames, 51)):
        with pytest.raises(UserError):
            figures.Animation(*given)
    with pytest.raises(UserError, match="1, 3 or 4 channels"):
        figures.pixels(np.zeros((3, 4, 2), np.uint8))


def test_a_program_that_draws_nothing_does_not_import_matplotlib():
    import subprocess
    import sys

    code = "import sys, jaxdl.figures; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
