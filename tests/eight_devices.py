"""Layouts for tests that are marked `eight_devices`, which see as many."""

import jax

from jaxdl.training import Layout, data_mesh

DEVICES = 8
STRATEGIES = ("jit", "fsdp", "pmap")


def on_one_device() -> Layout:
    """What the others are compared with."""
    return Layout("jit", data_mesh(jax.devices()[:1]))
