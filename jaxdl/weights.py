"""How published tensors become parameters, and parameters published tensors: a family's table of names, and the rows that many families share."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from jaxdl.errors import UserError

Transform = Callable[[np.ndarray], np.ndarray]

_FLOATS = tuple(np.dtype(each) for each in (jnp.float16, jnp.bfloat16, np.float32, np.float64))
_SHOWN = 10
"""How many mismatching tensors an error names."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a published tensor holds a parameter: `read` makes ours of it, `write`, its inverse, makes it of ours.

    Where several parameters are packed into one tensor, ours is the part of number `part` of `parts` equal ones along its `axis`; `read` and `write` are about that part. `any_rank` accepts any number of axes of length 1.
    """

    read: Transform
    write: Transform
    part: int = 0
    parts: int = 1
    axis: int = 0
    any_rank: bool = False

    def unpack(self, tensor: np.ndarray) -> np.ndarray:
        """Our parameter in the published tensor. Raises `ValueError` where the tensor has no such form."""
        return self.read(tensor if self.parts == 1 else np.split(tensor, self.parts, axis=self.axis)[self.part])

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor that holds our parameter of this shape, without making one."""
        published = list(self.write(np.broadcast_to(np.int8(0), shape)).shape)
        if self.parts > 1:
            published[self.axis] *= self.parts
        return tuple(published)

    def fits(self, published: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether a tensor of the shape `published` holds our parameter of the given `shape`: axis by axis, not just as many numbers."""
        return published == self.shape_of(shape) or (self.any_rank and math.prod(published) == 1)


Rows = dict[str, tuple[str, Form]]

UNCHANGED = Form(lambda tensor: tensor, lambda param: param)
"""The same on both sides."""
TRANSPOSED = Form(np.transpose, np.transpose)
"""A linear map: torch keeps (out, in), Flax (in, out)."""
BATCHED = Form(lambda tensor: tensor.squeeze(0), lambda param: param[None])
"""Theirs has a leading axis of length 1 that ours has not."""


def scalar(*shape: int) -> Form:
    """One number, which is published in a tensor of the given shape, all ones or empty, and read from any."""
    return Form(lambda tensor: tensor.reshape(()), lambda param: param.reshape(shape), any_rank=True)


def patch_kernel(patch_size: int) -> Form:
    """A convolution's `D C h w` as a matrix `h·w·C, D` on square patches, h = w = `patch_size`."""

    def read(tensor: np.ndarray) -> np.ndarray:
        if tensor.ndim != 4 or tensor.shape[2:] != (patch_size, patch_size):
            raise ValueError(f"a tensor of shape {tensor.shape} is no convolution over patches of {patch_size}")
        return tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))

    return Form(read, lambda param: param.reshape(patch_size, patch_size, -1, param.shape[-1]).transpose(3, 2, 0, 1))


def packed(part: int, parts: int, form: Form = UNCHANGED, axis: int = 0) -> Form:
    """Part number `part` of `parts` along `axis` of a published tensor, itself in the given form."""
    return dataclasses.replace(form, part=part, parts=parts, axis=axis)


def reordered(order: Sequence[int], axis: int, form: Form = UNCHANGED) -> Form:
    """The form of a parameter whose published elements along `axis` are ours in the given `order`."""
    back = np.argsort(order)

    def read(tensor: np.ndarray) -> np.ndarray:
        param = form.read(tensor)
        if param.shape[axis] != len(order):
            raise ValueError(f"{param.shape[axis]} elements are not put into an order of {len(order)}")
        return np.take(param, back, axis)

    return dataclasses.replace(form, read=read, write=lambda param: form.write(np.take(param, order, axis)))


@dataclasses.dataclass(frozen=True)
class Constant:
    """A published tensor that is computed here and not read: it `holds` what is computed, which is said in words, or the model is another one."""

    words: str
    holds: Callable[[np.ndarray], bool]

    def is_held(self, tensor: np.ndarray) -> bool:
        """Whether it holds it; not if it has another form or type."""
        try:
            return bool(self.holds(tensor))
        except (TypeError, ValueError):
            return False


COUNTED = Constant("0, 1, 2 …", lambda tensor: np.array_equal(tensor.ravel(), np.arange(tensor.size)))
"""The numbers of positions."""
ZERO = Constant("zero", lambda tensor: not tensor.any())


