"""What training carries from step to step."""

import hashlib
from collections.abc import Mapping

import flax.struct
import jax
import numpy as np
from jaxtyping import PyTree

from jaxdl.training.processes import to_host


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes. Leaves may be abstract, or stacked over seeds: that is why they are not typed further."""

    step: PyTree
    """int32 scalar: how many steps were made."""
    params: PyTree
    """Of one network, or a dict with an entry for each (GANs, reinforcement learning)."""
    opt_state: PyTree
    """By name of the update."""
    variables: PyTree
    """The other Linen collections (`batch_stats`, …)."""
    key: PyTree
    """A typed scalar key that never changes: that of a step is `fold_in(key, step)`."""
    ema: PyTree | None = None
    """An average of `params`, or of those entries of which one is kept."""
    carry: PyTree = None
    """What is neither parameter nor statistic: environments, replay buffers, queues of keys, counters. It is never averaged over devices, lies over them as the layout's rules say, and is in the checkpoint."""
    constants: PyTree = None
    """What objectives read and nothing changes: a teacher, a frozen base. It has no optimizer state, and is not in the checkpoint, since it comes from where it came from at each start; a checkpoint knows if it is another."""

    @property
    def eval_params(self) -> PyTree:
        """The parameters to evaluate: their average where one is kept."""
        return self.params if self.ema is None else {**self.params, **self.ema}

    @property
    def eval_variables(self) -> dict[str, PyTree]:
        """What a module is applied to when it is evaluated: `eval_params`, batch statistics and other collections."""
        return {"params": self.eval_params, **self.variables}


def merge(given: PyTree, whole: PyTree) -> PyTree:
    """What is given, and the rest of the whole, in trees of dicts. Raises `KeyError` for what the whole does not have."""
    if not (isinstance(whole, Mapping) and isinstance(given, Mapping)):
        return given
    return {**whole, **{name: merge(part, whole[name]) for name, part in given.items()}}


def parameter_paths(params: PyTree) -> list[str]:
    """The name of each leaf, as in "vision/encoder/block_0/norm/scale", in the order of `jax.tree.leaves`."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def parameters_sha256(params: PyTree) -> str:
    """Digest of all parameters' bytes in the order of their paths: equal if and only if every bit is."""
    digest = hashlib.sha256()
    for _, leaf in sorted(zip(parameter_paths(params), jax.tree.leaves(params), strict=True), key=lambda pair: pair[0]):
        digest.update(np.ascontiguousarray(to_host(leaf)).tobytes())
    return digest.hexdigest()


def parameter_table(params: PyTree, depth: int = 2) -> str:
    """How many parameters each part has, as lines of text; parts are paths cut after `depth` names."""
    rows: dict[str, int] = {}
    for path, leaf in zip(parameter_paths(params), jax.tree.leaves(params), strict=True):
        part = "/".join(path.split("/")[:depth])
        rows[part] = rows.get(part, 0) + leaf.size
    rows["total"] = sum(rows.values())
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {count:>13,}" for name, count in rows.items())
