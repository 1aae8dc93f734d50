"""Statistics of the layers over training: activations, gradients, updates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxdl.figures.canvas import subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OCTAVES = range(-40, 16)
"""Exponents e of the bins 2^e ≤ |x| < 2^(e + 1) of the histograms that `layer_stats` draws: from 1e-12 to 65536, as far as gradients and float16 reach. What is beyond counts in the outermost."""


def layer_stats(rows: Sequence[dict[str, Any]]) -> "dict[str, Figure]":
    """Figures of the rows that a run logs about its layers: `layer_stats`, `layer_updates`, `layer_activations` and `layer_gradients`, or those of them for which there is something to draw.

    Layers are those that all rows have, in the order of their calls, without those that changed nothing; only some of them, evenly chosen, where there are too many to be read.
    """
    if not rows:
        return {}
    steps = [row["step"] for row in rows]
    layers = [name for name in rows[0]["activations"] if all(name in row["activations"] for row in rows)]
    # A module that changes nothing (dropout of 0, the module whose last part is the one before) repeats what is drawn.
    layers = [
        name
        for before, name in zip([None, *layers], layers)
        if before is None or any(row["activations"][name] != row["activations"][before] for row in rows)
    ]
    order = {name: place for place, name in enumerate(layers)}
    owner = lambda path: order.get(path.rpartition("/")[0], len(order))
    parameters = sorted((name for name in rows[0]["parameters"] if all(name in row["parameters"] for row in rows)), key=owner)
    drawn: dict[str, Figure | None] = {}
    if layers:
        arrays = _some([name for name in layers if any(row["activations"][name]["std"] for row in rows)], 30)
        drawn["layer_stats"] = _layers(rows, steps, _some(layers, 120))
        drawn["layer_activations"] = _histograms(rows, steps, arrays, "activations", "what each layer gives")
        drawn["layer_gradients"] = _histograms(rows, steps, arrays, "gradients", "gradient of the loss by what each layer gives")
    if parameters:
        drawn["layer_updates"] = _updates(rows, steps, parameters)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _layers(rows: Sequence[dict[str, Any]], steps: Sequence[int], names: list[str]) -> "Figure":
    """Each layer a line, from the first downwards, each look a column."""

    def of(kind: str, field: str) -> Float[np.ndarray, "L T"]:
        return np.array([[row[kind][name][field] for row in rows] for name in names], float)

    panels = (
        ("deviation of activations", "log₁₀", _log(of("activations", "std")), {}),
        ("share of activations that are 0", "share", of("activations", "zeros"), {"vmin": 0, "vmax": 1, "cmap": "magma"}),
        ("deviation of gradients by activations", "log₁₀", _log(of("gradients", "std")), {}),
    )
    figure, axes = subplots(1, 3, 3.6, 1.6 + 0.15 * len(names), width_ratios=(1, 1, 1))
    for axis, (title, label, values, options) in zip(axes, panels):
        drawn = axis.imshow(values, aspect="auto", interpolation="nearest", **options)
        axis.set_title(title, fontsize=9)
        axis.set_yticks([])
        _step_ticks(axis, steps)
        figure.colorbar(drawn, ax=axis, label=label, location="bottom", shrink=0.9, aspect=30, pad=0.02)
    axes[0].set_yticks(range(len(names)), names, fontsize=7)
    return figure


def _updates(rows: Sequence[dict[str, Any]], steps: Sequence[int], names: list[str]) -> "Figure":
    """‖Δw‖ / ‖w‖ of each parameter: a line each, and the same as colours with names."""
    values = np.array([[row["parameters"][name]["update_ratio"] or np.nan for row in rows] for name in names], float)
    shown = _some(names, 60)
    import matplotlib  # Here, as in `subplots`.

    figure, (lines, colors) = subplots(1, 2, 4.2, 1.6 + 0.15 * max(len(shown), 16), width_ratios=(1, 1))
    for place, line in enumerate(values):
        lines.plot(steps, line, linewidth=0.8, color=matplotlib.colormaps["viridis"](place / max(len(names) - 1, 1)))
    lines.axhline(1e-3, color="tab:red", linestyle="--", linewidth=1.5, label="1e-3, a rule of thumb")
    lines.legend(fontsize=7, loc="lower left")
    lines.set(yscale="log", xlabel="step")
    lines.set_title("length of an update / length of the parameter\n(dark: first layers, bright: last ones)", fontsize=9)
    lines.grid(alpha=0.3)
    lines.tick_params(labelsize=7)
    indices = [names.index(name) for name in shown]
    drawn = colors.imshow(_log(values[indices]), aspect="auto", cmap="coolwarm", vmin=-6, vmax=0, interpolation="nearest")
    colors.set_yticks(range(len(shown)), shown, fontsize=7)
    colors.set_title("the same, parameter by parameter", fontsize=9)
    _step_ticks(colors, steps)
    figure.colorbar(
        drawn, ax=colors, label="log₁₀ (white in the middle: 1e-3)", location="bottom", shrink=0.9, aspect=30, pad=0.02
    )
    return figure


def _histograms(rows: Sequence[dict[str, Any]], steps: Sequence[int], names: list[str], kind: str, title: str) -> "Figure | None":
    """How the values of each layer are distributed, look by look: negative octaves below, positive ones above, zero and what is too small for the picture between."""
    if not names:
        return None
    shares = np.array([[row[kind][name]["histogram"] for row in rows] for name in names], float)  # L T 2E
    half = shares.shape[-1] // 2
    by_octave = np.maximum(shares[..., half:], shares[..., half - 1 :: -1]).max((0, 1))
    used = np.flatnonzero(by_octave >= 0.005)
    if not len(used):
        return None
    low, high = used[0], used[-1]
    negative, positive = shares[..., half - 1 - high : half - low], shares[..., half + low : half + high + 1]
    rest = np.maximum(1 - negative.sum(-1) - positive.sum(-1), 0)
    drawn_shares = np.concatenate([negative, rest[..., None], positive], -1)
    count = high - low + 1
    exponents = [e for e in range(high, low, -max(count // 3, 1))]
    first = OCTAVES.start
    ticks = [(count + 1 + e - low, _power(e + first)) for e in exponents]
    ticks += [(count, "0")] + [(count - 1 - (e - low), f"−{_power(e + first)}") for e in exponents]
    columns = min(6, len(names))
    figure, axes = subplots(-(-len(names) // columns), columns, 2.3, 1.9)
    for axis, name, values in zip(axes, names, drawn_shares):
        drawn = axis.imshow(
            np.sqrt(values.T), origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=0.5**0.5, interpolation="nearest"
        )
        axis.set_title(_two_lines(name), fontsize=6.5)
        axis.set_yticks(*zip(*ticks), fontsize=6)
        _step_ticks(axis, steps)
    bar = figure.colorbar(drawn, ax=list(axes), label="share of the values", shrink=0.5)
    shown = (0, 0.02, 0.1, 0.25, 0.5)
    bar.set_ticks(np.sqrt(shown), labels=[*map(str, shown[:-1]), "≥ 0.5"])
    figure.suptitle(f"{title}: distribution over training, a bin for each power of 2", fontsize=10)
    return figure


def _some(names: list[str], most: int) -> list[str]:
    """`most` of them, evenly chosen, the first and the last among them."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, most).round().astype(int))] if len(names) > most else names


def _power(exponent: int) -> str:
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _log(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Base 10; NaN, which is not drawn, where there is nothing to take it of."""
    return np.log10(np.where(values > 0, values, np.nan))


def _step_ticks(axis: "Axes", steps: Sequence[int]) -> None:
    """Names some of the columns of a picture by their steps."""
    shown = np.unique(np.linspace(0, len(steps) - 1, 4).round().astype(int))
    axis.set_xticks(shown, [f"{steps[i]:,}" for i in shown], fontsize=7)
    axis.set_xlabel("step", fontsize=8)


def _two_lines(name: str) -> str:
    """A path that is long, broken where it is nearest to the middle."""
    breaks = [i for i, letter in enumerate(name) if letter == "/"]
    if len(name) <= 30 or not breaks:
        return name
    cut = min(breaks, key=lambda i: abs(i - len(name) / 2)) + 1
    return f"{name[:cut]}\n{name[cut:]}"