@dataclasses.dataclass(frozen=True)
class Table:
    r"""Which published tensor each of our parameters is read from and written to, and how.

    `rows` maps a regular expression for our path (`vision/head/probe`, to be matched in full) to the published name, in which `\1` is the expression's first group, and the form of the parameter in that tensor. The first row that matches counts.
    """

    rows: Rows
    ignored: str = r"(?!)"
    """A regular expression for published names that are no parameters. The default matches none."""
    optional: str = r"(?!)"
    """A regular expression for a part of the names, such as a prefix, that some files have and others have not. Names are compared without it. The default matches nothing."""
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    r"""Other names that one tensor has, alone or beside its own, without what is optional: a regular expression to be matched in full, and the name in `rows`, in which `\1` is its first group."""
    constants: Mapping[str, Constant] = dataclasses.field(default_factory=dict)
    """By a regular expression for published names without what is optional, what such a tensor has to hold."""
    zero: str = r"(?!)"
    """A regular expression for published names that mean zeros where they are missing. The default matches none."""

    def source(self, path: str) -> tuple[str, Form]:
        """Raises `LookupError` where no row speaks of `path`: a gap in the table, not in the file."""
        for pattern, (name, form) in self.rows.items():
            if match := re.fullmatch(pattern, path):
                return match.expand(name), form
        raise LookupError(f"no row of the table matches the parameter {path}")

    def bare(self, name: str) -> str:
        """A published name without what is optional in it, the same for all names of one tensor."""
        bare = re.sub(self.optional, "", name)
        for pattern, original in self.copies.items():
            if match := re.fullmatch(pattern, bare):
                return re.sub(self.optional, "", match.expand(original))
        return bare

    def constant(self, name: str) -> Constant | None:
        """What a published tensor has to hold, if it is computed here."""
        return next((held for pattern, held in self.constants.items() if re.fullmatch(pattern, self.bare(name))), None)


def dense(ours: str, published: str) -> Rows:
    """Rows for a linear map with a bias."""
    return {f"{ours}/kernel": (f"{published}.weight", TRANSPOSED), f"{ours}/bias": (f"{published}.bias", UNCHANGED)}


def norm(ours: str, published: str) -> Rows:
    """Rows for a normalisation with scale and bias."""
    return {f"{ours}/scale": (f"{published}.weight", UNCHANGED), f"{ours}/bias": (f"{published}.bias", UNCHANGED)}


def separate_attention(ours: str, published: str) -> Rows:
    """Rows for an attention that keeps its projections apart, as Hugging Face's encoders do."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    parts = [dense(f"{ours}/{name}", f"{published}.{theirs}") for name, theirs in names.items()]
    return {path: source for part in parts for path, source in part.items()}


def encoder_block(ours: str, published: str) -> Rows:
    """Rows for a pre-norm block in the names of Hugging Face's towers for images and texts."""
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
    for part, name in enumerate(("query", "key", "value")):
        rows[f"{ours}/{name}/kernel"] = f"{published}.in_proj_weight", packed(part, 3, TRANSPOSED)
        rows[f"{ours}/{name}/bias"] = f"{published}.in_proj_bias", packed(part, 3)
    return rows


