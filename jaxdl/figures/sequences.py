"""What recurrent networks make of names and other sequences."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxdl.figures.canvas import save, subplots


def readings(
    names: Sequence[str], readings: Sequence[Float[np.ndarray, "_ C"]], labels: Sequence[int], classes: Sequence[str], path: Path
) -> None:
    """For each name the probabilities of the likeliest languages after each of its characters; its own language is marked."""
    figure, axes = subplots(-(-len(names) // 2), 2, 5.5, 1.7)
    for axis, name, reading, label in zip(axes, names, readings, labels):
        shown = list(np.argsort(-reading.max(0), kind="stable")[:4])
        shown = shown if label in shown else [*shown[:3], label]
        axis.imshow(reading[:, shown].T, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for (column, row), share in np.ndenumerate(reading[:, shown]):
            if share >= 0.1:
                axis.text(
                    column,
                    row,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if share < 0.6 else "black",
                )
        axis.set_xticks(range(len(name)), [character.replace(" ", "␣") for character in name], fontsize=9)
        axis.set_yticks(range(len(shown)), [classes[index] for index in shown], fontsize=8)
        for tick, index in zip(axis.get_yticklabels(), shown):
            tick.set(color="tab:green" if index == label else "0.3", fontweight="bold" if index == label else "normal")
    figure.suptitle("the language, if the name ended there, in per cent (green: the right one)", fontsize=10)
    save(figure, path)


def written_names(
    names: Sequence[str], new: Bool[np.ndarray, "N"], classes: Sequence[str], path: Path, *, temperature: float, shown: int = 5
) -> None:
    """The first names that were written of each language."""
    rows = np.reshape(names, (len(classes), -1))[:, :shown]
    figure, (axis,) = subplots(1, 1, 2.1 * (shown + 0.6), 0.27 * len(classes) + 0.7)
    axis.set_axis_off()
    axis.set(xlim=(-0.6, shown), ylim=(len(classes), -0.5))
    for row, (language, written) in enumerate(zip(classes, rows)):
        axis.text(-0.6, row, language, fontsize=9, fontweight="bold", va="center")
        for column, name in enumerate(written):
            color = "black" if np.reshape(new, (len(classes), -1))[row, column] else "tab:orange"
            axis.text(column, row, name or "∅", fontsize=9, va="center", color=color)
    axis.set_title(
        f"names that the network wrote, at temperature {temperature:g} (orange: also among those it read)", fontsize=10
    )
    save(figure, path)


def bits_by_class(
    ours: Float[np.ndarray, "N T"],
    counted: Sequence[Float[np.ndarray, "_"]],
    labels: Int[np.ndarray, "N"],
    classes: Sequence[str],
    path: Path,
    *,
    order: int,
) -> None:
    """Bits per character of held-out names, language by language: the network's beside those of counting `order` characters at a time."""
    figure, (axis,) = subplots(1, 1, 6.5, 0.26 * len(classes) + 1.1)
    places = np.arange(len(classes))
    by_language = lambda rows: [
        np.nanmean(np.concatenate([rows[i] for i in np.flatnonzero(labels == label)])) for label in places
    ]
    network = by_language(ours)
    axis.barh(places - 0.2, network, 0.4, label="network", color="tab:blue")
    axis.barh(places + 0.2, by_language(counted), 0.4, label=f"counting {order} characters at a time", color="0.7")
    axis.set_yticks(places, classes, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="bits per character (less is better)")
    axis.set_title("how surprising held-out names are", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    save(figure, path)


def words_found(
    texts: Sequence[str], guessed: Int[np.ndarray, "N T"], tags: Int[np.ndarray, "N T"], path: Path, shown: int = 16
) -> None:
    """What was read, and where words were found to begin: 1 at their first characters."""
    chosen = [index for index in np.random.default_rng(0).permutation(len(tags)).tolist() if tags[index, 1:].any()][:shown]
    figure, (axis,) = subplots(1, 1, 9, 0.27 * len(chosen) + 0.9)
    axis.set_axis_off()
    axis.set(xlim=(0, 3), ylim=(len(chosen), -1.2))
    for column, title in enumerate(("what is read", "with the words found", "what was written")):
        axis.text(column, -1, title, fontsize=9, fontweight="bold", va="center")
    for row, index in enumerate(chosen):
        text = texts[index][: tags.shape[1]]
        found, truth = ("".join(" " * begin + c for c, begin in zip(text, row)).strip() for row in (guessed[index], tags[index]))
        color = "tab:green" if found == truth else "tab:red"
        for column, words in enumerate((text, found, truth)):
            axis.text(column, row, words, fontsize=8, va="center", family="monospace", color=color if column == 1 else "black")
    axis.set_title("words found again in held-out names of several words (green: all of them right)", fontsize=10)
    save(figure, path)


def copied(
    probabilities: Float[np.ndarray, "T A"],
    symbols: Int[np.ndarray, "T"],
    targets: Int[np.ndarray, "T"],
    path: Path,
    *,
    signs: dict[int, str],
) -> None:
    """The probability of each symbol at every step, and what was read and is wanted (0: nothing). `signs` stand for symbols that have no number."""
    figure, (axis,) = subplots(1, 1, max(6.0, 0.22 * len(symbols) + 1.6), 3.2)
    drawn = axis.imshow(
        probabilities[:, 1:].T, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest", origin="lower"
    )
    axis.set_xticks(range(len(symbols)), [signs.get(symbol, str(symbol)) for symbol in symbols.tolist()], fontsize=8)
    axis.set_yticks(range(probabilities.shape[1] - 1), range(1, probabilities.shape[1]), fontsize=8)
    (wanted,) = np.nonzero(targets)
    axis.scatter(wanted, targets[wanted] - 1, s=50, facecolors="none", edgecolors="tab:red", label="wanted")
    axis.set(xlabel="what is read, step by step ( · blank, ! repeat now)", ylabel="answer")
    axis.set_title("a sequence that was not trained on: circles are the symbols to repeat", fontsize=10)
    figure.colorbar(drawn, ax=axis, label="probability")
    save(figure, path)
