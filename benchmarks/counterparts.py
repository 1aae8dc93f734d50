"""The blocks of `jaxdl.nn` beside the functions of other libraries that they equal: one table, from which the speeds (`benchmarks.blocks`) and the reference page (`benchmarks.reference`) are made.

A row is a function that returns `Sides`: arrays of a realistic size, and what each library makes of them. All get the same numbers in float32; torch gets them in the layouts that it likes best (channels second, heads before length, kernels with the outputs first), made before the clock starts. Rows stand in the order of the files in `jaxdl/nn`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import PyTree

from jaxdl import nn

F = torch.nn.functional

IMAGE = (0, 3, 1, 2)
"""`B H W C` to `B C H W`."""
HEADS = (0, 2, 1, 3)
"""`B T N H` to `B N T H`."""
KERNEL = (3, 2, 0, 1)
"""`h w I O` to `O I h w`."""


class Given(NamedTuple):
    """An array of normal numbers, or a `fixed` one, and the order in which torch has its axes, if another than ours."""

    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None
    scale: float = 1.0
    mean: float = 0.0
    fixed: np.ndarray | None = None

    def value(self, seed: int) -> np.ndarray:
        """In float32, unless fixed."""
        drawn = self.mean + self.scale * np.random.default_rng(seed).standard_normal(self.shape)
        return np.asarray(drawn, np.float32) if self.fixed is None else self.fixed


@dataclasses.dataclass(frozen=True, eq=False)
class Sides:
    """The same function of the same arrays, in each library. `torch` gets and returns its own layouts: `out` says that of each result. `flax` is None where `flax.linen` has none.

    Floating-point arrays have gradients, others have none; no array means a constant, which is compared and not timed.
    """

    given: Sequence[Given]
    ours: Callable[..., PyTree]
    torch: Callable[..., Any]
    flax: Callable[..., PyTree] | None = None
    out: tuple[int, ...] | None = None

    @functools.cached_property
    def arrays(self) -> list[np.ndarray]:
        """In our layouts. Each has a seed of its own: two alike could be exchanged unnoticed."""
        return [given.value(seed) for seed, given in enumerate(self.given)]

    @functools.cached_property
    def cotangent(self) -> PyTree:
        """One for each result."""
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in self.arrays]
        leaves, structure = jax.tree.flatten(jax.eval_shape(self.ours, *shapes))
        return structure.unflatten([Given(leaf.shape).value(100 + place) for place, leaf in enumerate(leaves)])


class Row(NamedTuple):
    """`blocks` are the public names that it speaks of, `library` what they are compared with."""

    blocks: tuple[str, ...]
    library: str
    sides: Callable[[], Sides]


ROWS: dict[str, Row] = {}


def compared(library: str, *blocks: str) -> Callable[[Callable[[], Sides]], Callable[[], Sides]]:
    """Enters a function that makes `Sides` in the table, under its own name."""

    def enter(sides: Callable[[], Sides]) -> Callable[[], Sides]:
        ROWS[sides.__name__] = Row(blocks, library, sides)
        return sides

    return enter


# Arrays. ----------------


def normal(*shape: int, axes: tuple[int, ...] | None = None, scale: float = 1.0) -> Given:
    """From a normal distribution of deviation `scale`."""
    return Given(shape, axes, scale)


def image(*shape: int) -> Given:
    return normal(*shape, axes=IMAGE)


def heads(*shape: int) -> Given:
    return Given(shape, HEADS)


def matrix(inputs: int, outputs: int) -> Given:
    """Of a linear map that keeps the deviation."""
    return normal(inputs, outputs, axes=(1, 0), scale=inputs**-0.5)


def window(*shape: int) -> Given:
    """A convolution's kernel `h w I O` that keeps the deviation."""
    return normal(*shape, axes=KERNEL, scale=math.prod(shape[:-1]) ** -0.5)


def near_one(width: int) -> Given:
    """A scale as training leaves it."""
    return Given((width,), scale=0.1, mean=1.0)


def permuted(array: Any, axes: tuple[int, ...] | None) -> Any:
    """With its axes in another order and in one piece."""
    return array if axes is None else np.ascontiguousarray(np.transpose(array, axes))