def image_settings(patch_size: int, kernel: Array | np.ndarray | jax.ShapeDtypeStruct, positions: int) -> dict[str, int]:
    """`patch_size`, `image_size` and `num_channels` as a Hugging Face configuration has them, from a matrix on patches and how many positions there are for them. Raises `UserError` if those are not a square's."""
    side = math.isqrt(positions)
    if side**2 != positions:
        raise UserError(f"{positions} positions are not those of a square image: only its image_size can be published")
    return dict(patch_size=patch_size, image_size=side * patch_size, num_channels=kernel.shape[0] // patch_size**2)


def convert(
    tensors: Mapping[str, np.ndarray], table: Table, shapes: PyTree[jax.ShapeDtypeStruct], dtype: DTypeLike | None = None
) -> PyTree[Array]:
    """Published tensors as parameters of the given shapes, one at a time, so that one copy is in memory when they come from a file.

    Raises `UserError` that names every tensor (up to a bound) that is missing, left over, of another shape, or no float; and one that is said to be a copy of another, or to be computed, and differs.
    """
    expected = flatten_dict(shapes, sep="/")
    holders: dict[str, list[tuple[str, Form]]] = {}
    for path in expected:
        name, form = table.source(path)
        holders.setdefault(name, []).append((path, form))
    wanted = {table.bare(name): name for name in holders}
    stored: dict[str, list[str]] = {}
    for name in sorted(tensors, key=lambda name: name not in holders):
        if not re.fullmatch(table.ignored, table.bare(name)) and table.constant(name) is None:
            stored.setdefault(table.bare(name), []).append(name)
    absent = {name for bare, name in wanted.items() if bare not in stored}
    zero = {name for name in absent if re.fullmatch(table.zero, name)}
    _refuse(
        [f"{name} is missing" for name in sorted(absent - zero)]
        + [f"{names[0]} is left over" for bare, names in sorted(stored.items()) if bare not in wanted]
    )
    _refuse_other_constants(tensors, table)
    params, problems = {}, []
    for name, parts in holders.items():
        if name in zero:
            params |= {path: jnp.zeros(expected[path].shape, dtype or expected[path].dtype) for path, _ in parts}
            continue
        name, *copies = stored[table.bare(name)]
        tensor = tensors[name]
        _refuse_no_float(name, tensor)
        if wrong := _misfits(name, tensor, parts, expected):
            problems += wrong
            continue
        _refuse_other_copies(tensors, name, tensor, copies)
        if not problems:
            params |= {path: jnp.asarray(form.unpack(tensor), dtype) for path, form in parts}
    _refuse(problems)
    return unflatten_dict(params, sep="/")


def _misfits(
    name: str, tensor: np.ndarray, parts: Sequence[tuple[str, Form]], expected: Mapping[str, jax.ShapeDtypeStruct]
) -> list[str]:
    return [
        f"{name} of shape {tensor.shape} does not make {path} of shape {expected[path].shape}, "
        f"which is published as {form.shape_of(expected[path].shape)}"
        for path, form in parts
        if not form.fits(tensor.shape, expected[path].shape)
    ]


def _refuse_no_float(name: str, tensor: np.ndarray) -> None:
    if tensor.dtype not in _FLOATS:
        raise UserError(
            f"{name} is stored as {tensor.dtype}, and floats of 16, 32 or 64 bits are read here: give weights that are not quantized"
        )


def _refuse_other_constants(tensors: Mapping[str, np.ndarray], table: Table) -> None:
    for name in sorted(tensors):
        if (constant := table.constant(name)) is not None and not constant.is_held(tensors[name]):
            raise UserError(f"{name} does not hold {constant.words}, as is computed here whatever it holds: give another model")


def _refuse_other_copies(tensors: Mapping[str, np.ndarray], name: str, tensor: np.ndarray, copies: Sequence[str]) -> None:
    for copy in copies:
        if not np.array_equal(tensors[copy], tensor):
            raise UserError(
                f"{copy} differs from {name}, and one tensor is used for both here: give a model in which they are the same "
                "(tied), as before one of them was trained apart"
            )


class PublishedTensors(Mapping[str, np.ndarray]):
    """Parameters as the published tensors of a table, each made when it is asked for: the inverse of `convert`.

    Raises `LookupError` for a parameter that the table does not know, and where a packed tensor lacks parts: gaps in the table.
    """

    def __init__(self, params: PyTree[Array | np.ndarray | jax.ShapeDtypeStruct], table: Table):
        self._holders: dict[str, list[tuple[Form, Any]]] = {}
        for path, param in flatten_dict(params, sep="/").items():
            name, form = table.source(path)
            self._holders.setdefault(name, []).append((form, param))
        for name, parts in self._holders.items():
            parts.sort(key=lambda held: held[0].part)
            if [form.part for form, _ in parts] != list(range(parts[0][0].parts)):
                raise LookupError(f"the parameters do not make the whole of {name}")

    def __getitem__(self, name: str) -> np.ndarray:
        parts = self._holders[name]
        written = [form.write(np.asarray(param)) for form, param in parts]
        return np.asarray(written[0] if len(written) == 1 else np.concatenate(written, axis=parts[0][0].axis), order="C")

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)

    def nbytes(self, name: str) -> int:
        """The size of a tensor, which is not made for it."""
        return sum(math.prod(param.shape) * jnp.dtype(param.dtype).itemsize for _, param in self._holders[name])


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        shown = ", ".join(problems[:_SHOWN])
        raise UserError(
            f"the weights do not fit the model that config.json describes: {shown}{more}; give a directory whose files belong together"
        )
