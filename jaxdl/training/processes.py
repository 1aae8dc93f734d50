"""What several processes of one run say to each other. With one process all of it is free."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from jaxdl import signals


def is_first() -> bool:
    """True on the process that logs and writes figures."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the same place, which `name` tells from others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag whether any process has it set. All processes must ask at the same step."""
    if jax.process_count() == 1:
        return flags
    return tuple(bool(flag) for flag in multihost_utils.process_allgather(np.array(flags)).any(axis=0))


def look_for_stop() -> None:
    """Between the parts of what takes long: raises `Interrupted` if a signal to stop has come. One of several processes goes on, as the others wait for it: they stop together."""
    if jax.process_count() == 1:
        signals.look()


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Runs the block in the first process, then in all others, which find the files that the first one wrote."""
    try:
        if not is_first():
            barrier(name)
        yield
    finally:
        if is_first():
            barrier(name)


def to_host(leaf: PyTree) -> np.ndarray:
    """An array on the host with all its parts, those of other processes included."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(jax.device_get(leaf))
