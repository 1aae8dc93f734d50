"""ViT: a Transformer encoder that classifies an image from its patches (Dosovitskiy et al. 2021, arXiv:2010.11929)."""

import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError, unknown
from jaxdl.models.siglip import refuse_other_grid
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
from jaxdl.settings import Settings, anything, count, depth, fixed, flag, number, optional, refuse_uneven, side
from jaxdl.weights import BATCHED, UNCHANGED, Table, dense, image_settings, norm, patch_kernel

POOLS = ("class", "mean", "map")
POSITIONS = ("learned", "sincos")


@flax.struct.dataclass
class ViTOutput:
    """`logits` (B C), None without a head, and the pooled `features` (B D) that the head reads."""

    logits: PyTree
    features: PyTree


class ViT(nn.Module):
    """Images `B H W C` to `num_classes` logits; 0 leaves out the head.

    - `pool` says how the patches become one vector: by a class token in front of them (the paper, section 3.1), by their mean (Beyer et al. 2022), or by attention with a learned query (Zhai et al. 2022).
    - `positions` are learned, one for each patch and the class token, or fixed sines and cosines of row and column, with none for the class token (Beyer et al. 2022).
    - `grid`, where it is known, is that of `refuse_other_grid`: the rows and columns of patches that learned positions are of.
    - `stochastic_depth`, `scan` and `remat` are those of `Transformer`; `mlp_dim` is `4 · width` unless given.

    The head and the class token start from zero, as in the authors' code. `ViT.variant("B/16", num_classes=1000)` is a published size. The number of positions is fixed by the image size at initialisation; `adapt` changes it.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    num_classes: int
    mlp_dim: int | None = None
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
    grid: tuple[int, int] | None = dataclasses.field(default=None, compare=False)

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], *, train: bool = False) -> ViTOutput:
        """Raises `UserError` if a side of the images is no multiple of `patch_size`, and for an unknown `pool` or `positions`."""
        for what, given, known in (("pool", self.pool, POOLS), ("positions", self.positions, POSITIONS)):
            if given not in known:
                raise unknown(what, given, known)
        x = PatchEmbedding(self.patch_size, self.width, dtype=self.dtype, name="patches")(images)
        rows, columns = (side // self.patch_size for side in images.shape[1:3])
        if self.positions == "learned":
            refuse_other_grid(self.grid, (rows, columns))
        if self.positions == "sincos":
            x = x + sinusoidal_2d(rows, columns, self.width, endpoint=True)
        if self.pool == "class":
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        if self.positions == "learned":
            x = LearnedPositions(name="positions")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        features = self._pooled(self._encoder()(x, train=train))
        if not self.num_classes:
            return ViTOutput(None, features)
        head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="head")
        return ViTOutput(head(features), features)

    def _encoder(self) -> Transformer:
        block = TransformerBlock(
            self.num_heads,
            self.mlp_dim or 4 * self.width,
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
        mlp_dim = self.mlp_dim or 4 * self.width
        return AttentionPooling(self.num_heads, mlp_dim, self.attention, self.eps, self.dtype, name="pooling")(x)

    @classmethod
    def variant(cls, name: str, *, num_classes: int, **changes: Any) -> "ViT":
        """The published size `name` of `VARIANTS`; `changes` are the other fields."""
        if name not in VARIANTS:
            raise unknown("ViT variant", name, VARIANTS)
        return cls(**(dataclasses.asdict(VARIANTS[name]) | dict(num_classes=num_classes) | changes))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published size; `patch_size` is the side of a patch in pixels, and the feed-forward is four times as wide as `width`."""

    patch_size: int
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


