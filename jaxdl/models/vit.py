"""ViT: a Transformer encoder on the patches of an image, which says what is on it (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from jaxdl.errors import UserError, unknown
from jaxdl.nn import (
    Attention,
    AttentionPooling,
    FeedForward,
    LayerNorm,
    LearnedPositions,
    MultiHeadAttention,
    PatchEmbedding,
    Transformer,
    TransformerBlock,
    dot_product_attention,
    gelu,
    interpolate_positions,
    sinusoidal_2d,
)
from jaxdl.weights import Table, dense, norm, patch_kernel, unchanged

POOLS = ("class", "mean", "map")
POSITIONS = ("learned", "sincos")


@flax.struct.dataclass
class ViTOutput:
    """`logits` (B C) of the classes, None where there are none, and `features` (B D), from which they are read."""

    logits: PyTree
    features: PyTree


class ViT(nn.Module):
    """Images `B H W C` to the logits of `classes`, 0 of which leave out the head.

    - `pool` says how the places are gathered into one vector: by a class token that stands before them (the paper, section 3.1), by their mean (Beyer et al. 2022), or by attention with a learned query (Zhai et al. 2022).
    - `positions` are learned, one for each place and the class token, or fixed sines and cosines of row and column, which the class token is without (Beyer et al. 2022).
    - `stochastic_depth`, `scan` and `remat` are those of `Transformer`; `hidden` is `4 · width` unless given.

    The head and the class token start from zero, as in the authors' code. `ViT.variant("B/16", classes=1000)` is a published size. The number of positions is fixed by the image size at initialisation; `adapt` changes it.
    """

    patch: int
    width: int
    depth: int
    num_heads: int
    classes: int
    hidden: int | None = None
    pool: str = "class"
    positions: str = "learned"
    qkv_bias: bool = True
    attention: Attention = dot_product_attention
    eps: float = 1e-6
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], *, train: bool = False) -> ViTOutput:
        """Raises `UserError` if a side of the images is no multiple of `patch`, and for an unknown `pool` or `positions`."""
        for what, given, known in (("pool", self.pool, POOLS), ("positions", self.positions, POSITIONS)):
            if given not in known:
                raise unknown(what, given, known)
        x = PatchEmbedding(self.patch, self.width, dtype=self.dtype, name="patches")(images)
        if self.positions == "sincos":
            rows, columns = (side // self.patch for side in images.shape[1:3])
            x = x + sinusoidal_2d(rows, columns, self.width, endpoint=True)
        if self.pool == "class":
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        if self.positions == "learned":
            x = LearnedPositions(name="positions")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        features = self._pooled(self._encoder()(x, train=train))
        if not self.classes:
            return ViTOutput(None, features)
        head = nn.Dense(self.classes, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="head")
        return ViTOutput(head(features), features)

    def _encoder(self) -> Transformer:
        block = TransformerBlock(
            self.num_heads,
            self.hidden or 4 * self.width,
            self.attention,
            attention_layer=functools.partial(MultiHeadAttention, use_bias=True if self.qkv_bias else ("out",)),
            feed_forward_layer=functools.partial(FeedForward, activation=gelu),
            norm=functools.partial(LayerNorm, self.eps),
            dropout=self.dropout,
            dtype=self.dtype,
            parent=None,
        )
        return Transformer(self.depth, block, self.stochastic_depth, scan=self.scan, remat=self.remat, name="encoder")

    def _pooled(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        if self.pool == "class":
            return x[:, 0]
        if self.pool == "mean":
            return x.mean(axis=1)
        hidden = self.hidden or 4 * self.width
        return AttentionPooling(self.num_heads, hidden, self.attention, self.eps, self.dtype, name="pooling")(x)

    @classmethod
    def variant(cls, name: str, *, classes: int, **changes: Any) -> "ViT":
        """The published size `name` of `VARIANTS`; `changes` are the other fields."""
        if name not in VARIANTS:
            raise unknown("ViT variant", name, VARIANTS)
        return cls(**(dataclasses.asdict(VARIANTS[name]) | dict(classes=classes) | changes))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published size, with the side of its patches in pixels. The feed-forward is four times as wide as the rest."""

    patch: int
    width: int
    depth: int
    num_heads: int


# B, L and H: Dosovitskiy et al. 2021, table 1. Ti and S: Touvron et al. 2021 (arXiv:2012.12877), table 1.
# Patches: those of the papers, of the authors' files, and B/8 of Caron et al. 2021 (arXiv:2104.14294).
VARIANTS = {
    "Ti/16": Variant(16, 192, 12, 3),
    "S/16": Variant(16, 384, 12, 6),
    "S/32": Variant(32, 384, 12, 6),
    "B/8": Variant(8, 768, 12, 12),
    "B/16": Variant(16, 768, 12, 12),
    "B/32": Variant(32, 768, 12, 12),
    "L/16": Variant(16, 1024, 24, 16),
    "L/32": Variant(32, 1024, 24, 16),
    "H/14": Variant(14, 1280, 32, 16),
}


