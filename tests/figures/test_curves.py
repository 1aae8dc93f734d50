"""Lines, bars, heat maps and points lie where their numbers say."""

import numpy as np
import pytest

from jaxdl import figures
from jaxdl.errors import UserError

random = np.random.default_rng(0)


def test_learning_curves_have_a_panel_for_each_family_of_metrics():
    rows = [{"step": step, "loss": 1 / step, "eval/r_at_1": 0.1 * step, "eval/r_at_5": 0.2 * step} for step in (1, 2, 3)]
    rows.append({"step": 3, "eval/once": 1.0})
    loss, recall = figures.learning_curves(rows).axes[:2]
    assert [axis.get_title() for axis in (loss, recall)] == ["loss", "r"]
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[1, 1], [2, 1 / 2], [3, 1 / 3]])
    assert [line.get_label() for line in recall.lines] == ["1", "5"] and recall.get_ylim() == (0, 1.02)
    assert figures.learning_curves([]) is None and figures.learning_curves(rows[3:]) is not None


@pytest.mark.parametrize("band", ["range", "std"])
def test_a_line_over_seeds_is_their_mean_and_the_band_their_spread(band):
    runs = random.normal(size=(4, 10))
    (axis,) = figures.curves({"panel": {"ours": (range(10), runs), "one": ([0, 9], [1.0, 2.0])}}, band=band).axes
    np.testing.assert_allclose(axis.lines[0].get_ydata(), runs.mean(0))
    (collection,) = axis.collections  # None around a single run.
    vertices = collection.get_paths()[0].vertices
    low, high = (runs.min(0), runs.max(0)) if band == "range" else (runs.mean(0) - runs.std(0), runs.mean(0) + runs.std(0))
    for step in range(10):
        seen = vertices[vertices[:, 0] == step, 1]
        assert np.isclose(seen.min(), low[step]) and np.isclose(seen.max(), high[step])
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == [f"ours: {runs[:, -1].mean():.3g}", "one: 2"]


def test_levels_are_dashed_lines_in_every_panel():
    lines = {"a": ([0, 1], [0.2, 0.9])}
    figure = figures.curves({"x": lines, "y": lines}, levels={"baseline": 0.5}, limits=(0, 1.02))
    for axis in figure.axes:
        level = axis.lines[1]
        assert set(level.get_ydata()) == {0.5} and level.get_linestyle() == "--" and axis.get_ylim() == (0, 1.02)
    assert [axis.get_title() for axis in figure.axes] == ["x", "y"] and figures.curves({}) is None


def test_panels_may_share_their_scale():
    panels = {"x": {"a": ([0, 1], [1.0, 10.0])}, "y": {"a": ([0, 1], [100.0, 1000.0])}}
    one, other = figures.curves(panels, log=True, share_y=True, final=False).axes
    assert one.get_ylim() == other.get_ylim() and one.get_ylim()[0] < 1 and one.get_ylim()[1] > 1000
    assert one.get_legend() is not None and other.get_legend() is None


def test_runs_that_diverged_are_gaps():
    runs = np.array([[1.0, np.inf, 2.0], [1.0, 3.0, np.nan]])
    figure = figures.curves({"x": {"a": (range(3), runs)}, "all": {"a": (range(3), np.full(3, np.nan))}}, log=True, band="std")
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).tolist() == [False, True, True]
    figures.pixels(figure)


def test_layers_are_lines_in_the_panel_of_their_model():
    ours, theirs = random.random((3, 5)) + 0.01, random.random((2, 5))
    panels = {"deviation": {"ours": ours, "theirs": theirs + 1}, "zeros": {"ours": ours, "theirs": theirs}}
    figure = figures.layer_curves(range(5), panels, shares={"zeros"}, levels={"deviation": 0.1})
    a, b, c, d = figure.axes
    np.testing.assert_allclose([line.get_ydata() for line in a.lines[:3]], ours)
    assert len(b.lines) == len(d.lines) + 1 == 3 and a.get_yscale() == "log" and c.get_yscale() == "linear"
    assert a.get_ylim() == b.get_ylim() and c.get_ylim() == (-0.02, 1.02) and (a.get_title(), b.get_title()) == ("ours", "theirs")
    assert figures.layer_curves([], panels) is None
    figures.pixels(figures.layer_curves(range(5), {"x": {"a": np.full((2, 5), np.nan)}}))


