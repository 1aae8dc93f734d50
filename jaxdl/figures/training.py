"""How training went, of one run or of several."""

import collections
from collections.abc import Sequence
from pathlib import Path

from jaxdl.figures.canvas import save, subplots


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


def beside(curves: dict[str, list[dict[str, float]]], score: str, levels: dict[str, float], path: Path) -> None:
    """A score on held-out data in the course of training, for several runs, and what simpler methods reach."""
    figure, (axis,) = subplots(1, 1, 6, 4)
    for name, rows in curves.items():
        steps, values = zip(*[(row["step"], row[f"eval/{score}"]) for row in rows])
        axis.plot(steps, values, marker=".", label=f"{name.replace('_', ' ')}: {values[-1]:.3f}")
    for (label, level), color in zip(levels.items(), ("0.35", "0.65")):
        axis.axhline(level, color=color, linestyle="--", linewidth=1, label=f"{label}: {level:.3f}")
    axis.set(xlabel="step", ylim=(0, 1.02))
    axis.set_title(f"{score.replace('_', ' ')} in the course of training", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)
