"""Pictures that experiments share."""

import collections
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

OCTAVES = range(-40, 16)
"""Exponents e of the bins 2^e ≤ |x| < 2^(e + 1) of the histograms that `inside` draws: from 1e-12 to 65536, as far as gradients and float16 reach. What is beyond counts in the outermost."""


def learning_curves(rows: Sequence[dict[str, float | int]], path: Path) -> None:
    """One panel per metric of a `metrics.jsonl` that was measured more than once; evaluations are drawn with dots, in the panel of their family (`eval/NAME_at_1`, `_5`)."""
    skipped = ("step", "steps_per_second", "examples_per_second", "seconds_to_first_step")
    counts = collections.Counter(name for row in rows for name in row if name not in skipped)
    names = [name for name, count in counts.items() if count > 1 or len(rows) == 1]
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(name.partition("_at_")[0], []).append(name)
    if not panels:
        return
    columns = min(len(panels), 4)
    figure, axes = subplots(-(-len(panels) // columns), columns, 3.2, 2.4)
    for axis, (title, members) in zip(axes, panels.items()):
        for name in members:
            steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row])
            axis.plot(steps, values, marker="." if name.startswith("eval/") else "", linewidth=1, label=name.rpartition("_")[2])
        axis.set_title(title.removeprefix("eval/").replace("_", " "), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        if len(members) > 1:
            axis.legend(title="at", fontsize=7, title_fontsize=7)
        if title.startswith("eval/") and 0 <= min(axis.dataLim.intervaly) and max(axis.dataLim.intervaly) <= 1:
            axis.set_ylim(0, 1.02)
    save(figure, path)


def similarity_matrix(similarity: Float[np.ndarray, "I J"], path: Path, *, title: str) -> None:
    """Images downwards, texts across: a good model shows a bright diagonal."""
    figure, (axis,) = subplots(1, 1, 5.6, 5)
    drawn = axis.imshow(similarity, cmap="viridis", interpolation="nearest")
    axis.set(xlabel="text", ylabel="image")
    axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axis, label="cosine similarity", shrink=0.8)
    save(figure, path)


def ranked_texts(
    images: Sequence[UInt8[np.ndarray, "_ _ _"]],
    texts: Sequence[str],
    similarity: Float[np.ndarray, "I J"],
    relevant: Sequence[int],
    path: Path,
    *,
    k: int = 5,
) -> None:
    """For each image the k most similar texts, the right one, `relevant[i]`, in green."""
    figure, axes = subplots(len(images), 2, 1.5, 1.5, width_ratios=(1, 5))
    for image, scores, right, picture, words in zip(images, similarity, relevant, axes[::2], axes[1::2]):
        show(picture, image)
        words.set_axis_off()
        for place, index in enumerate(np.argsort(-scores, kind="stable")[:k]):
            text = textwrap.shorten(texts[index], 100, placeholder=" …")
            color = "tab:green" if index == right else "0.4"
            words.text(0, 0.92 - place / k, f"{scores[index]:.2f}  {text}", color=color, fontsize=9, va="top")
    save(figure, path)


def ranked_images(
    texts: Sequence[str],
    images: Sequence[UInt8[np.ndarray, "_ _ _"]],
    similarity: Float[np.ndarray, "J I"],
    relevant: Sequence[int],
    path: Path,
    *,
    k: int = 6,
) -> None:
    """For each text the k most similar images, the right one, `relevant[j]`, framed in green."""
    figure, axes = subplots(len(texts), k, 1.5, 1.6)
    for text, scores, right, row in zip(texts, similarity, relevant, axes.reshape(-1, k)):
        row[0].set_title(" ", fontsize=9)  # Keeps the height of a line; a long title would widen the first column.
        caption = textwrap.shorten(text, 120, placeholder=" …")
        row[0].text(0, 1.05, caption, transform=row[0].transAxes, fontsize=9, va="bottom").set_in_layout(False)
        for axis, index in zip(row, np.argsort(-scores, kind="stable")):
            show(axis, images[index])
            axis.set_xlabel(f"{scores[index]:.2f}", fontsize=7, labelpad=2)
            for side in axis.spines.values():
                side.set(color="tab:green", linewidth=3) if index == right else side.set(color="0.8")
    save(figure, path)