def test_heat_maps_show_means_and_frame_what_was_chosen():
    values = random.random((2, 3, 4))
    figure = figures.heatmaps({"small": values, "large": values}, ["a", "b"], ["1", "2", "3"], chosen={"large": [2, 0]})
    small, large = figure.axes[:2]
    np.testing.assert_allclose(small.images[0].get_array(), values.mean(2))
    assert small.texts[4].get_text() == f"{values[1, 1].mean():.3f}\n± {np.ptp(values[1, 1]) / 2:.3f}"
    centres = [patch.get_bbox().extents.reshape(2, 2).mean(0) for patch in large.patches]
    np.testing.assert_allclose(centres, [[2, 0], [0, 1]])
    assert not small.patches and [label.get_text() for label in large.get_yticklabels()] == ["a", "b"]


def test_bars_are_the_least_times_in_milliseconds():
    seconds = {"loop": {"forward": [0.003, 0.002, 0.004], "backward": [0.01]}, "XLA": {"forward": np.array([0.001])}}
    (axis,) = figures.timings(seconds).axes
    heights = [[bar.get_height() for bar in container] for container in axis.containers]
    np.testing.assert_allclose(heights, [[2, 1], [10, np.nan]])
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [3, 1])
    assert [text.get_text() for text in axis.texts] == ["2", "1", "10"]


def test_means_by_class_are_over_all_values_of_its_examples():
    rows = [np.array([1.0, np.nan, 3.0]), np.array([5.0]), np.array([2.0, 4.0, 6.0, 8.0])]
    figure = figures.means_by_class({"a": rows, "b": np.ones((3, 2))}, [0, 2, 0], ["x", "y", "z"], xlabel="bits", title="t")
    (axis,) = figure.axes
    widths = [[bar.get_width() for bar in container] for container in axis.containers]
    np.testing.assert_allclose(widths, [[4, np.nan, 5], [1, np.nan, 1]])
    figures.pixels(figure)


def test_points_are_drawn_by_class_within_one_frame():
    points = {"data": random.normal(size=(50, 2)), "samples": 3 * random.normal(size=(30, 2))}
    labels = random.integers(0, 3, 50)
    data, samples = figures.scatter(points, labels={"data": labels}, classes=["a", "b", "c"]).axes
    for label, collection in enumerate(data.collections):
        np.testing.assert_allclose(collection.get_offsets(), points["data"][labels == label])
    np.testing.assert_allclose(samples.collections[0].get_offsets(), points["samples"])
    assert data.get_xlim() == samples.get_xlim() and data.get_ylim() == samples.get_ylim()
    everything = np.concatenate(list(points.values()))
    (left, right), (bottom, top) = data.get_xlim(), data.get_ylim()
    assert ((everything > (left, bottom)) & (everything < (right, top))).all()
    (legend,) = data.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]


def test_a_density_lies_on_its_extent_with_its_first_row_at_the_bottom():
    density = np.zeros((4, 6))
    density[0, 5] = 1  # At the bottom right.
    (axis,) = figures.scatter({}, density={"p": density}, extent=(-1, 2, 0, 8)).axes
    (image,) = axis.images
    assert image.get_extent() == [-1, 2, 0, 8] and image.origin == "lower" and axis.get_xlim() == (-1, 2)
    contour = np.concatenate([path.vertices for path in axis.collections[0].get_paths() if len(path.vertices)])
    assert (contour[:, 0] > 1).all() and (contour[:, 1] < 4).all()  # Around the peak at (1.75, 1).
    figures.pixels(figures.scatter({"flat": np.zeros((1, 2))}, density={"flat": np.ones((2, 2))}, extent=(0, 1, 0, 1)))
    with pytest.raises(UserError, match="extent"):
        figures.scatter({}, density={"p": density})


def test_points_that_are_nowhere_do_not_move_the_frame():
    (axis,) = figures.scatter({"x": np.array([[0.0, 0.0], [1.0, 1.0], [np.nan, 5.0], [np.inf, 0.0]])}).axes
    assert axis.get_xlim() == pytest.approx((-0.05, 1.05))
    figures.pixels(axis.figure)
    assert figures.scatter({}) is None and figures.scatter({"none": np.zeros((0, 2))}) is not None