def inverse(axes: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """What undoes `permuted`."""
    return None if axes is None else tuple(int(place) for place in np.argsort(axes))


def tensors(sides: Sides) -> list[torch.Tensor]:
    """The arrays in torch's layouts, its gradients asked for."""
    made = [torch.tensor(permuted(array, given.axes)) for array, given in zip(sides.arrays, sides.given)]
    return [tensor.requires_grad_() if tensor.is_floating_point() else tensor.long() for tensor in made]


def torch_cotangent(sides: Sides) -> Any:
    """The cotangent in torch's layouts."""
    return jax.tree.map(lambda array: torch.tensor(permuted(array, sides.out)), sides.cotangent)


# What all rows share: the pass forward and back, and the difference. ------------------------------------------------------------


def forward_and_back(function: Callable[..., PyTree]) -> Callable[[PyTree, Sequence[jax.Array]], tuple[PyTree, list[jax.Array]]]:
    """`(cotangent, arrays)` to the value and the gradients of the floating-point arrays."""

    def run(cotangent: PyTree, arrays: Sequence[jax.Array]) -> tuple[PyTree, list[jax.Array]]:
        real = [jnp.issubdtype(array.dtype, jnp.floating) for array in arrays]

        def of_real(*parts: jax.Array) -> PyTree:
            left = iter(parts)
            return function(*(next(left) if is_real else array for is_real, array in zip(real, arrays)))

        value, pull = jax.vjp(of_real, *(array for is_real, array in zip(real, arrays) if is_real))
        return value, list(pull(cotangent))

    return run


def torch_forward_and_back(function: Callable[..., Any], cotangent: Any, given: Sequence[torch.Tensor]) -> tuple[Any, Any]:
    """The same in torch."""
    value = function(*given)
    real = [tensor for tensor in given if tensor.requires_grad]
    several = isinstance(value, tuple)
    return value, torch.autograd.grad(value if several else [value], real, cotangent if several else [cotangent])


def differences(sides: Sides) -> tuple[float, float]:
    """The largest difference of values and of gradients between us and torch, each array's relative to its largest number, or to 1 where that is smaller."""
    given = tensors(sides)
    arrays = [jnp.asarray(array) for array in sides.arrays]
    if not any(tensor.requires_grad for tensor in given):
        return _largest(jax.jit(sides.ours)(*arrays), sides.torch(*given), sides.out), 0.0
    value, gradients = jax.jit(forward_and_back(sides.ours))(sides.cotangent, arrays)
    theirs = torch_cotangent(sides)
    wanted, wanted_gradients = torch_forward_and_back(sides.torch, theirs, given)
    layouts = [given.axes for array, given in zip(sides.arrays, sides.given) if array.dtype.kind == "f"]
    by_gradient = [_largest(got, want, axes) for got, want, axes in zip(gradients, wanted_gradients, layouts, strict=True)]
    return _largest(value, wanted, sides.out), max(by_gradient)


def _largest(ours: PyTree, theirs: Any, axes: tuple[int, ...] | None) -> float:
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    worst = 0.0
    for got, want in zip(jax.tree.leaves(ours), theirs, strict=True):
        want = np.float64(permuted(want.detach().numpy(), inverse(axes)))
        if got.shape != want.shape:
            raise ValueError(f"ours has the shape {got.shape}, theirs {want.shape}")
        worst = max(worst, float(np.abs(np.float64(got) - want).max() / max(1.0, np.abs(want).max())))
    return worst


def _dense(kernel: jax.Array, bias: jax.Array | None = None) -> dict[str, jax.Array]:
    return {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}


def _apply(module: linen.Module, params: PyTree, *inputs: jax.Array, **options: Any) -> PyTree:
    return module.apply({"params": params}, *inputs, **options)


# activations.py ----------------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[Callable, Callable, Callable]] = {
    "leaky_relu": (nn.leaky_relu, F.leaky_relu, linen.leaky_relu),
    "elu": (nn.elu, F.elu, linen.elu),
    "gelu": (nn.gelu, F.gelu, functools.partial(linen.gelu, approximate=False)),
    "gelu_tanh": (nn.gelu_tanh, functools.partial(F.gelu, approximate="tanh"), linen.gelu),
    "silu": (nn.silu, F.silu, linen.silu),
    "mish": (nn.mish, F.mish, jax.nn.mish),
    "hard_sigmoid": (nn.hard_sigmoid, F.hardsigmoid, linen.hard_sigmoid),
    "hard_swish": (nn.hard_swish, F.hardswish, linen.hard_swish),
    "glu": (nn.glu, F.glu, linen.glu),
}


def _activation(name: str) -> Sides:
    return Sides([normal(32, 128, 512)], *ACTIVATIONS[name])


for _name, (_, _theirs, _) in ACTIVATIONS.items():
    _called = getattr(_theirs, "func", _theirs).__name__ + ("(approximate='tanh')" if _name == "gelu_tanh" else "")
    ROWS[_name] = Row((_name,), f"torch.nn.functional.{_called}", functools.partial(_activation, _name))


@compared("torch.nn.functional.prelu", "prelu", "PReLU")
def prelu() -> Sides:
    given = [image(16, 32, 32, 128), Given((), scale=0.1, mean=0.25)]
    theirs = lambda x, slope: F.prelu(x, slope.reshape(1))
    return Sides(
        given,
        lambda x, slope: _apply(nn.PReLU(), {"slope": slope}, x),
        theirs,
        lambda x, slope: _apply(linen.PReLU(), {"negative_slope": slope}, x),
        IMAGE,
    )


# attention.py and masks.py -----------------------------------------------------------------------------------------------------

QKV = [heads(4, 256, 8, 64) for _ in range(3)]
SHARED = [QKV[0], *(heads(4, 256, 2, 64) for _ in range(2))]


@compared("torch.nn.functional.scaled_dot_product_attention", "dot_product_attention")
def attention() -> Sides:
    return Sides(QKV, nn.dot_product_attention, F.scaled_dot_product_attention, linen.dot_product_attention, HEADS)


@compared("torch.nn.functional.scaled_dot_product_attention(is_causal=True)", "dot_product_attention", "causal_mask")
def attention_causal() -> Sides:
    ours = functools.partial(nn.dot_product_attention, is_causal=True)
    flax = lambda *qkv: linen.dot_product_attention(*qkv, mask=linen.make_causal_mask(jnp.ones((4, 256))))
    return Sides(QKV, ours, functools.partial(F.scaled_dot_product_attention, is_causal=True), flax, HEADS)


@compared("torch.nn.functional.scaled_dot_product_attention(enable_gqa=True)", "dot_product_attention")
def attention_grouped() -> Sides:
    theirs = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
    return Sides(SHARED, nn.dot_product_attention, theirs, out=HEADS)


PROJECTIONS = ("query", "key", "value", "out")