def confusion_matrix(
    labels: Int[np.ndarray, "B"], predictions: Int[np.ndarray, "B"], classes: Sequence[str], path: Path, *, title: str
) -> None:
    """What things are, downwards, and what they were taken for, across; a row is the shares of a class and sums to 1."""
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.0, 0.36 * len(classes) + 1.6)
    figure, (axis,) = subplots(1, 1, side + 0.6, side)
    drawn = axis.imshow(shares, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for row, column in zip(*np.nonzero(shares >= 0.005)):
        color = "white" if shares[row, column] < 0.6 else "black"
        axis.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axis.set_yticks(range(len(classes)), classes, fontsize=8)
    axis.set(xlabel="taken for", ylabel="is")
    axis.set_title(title, fontsize=10)
    figure.colorbar(drawn, ax=axis, label="share of the row (numbers: per cent)", shrink=0.8)
    save(figure, path)


def inside(rows: Sequence[dict[str, Any]], directory: Path) -> None:
    """What a run saw inside of its steps, from the rows of its `inside.jsonl`: `inside_layers.png`, `inside_updates.png`, `inside_activations.png` and `inside_gradients.png`.

    Layers are those that all rows have, in the order of their calls, without those that changed nothing; only some of them, evenly chosen, where there are too many to be read.
    """
    if not rows:
        return
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
    if layers:
        _layers(rows, steps, _some(layers, 120), directory / "inside_layers.png")
        for kind, title in (
            ("activations", "what each layer gives"),
            ("gradients", "gradient of the loss by what each layer gives"),
        ):
            arrays = [name for name in layers if any(row["activations"][name]["std"] for row in rows)]
            _histograms(rows, steps, _some(arrays, 30), kind, title, directory / f"inside_{kind}.png")
    if parameters:
        _updates(rows, steps, parameters, directory / "inside_updates.png")


def _some(names: list[str], most: int) -> list[str]:
    """`most` of them, evenly chosen, the first and the last among them."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, most).round().astype(int))] if len(names) > most else names


def _log(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Base 10; NaN, which is not drawn, where there is nothing to take it of."""
    return np.log10(np.where(values > 0, values, np.nan))


def _step_ticks(axis: Any, steps: Sequence[int]) -> None:
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


def _layers(rows: Sequence[dict[str, Any]], steps: Sequence[int], names: list[str], path: Path) -> None:
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
    save(figure, path)


def _updates(rows: Sequence[dict[str, Any]], steps: Sequence[int], names: list[str], path: Path) -> None:
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
    save(figure, path)


def _histograms(
    rows: Sequence[dict[str, Any]], steps: Sequence[int], names: list[str], kind: str, title: str, path: Path
) -> None:
    """How the values of each layer are distributed, look by look: negative octaves below, positive ones above, zero and what is too small for the picture between."""
    shares = np.array([[row[kind][name]["histogram"] for row in rows] for name in names], float)  # L T 2E
    if not len(names):
        return
    half = shares.shape[-1] // 2
    by_octave = np.maximum(shares[..., half:], shares[..., half - 1 :: -1]).max((0, 1))
    used = np.flatnonzero(by_octave >= 0.005)
    if not len(used):
        return
    low, high = used[0], used[-1]
    negative, positive = shares[..., half - 1 - high : half - low], shares[..., half + low : half + high + 1]
    rest = np.maximum(1 - negative.sum(-1) - positive.sum(-1), 0)
    drawn_shares = np.concatenate([negative, rest[..., None], positive], -1)
    count = high - low + 1
    exponents = [e for e in range(high, low, -max(count // 3, 1))]
    first = OCTAVES.start
    ticks = [(count + 1 + e - low, f"$2^{{{e + first}}}$") for e in exponents]
    ticks += [(count, "0")] + [(count - 1 - (e - low), f"$-2^{{{e + first}}}$") for e in exponents]
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
    save(figure, path)


def attention_maps(weights: Float[np.ndarray, "L N T S"], tokens: Sequence[str], path: Path, *, title: str) -> None:
    """What each place (a row of a map) looks at (its columns), for every head, across, of every block, downwards."""
    blocks, heads = weights.shape[:2]
    figure, axes = subplots(blocks, heads, 2.9, 3.0)
    for place, (axis, map_) in enumerate(zip(axes, weights.reshape(-1, *weights.shape[2:]))):
        axis.imshow(map_, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks(range(map_.shape[1]), tokens, fontsize=5, rotation=90)
        axis.set_yticks(range(map_.shape[0]), tokens, fontsize=5)
        axis.set_title(f"block {place // heads + 1}, head {place % heads + 1}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def show(axis: Any, image: UInt8[np.ndarray, "H W C"]) -> None:
    """A picture, grey where it has one channel, with sharp pixels and no ticks."""
    axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def subplots(
    rows: int, columns: int, width: float, height: float, width_ratios: Sequence[float] | None = None
) -> tuple[Any, np.ndarray]:
    """A figure with a flat array of axes, each `width` by `height` inches, without a global pyplot state."""
    import matplotlib.figure  # Here, so that a command line that draws nothing does not wait for it.

    total = width * (sum(width_ratios) if width_ratios else columns)
    figure = matplotlib.figure.Figure(figsize=(total, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": width_ratios}).ravel()
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Writes the picture; axes without anything in them are not drawn."""
    for axis in figure.axes:
        if not axis.has_data() and not axis.texts:
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