def adapt(
    module: ViT, params: PyTree, *, size: tuple[int, int] | None = None, num_classes: int | None = None
) -> tuple[ViT, PyTree]:
    """Prepares a model for fine-tuning on images of another `size` (height, width) and another number of classes (Dosovitskiy et al. 2021, section 3.2).

    Learned positions are interpolated: those of a square image, or of the `grid` of the module where it is known. If the number of classes differs, or there was no head, the new head starts from zero; otherwise it is kept, even if the classes mean something else. Raises `UserError` for a size that is no multiple of `patch_size`, and for positions that do not form a square.
    """
    params = dict(params)
    if size is not None and module.positions == "learned":
        if any(side < module.patch_size or side % module.patch_size for side in size):
            raise UserError(
                f"images of {size[0]}×{size[1]} cannot be cut into patches of {module.patch_size}: choose a multiple of it"
            )
        table = params["positions"]["table"]
        places = len(table) - (module.pool == "class")
        side = math.isqrt(places)
        if module.grid is None and side**2 != places:
            raise UserError(f"{places} places are not those of a square image: positions of others are not interpolated here")
        grid = size[0] // module.patch_size, size[1] // module.patch_size
        if (before := module.grid or (side, side)) != grid:
            params["positions"] = {"table": interpolate_positions(table, before, grid)}
        module = module.clone(grid=grid)
    if num_classes is not None and num_classes != module.num_classes:
        dtype = params["patches"]["projection"]["kernel"].dtype
        params["head"] = {"kernel": jnp.zeros((module.width, num_classes), dtype), "bias": jnp.zeros(num_classes, dtype)}
        module = module.clone(num_classes=num_classes)
    return module, params


def image_processor(size: int | tuple[int, int], **changes: Any) -> ImageProcessor:
    """The processor of the published models, google/vit-*: to −1 … 1, stretched to `size` with a bilinear filter; `changes` are fields."""
    return ImageProcessor.symmetric(size, **{"resample": "bilinear", **changes})


_SETTINGS = Settings(
    "ViT",
    dict(
        hidden_size=count(768),
        num_hidden_layers=depth(12),
        num_attention_heads=count(12),
        intermediate_size=count(3072),
        hidden_act=fixed("gelu", "gelu_python"),
        layer_norm_eps=number(1e-12),
        image_size=side(224),
        patch_size=side(16),
        num_channels=count(3),
        qkv_bias=flag(True),
        num_labels=optional(count(None, least=0)),
        id2label=anything(),
        architectures=anything(),
    ),
    # Of the layer on top of the class token that no classifier uses, and of masked training.
    unused=("pooler_output_size", "pooler_act", "encoder_stride"),
)
"""Of transformers' `ViTConfig`."""


