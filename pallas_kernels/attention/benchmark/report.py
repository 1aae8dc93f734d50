"""What people look at: a table, and curves to be drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pallas_kernels.attention.benchmark.goals import Row
from pallas_kernels.attention.benchmark.implementations import COMPARED
from pallas_kernels.attention.benchmark.shapes import PASSES


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


def curves(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, tuple[list[int], np.ndarray]]]]:
    """What there is to draw over the length: by picture (`time_WIDTH`, `memory_WIDTH`), by panel (passes and case) and by implementation, lengths and milliseconds (with both quartiles) or temporary MiB."""
    rows = sorted((row for row in rows if "error" not in row), key=lambda row: row["length"])
    cases, names = dict.fromkeys(row["case"] for row in rows), dict.fromkeys(row["implementation"] for row in rows)

    def line(quantity: str, *place: Any) -> tuple[list[int], np.ndarray]:
        own = [
            row for row in rows if (row["width"], row["case"], row["passes"], row["implementation"]) == place and row[quantity]
        ]
        values = [
            (row["quartiles"][0], row[quantity], row["quartiles"][1]) if quantity == "milliseconds" else row[quantity]
            for row in own
        ]
        return [row["length"] for row in own], np.array(values, np.float64).T

    return {
        f"{picture}_{width}": {
            f"{case}, {passes}": {name: line(quantity, width, case, passes, name) for name in names}
            for passes in PASSES
            for case in cases
        }
        for width in sorted({row["width"] for row in rows})
        for picture, quantity in (("time", "milliseconds"), ("memory", "temporary_mib"))
    }
