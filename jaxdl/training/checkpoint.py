"""The one place that knows Orbax: a run's checkpoints, written off the critical path and restored exactly."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

from jaxdl.errors import RunError, UserError
from jaxdl.files import parse_json
from jaxdl.training.identity import differences, plain
from jaxdl.training.processes import any_process, barrier, is_first
from jaxdl.training.state import TrainState


class Checkpoints:
    """The newest `keep` checkpoints of a run, one folder per step.

    Each holds the train state but for its constants, the position in the data, the seconds spent so far, and the run's config. A checkpoint appears under its name only when it is whole, so that a process killed while writing leaves the ones before untouched. Of several processes each writes and reads its own parts of the state, in one directory that all of them see; another number of processes or devices, or another layout, can go on from it.
    """

    def __init__(self, directory: Path, experiment: str, config: Any, keep: int = 2):
        self.directory, self.experiment, self.config = directory, experiment, config
        if is_first():
            _check_writable(directory)
        import orbax.checkpoint as ocp  # Here and below, so that help does not wait for it.

        self._args = ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, state: TrainState, data: dict[str, Any], seconds: float) -> None:
        """Copies the state and returns; the files are written behind. A failure of an earlier write is raised here."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        state, constants = state.replace(constants=None), int(_checksum(state.constants))
        progress = {"data": data, "seconds": seconds, "checksum": int(_checksum(state)), "constants": constants}
        progress["experiment"] = self.experiment
        with self._failures():
            self._manager.save(
                step,
                args=self._args.Composite(
                    state=self._args.StandardSave(state),
                    progress=self._args.JsonSave(progress),
                    config=self._args.JsonSave(plain(self.config)),
                ),
            )

    def restore(self, like: TrainState, report: Callable[[str], None]) -> tuple[TrainState, dict[str, Any], float] | None:
        """The newest checkpoint that can be read: its state placed as `like` is and with its constants, the position in the data, the seconds.

        One that cannot be read is reported and removed, and the one before is tried. None if there never was one. Raises `RunError` if there were, and none is readable, and `UserError` for a checkpoint of another run, for one that may not be read, and if training had begun with arrays of other shapes or types, or with other constants.
        """
        from orbax.checkpoint.utils import to_shape_dtype_struct

        abstract = jax.tree.map(to_shape_dtype_struct, like.replace(constants=None))
        args = self._args.Composite(state=self._args.StandardRestore(abstract), progress=self._args.JsonRestore())
        broken: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            self._refuse_another_run(step)
            reason = ""
            try:
                restored = self._manager.restore(step, args=args)
            except Exception as error:  # Orbax, TensorStore and the JSON reader each have their own.
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            (failed,) = any_process(bool(reason))
            if not failed and restored.progress["checksum"] != int(_checksum(restored.state)):
                failed, reason = True, "its bytes are not those that were written"
            if failed:
                broken[step] = reason or "another process could not read it"
                continue
            for bad, reason in broken.items():
                report(f"the checkpoint of step {bad} cannot be read and is dropped ({reason}); going on from step {step}")
                if is_first():
                    shutil.rmtree(self.directory / str(bad))
            if broken:
                barrier("broken checkpoints are removed")
                self._manager.reload()
            if restored.progress["constants"] != int(_checksum(like.constants)):
                raise UserError(
                    f"the run in {self.directory.parent} began with other constants, such as a teacher's weights, than it is given now: "
                    "bring those back, or start anew with --overwrite"
                )
            return restored.state.replace(constants=like.constants), restored.progress["data"], restored.progress["seconds"]
        if broken:
            self._refuse_other_arrays(max(broken), abstract)
            raise RunError(
                f"none of the checkpoints in {self.directory} can be read ({next(iter(broken.values()))}): "
                "restore them from a copy, or start anew with --overwrite"
            )
        return None

    def _refuse_another_run(self, step: int) -> None:
        """Raises `UserError` if the checkpoint's config is another than the run's, or if the user may not read its files."""
        folder = self.directory / str(step)
        if closed := next((path for path in folder.rglob("*") if not os.access(path, os.R_OK)), None):
            raise UserError(f"{closed} may not be read: change its permissions (chmod u+r), or move {folder} away")
        try:
            config = parse_json(folder / "config" / "metadata")
            experiment = parse_json(folder / "progress" / "metadata").get("experiment", self.experiment)
            changed = differences(config, self.config)
        except (ValueError, AttributeError, TypeError):
            return  # It is damaged, which the restoring finds.
        if experiment != self.experiment:
            changed = [f"experiment: {experiment} → {self.experiment}"]
        if changed:
            raise UserError(
                f"the checkpoint {folder} is of another run than {self.directory.parent / 'config.json'} ({'; '.join(changed)}): "
                "move it away, or start anew with --overwrite"
            )

    def _refuse_other_arrays(self, step: int, abstract: TrainState) -> None:
        """Raises `UserError` if a checkpoint that could not be restored has arrays of other shapes or types than the model has now, as after a class was added to the data."""
        import orbax.checkpoint as ocp

        try:
            there = _describe(ocp.PyTreeCheckpointHandler().metadata(self.directory.absolute() / str(step) / "state").tree)
        except Exception:  # It is damaged. Orbax and TensorStore each have their own.
            return
        here = _describe(abstract)
        changed = [
            f"{path}: {there.get(path, 'absent')} → {here.get(path, 'absent')}"
            for path in dict.fromkeys([*here, *there])
            if there.get(path) != here.get(path)
        ]
        changed.sort(key=lambda line: not line.startswith("params/"))  # The optimizer's state repeats them.
        if changed:
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"the checkpoint of step {step} in {self.directory} has other arrays than the model now ({'; '.join(changed[:3])}{more}): "
                "bring back what the run began with (the data and their classes, jax_enable_x64, the version of this code), or start anew with --overwrite"
            )

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Until everything is on disk. Raises `RunError` if it could not be written."""
        with self._failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """What Orbax and TensorStore raise where files cannot be written, as a `RunError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            stands = "there is none" if self.latest() is None else f"that of step {self.latest():,} stands"
            raise RunError(
                f"a checkpoint cannot be written to {self.directory} ({reason}), and before it {stands}: mend that, then give the same command"
            ) from error


def _check_writable(directory: Path) -> None:
    """Raises `UserError` for a directory of checkpoints that cannot be made or written to, before anything is computed for it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".writable-"):
            pass
    except OSError as error:
        raise UserError(
            f"checkpoints cannot be written to {directory} ({error.strerror}): mend that, or give another --workdir"
        ) from None


def read_variables(directory: Path) -> dict[str, PyTree]:
    """Parameters, their average (or None) and other variables of the newest checkpoint in a folder, as numpy arrays on any machine: `params`, `ema` and `variables`. The optimizer's state is not read. Raises `UserError` if there is none, or it cannot be read."""
    import orbax.checkpoint as ocp

    handlers = {"state": ocp.PyTreeCheckpointHandler(), **{name: ocp.JsonCheckpointHandler() for name in ("progress", "config")}}
    missing = UserError(f"there is no checkpoint in {directory}: train first")
    if not directory.is_dir():
        raise missing
    manager = ocp.CheckpointManager(directory.absolute(), item_handlers=handlers)
    try:
        latest = manager.latest_step()
        if latest is None:
            raise missing
        stored = manager.item_metadata(latest)["state"].tree
        wanted = {name: stored[name] for name in ("params", "ema", "variables")}
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
        as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        state = ocp.args.PyTreeRestore(shapes, restore_args=as_numpy, partial_restore=True)
        return manager.restore(latest, args=ocp.args.Composite(state=state)).state
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore each have their own.
        raise UserError(f"the checkpoint of step {latest} in {directory} cannot be read ({type(error).__name__})") from error
    finally:
        manager.close()


def _describe(tree: PyTree) -> dict[str, str]:
    """Of each array the shape and type, by its path."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return found


@jax.jit
def _checksum(state: PyTree) -> UInt32[Array, ""]:
    """A sum over all words of a tree of arrays, modulo 2³², each times an odd number that depends on its place: whatever changes in one word changes it.

    TensorStore notices a file that is cut short, but not a byte that changed. Integers add up to the same in any order, so the sum does not depend on how the state lies over devices, and is taken where it lies.
    """
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(state)):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        words = leaf.view(jnp.uint8) if leaf.dtype == bool else leaf
        words = jax.lax.bitcast_convert_type(words, jnp.dtype(f"uint{8 * min(words.dtype.itemsize, 4)}")).astype(jnp.uint32)
        place = sum(
            (
                jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(_MIX ** (axis + 1) % 2**32)
                for axis in range(words.ndim)
            ),
            start=jnp.uint32(number),
        )
        total += (words * (2 * place + 1)).sum(dtype=jnp.uint32)
    return total


_MIX = 2_654_435_761
"""Knuth's multiplier of 32-bit hashes: 2³² over the golden ratio."""
