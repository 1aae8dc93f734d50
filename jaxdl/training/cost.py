"""What a step costs: bytes on a device, and floating-point operations."""

import math
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params
from jaxtyping import PyTree

from jaxdl.training.state import TrainState
from jaxdl.training.step import Batch, Step

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bf16 operations a second, by the beginning of a device's name: the makers' data sheets, for the SXM forms of NVIDIA's."""


@dataclass(frozen=True)
class Cost:
    """Of one step: bytes on each device, and operations on all of them together."""

    parameter_bytes: int
    optimizer_bytes: int
    """The EMA included."""
    temporary_bytes: int
    """Activations, gradients and whatever else XLA needs room for within a step."""
    flops: float
    seconds_to_compile: float
    devices: int
    device_kind: str

    def utilization(self, steps_per_second: float) -> float | None:
        """Share of the devices' peak in bf16 that goes into the model's matrix products (model FLOP utilisation, Chowdhery et al. 2022, appendix B); None where the peak is not known."""
        peak = peak_flops(self.device_kind)
        return None if peak is None else self.flops * steps_per_second / (peak * self.devices)

    def __str__(self) -> str:
        parts = [
            ("parameters", self.parameter_bytes),
            ("optimizer state", self.optimizer_bytes),
            ("a step's temporaries", self.temporary_bytes),
        ]
        memory = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in parts)
        return f"on each of {self.devices} × {self.device_kind}: {memory}; a step is {self.flops / 1e9:.3g} GFLOP"


def compile_step(step: Step, state: TrainState, batch: Batch) -> tuple[Step, Cost]:
    """A step that `distribute` gave, compiled for a state and batches in their places, with what it costs."""
    started = time.perf_counter()
    traced = step.trace(state, batch)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    devices = state.step.sharding.device_set
    return compiled, Cost(
        parameter_bytes=bytes_per_device(state.params),
        optimizer_bytes=bytes_per_device((state.opt_state, state.ema)),
        temporary_bytes=memory.temp_size_in_bytes if memory else 0,
        flops=matmul_flops(traced.jaxpr),
        seconds_to_compile=seconds,
        devices=len(devices),
        device_kind=next(iter(devices)).device_kind,
    )


def peak_flops(device_kind: str) -> float | None:
    """Of one device in bf16; None where it is not known, and for the slower PCIe forms."""
    if "PCIe" in device_kind or "NVL" in device_kind:
        return None
    known = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def bytes_per_device(tree: PyTree) -> int:
    """What one device holds of the arrays, by their shardings; the devices' parts are of one size."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def matmul_flops(jaxpr: Any) -> float:
    """Operations of all matrix products and convolutions of a jaxpr, two for a multiplication with its addition.

    Counted in the program before it is compiled, for all devices together. XLA's own `cost_analysis` counts the body of a loop once, however often it runs; here it counts as often as a `scan` runs it, and a block computed anew by `remat` counts again. The body of a `while_loop` counts once, since nobody knows; a Pallas kernel as it states itself.
    """
    return sum(_equation_flops(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation_flops(equation: Any) -> float:
    parameters = equation.params
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        case "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
        case "pallas_call":
            estimate = parameters.get("cost_estimate")
            return float(estimate.flops) if estimate else 0.0
        case "scan":
            return parameters["length"] * matmul_flops(parameters["jaxpr"])
        case "cond":
            return max(matmul_flops(branch) for branch in parameters["branches"])
        case "shard_map":
            return math.prod(parameters["mesh"].shape.values()) * matmul_flops(parameters["jaxpr"])
    return sum(matmul_flops(inner) for inner in jaxprs_in_params(parameters))
