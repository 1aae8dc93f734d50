"""How training lies over devices: one program over a sharded batch (`jit`), sharded parameters too (`fsdp`), or a program per device (`pmap`).

The result does not depend on the layout, up to rounding; under `pmap` dropout is another draw, since each device has a key of its own. Communication is XLA's in `jit` and `fsdp`, which only say where arrays lie; `pmap` averages gradients itself.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PyTree

from jaxdl.data.pipeline import Row, eval_batches
from jaxdl.errors import UserError
from jaxdl.training.processes import look_for_stop, to_host
from jaxdl.training.state import TrainState
from jaxdl.training.step import Batch, Step

AXIS = "data"
"""The one axis of the mesh."""

SHARDED_FROM = 1024
"""Elements from which `fsdp` cuts an array; smaller ones cost more to gather than to keep."""

Rules = Sequence[tuple[str, PartitionSpec]]
"""Regular expressions, searched in a leaf's path as in "params/text/encoder/block_0/norm/scale", and how what they match is cut."""


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (by default all, of all processes) along one axis, `data`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


@dataclass(frozen=True)
class Layout:
    """Where state and batch lie.

    - `jit`: the state whole on every device, the batch cut along its first axis. The program is written for the whole batch.
    - `fsdp`: parameters, optimizer state and EMA are cut as well, each along its longest axis that the number of devices divides, unless one of `rules` says otherwise (Rajbhandari et al. 2020, ZeRO stage 3). XLA gathers a parameter where it is used and scatters its gradient.
    - `pmap`: the state whole on every device, and a program for a device's part of the batch, which averages gradients over `axis_name`. jax keeps `pmap` in maintenance only; it is here since courses and people's code use it.

    `rules` also say which leaves of a state's carry have an axis of many things, such as environments, that are cut over the devices as a batch is: `("^carry/environments/", PartitionSpec("data"))`. Other carry is whole on every device, and a step must leave the same there.
    """

    strategy: Literal["jit", "fsdp", "pmap"] = "jit"
    mesh: Mesh = field(default_factory=data_mesh)
    rules: Rules = ()

    @property
    def axis_name(self) -> str | None:
        """The axis to average over in a step, an objective or a normalisation that sees a device's part of the batch only; None where it sees all of it."""
        return AXIS if self.strategy == "pmap" else None

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    def state_shardings(self, state: TrainState) -> TrainState:
        """The sharding of each leaf of a state, which may be abstract."""

        def sharding(path: tuple, leaf: Array | jax.ShapeDtypeStruct) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            part = name.split("/")[0]
            if part == "carry":
                return NamedSharding(self.mesh, self._rule(name, leaf.shape) or PartitionSpec())
            if self.strategy != "fsdp" or part not in ("params", "opt_state", "ema", "constants"):
                return self.replicated
            return NamedSharding(self.mesh, self._partition(name, leaf.shape))

        return jax.tree_util.tree_map_with_path(sharding, state)

    def _rule(self, name: str, shape: tuple[int, ...]) -> PartitionSpec | None:
        """What the first rule says that speaks of a leaf."""
        return next((spec for pattern, spec in self.rules if re.search(pattern, name) and len(spec) <= len(shape)), None)

    def _partition(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        if (spec := self._rule(name, shape)) is not None:
            return spec
        divisible = [axis for axis, size in enumerate(shape) if size % self.mesh.size == 0]
        if not divisible or math.prod(shape) < SHARDED_FROM:
            return PartitionSpec()
        axis = max(divisible, key=lambda axis: shape[axis])
        return PartitionSpec(*[None] * axis, AXIS)

    def place_state(self, state: TrainState) -> TrainState:
        return jax.device_put(state, self.state_shardings(state))

    def place_batch(self, batch: PyTree) -> Batch:
        """A batch on the devices, made of the rows that each process has loaded; None stays None. Raises `UserError` if the devices do not divide them."""
        for leaf in jax.tree.leaves(batch):
            rows = len(leaf) * jax.process_count()
            if rows % self.mesh.size:
                raise UserError(
                    f"a batch of {rows} cannot be spread over {self.mesh.size} devices: choose a batch size that is a multiple of {self.mesh.size}"
                )

        def place(values: np.ndarray) -> Array:
            if self.strategy == "pmap":
                values = values.reshape(len(self.mesh.local_devices), -1, *values.shape[1:])
            return jax.make_array_from_process_local_data(self.batch_sharding, values)

        return _arrived(jax.tree.map(place, batch))

    def rows(self, batch: Batch) -> int:
        """How many examples a placed batch has, over all devices; 0 where there is none."""
        leaves = jax.tree.leaves(batch)
        axes = 2 if self.strategy == "pmap" else 1
        return math.prod(leaves[0].shape[:axes]) if leaves else 0

    def pmap(self, fn: Callable[[TrainState, Batch], PyTree], state: TrainState, out_axes: PyTree) -> Callable[..., PyTree]:
        """`fn(state, batch)` as a program for each device. Carry that the rules cut comes as the device's part of it, and all else of the state whole."""
        axes = self.state_axes(state)
        # The number of the device is not used: `pmap` wants one argument that is mapped, and there may be no batch.
        numbered = lambda state, batch, device: fn(state, batch)
        mapped = jax.pmap(numbered, AXIS, in_axes=(axes, 0, 0), out_axes=out_axes, devices=list(self.mesh.devices.flat))
        return lambda state, batch: mapped(self._by_device(state, axes), batch, np.arange(self.mesh.size))

    def state_axes(self, state: TrainState) -> TrainState:
        """For `pmap`: the axis along which a leaf is cut over the devices, None for what all have."""
        axis = lambda sharding: sharding.spec.index(AXIS) if AXIS in sharding.spec else None
        carry = jax.tree.map(axis, self.state_shardings(state).carry)
        return TrainState(step=None, params=None, opt_state=None, variables=None, key=None, ema=None, carry=carry, constants=None)

    def _by_device(self, state: TrainState, axes: TrainState) -> TrainState:
        split = lambda axis, leaf: leaf.reshape(*leaf.shape[:axis], self.mesh.size, -1, *leaf.shape[axis + 1 :])
        return state.replace(carry=_map_axes(split, axes.carry, state.carry))

    def together(self, state: TrainState, axes: TrainState) -> TrainState:
        """The state that `pmap` has left, with the devices' parts of the carry one after another."""
        join = lambda axis, leaf: leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])
        return state.replace(carry=_map_axes(join, axes.carry, state.carry))

    def shard_objective(self, objective: Callable[..., Float[Array, ""]]) -> Callable[..., Float[Array, ""]]:
        """An objective that compares examples with each other, for use in a step: it never sees the whole batch on one device.

        `objective(*arrays, axis_name=...)` is given a device's rows of every argument that has axes and scalars as they are, and brings in the other rows itself. With one device `axis_name` is None, and there are no other rows.
        """
        if self.mesh.size == 1:
            return lambda *arrays: objective(*arrays, axis_name=None)
        if self.strategy == "pmap":
            return lambda *arrays: objective(*arrays, axis_name=AXIS)

        def mapped(*arrays: Array) -> Float[Array, ""]:
            specs = tuple(PartitionSpec(AXIS) if array.ndim else PartitionSpec() for array in arrays)
            mean = lambda *parts: jax.lax.pmean(objective(*parts, axis_name=AXIS), AXIS)
            return jax.shard_map(mean, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec())(*arrays)

        return mapped

    def inference(
        self, fn: Callable[[PyTree, Array | Batch], PyTree], batch_size: int = 128
    ) -> Callable[[PyTree, Iterable[Row]], PyTree]:
        """`fn(variables, batch)`, whose results have a row for each of the batch, as a function of any number of rows, arrays or dicts of them: compiled once, for batches of one size that are spread over the devices where they divide it.

        Numpy in (the same in every process), numpy out. Raises `UserError` if there are no rows.
        """
        compiled = jax.jit(fn, out_shardings=self.replicated)

        def place(values: np.ndarray) -> Array:
            sharding = self.replicated if len(values) % self.mesh.size else self.batch_sharding
            return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

        def one(variables: PyTree, batch: Row, count: int) -> PyTree:
            look_for_stop()
            return jax.tree.map(lambda result: to_host(result)[:count], compiled(variables, _arrived(jax.tree.map(place, batch))))

        def over_rows(variables: PyTree, rows: Iterable[Row]) -> PyTree:
            parts = [one(variables, *part) for part in eval_batches(rows, batch_size)]
            if not parts:
                raise UserError("there is nothing to compute on: the data set is empty")
            return jax.tree.map(lambda *results: np.concatenate(results), *parts)

        return over_rows

    def sample(self, fn: Callable[..., PyTree], batch_size: int = 64) -> Callable[..., PyTree]:
        """`fn(variables, keys, **conditions)`, which draws one result for each of `B` keys, as `(variables, key, count, **conditions)`: any number of them, each condition an array with a row for each.

        Row i is drawn with `fold_in(key, i)` alone, so that it is the same however many there are and however they are spread; `fn` must use a row's own key for all that is random in it, as `jax.vmap(one)(keys)` does. Numpy out.
        """

        def of_rows(variables: PyTree, rows: dict[str, Array]) -> PyTree:
            conditions = {name: values for name, values in rows.items() if name != "key"}
            return fn(variables, jax.random.wrap_key_data(rows["key"]), **conditions)

        over_rows = self.inference(of_rows, batch_size)

        def draw(variables: PyTree, key: Key[Array, ""], count: int, **conditions: np.ndarray) -> PyTree:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(count))
            columns = {"key": np.asarray(jax.random.key_data(keys)), **conditions}
            rows = ({name: values[index] for name, values in columns.items()} for index in range(count))
            return over_rows(variables, rows)

        return draw


