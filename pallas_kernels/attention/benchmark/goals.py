"""What the measurements are held against: ratios to others at the same shape, and the goals that were set."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pallas_kernels.attention.benchmark.implementations import COMPARED
from pallas_kernels.attention.benchmark.shapes import Case, Shape

Row = Mapping[str, Any]
"""Of a pass of an implementation at a shape: what was measured, or why not under `error`."""


class Goal(NamedTuple):
    """At every shape of these, `other` takes `at_least` so many times what `implementation` takes."""

    text: str
    implementation: str
    passes: str
    other: str
    at_least: float
    cases: tuple[Case, ...]
    width: int | None = None
    lengths: range = range(1, 1 << 30)
    other_case: Case | None = None
    """What the other one computes, where it is not the same."""
    quantity: str = "milliseconds"


DENSE: tuple[Case, ...] = ("full", "causal")
ALL: tuple[Case, ...] = (*DENSE, "window", "packed")
LONG, AT_4096, AT_16K, AT_32K = range(2048, 1 << 30), range(4096, 4097), range(16384, 16385), range(32768, 32769)
TO_16K = range(2048, 16385)

GOALS: dict[str, tuple[Goal, ...]] = {
    "cpu": (
        Goal("forward at least 4 × as fast as jax.nn", "xla_chunked", "forward", "jax.nn xla", 4, ALL, lengths=LONG),
        Goal("forward+backward at least 3 × as fast as jax.nn", "xla_chunked", "forward+backward", "jax.nn xla", 3, ALL, lengths=LONG),
        Goal("at most 5 % of jax.nn's temporary memory", "xla_chunked", "forward+backward", "jax.nn xla", 20, ALL, lengths=AT_4096, quantity="temporary_mib"),
        Goal("forward at least 0.95 × as fast as torch's flash attention", "xla_chunked", "forward", "torch flash", 0.95, DENSE, lengths=LONG),
        Goal("forward+backward at least 0.9 × as fast as torch's flash attention", "xla_chunked", "forward+backward", "torch flash", 0.9, DENSE, lengths=LONG),
    ),
    "gpu": (
        *(
            Goal(f"forward at least as fast as cuDNN, heads of {width}", "mosaic_gpu", "forward", "jax.nn cudnn", 1, DENSE, width, TO_16K)
            for width in (64, 128, 256)
        ),
        Goal("forward at least 1.6 × as fast as torch's FlashAttention-2", "mosaic_gpu", "forward", "torch flash", 1.6, DENSE, lengths=TO_16K),
        Goal("forward at least as fast as tokamax", "mosaic_gpu", "forward", "tokamax", 1, DENSE, lengths=TO_16K),
        Goal("backward at least 0.7 × as fast as cuDNN", "mosaic_gpu", "backward", "jax.nn cudnn", 0.7, DENSE, lengths=TO_16K),
        Goal("8 documents packed into 16k at least 2.5 × as fast as cuDNN with a mask, forward+backward", "mosaic_gpu", "forward+backward", "jax.nn cudnn", 2.5, ("packed",), lengths=AT_16K),
        Goal("a window of 1k at 32k at least 12 × as fast as all of causal, forward", "mosaic_gpu", "forward", "mosaic_gpu", 12, ("window",), lengths=AT_32K, other_case="causal"),
    ),
}  # fmt: skip
"""By the kind of device; for a GPU those for Hopper in bfloat16 with 16k tokens and 2048 features, as in FlashAttention-3 (Shah et al. 2024, section 4.1)."""


def compared(rows: Iterable[Row], platform: str, matmul_tflops: float, peak_tflops: float | None) -> list[dict[str, Any]]:
    """The rows, each that was measured with its `share_of_matmul` and `share_of_peak` (None where that is not known), and `faster_than`: how many times, than those whom the platform's are compared with."""
    rows = list(rows)
    found = {(_key(row), row["implementation"]): row["milliseconds"] for row in rows if "error" not in row}

    def with_shares(row: Row) -> dict[str, Any]:
        others = {name: found.get((_key(row), name)) for name in COMPARED.get(platform, ())}
        return {
            **row,
            "share_of_matmul": row["tflops"] / matmul_tflops,
            "share_of_peak": row["tflops"] / peak_tflops if peak_tflops else None,
            "faster_than": {name: other / row["milliseconds"] for name, other in others.items() if other},
        }

    return [dict(row) if "error" in row else with_shares(row) for row in rows]


def judge(goal: Goal, rows: Iterable[Row], absent: Mapping[str, str], points: Sequence[Shape]) -> dict[str, str]:
    """The goal with `status` "met", "missed" or "not measured" and, under `why`, the ratios. It is met if it is at every shape of the run that it speaks of, and missed if it is not at one of them."""
    wanted = [
        point
        for point in points
        if point.case in goal.cases and point.length in goal.lengths and goal.width in (None, point.width)
    ]
    if not wanted:
        return _verdict(goal, "not measured", "this run has no such shape")
    found = {(*_key(row), row["implementation"]): row for row in rows}

    def value(point: Shape, implementation: str, case: Case) -> tuple[float | None, str]:
        row = found.get((case, point.length, point.width, goal.passes, implementation))
        if row is None:
            return (
                None,
                f"{implementation}: {absent.get(implementation, f'not measured yet at {case}, {point.length} × {point.width}')}",
            )
        if "error" in row:
            return None, f"{implementation} at {case}, {point.length} × {point.width}: {row['error']}"
        reason = f"{implementation} does not say its {goal.quantity}"
        return row[goal.quantity], reason

    ratios: list[tuple[float, str]] = []
    reasons = []
    for point in wanted:
        own, why_not = value(point, goal.implementation, point.case)
        others, why_not_others = value(point, goal.other, goal.other_case or point.case)
        if own is not None and others is not None:
            ratios.append((others / own if own else math.inf, f"{point.case}, {point.length} × {point.width}"))
        else:
            reasons.append(why_not if own is None else why_not_others)
    least, where = min(ratios, default=(None, ""))
    said = [f"{least:.2f} to {max(ratios)[0]:.2f} × at {len(ratios)} of {len(wanted)} shapes, least at {where}"] if ratios else []
    said += [f"no ratio at {len(reasons)}: {reasons[0]}"] if reasons else []
    status = "missed" if ratios and least < goal.at_least else "not measured" if reasons else "met"
    return _verdict(goal, status, "; ".join(said))


def _verdict(goal: Goal, status: str, why: str) -> dict[str, str]:
    return {"goal": goal.text, "status": status, "why": why}


def _key(row: Row) -> tuple[str, int, int, str]:
    return row["case"], row["length"], row["width"], row["passes"]
