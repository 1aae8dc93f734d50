"""How published tensors become parameters: a family's table of names, and the rows that many families share."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jaxdl.errors import UserError

Transform = Callable[[np.ndarray], np.ndarray]
Rows = dict[str, tuple[str, Transform]]

_SHOWN = 10
"""How many mismatching tensors an error names."""


@dataclasses.dataclass(frozen=True)
class Table:
    r"""Which published tensor each of our parameters is read from, and how.

    `rows` maps a regular expression for our path (`vision/head/probe`, to be matched in full) to the published name, in which `\1` is the expression's first group, and a function from that tensor to our parameter. Several of ours may read parts of one tensor. The first row that matches counts.
    """

    rows: Rows
    ignored: str = r"(?!)"
    """A regular expression for published names that are no parameters. The default matches none."""
    optional: str = r"(?!)"
    """A regular expression for what some files have in their names, and others have not, such as a prefix; `rows` and `ignored` are without it. The default matches nothing."""

    def source(self, path: str) -> tuple[str, Transform]:
        """Raises `LookupError` where no row speaks of `path`: a gap in the table, not in the file."""
        for pattern, (name, transform) in self.rows.items():
            if match := re.fullmatch(pattern, path):
                return match.expand(name), transform
        raise LookupError(f"no row of the table matches the parameter {path}")


def unchanged(tensor: np.ndarray) -> np.ndarray:
    """For what is kept in the same form on both sides."""
    return tensor


def scalar(tensor: np.ndarray) -> np.ndarray:
    """The one number in a tensor."""
    return tensor.reshape(())


def patch_kernel(tensor: np.ndarray) -> np.ndarray:
    """A convolution's `D C h w` as a matrix `h·w·C, D` on patches."""
    return tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))


def dense(ours: str, published: str) -> Rows:
    """Rows for a linear map: torch keeps (out, in), Flax (in, out)."""
    return {f"{ours}/kernel": (f"{published}.weight", np.transpose), f"{ours}/bias": (f"{published}.bias", unchanged)}


def norm(ours: str, published: str) -> Rows:
    """Rows for a normalisation with scale and bias."""
    return {f"{ours}/scale": (f"{published}.weight", unchanged), f"{ours}/bias": (f"{published}.bias", unchanged)}


def separate_attention(ours: str, published: str) -> Rows:
    """Rows for an attention of Hugging Face's that keeps its projections apart, as those of BART, CLIP and SigLIP do."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    parts = [dense(f"{ours}/{name}", f"{published}.{theirs}") for name, theirs in names.items()]
    return {path: source for part in parts for path, source in part.items()}


def encoder_block(ours: str, published: str) -> Rows:
    """Rows for a block of Hugging Face's CLIP and SigLIP towers."""
    return {
        **norm(f"{ours}/attention_norm", f"{published}.layer_norm1"),
        **separate_attention(f"{ours}/attention", f"{published}.self_attn"),
        **norm(f"{ours}/feed_forward_norm", f"{published}.layer_norm2"),
        **dense(f"{ours}/feed_forward/expand", f"{published}.mlp.fc1"),
        **dense(f"{ours}/feed_forward/contract", f"{published}.mlp.fc2"),
    }


def packed_attention(ours: str, published: str) -> Rows:
    """Rows for `torch.nn.MultiheadAttention`, which keeps query, key and value in one matrix."""
    rows = dense(f"{ours}/out", f"{published}.out_proj")
    for index, name in enumerate(("query", "key", "value")):
        rows[f"{ours}/{name}/kernel"] = f"{published}.in_proj_weight", lambda packed, index=index: np.split(packed, 3)[index].T
        rows[f"{ours}/{name}/bias"] = f"{published}.in_proj_bias", lambda packed, index=index: np.split(packed, 3)[index]
    return rows


def convert(
    tensors: Mapping[str, np.ndarray], table: Table, shapes: PyTree[jax.ShapeDtypeStruct], dtype: DTypeLike | None = None
) -> PyTree[Array]:
    """Published tensors as parameters of the given shapes, one at a time, so that one copy is in memory when they come from a file.

    Raises `UserError` that names every tensor (up to a bound) that is missing, left over, or of another shape.
    """
    expected = flatten_dict(shapes, sep="/")
    sources = {path: table.source(path) for path in expected}
    stored = {re.sub(table.optional, "", name): name for name in tensors}
    present = {name for name in stored if not re.fullmatch(table.ignored, name)}
    wanted = {name for name, _ in sources.values()}
    _refuse(
        [f"{name} is missing" for name in sorted(wanted - present)]
        + [f"{name} is left over" for name in sorted(present - wanted)]
    )
    params, problems = {}, []
    for path, (name, transform) in sources.items():
        tensor, shape = tensors[stored[name]], expected[path].shape
        try:
            value = transform(tensor)
        except ValueError:
            value = tensor
        if value.shape != shape:
            problems.append(f"{name} of shape {tensor.shape} does not make {path} of shape {shape}")
        elif not problems:
            params[path] = jnp.asarray(value, dtype)
    _refuse(problems)
    return unflatten_dict(params, sep="/")


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        shown = ", ".join(problems[:_SHOWN])
        raise UserError(f"the weights do not fit the model that config.json describes: {shown}{more}; fetch both from one place")
