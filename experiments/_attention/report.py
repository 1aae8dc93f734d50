"""What is left in the run's folder: a table for people, and pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments._attention.implementations import COMPARED
from experiments._attention.shapes import PASSES
from jaxdl import figures


def markdown(result: Mapping[str, Any]) -> str:
    """A line for each implementation at each shape, what failed, what is not here, and what became of the goals."""
    compared = COMPARED.get(result["platform"], ())
    peak = result["peak_tflops"]
    head = "case", "length", "width", "passes", "implementation", "ms (quartiles)", "TFLOP/s", "of the peak", "of a matmul"
    head = *head, "temporary MiB", *(f"× {name}" for name in compared)
    lines = [
        f"{result['device']}; a product of {result['config']['dtype']} matrices reaches {result['matmul_tflops']:.3g} TFLOP/s"
        + (f", its maker states {peak:.4g} in bfloat16." if peak else "."),
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in result["rows"]:
        if "error" not in row:
            low, high = row["quartiles"]
            cells = [
                row["case"], row["length"], row["width"], row["passes"], row["implementation"],
                f"{row['milliseconds']:.3g} ({low:.3g}–{high:.3g})", f"{row['tflops']:.3g}",
                *("–" if row[share] is None else f"{row[share]:.0%}" for share in ("share_of_peak", "share_of_matmul")),
                "–" if row["temporary_mib"] is None else f"{row['temporary_mib']:.1f}",
                *(f"{row['faster_than'][name]:.2f}" if name in row["faster_than"] else "–" for name in compared),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    failures = [row for row in result["rows"] if "error" in row]
    for section in (
        [
            f"Failed: {r['implementation']}, {r['passes']}, {r['case']} {r['length']} × {r['width']}: {r['error']}"
            for r in failures
        ],
        [f"Not here: {name}: {reason}" for name, reason in result["not_measured"].items()],
        [f"- {goal['status']}: {goal['goal']} ({goal['why']})" for goal in result["goals"]],
    ):
        lines += ["", *section] if section else []
    return "\n".join(lines) + "\n"


def draw_figures(rows: list[dict[str, Any]], directory: Path) -> None:
    """Time and temporary memory over the length, a panel for each pass and case."""
    import matplotlib.ticker  # Here, as in `figures.subplots`.

    rows = [row for row in rows if "error" not in row]
    widths, cases = sorted({row["width"] for row in rows}), list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    colors = dict(zip(names, (f"C{index}" for index in range(len(names)))))
    for width in widths:
        for quantity, label in (("milliseconds", "milliseconds"), ("temporary_mib", "temporary MiB")):
            figure, axes = figures.subplots(len(PASSES), len(cases), 2.9, 2.6)
            for axis, (passes, case) in zip(axes, [(passes, case) for passes in PASSES for case in cases]):
                for name in names:
                    points = [
                        row
                        for row in rows
                        if (row["width"], row["passes"], row["case"], row["implementation"]) == (width, passes, case, name)
                        and row[quantity]
                    ]
                    points.sort(key=lambda row: row["length"])
                    if points:
                        lengths, values = [row["length"] for row in points], [row[quantity] for row in points]
                        axis.plot(lengths, values, marker=".", color=colors[name], label=name)
                        if quantity == "milliseconds":
                            low, high = zip(*[row["quartiles"] for row in points])
                            axis.fill_between(lengths, low, high, color=colors[name], alpha=0.2, linewidth=0)
                axis.set(xscale="log", yscale="log", xlabel="length", ylabel=label)
                ticks = sorted({row["length"] for row in rows})
                axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
                axis.minorticks_off()
                # A decade has three ticks, since what is drawn may lie within one.
                axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.tick_params(axis="y", labelsize=7)
                axis.set_title(f"{case}, {passes}", fontsize=9)
                axis.grid(alpha=0.3)
            axes[0].legend(fontsize=7)
            figures.save(figure, directory / f"{'time' if quantity == 'milliseconds' else 'memory'}_{width}.png")
