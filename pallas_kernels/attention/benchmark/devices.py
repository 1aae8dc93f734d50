"""The device at hand: what it is, what it can do at best, and how its memory is shared."""

import gc
import os
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.attention.benchmark.implementations import compiled
from pallas_kernels.attention.benchmark.timing import time_in_turns


def matmul_speed(dtype: str) -> float:
    """Floating-point operations per second of a product of square matrices: what this device gives to anybody."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    multiply = compiled(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32), a)
    found = time_in_turns({"product": multiply}, repeats=7, seconds=5, shortest=0.02)["product"]
    if isinstance(found, Exception):
        raise found
    return 2 * size**3 / min(found.seconds)


def device() -> str:
    """The kind and number of devices."""
    return f"{jax.devices()[0].device_kind} × {jax.device_count()}"


def on_hopper() -> bool:
    """Whether it is a GPU that the Hopper kernel is for."""
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")


def device_answers() -> bool:
    """Whether it still computes: after a kernel that reads where it must not, a GPU refuses everything to the process."""
    try:
        return float(jnp.ones(8).sum()) == 8
    except Exception:
        return False


def target_description(devices: Sequence[jax.Device]) -> str | None:
    """What XLA knows of them, in the form that `jax.experimental.topologies.get_topology_desc` takes as `target_config` to compile for them elsewhere; None for kinds of devices that have none."""
    from jax._src.lib import xla_client  # jax has no public way to ask.

    try:
        return getattr(xla_client.get_topology_for_devices(list(devices)), "target_config", None)
    except jax.errors.JaxRuntimeError:  # A platform without topologies.
        return None


def leave_memory_to_others() -> None:
    """Has jax take of a GPU's memory what it needs and not three quarters of it, since torch wants some too. To be called before jax sees the GPU."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def release_memory() -> None:
    """Frees on a GPU what nobody holds, and what torch keeps for later."""
    if jax.default_backend() != "gpu":
        return
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