def _multi_head(keys: int | None, causal: bool = False) -> Sides:
    """Eight heads of 64, within 256 tokens or to others.

    The three biases of the inputs are one array: the gradient of the key's is 0 but for rounding, which is no number to divide by.
    """
    width, count = 512, 8
    given = [normal(8, 256, width), *([] if keys is None else [normal(8, keys, width)])]
    given += [matrix(width, width) for _ in PROJECTIONS] + [normal(3 * width), normal(width)]
    own = keys is None

    def named(arrays: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        *inputs, q, k, v, o, biases, bias = arrays
        parts = zip(PROJECTIONS, (q, k, v, o), [*jnp.split(biases, 3), bias])
        return inputs[0], inputs[-1], {name: _dense(*both) for name, *both in parts}

    def ours(*arrays: jax.Array) -> jax.Array:
        x, y, params = named(arrays)
        return _apply(nn.MultiHeadAttention(count), params, x, *(() if own else (y,)), is_causal=causal)

    def theirs(*arrays: torch.Tensor) -> torch.Tensor:
        *inputs, q, k, v, o, biases, bias = arrays
        x, y = inputs[0].transpose(0, 1), inputs[-1].transpose(0, 1)
        packed = dict(use_separate_proj_weight=True, q_proj_weight=q, k_proj_weight=k, v_proj_weight=v, need_weights=False)
        packed |= dict(is_causal=True, attn_mask=torch.ones(256, 256, dtype=torch.bool).triu(1)) if causal else {}
        options = (width, count, None, biases, None, None, False, 0.0, o, bias)
        return F.multi_head_attention_forward(x, y, y, *options, **packed)[0].transpose(0, 1)

    def flax(*arrays: jax.Array) -> jax.Array:
        x, y, params = named(arrays)
        mask = linen.make_causal_mask(jnp.ones(x.shape[:2])) if causal else None
        return _apply(linen.MultiHeadDotProductAttention(count), _by_heads(params, count), x, y, mask=mask)

    return Sides(given, ours, theirs, flax)


def _by_heads(params: dict[str, Any], count: int) -> dict[str, Any]:
    """The parameters of our attention as those of Flax, which have an axis for the heads."""
    kernel, bias = params["out"]["kernel"], params["out"]["bias"]
    split = jax.tree.map(lambda array: array.reshape(*array.shape[:-1], count, -1), params)
    return split | {"out": _dense(kernel.reshape(count, -1, kernel.shape[-1]), bias)}


@compared("torch.nn.functional.multi_head_attention_forward", "MultiHeadAttention")
def multi_head_attention() -> Sides:
    return _multi_head(None)


@compared("torch.nn.functional.multi_head_attention_forward(is_causal=True)", "MultiHeadAttention", "causal_mask")
def multi_head_attention_causal() -> Sides:
    return _multi_head(None, causal=True)


@compared("torch.nn.functional.multi_head_attention_forward", "MultiHeadAttention")
def multi_head_attention_cross() -> Sides:
    return _multi_head(77)


# convolution.py, deformable.py and pooling.py ----------------------------------------------------------------------------------


def _convolution(
    x: Given, kernel: Given, *, stride: int = 1, padding: int = 1, dilation: int = 1, groups: int = 1, method: str | None = None
) -> Sides:
    """The module, or the function by one of its methods."""
    *sizes, _, features = kernel.shape
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    conv = nn.Conv(features, sizes, use_bias=False, **options)
    flax = linen.Conv(features, sizes, stride, padding, kernel_dilation=dilation, feature_group_count=groups, use_bias=False)
    module = lambda x, kernel: _apply(conv, _dense(kernel), x)
    ours = module if method is None else functools.partial(nn.convolve, method=method, **options)
    theirs = functools.partial(F.conv2d, **options)
    return Sides([x, kernel], ours, theirs, lambda x, kernel: _apply(flax, _dense(kernel), x), IMAGE)


def _square(channels: int = 64) -> list[Given]:
    return [image(16, 32, 32, channels), window(3, 3, channels, channels)]


@compared("torch.nn.functional.conv2d", "convolve", "Conv")
def convolve() -> Sides:
    return _convolution(*_square())


@compared("torch.nn.functional.conv2d", "convolve")
def convolve_by_taps() -> Sides:
    return _convolution(*_square(), method="taps")


@compared("torch.nn.functional.conv2d", "convolve")
def convolve_by_unfolding() -> Sides:
    return _convolution(*_square(), method="unfold")


@compared("torch.nn.functional.conv2d", "convolve")
def convolve_by_lax() -> Sides:
    return _convolution(*_square(), method="lax")


@compared("torch.nn.functional.conv2d(stride=2)", "convolve", "Conv")
def convolve_strided() -> Sides:
    return _convolution(*_square(), stride=2)


@compared("torch.nn.functional.conv2d(dilation=2)", "convolve", "Conv")
def convolve_dilated() -> Sides:
    return _convolution(*_square(), padding=2, dilation=2)


@compared("torch.nn.functional.conv2d", "convolve", "Conv")
def convolve_pointwise() -> Sides:
    return _convolution(image(16, 32, 32, 128), window(1, 1, 128, 128), padding=0)


@compared("torch.nn.functional.conv2d(groups=4)", "convolve", "Conv")
def convolve_grouped() -> Sides:
    return _convolution(image(16, 32, 32, 64), window(3, 3, 16, 64), groups=4)


@compared("torch.nn.functional.conv2d(groups=128)", "convolve", "Conv")
def convolve_depthwise() -> Sides:
    return _convolution(image(16, 32, 32, 128), window(3, 3, 1, 128), groups=128)


@compared("torch.nn.functional.conv2d, twice", "SeparableConv")
def separable_convolution() -> Sides:
    given = [image(16, 32, 32, 128), window(3, 3, 1, 128), window(1, 1, 128, 128), normal(128)]

    def ours(x: jax.Array, depthwise: jax.Array, pointwise: jax.Array, bias: jax.Array) -> jax.Array:
        params = {"depthwise": _dense(depthwise), "pointwise": _dense(pointwise, bias)}
        return _apply(nn.SeparableConv(128, 3), params, x)

    def flax(x: jax.Array, depthwise: jax.Array, pointwise: jax.Array, bias: jax.Array) -> jax.Array:
        y = _apply(linen.Conv(128, (3, 3), feature_group_count=128, use_bias=False), _dense(depthwise), x)
        return _apply(linen.Conv(128, (1, 1)), _dense(pointwise, bias), y)

    theirs = lambda x, depthwise, pointwise, bias: F.conv2d(F.conv2d(x, depthwise, None, 1, 1, 1, 128), pointwise, bias)
    return Sides(given, ours, theirs, flax, IMAGE)


@compared("torch.nn.functional.conv2d of a masked kernel", "MaskedConv", "raster_mask")
def masked_convolution() -> Sides:
    before = np.arange(25).reshape(5, 5, 1, 1) <= 12
    conv = linen.Conv(64, (5, 5), use_bias=False, mask=jnp.asarray(np.broadcast_to(before, (5, 5, 64, 64)), jnp.float32))
    allowed = torch.tensor(before.astype(np.float32)).permute(3, 2, 0, 1)
    return Sides(
        [image(16, 24, 24, 64), window(5, 5, 64, 64)],
        lambda x, kernel: _apply(nn.MaskedConv(64, 5, use_bias=False), _dense(kernel), x),
        lambda x, kernel: F.conv2d(x, kernel * allowed, None, 1, 2),
        lambda x, kernel: _apply(conv, _dense(kernel), x),
        IMAGE,
    )


@compared("torch.nn.functional.conv_transpose2d", "convolve_transposed", "ConvTranspose")
def convolve_transposed() -> Sides:
    given = [image(16, 16, 16, 64), normal(4, 4, 64, 64, axes=(2, 3, 0, 1), scale=256**-0.5)]
    conv, flax = nn.ConvTranspose(64, 4, 2, use_bias=False), linen.ConvTranspose(64, (4, 4), (2, 2), use_bias=False)
    return Sides(
        given,
        lambda x, kernel: _apply(conv, _dense(kernel), x),
        lambda x, kernel: F.conv_transpose2d(x, kernel, None, 2, 1),
        lambda x, kernel: _apply(flax, _dense(kernel[::-1, ::-1]), x),
        IMAGE,
    )


@compared("torch.nn.functional.unfold", "unfold")
def unfold() -> Sides:
    def theirs(x: torch.Tensor) -> torch.Tensor:
        return F.unfold(x, 3, 1, 1).mT.reshape(8, 32, 32, 64, 9).transpose(-1, -2).flatten(-2)  # Torch has the channels first.

    flax = lambda x: jax.lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    reorder = lambda patches: patches.reshape(8, 32, 32, 64, 9).swapaxes(-1, -2).reshape(8, 32, 32, -1)
    return Sides([image(8, 32, 32, 64)], lambda x: nn.unfold(x, 3), theirs, lambda x: reorder(flax(x)))


@compared("torch.nn.functional.grid_sample and a matrix product", "deformable_convolve", "sample_bilinear")
def deformable_convolve() -> Sides:
    batch, side, channels = 4, 24, 32
    given = [
        image(batch, side, side, channels),
        normal(batch, side, side, 18),
        normal(3, 3, channels, 64, scale=(9 * channels) ** -0.5),
        normal(batch, side, side, 9),
    ]

    def theirs(x: torch.Tensor, offsets: torch.Tensor, kernel: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        places, steps = torch.arange(side), torch.arange(3) - 1
        rows = (places[:, None] + steps)[:, None, :, None].expand(side, side, 3, 3)
        columns = (places[:, None] + steps)[None, :, None, :].expand(side, side, 3, 3)
        y, x_ = (offsets.unflatten(-1, (3, 3, 2)) + torch.stack([rows, columns], -1)).unbind(-1)
        grid = torch.stack([x_, y], -1) * (2 / (side - 1)) - 1
        seen = F.grid_sample(x, grid.flatten(3, 4).flatten(1, 2), align_corners=True)  # B C Y·X 9
        seen = (seen * modulation.flatten(1, 2)[:, None]).permute(0, 2, 3, 1).flatten(2)
        return (seen @ kernel.flatten(0, 2)).unflatten(1, (side, side))

    return Sides(given, nn.deformable_convolve, theirs)


@compared("torch.nn.functional.max_pool2d", "max_pool")
def max_pool() -> Sides:
    flax = lambda x: linen.max_pool(x, (2, 2), (2, 2))
    return Sides([image(16, 64, 64, 64)], lambda x: nn.max_pool(x, 2), lambda x: F.max_pool2d(x, 2), flax, IMAGE)


@compared("torch.nn.functional.max_pool2d", "max_pool")
def max_pool_overlapping() -> Sides:
    ours = functools.partial(nn.max_pool, window=3, stride=2, padding=1)
    flax = lambda x: linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    return Sides([image(16, 64, 64, 64)], ours, lambda x: F.max_pool2d(x, 3, 2, 1), flax, IMAGE)


@compared("torch.nn.functional.avg_pool2d", "average_pool")
def average_pool() -> Sides:
    flax = lambda x: linen.avg_pool(x, (2, 2), (2, 2))
    return Sides([image(16, 64, 64, 64)], lambda x: nn.average_pool(x, 2), lambda x: F.avg_pool2d(x, 2), flax, IMAGE)


# embedding.py ------------------------------------------------------------------------------------------------------------------


@compared("torch.nn.functional.conv2d(stride=16)", "PatchEmbedding", "patchify")
def patch_embedding() -> Sides:
    given = [image(16, 224, 224, 3), window(16, 16, 3, 384), normal(384)]

    def ours(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return _apply(nn.PatchEmbedding(16, 384), {"projection": _dense(kernel.reshape(-1, 384), bias)}, images)

    def theirs(images: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, kernel, bias, 16).flatten(2).mT

    flax = lambda images, *kernel: _apply(linen.Conv(384, (16, 16), 16, "VALID"), _dense(*kernel), images).reshape(16, -1, 384)
    return Sides(given, ours, theirs, flax)


@compared("torch.nn.functional.fold", "unpatchify")
def unpatchify() -> Sides:
    # Torch has the channels of a patch first.
    theirs = lambda patches: F.fold(patches.unflatten(-1, (256, 3)).mT.flatten(2).mT, (224, 224), 16, stride=16)
    return Sides([normal(16, 196, 768)], lambda patches: nn.unpatchify(patches, 16, 224, 224), theirs, out=IMAGE)


# latent_attention.py, linear_attention.py and sliding_window.py ----------------------------------------------------------------

LATENT = {
    "query_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "query_up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "out": "o_proj",
}


@compared("transformers' DeepseekV3Attention", "LatentAttention")
def latent_attention() -> Sides:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    width, count, length = 512, 8, 256
    widths = dict(qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, kv_lora_rank=128, q_lora_rank=192)
    parameters = dict(rope_type="default", rope_theta=10_000.0)
    sizes = dict(hidden_size=width, num_attention_heads=count, num_key_value_heads=count, **widths)
    config = deepseek.DeepseekV3Config(**sizes, rope_parameters=parameters, attn_implementation="sdpa")
    layer, angles = deepseek.DeepseekV3Attention(config, layer_idx=0).eval(), deepseek.DeepseekV3RotaryEmbedding(config)
    module = nn.LatentAttention(count, 64, 32, 64, 128, 192)
    shapes = {
        "query_down": matrix(width, 192),
        "query_norm": near_one(192),
        "query_up": matrix(192, count * 96),
        "kv_down": matrix(width, 160),
        "kv_norm": near_one(128),
        "kv_up": matrix(128, count * 128),
        "out": matrix(count * 64, width),
    }

    def theirs(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        named = {f"{LATENT[name]}.weight": weight for name, weight in zip(shapes, weights)}
        table = angles(x, torch.arange(length)[None])
        options = dict(position_embeddings=table, attention_mask=None, is_causal=True)
        return torch.func.functional_call(layer, named, (), dict(hidden_states=x, **options))[0]

    def ours(x: jax.Array, *weights: jax.Array) -> jax.Array:
        return _apply(module, dict(zip(shapes, weights)), x, is_causal=True)

    return Sides([normal(8, length, width), *shapes.values()], ours, theirs)


LONG = [heads(2, 1024, 8, 64) for _ in range(3)]


def _elu_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Eq. 5 of Katharopoulos et al. 2020, on `B N T H`."""
    query, key = F.elu(query) + 1, F.elu(key) + 1
    return (query @ (key.mT @ value)) / (query @ key.sum(-2)[..., None])


def _elu_attention_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Eq. 9, with all pairs of tokens: torch has no scan, and a state for every token would be 64 times the keys."""
    weights = ((F.elu(query) + 1) @ (F.elu(key) + 1).mT).tril()
    return (weights @ value) / weights.sum(-1, keepdim=True)


@compared("eq. 5 of the paper in torch", "linear_attention", "elu_features")
def linear_attention() -> Sides:
    return Sides(LONG, nn.linear_attention, _elu_attention, out=HEADS)


@compared("eq. 9 of the paper in torch, with all pairs", "linear_attention", "linear_decode", "LinearState", "elu_features")
def linear_attention_causal() -> Sides:
    return Sides(LONG, functools.partial(nn.linear_attention, is_causal=True), _elu_attention_causal, out=HEADS)


@compared("eq. 5 of the paper in torch", "positive_features", "linear_attention", "RandomFeatureAttention")
def performer_attention() -> Sides:
    projection = np.array(nn.random_projection(jax.random.key(0), 256, 64))

    def ours(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        # eps changes what is estimated, and libraries take it relative to different numbers.
        variables = {"random_features": {"projection": jnp.asarray(projection), "calls": jnp.zeros((), jnp.int32)}}
        return nn.RandomFeatureAttention(256, eps=0.0).apply(variables, query, key, value)

    def theirs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor(projection)

        def features(x: torch.Tensor) -> torch.Tensor:
            x = x * 64**-0.25
            exponent = x @ rows.T - x.square().sum(-1, keepdim=True) / 2
            return torch.exp(exponent - exponent.amax((-1, -2), keepdim=True).detach())

        query, key = features(query), features(key)
        return (query @ (key.mT @ value)) / (query @ key.sum(-2)[..., None])

    return Sides(LONG, ours, theirs, out=HEADS)


@compared("torch.nn.functional.scaled_dot_product_attention with a mask", "sliding_window_attention")
def sliding_window_attention() -> Sides:
    distance = np.arange(1024) - np.arange(1024)[:, None]
    near = (distance <= 0) & (distance >= -128)
    return Sides(
        LONG,
        functools.partial(nn.sliding_window_attention, local_window_size=(128, 0)),
        functools.partial(F.scaled_dot_product_attention, attn_mask=torch.tensor(near)),
        lambda *qkv: linen.dot_product_attention(*qkv, mask=jnp.asarray(near)[None, None]),
        HEADS,
    )


# normalization.py --------------------------------------------------------------------------------------------------------------


@compared("torch.nn.functional.layer_norm", "layer_norm", "LayerNorm")
def layer_norm() -> Sides:
    ours = lambda x, scale, bias: _apply(nn.LayerNorm(), {"scale": scale, "bias": bias}, x)
    flax = lambda x, scale, bias: _apply(linen.LayerNorm(1e-6), {"scale": scale, "bias": bias}, x)
    theirs = lambda x, scale, bias: F.layer_norm(x, (384,), scale, bias, 1e-6)
    return Sides([normal(32, 196, 384), near_one(384), normal(384)], ours, theirs, flax)


@compared("torch.nn.functional.rms_norm", "rms_norm", "RMSNorm")
def rms_norm() -> Sides:
    ours = lambda x, scale: _apply(nn.RMSNorm(), {"scale": scale}, x)
    flax = lambda x, scale: _apply(linen.RMSNorm(1e-6), {"scale": scale}, x)
    theirs = lambda x, scale: F.rms_norm(x, (384,), scale, 1e-6)
    return Sides([normal(32, 196, 384), near_one(384)], ours, theirs, flax)


PIXELS = [image(32, 56, 56, 64), near_one(64), normal(64)]


@compared("torch.nn.functional.group_norm", "group_norm", "GroupNorm")
def group_norm() -> Sides:
    flax = lambda x, scale, bias: _apply(linen.GroupNorm(8, epsilon=1e-5), {"scale": scale, "bias": bias}, x)
    return Sides(
        PIXELS,
        lambda x, scale, bias: _apply(nn.GroupNorm(8), {"scale": scale, "bias": bias}, x),
        lambda x, scale, bias: F.group_norm(x, 8, scale, bias),
        flax,
        IMAGE,
    )


@compared("torch.nn.functional.instance_norm", "instance_norm", "InstanceNorm")
def instance_norm() -> Sides:
    ours = lambda x, scale, bias: _apply(nn.InstanceNorm(affine=True), {"scale": scale, "bias": bias}, x)
    flax = lambda x, scale, bias: _apply(linen.InstanceNorm(epsilon=1e-5), {"scale": scale, "bias": bias}, x)
    theirs = lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias)
    return Sides(PIXELS, ours, theirs, flax, IMAGE)


def _batch_norm(module: linen.Module, variance: str, x: jax.Array, scale: jax.Array, bias: jax.Array, **mode: bool) -> jax.Array:
    """The value; of the statistics that are kept, ours and Flax's, only what it needs is computed."""
    stats = {"mean": jnp.zeros_like(bias), variance: jnp.ones_like(bias)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    return module.apply(variables, x, mutable=["batch_stats"], **mode)[0]


@compared("torch.nn.functional.batch_norm(training=True)", "BatchNorm", "batch_norm", "batch_statistics")
def batch_norm() -> Sides:
    def theirs(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, torch.zeros(64), torch.ones(64), scale, bias, training=True)

    ours = lambda *arrays: _batch_norm(nn.BatchNorm(), "variance", *arrays, train=True)
    flax = lambda *arrays: _batch_norm(linen.BatchNorm(momentum=0.9), "var", *arrays, use_running_average=False)
    return Sides(PIXELS, ours, theirs, flax, IMAGE)


@compared("torch._weight_norm", "weight_norm", "WeightNorm")
def weight_norm() -> Sides:
    theirs = lambda direction, magnitude: torch._weight_norm(direction, magnitude.reshape(-1, 1, 1, 1), 0)
    ours = lambda direction, magnitude: _apply(nn.WeightNorm(), {"magnitude": magnitude}, direction)
    given = [window(3, 3, 256, 256), near_one(256)]
    return Sides(given, ours, theirs, out=KERNEL)


@compared("torch.nn.utils.parametrizations.spectral_norm", "spectral_norm", "SpectralNorm", "power_iteration")
def spectral_norm() -> Sides:
    inputs, outputs = 9 * 256, 256
    left, right = (normal(size).value(size) for size in (outputs, inputs))
    left, right = left / np.linalg.norm(left), right / np.linalg.norm(right)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(inputs, outputs)).parametrizations.weight[0]

    def ours(kernel: jax.Array) -> jax.Array:
        stats = {"spectral_norm": {"vectors": (jnp.asarray(left), jnp.asarray(right))}}
        return nn.SpectralNorm().apply(stats, kernel, train=True, mutable=["spectral_norm"])[0]

    def theirs(weight: torch.Tensor) -> torch.Tensor:
        layer._u.copy_(torch.tensor(left))
        layer._v.copy_(torch.tensor(right))
        return layer(weight)

    return Sides([matrix(inputs, outputs)], ours, theirs, out=(1, 0))


# positions.py ------------------------------------------------------------------------------------------------------------------


def _llama_rotary(length: int, width: int, **parameters: Any) -> Any:
    from transformers.models.llama import modeling_llama as llama

    scaling = {"rope_type": "default", "rope_theta": 10_000.0} | parameters
    sizes = dict(hidden_size=8 * width, num_attention_heads=8, max_position_embeddings=length)
    return llama, llama.LlamaRotaryEmbedding(llama.LlamaConfig(**sizes, rope_parameters=scaling))


def _positions(batch: int, length: int) -> Given:
    return Given((batch, length), fixed=np.tile(np.arange(length, dtype=np.int32), (batch, 1)))


@compared("transformers' LlamaRotaryEmbedding and apply_rotary_pos_emb", "rope", "rotary_frequencies")
def rope() -> Sides:
    llama, rotary = _llama_rotary(256, 64)

    def theirs(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return llama.apply_rotary_pos_emb(query, key, *rotary(query, positions))

    ours = lambda query, key, positions: (nn.rope(query, positions), nn.rope(key, positions))
    given = [heads(8, 256, 8, 64), heads(8, 256, 8, 64), _positions(8, 256)]
    return Sides(given, ours, theirs, out=HEADS)


@compared("transformers' GPT-J: apply_rotary_pos_emb", "rope")
def rope_interleaved() -> Sides:
    from transformers.models.gptj import modeling_gptj as gptj

    def theirs(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        sin, cos = gptj.create_sinusoidal_positions(256, 64)[positions].chunk(2, dim=-1)
        return gptj.apply_rotary_pos_emb(x, sin, cos)

    given = [normal(8, 256, 8, 64), _positions(8, 256)]
    return Sides(given, functools.partial(nn.rope, interleaved=True), theirs)


def _frequencies(ours: Callable[[], jax.Array], **parameters: Any) -> Sides:
    return Sides([], ours, lambda: _llama_rotary(64, 64, **parameters)[1].inv_freq)


@compared("transformers' rope_type='yarn'", "yarn_frequencies")
def yarn_frequencies() -> Sides:
    parameters = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)
    return _frequencies(lambda: nn.yarn_frequencies(64, 8.0, 64), **parameters)


@compared("transformers' rope_type='dynamic'", "ntk_frequencies")
def ntk_frequencies() -> Sides:
    def theirs() -> torch.Tensor:
        _, rotary = _llama_rotary(64, 64, rope_type="dynamic", factor=2.0)
        rotary(torch.zeros(()), torch.arange(150)[None])
        return rotary.inv_freq

    return Sides([], lambda: nn.ntk_frequencies(64, 2.0, length=150, original_length=64), theirs)


@compared("transformers' attention factor of rope_type='yarn'", "yarn_magnitude")
def yarn_magnitude() -> Sides:
    parameters = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)
    theirs = lambda: torch.tensor(_llama_rotary(64, 64, **parameters)[1].attention_scaling, dtype=torch.float64)
    return Sides([], lambda: jnp.asarray(nn.yarn_magnitude(8.0)), theirs)


@compared("transformers' GPT-J: create_sinusoidal_positions", "sinusoidal")
def sinusoidal() -> Sides:
    from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

    return Sides([], lambda: nn.sinusoidal(256, 64, interleaved=False), lambda: create_sinusoidal_positions(256, 64))


@compared("transformers' ViT-MAE: sincos positions, halves exchanged", "sinusoidal_2d")
def sinusoidal_2d() -> Sides:
    from transformers.models.vit_mae import modeling_vit_mae as mae

    build = next(getattr(mae, name) for name in dir(mae) if "2d" in name and "sin" in name)
    return Sides([], lambda: nn.sinusoidal_2d(14, 14, 384), lambda: torch.as_tensor(build(14, 14, 384)).roll(192, -1))


@compared("transformers' BLOOM: build_alibi_tensor, relative to the query's own place", "alibi_bias", "alibi_slopes")
def alibi_bias() -> Sides:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    def theirs() -> torch.Tensor:
        row = build_alibi_tensor(torch.ones(1, 256), 12, torch.float32).reshape(1, 12, 1, 256)
        return (row - row.mT).tril() + (row.mT - row).triu(1)

    return Sides([], lambda: nn.alibi_bias(12, 256, 256), theirs)


@compared("transformers' T5Attention._relative_position_bucket and an embedding", "RelativePositionBias", "relative_buckets")
def relative_position_bias() -> Sides:
    from transformers.models.t5.modeling_t5 import T5Attention

    def theirs(table: torch.Tensor) -> torch.Tensor:
        places = torch.arange(256)
        buckets = T5Attention._relative_position_bucket(places - places[:, None], True, 32, 128)
        return F.embedding(buckets, table).permute(2, 0, 1)[None]

    return Sides([normal(32, 12)], lambda table: _apply(nn.RelativePositionBias(12), {"table": table}, 256, 256), theirs)


@compared("transformers' SwinRelativePositionBias", "WindowPositionBias", "window_offsets")
def window_position_bias() -> Sides:
    from transformers.models.swin.modeling_swin import SwinRelativePositionBias

    layer = SwinRelativePositionBias(12, (12, 12))
    theirs = lambda table: torch.func.functional_call(layer, {"relative_position_bias_table": table}, ())
    ours = lambda table: _apply(nn.WindowPositionBias(12, (12, 12)), {"table": table})
    return Sides([normal(23 * 23, 12)], ours, theirs)


# recurrence.py -----------------------------------------------------------------------------------------------------------------

STEPS = dict(batch=32, length=64, inputs=128, hidden=256)


def _recurrent(cell: str, gates: int) -> Sides:
    """One layer over whole sequences, from a state of zeros."""
    batch, length, inputs, hidden = STEPS.values()
    given = [
        normal(batch, length, inputs),
        matrix(inputs, gates * hidden),
        matrix(hidden, gates * hidden),
        normal(gates * hidden),
    ]
    given += [normal(hidden)] if cell == "gru" else []
    run = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh}[cell]

    def ours(x: jax.Array, enter: jax.Array, again: jax.Array, bias: jax.Array, *more: jax.Array) -> jax.Array:
        params = {"input_kernel": enter, "recurrent_kernel": again, "bias": bias}
        params |= {"recurrent_bias": more[0]} if more else {}
        return _apply(nn.Recurrent(hidden, cell), {"layer_0": params}, x)[0]

    def theirs(
        x: torch.Tensor, enter: torch.Tensor, again: torch.Tensor, bias: torch.Tensor, *more: torch.Tensor
    ) -> torch.Tensor:
        zeros = x.new_zeros(1, batch, hidden)
        other = F.pad(more[0], (2 * hidden, 0)) if more else torch.zeros_like(bias)
        start, train = ((zeros, zeros) if cell == "lstm" else zeros), torch.is_grad_enabled()
        return run(x, start, [enter, again, bias, other], True, 1, 0.0, train, False, True)[0]

    def flax(x: jax.Array, enter: jax.Array, again: jax.Array, bias: jax.Array, *more: jax.Array) -> jax.Array:
        if cell == "rnn_tanh":
            made, params = linen.SimpleCell(hidden), {"i": _dense(enter, bias), "h": _dense(again)}
        elif cell == "lstm":
            made, params = linen.OptimizedLSTMCell(hidden), {}
            for gate, *parts in zip("ifgo", *(jnp.split(array, 4, axis=-1) for array in (enter, again, bias))):
                params |= {f"i{gate}": _dense(parts[0]), f"h{gate}": _dense(*parts[1:])}
        else:
            made, params = linen.GRUCell(hidden), {}
            for gate, *parts in zip("rzn", *(jnp.split(array, 3, axis=-1) for array in (enter, again, bias))):
                params |= {f"i{gate}": _dense(parts[0], parts[2]), f"h{gate}": _dense(parts[1], *(more if gate == "n" else ()))}
        return _apply(linen.RNN(made), {"cell": params}, x)

    return Sides(given, ours, theirs, flax)


@compared("torch.nn.RNN", "Recurrent", "recurrence")
def rnn() -> Sides:
    return _recurrent("rnn_tanh", 1)


@compared("torch.nn.LSTM", "Recurrent", "recurrence")
def lstm() -> Sides:
    return _recurrent("lstm", 4)


@compared("torch.nn.GRU", "Recurrent", "recurrence")
def gru() -> Sides:
    return _recurrent("gru", 3)


def _cell(gates: int, states: int, ours: Callable, theirs: Callable, second_bias: bool = False) -> Sides:
    """One step; torch's second bias is 0 unless it is among the arrays."""
    batch, _, inputs, hidden = STEPS.values()
    kernels = [matrix(inputs, gates * hidden), matrix(hidden, gates * hidden), normal(gates * hidden)]
    given = [*kernels, *[normal(batch, hidden)] * states, normal(batch, inputs), *([normal(hidden)] if second_bias else [])]

    def run(enter: torch.Tensor, again: torch.Tensor, bias: torch.Tensor, *rest: torch.Tensor) -> Any:
        state, (x, *more) = rest[:states], rest[states:]
        other = F.pad(more[0], (2 * hidden, 0)) if more else torch.zeros_like(bias)
        return theirs(x, state if states > 1 else state[0], enter, again, bias, other)

    return Sides(given, ours, run)


@compared("torch.nn.RNNCell", "rnn_cell")
def rnn_cell() -> Sides:
    return _cell(1, 1, nn.rnn_cell, torch.rnn_tanh_cell)


@compared("torch.nn.LSTMCell", "lstm_cell")
def lstm_cell() -> Sides:
    ours = lambda enter, again, bias, hidden, memory, x: nn.lstm_cell(enter, again, bias, (hidden, memory), x)
    return _cell(4, 2, ours, torch.lstm_cell)


@compared("torch.nn.GRUCell", "gru_cell")
def gru_cell() -> Sides:
    return _cell(3, 1, nn.gru_cell, torch.gru_cell, second_bias=True)


# transformer.py ----------------------------------------------------------------------------------------------------------------


@compared("torch.nn.functional.linear and gelu", "FeedForward")
def feed_forward() -> Sides:
    given = [normal(8, 256, 384), matrix(384, 1536), normal(1536), matrix(1536, 384), normal(384)]

    def ours(x: jax.Array, w: jax.Array, b: jax.Array, v: jax.Array, c: jax.Array) -> jax.Array:
        return _apply(nn.FeedForward(1536), {"expand": _dense(w, b), "contract": _dense(v, c)}, x)

    def flax(x: jax.Array, w: jax.Array, b: jax.Array, v: jax.Array, c: jax.Array) -> jax.Array:
        return _apply(linen.Dense(384), _dense(v, c), linen.gelu(_apply(linen.Dense(1536), _dense(w, b), x)))

    theirs = lambda x, w, b, v, c: F.linear(F.gelu(F.linear(x, w, b), approximate="tanh"), v, c)
    return Sides(given, ours, theirs, flax)


@compared("transformers' LlamaMLP", "GatedFeedForward")
def gated_feed_forward() -> Sides:
    from transformers.models.llama import modeling_llama as llama

    width, hidden = 384, nn.gated_mlp_dim(1536)
    layer = llama.LlamaMLP(llama.LlamaConfig(hidden_size=width, num_attention_heads=6, intermediate_size=hidden))
    names = ("gate", "expand", "contract")

    def ours(x: jax.Array, *kernels: jax.Array) -> jax.Array:
        return _apply(nn.GatedFeedForward(hidden), {name: _dense(kernel) for name, kernel in zip(names, kernels)}, x)

    def theirs(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
        return torch.func.functional_call(layer, weights, x)

    def flax(x: jax.Array, *kernels: jax.Array) -> jax.Array:
        gate, up = (_apply(linen.Dense(hidden, use_bias=False), _dense(kernel), x) for kernel in kernels[:2])
        return _apply(linen.Dense(width, use_bias=False), _dense(kernels[2]), linen.silu(gate) * up)

    return Sides([normal(8, 256, width), matrix(width, hidden), matrix(width, hidden), matrix(hidden, width)], ours, theirs, flax)


@compared("torch.nn.TransformerEncoderLayer(norm_first=True)", "TransformerBlock")
def transformer_block() -> Sides:
    return _block(norm_first=True)


@compared("torch.nn.TransformerEncoderLayer(norm_first=False)", "TransformerBlock")
def transformer_block_post_norm() -> Sides:
    return _block(norm_first=False)


def _block(norm_first: bool) -> Sides:
    batch, length, width, count, hidden = 8, 128, 384, 6, 1536
    layer = torch.nn.TransformerEncoderLayer(
        width, count, hidden, 0.0, torch.nn.GELU(approximate="tanh"), batch_first=True, norm_first=norm_first
    )
    module = nn.TransformerBlock(count, hidden, norm=functools.partial(nn.LayerNorm, 1e-5), norm_first=norm_first)
    given = {
        "norm1.weight": near_one(width),
        "norm1.bias": normal(width),
        "self_attn.in_proj_weight": matrix(width, 3 * width),
        "self_attn.in_proj_bias": normal(3 * width),
        "self_attn.out_proj.weight": matrix(width, width),
        "self_attn.out_proj.bias": normal(width),
        "norm2.weight": near_one(width),
        "norm2.bias": normal(width),
        "linear1.weight": matrix(width, hidden),
        "linear1.bias": normal(hidden),
        "linear2.weight": matrix(hidden, width),
        "linear2.bias": normal(width),
    }

    def parts(arrays: Sequence[jax.Array]) -> dict[str, Any]:
        """Named as in ours."""
        a, b, qkv, biases, out, bias, c, d, *linear = arrays
        projections = zip(PROJECTIONS, *(jnp.split(array, 3, axis=-1) for array in (qkv, biases)))
        return {
            "attention_norm": {"scale": a, "bias": b},
            "attention": {name: _dense(*both) for name, *both in projections} | {"out": _dense(out, bias)},
            "feed_forward_norm": {"scale": c, "bias": d},
            "feed_forward": {"expand": _dense(*linear[:2]), "contract": _dense(*linear[2:])},
        }

    def flax(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        params = parts(arrays)
        attention = _by_heads(params["attention"], count)
        norm = lambda name, x: _apply(linen.LayerNorm(1e-5), params[f"{name}_norm"], x)
        attend = lambda x: _apply(linen.MultiHeadDotProductAttention(count), attention, x, x)

        def feed(x: jax.Array) -> jax.Array:
            middle = linen.gelu(_apply(linen.Dense(hidden), params["feed_forward"]["expand"], x))
            return _apply(linen.Dense(width), params["feed_forward"]["contract"], middle)

        for name, part in {"attention": attend, "feed_forward": feed}.items():
            x = x + part(norm(name, x)) if norm_first else norm(name, x + part(x))
        return x

    return Sides(
        [normal(batch, length, width), *given.values()],
        lambda x, *arrays: _apply(module, parts(arrays), x),
        lambda x, *weights: torch.func.functional_call(layer, dict(zip(given, weights)), x),
        flax,
    )


@compared("torch.nn.MultiheadAttention of a probe, LayerNorm and a feed-forward", "AttentionPooling")
def attention_pooling() -> Sides:
    width, count, hidden = 384, 6, 1536
    given = [normal(16, 196, width), normal(1, 1, width), matrix(width, 3 * width), normal(3 * width), matrix(width, width)]
    given += [normal(width), near_one(width), normal(width)]
    given += [matrix(width, hidden), normal(hidden), matrix(hidden, width), normal(width)]

    def ours(
        x: jax.Array, probe: jax.Array, qkv: jax.Array, biases: jax.Array, out: jax.Array, bias: jax.Array, *rest: jax.Array
    ):
        projections = zip(PROJECTIONS, *(jnp.split(array, 3, axis=-1) for array in (qkv, biases)))
        params = {
            "probe": probe,
            "attention": {name: _dense(*both) for name, *both in projections} | {"out": _dense(out, bias)},
            "norm": {"scale": rest[0], "bias": rest[1]},
            "feed_forward": {"expand": _dense(*rest[2:4]), "contract": _dense(*rest[4:])},
        }
        return _apply(nn.AttentionPooling(count, hidden), params, x)

    def theirs(
        x: torch.Tensor, probe: torch.Tensor, qkv: torch.Tensor, biases: torch.Tensor, out: torch.Tensor, *rest: torch.Tensor
    ):
        query, source = probe.expand(len(x), 1, width).transpose(0, 1), x.transpose(0, 1)
        options = (width, count, qkv, biases, None, None, False, 0.0, out, rest[0])
        y = F.multi_head_attention_forward(query, source, source, *options, need_weights=False)[0][0]
        z = F.layer_norm(y, (width,), rest[1], rest[2], 1e-6)
        return y + F.linear(F.gelu(F.linear(z, *rest[3:5]), approximate="tanh"), *rest[5:])

    return Sides(given, ours, theirs)
