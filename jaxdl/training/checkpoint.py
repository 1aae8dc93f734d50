"""The one place that knows Orbax: a run's checkpoints, written off the critical path and restored exactly."""

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdl.errors import RunError
from jaxdl.training.state import TrainState


class Checkpoints:
    """The newest `keep` checkpoints of a run, one folder per step.

    Each holds the train state, the position in the data, the seconds spent so far, and the run's config. A checkpoint appears under its name only when it is whole, so that a process killed while writing leaves the ones before untouched.
    """

    def __init__(self, directory: Path, config: dict[str, Any], keep: int = 2):
        self.directory = directory
        self.config = config
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, state: TrainState, data: dict[str, Any], seconds: float) -> None:
        """Copies the state and returns; the files are written behind. A failure of an earlier write is raised here."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                progress=ocp.args.JsonSave({"data": data, "seconds": seconds, "checksum": _checksum(state)}),
                config=ocp.args.JsonSave(self.config),
            ),
        )

    def restore(self, like: TrainState, report: Callable[[str], None]) -> tuple[TrainState, dict[str, Any], float] | None:
        """The newest checkpoint that can be read: its state placed as `like` is, the position in the data, the seconds.

        One that cannot be read is reported and removed, and the one before is tried. None if there never was one; `RunError` if there were, and none is readable.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        broken: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=args)
                if restored.progress["checksum"] != _checksum(restored.state):
                    raise ValueError("its bytes are not those that were written")
            except Exception as error:  # Orbax, TensorStore and the JSON reader each have their own.
                broken[step] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                continue
            for bad, reason in broken.items():
                report(f"the checkpoint of step {bad} cannot be read and is dropped ({reason}); going on from step {step}")
                shutil.rmtree(self.directory / str(bad))
            if broken:
                self._manager.reload()
            return restored.state, restored.progress["data"], restored.progress["seconds"]
        if broken:
            raise RunError(
                f"none of the checkpoints in {self.directory} can be read ({next(iter(broken.values()))}): "
                "restore them from a copy, or start anew with --overwrite"
            )
        return None

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Until everything is on disk. Raises what the writing raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _checksum(state: TrainState) -> int:
    """CRC-32 of all leaves: TensorStore notices a file that is cut short, but not a byte that changed."""
    checksum = 0
    for leaf in jax.tree.leaves(state):
        words = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        checksum = zlib.crc32(np.ascontiguousarray(jax.device_get(words)).view(np.uint8), checksum)
    return checksum