def _map_axes(fn: Callable[[int, Array], Array], axes: PyTree, tree: PyTree) -> PyTree:
    """Of the leaves that have an axis, and the others as they are."""
    of_leaf = lambda axis, leaf: leaf if axis is None else fn(axis, leaf)
    return jax.tree.map(of_leaf, axes, tree, is_leaf=lambda axis: axis is None) if jax.tree.leaves(tree) else tree


def _arrived(batch: PyTree) -> PyTree:
    """The same batch, on a CPU once it is copied: a program that has to wait for its inputs runs in a thread of jax's, and from there malloc returns large buffers to the system after every step (see `jaxdl.launch.keep_freed_memory`). Elsewhere the copy goes on beside the step before."""
    return jax.block_until_ready(batch) if jax.default_backend() == "cpu" else batch


def distribute(step: Step, state: TrainState, layout: Layout) -> Step:
    """Compiles a step for a layout. It consumes the state that it is given and leaves the new one where that lay.

    For `pmap`, the step must average over `layout.axis_name`; a `make_step` that was given it does.
    """
    if layout.strategy == "pmap":
        axes = layout.state_axes(state)
        mapped = layout.pmap(step, state, out_axes=(axes, None))

        def together(state: TrainState, batch: Batch) -> tuple[TrainState, PyTree]:
            state, metrics = mapped(state, batch)
            return layout.together(state, axes), metrics

        return jax.jit(together, donate_argnums=0)
    shardings = layout.state_shardings(state)
    return jax.jit(
        step,
        in_shardings=(shardings, layout.batch_sharding),
        out_shardings=(shardings, layout.replicated),
        donate_argnums=0,
    )