def adapt(module: ViT, params: PyTree, *, size: tuple[int, int] | None = None, classes: int | None = None) -> tuple[ViT, PyTree]:
    """The model for images of another `size` (height, width) and for other classes, as fine-tuning begins (Dosovitskiy et al. 2021, section 3.2).

    Learned positions are interpolated, from those of square images. If the number of classes is another, or there was no head, the head is one of zeros; else it stays as it is, whatever the classes are called. Raises `UserError` for a size that is no multiple of the patch, and for positions that are not those of a square.
    """
    params = dict(params)
    if size is not None and module.positions == "learned":
        if any(side < module.patch or side % module.patch for side in size):
            raise UserError(
                f"images of {size[0]}×{size[1]} cannot be cut into patches of {module.patch}: choose a multiple of it"
            )
        table = params["positions"]["table"]
        places = len(table) - (module.pool == "class")
        side = math.isqrt(places)
        if side**2 != places:
            raise UserError(f"{places} places are not those of a square image: positions of others are not interpolated here")
        grid = (side, side), (size[0] // module.patch, size[1] // module.patch)
        if grid[0] != grid[1]:
            params["positions"] = {"table": interpolate_positions(table, *grid)}
    if classes is not None and classes != module.classes:
        dtype = params["patches"]["projection"]["kernel"].dtype
        params["head"] = {"kernel": jnp.zeros((module.width, classes), dtype), "bias": jnp.zeros(classes, dtype)}
        module = module.clone(classes=classes)
    return module, params


def from_config(config: dict, **changes: Any) -> tuple[ViT, tuple[jax.ShapeDtypeStruct]]:
    """The model that a Hugging Face `config.json` of type `vit` describes, and abstract images of the size it was trained on.

    Fields that are left out have the defaults of transformers' `ViTConfig`. A `ViTModel`, by `architectures`, has no head. Raises `UserError` for a setting that is not ViT's.
    """
    for field, only in (("hidden_act", "gelu"), ("attention_probs_dropout_prob", 0.0)):
        if (given := config.get(field, only)) != only:
            raise UserError(f"{field} is {given!r}: ViT has {only!r}, and nothing else is read here")
    patch, side = config.get("patch_size", 16), config.get("image_size", 224)
    if not (isinstance(patch, int) and isinstance(side, int)):
        raise UserError(f"images of {side} pixels in patches of {patch} are not read here: both must be the side of a square")
    width, num_heads = config.get("hidden_size", 768), config.get("num_attention_heads", 12)
    if width % num_heads:
        raise UserError(f"a hidden_size of {width} cannot be split into {num_heads} heads (num_attention_heads)")
    has_head = config.get("architectures") != ["ViTModel"]
    module = ViT(
        patch=patch,
        width=width,
        depth=config.get("num_hidden_layers", 12),
        num_heads=num_heads,
        # transformers does not write out the two classes that it takes where none are named.
        classes=len(config.get("id2label", range(2))) if has_head else 0,
        hidden=config.get("intermediate_size", 3072),
        qkv_bias=config.get("qkv_bias", True),
        eps=config.get("layer_norm_eps", 1e-12),
        **changes,
    )
    return module, (jax.ShapeDtypeStruct((1, side, side, config.get("num_channels", 3)), jnp.float32),)


_BLOCK, _LAYER = r"encoder/block_(\d+)", r"encoder.layer.\1"

# The names in the files of transformers' `ViTForImageClassification` and `ViTModel`.
PUBLISHED = Table(
    {
        "class_token": ("embeddings.cls_token", unchanged),
        "positions/table": ("embeddings.position_embeddings", lambda tensor: tensor[0]),
        "patches/projection/kernel": ("embeddings.patch_embeddings.projection.weight", patch_kernel),
        "patches/projection/bias": ("embeddings.patch_embeddings.projection.bias", unchanged),
        **norm(f"{_BLOCK}/attention_norm", f"{_LAYER}.layernorm_before"),
        **dense(f"{_BLOCK}/attention/query", f"{_LAYER}.attention.attention.query"),
        **dense(f"{_BLOCK}/attention/key", f"{_LAYER}.attention.attention.key"),
        **dense(f"{_BLOCK}/attention/value", f"{_LAYER}.attention.attention.value"),
        **dense(f"{_BLOCK}/attention/out", f"{_LAYER}.attention.output.dense"),
        **norm(f"{_BLOCK}/feed_forward_norm", f"{_LAYER}.layernorm_after"),
        **dense(f"{_BLOCK}/feed_forward/expand", f"{_LAYER}.intermediate.dense"),
        **dense(f"{_BLOCK}/feed_forward/contract", f"{_LAYER}.output.dense"),
        **norm("encoder/norm", "layernorm"),
        **dense("head", "classifier"),
    },
    # A layer on top of the class token that no classifier uses, and what stands for hidden patches in masked training.
    ignored=r"pooler\.dense\.(weight|bias)|embeddings\.mask_token",
    optional=r"^vit\.",  # `ViTModel` is without it.
)