def from_config(config: dict, **changes: Any) -> tuple[ViT, tuple[jax.ShapeDtypeStruct]]:
    """The model that a Hugging Face `config.json` of type `vit` describes, and abstract images of the size it was trained on.

    Fields that are left out have the defaults of transformers' `ViTConfig`. A `ViTModel`, by `architectures`, has no head. Raises `UserError` for a setting that is not ViT's.
    """
    given = _SETTINGS.read(config)
    refuse_uneven(given)
    named = given["architectures"] or ARCHITECTURES
    module = ViT(
        patch_size=given["patch_size"],
        width=given["hidden_size"],
        depth=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        num_classes=_num_classes(given) if "ViTForImageClassification" in named else 0,
        mlp_dim=given["intermediate_size"],
        qkv_bias=given["qkv_bias"],
        eps=given["layer_norm_eps"],
        grid=(given["image_size"] // given["patch_size"],) * 2,
        **changes,
    )
    sides = given["image_size"], given["image_size"]
    return module, (jax.ShapeDtypeStruct((1, *sides, given["num_channels"]), jnp.float32),)


def _num_classes(given: dict[str, Any]) -> int:
    """`num_labels`, or how many labels have a name, or the two that transformers takes, and does not write out, where nothing is said."""
    labels = given["id2label"]
    if labels is not None and not (isinstance(labels, dict) and all(str(index).isdecimal() for index in labels)):
        raise UserError(f"id2label is no object of names by number ({str(labels)[:80]}): correct it")
    if given["num_labels"] is not None:
        return given["num_labels"]
    return 2 if labels is None else len({int(index) for index in labels})


def to_config(module: ViT, params: PyTree) -> dict[str, Any]:
    """The `config.json` that `from_config` and transformers read as this module, whose `params` (or their shapes) say how large images are. Raises `UserError` for what transformers' ViT has not: another `pool` than the class token, fixed `positions`, images that are not square."""
    for field, only in (("pool", "class"), ("positions", "learned")):
        if (given := getattr(module, field)) != only:
            raise UserError(f"{field} is {given!r}: a published ViT has {only!r}, and no other can be written")
    places = len(params["positions"]["table"]) - 1
    labels = [f"LABEL_{index}" for index in range(module.num_classes)]
    return dict(
        architectures=["ViTForImageClassification" if labels else "ViTModel"],
        model_type="vit",
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.num_heads,
        intermediate_size=module.mlp_dim or 4 * module.width,
        qkv_bias=module.qkv_bias,
        layer_norm_eps=module.eps,
        hidden_act="gelu",
        hidden_dropout_prob=module.dropout,
        attention_probs_dropout_prob=0.0,
        **image_settings(module.patch_size, params["patches"]["projection"]["kernel"], places),
        **(dict(id2label=dict(enumerate(labels)), label2id=dict(zip(labels, range(len(labels))))) if labels else {}),
    )


ARCHITECTURES = ("ViTForImageClassification", "ViTModel")


_NEWER = {
    "layernorm_before": "layernorm_before",
    "layernorm_after": "layernorm_after",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""What parts of a block are called in the memory of transformers 5, and in files."""


def published(module: ViT) -> Table:
    """The names in the files of transformers' `ViTForImageClassification`, or where there is no head of its `ViTModel`."""
    within = "vit." if module.num_classes else ""
    block, layer = r"encoder/block_(\d+)", rf"{within}encoder.layer.\1"
    kernel = f"{within}embeddings.patch_embeddings.projection"
    return Table(
        {
            "class_token": (f"{within}embeddings.cls_token", UNCHANGED),
            "positions/table": (f"{within}embeddings.position_embeddings", BATCHED),
            "patches/projection/kernel": (f"{kernel}.weight", patch_kernel(module.patch_size)),
            "patches/projection/bias": (f"{kernel}.bias", UNCHANGED),
            **norm(f"{block}/attention_norm", f"{layer}.layernorm_before"),
            **dense(f"{block}/attention/query", f"{layer}.attention.attention.query"),
            **dense(f"{block}/attention/key", f"{layer}.attention.attention.key"),
            **dense(f"{block}/attention/value", f"{layer}.attention.attention.value"),
            **dense(f"{block}/attention/out", f"{layer}.attention.output.dense"),
            **norm(f"{block}/feed_forward_norm", f"{layer}.layernorm_after"),
            **dense(f"{block}/feed_forward/expand", f"{layer}.intermediate.dense"),
            **dense(f"{block}/feed_forward/contract", f"{layer}.output.dense"),
            **norm("encoder/norm", f"{within}layernorm"),
            **dense("head", "classifier"),
        },
        # A layer on top of the class token that no classifier uses, and what stands for hidden patches in masked training.
        ignored=r"pooler\.dense\.(weight|bias)|embeddings\.mask_token",
        optional=r"^vit\.",
        copies={
            r"score\.(weight|bias)": r"classifier.\1",
            **{rf"layers\.(\d+)\.{new}\.(weight|bias)": rf"vit.encoder.layer.\1.{old}.\2" for new, old in _NEWER.items()},
        },
    )


def architecture(names: Collection[str]) -> str:
    """Which of `ARCHITECTURES` tensors of these names are of, where no `config.json` says it."""
    return ARCHITECTURES["classifier.weight" not in names and "score.weight" not in names]
