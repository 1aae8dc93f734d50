"""What jax is to compute on, as the environment says, before it computes anything: XLA ends the process at what it does not know, and jax with a traceback."""

import os
import subprocess
import sys

import jax

from jaxdl.errors import UserError


def check_xla_flags() -> None:
    """Raises `UserError` for `XLA_FLAGS` that XLA does not know. A process of its own reads them, since it aborts at those."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if not flags:
        return
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    if done.returncode and "XLA_FLAGS" in done.stderr:
        reason = done.stderr.strip().splitlines()[-1].rpartition("] ")[2]
        raise UserError(f"XLA_FLAGS={flags!r}: this version of XLA refuses them ({reason}): correct or unset them")


def find_devices() -> None:
    """Raises `UserError` where jax cannot have the devices that `JAX_PLATFORMS` asks for, or any."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.jax_platforms
        reason = (str(error).splitlines() or ["none is found"])[0][:300]
        raise UserError(
            f"JAX_PLATFORMS={asked}: jax cannot compute on that here ({reason}): unset it, or install jax for that device"
            if asked
            else f"jax finds nothing to compute on ({reason}): install jax for this machine's devices, or set JAX_PLATFORMS=cpu"
        ) from None
