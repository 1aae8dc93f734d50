"""SigLIP: an image tower and a text tower trained with a pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343)."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError, unknown
from jaxdl.nn import (
    Attention,
    AttentionPooling,
    LayerNorm,
    LearnedPositions,
    PatchEmbedding,
    Transformer,
    TransformerBlock,
    dot_product_attention,
    known_tokens,
)
from jaxdl.settings import Settings, count, depth, fixed, flag, number, optional, refuse_uneven, section, side
from jaxdl.weights import (
    COUNTED,
    UNCHANGED,
    Rows,
    Table,
    dense,
    encoder_block,
    image_settings,
    norm,
    packed_attention,
    patch_kernel,
    scalar,
)


class VisionTower(nn.Module):
    """A ViT with an attention-pooling head: images `B H W C` to vectors `B D`, not normalised; without `head`, to those of all patches, `B T D`.

    Pixels beyond the last whole patch are cropped, as in the published So400m/14, which loses six of 384. The number of positions is fixed by the resolution at initialisation. `scan` and `remat` are those of `Transformer`, `grid` that of `refuse_other_grid`.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    attention: Attention = dot_product_attention
    eps: float = 1e-6
    dropout: float = 0.0
    head: bool = True
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None
    grid: tuple[int, int] | None = dataclasses.field(default=None, compare=False)

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B D"] | Float[Array, "B T D"]:
        height, width = (side // self.patch_size * self.patch_size for side in images.shape[1:3])
        if not height or not width:
            raise UserError(f"images of {images.shape[1]}×{images.shape[2]} hold no patch of {self.patch_size}: make them larger")
        refuse_other_grid(self.grid, (height // self.patch_size, width // self.patch_size))
        x = PatchEmbedding(self.patch_size, self.width, dtype=self.dtype, name="patches")(images[:, :height, :width])
        x = LearnedPositions(name="positions")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = _encoder(self)(x, train=train)
        if not self.head:
            return x
        return AttentionPooling(self.num_heads, self.mlp_dim, self.attention, self.eps, self.dtype, name="head")(x)


def refuse_other_grid(positions: tuple[int, int] | None, patches: tuple[int, int]) -> None:
    """Raises `UserError` where learned positions are known to be those of other rows and columns of patches, of which there may be as many. None: they are not known."""
    if positions is not None and positions != patches:
        raise UserError(
            f"images are cut into {patches[0]}×{patches[1]} patches, and the learned positions are those of "
            f"{positions[0]}×{positions[1]}: resize the images"
        )


class TextTower(nn.Module):
    """A Transformer read out at its last position: tokens `B T` to vectors `B D`, not normalised.

    Attention is bidirectional and sees the padding too: texts are padded to the full length, with the end-of-sentence token in the published models, so the last position is always a place to gather what was said.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    features: int
    attention: Attention = dot_product_attention
    eps: float = 1e-6
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], *, train: bool = False) -> Float[Array, "B D"]:
        tokens = known_tokens(tokens, self.vocab_size)
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="tokens")(tokens)
        x = LearnedPositions(name="positions")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = _encoder(self)(x, train=train)
        return nn.Dense(self.features, dtype=self.dtype, name="head")(x[:, -1])


def _encoder(tower: VisionTower | TextTower) -> Transformer:
    """The stack that is the same in both towers."""
    norm = functools.partial(LayerNorm, tower.eps)
    block = TransformerBlock(
        tower.num_heads, tower.mlp_dim, tower.attention, norm=norm, dropout=tower.dropout, dtype=tower.dtype, parent=None
    )
    return Transformer(tower.depth, block, scan=tower.scan, remat=tower.remat, name="encoder")


@flax.struct.dataclass
class SigLIPOutput:
    """`image_embeddings` (I D) and `text_embeddings` (J D) are L2-normalised; `logits[i, j]` says how well image i and text j fit.

    `log_temperature` and `bias` are the learned scalars; the first, named as in the paper, is the logarithm of what similarities are multiplied by, the inverse of a temperature. Leaves may be abstract or stacked, as in any pytree.
    """

    image_embeddings: PyTree
    text_embeddings: PyTree
    log_temperature: PyTree
    bias: PyTree

    @property
    def logits(self) -> Float[Array, "I J"]:
        """Cosine similarity · exp(log_temperature) + bias: the logit of the pair's probability, each pair on its own."""
        return self.image_embeddings @ self.text_embeddings.T * jnp.exp(self.log_temperature) + self.bias


class SigLIP(nn.Module):
    """The two towers with a learned scale t′ (from log 10) and bias (from −10), as section 3.1 of the paper has them.

    `SigLIP.variant("B/16")` is a published size. `apply(variables, images, tokens)` gives a `SigLIPOutput`; with `method="embed_images"` or `"embed_texts"` one tower alone is run.
    """

    vision: VisionTower
    text: TextTower

    def setup(self) -> None:
        self.log_temperature = self.param("log_temperature", nn.initializers.constant(math.log(10)), ())
        self.bias = self.param("bias", nn.initializers.constant(-10.0), ())

    def __call__(self, images: Float[Array, "I H W C"], tokens: Int[Array, "J T"], *, train: bool = False) -> SigLIPOutput:
        images, texts = self.embed_images(images, train=train), self.embed_texts(tokens, train=train)
        return SigLIPOutput(images, texts, self.log_temperature, self.bias)

    def embed_images(self, images: Float[Array, "I H W C"], *, train: bool = False) -> Float[Array, "I D"]:
        return normalize(self.vision(images, train=train))

    def embed_texts(self, tokens: Int[Array, "J T"], *, train: bool = False) -> Float[Array, "J D"]:
        return normalize(self.text(tokens, train=train))

    @classmethod
    def variant(cls, name: str, **changes: Any) -> "SigLIP":
        """The published model `name` of `VARIANTS`; `changes` (`attention`, `dtype`, `dropout`, `scan`, `remat`) go to both towers."""
        if name not in VARIANTS:
            raise unknown("SigLIP variant", name, VARIANTS)
        row = VARIANTS[name]
        size = dict(width=row.width, depth=row.depth, num_heads=row.num_heads, mlp_dim=row.mlp_dim, **changes)
        return cls(
            VisionTower(patch_size=row.patch_size, **size), TextTower(vocab_size=row.vocab_size, features=row.width, **size)
        )


def normalize(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Scales vectors to unit length, in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Variant:
    """The size of both towers, which share width, depth, heads and `mlp_dim`, and the inputs of the published weights."""

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    vocab_size: int
    resolutions: dict[int, int]
    """Image side in pixels -> text length in tokens."""


# Sizes: Zhai et al. 2022 (arXiv:2106.04560), table 2, and for So400m Alabdulmohsin et al. 2023 (arXiv:2305.13035).
# Resolutions, lengths and vocabularies: the checkpoints that big_vision publishes with the SigLIP paper.
VARIANTS = {
    "B/16": Variant(16, 768, 12, 12, 3072, 32_000, {224: 64, 256: 64, 384: 64, 512: 64}),
    "L/16": Variant(16, 1024, 24, 16, 4096, 32_000, {256: 64, 384: 64}),
    "So400m/14": Variant(14, 1152, 27, 16, 4304, 32_000, {224: 16, 384: 64}),
    "B/16-i18n": Variant(16, 768, 12, 12, 3072, 250_000, {256: 64}),
    "So400m/16-i18n": Variant(16, 1152, 27, 16, 4304, 250_000, {256: 64}),
}


def image_processor(size: int | tuple[int, int], **changes: Any) -> ImageProcessor:
    """The processor of the published models, google/siglip-*: to −1 … 1, stretched to `size`; `changes` are fields."""
    return ImageProcessor.symmetric(size, **changes)


_TOWER = dict(
    hidden_size=count(768),
    intermediate_size=count(3072),
    num_hidden_layers=depth(12),
    num_attention_heads=count(12),
    hidden_act=fixed("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh"),
    layer_norm_eps=number(1e-6),
)
VISION = Settings(
    "SigLIP",
    _TOWER | dict(image_size=side(224), patch_size=side(16), num_channels=count(3), vision_use_head=flag(True)),
    # Of the model around it, as PaliGemma's files have them.
    unused=("projection_dim", "projector_hidden_act", "num_image_tokens", "vocab_size", "num_positions"),
)
"""Of transformers' `SiglipVisionConfig`."""
_TEXT = Settings(
    "SigLIP",
    _TOWER | dict(vocab_size=count(32_000), max_position_embeddings=count(64), projection_size=optional(count(None))),
)
"""Of its `SiglipTextConfig`."""
_SETTINGS = Settings("SigLIP", {}, unused=("vision_config", "text_config", *VISION.fields, *_TEXT.fields))


def from_config(config: dict, **changes: Any) -> tuple[SigLIP, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
    """The model that a Hugging Face `config.json` describes, and abstract images and tokens of the sizes it was trained on.

    Fields that are left out have the defaults of transformers' `SiglipVisionConfig` and `SiglipTextConfig`. `changes` (`attention`, `dtype`, `dropout`, `scan`, `remat`) go to both towers. Raises `UserError` for a setting that is not SigLIP's.
    """
    _SETTINGS.read(config)
    vision = VISION.read(section(config, "vision_config", {}), " in vision_config")
    text = _TEXT.read(section(config, "text_config", {}), " in text_config")
    width, features = vision["hidden_size"], text["projection_size"] or text["hidden_size"]
    if not vision["vision_use_head"]:
        raise UserError("the vision tower has no attention-pooling head (vision_use_head is false): choose a SigLIP that has one")
    if width != features:
        raise UserError(
            f"images become vectors of {width} and texts of {features} (hidden_size in vision_config, projection_size or "
            "hidden_size in text_config): they must be of one width"
        )
    module = SigLIP(
        VisionTower(**vision_fields(vision), **changes),
        TextTower(vocab_size=text["vocab_size"], features=features, **tower_fields(text, " in text_config"), **changes),
    )
    tokens = jax.ShapeDtypeStruct((1, text["max_position_embeddings"]), jnp.int32)
    return module, (image_shape(vision), tokens)


def vision_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a vision tower, of its settings."""
    side = vision["image_size"] // vision["patch_size"]
    return tower_fields(vision, " in vision_config") | dict(patch_size=vision["patch_size"], grid=(side, side))


def image_shape(vision: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """One image of the size that the settings of a vision tower speak of."""
    sides = vision["image_size"], vision["image_size"]
    return jax.ShapeDtypeStruct((1, *sides, vision["num_channels"]), jnp.float32)


def to_config(module: SigLIP, params: PyTree) -> dict[str, Any]:
    """The `config.json` that `from_config` and transformers read as this module, whose `params` (or their shapes) say how large images and how long texts are. Raises `UserError` for a module without the attention-pooling head, and for images that are not square."""
    if not module.vision.head:
        raise UserError("head of the vision tower is False: a published SigLIP has its attention-pooling head")
    kernel, places = params["vision"]["patches"]["projection"]["kernel"], len(params["vision"]["positions"]["table"])
    text = dict(vocab_size=module.text.vocab_size, projection_size=module.text.features)
    text |= dict(max_position_embeddings=len(params["text"]["positions"]["table"]))
    return dict(
        architectures=["SiglipModel"],
        model_type="siglip",
        vision_config=tower_config(module.vision) | image_settings(module.vision.patch_size, kernel, places),
        text_config=tower_config(module.text) | dict(model_type="siglip_text_model") | text,
    )


def tower_config(tower: VisionTower | TextTower) -> dict[str, Any]:
    """The inverse of `tower_fields`: the settings that both towers have."""
    return dict(
        model_type="siglip_vision_model",
        hidden_size=tower.width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.num_heads,
        intermediate_size=tower.mlp_dim,
        layer_norm_eps=tower.eps,
        hidden_act="gelu_pytorch_tanh",
        attention_dropout=0.0,
    )


def tower_fields(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that both towers have, of the settings of one of them. Raises `UserError` for a width that cannot be split into its heads."""
    refuse_uneven(given, where=where)
    return dict(
        width=given["hidden_size"],
        depth=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        mlp_dim=given["intermediate_size"],
        eps=given["layer_norm_eps"],
    )


ARCHITECTURES = ("SiglipModel",)


def published(module: SigLIP) -> Table:
    """The names of transformers' `SiglipModel`."""
    return Table(
        {
            "log_temperature": ("logit_scale", scalar(1)),
            "bias": ("logit_bias", scalar(1)),
            **vision_rows("vision", "vision_model", module.vision),
            "text/tokens/embedding": ("text_model.embeddings.token_embedding.weight", UNCHANGED),
            "text/positions/table": ("text_model.embeddings.position_embedding.weight", UNCHANGED),
            **encoder_block(r"text/encoder/block_(\d+)", r"text_model.encoder.layers.\1"),
            **norm("text/encoder/norm", "text_model.final_layer_norm"),
            **dense("text/head", "text_model.head"),
        },
        optional=r"^siglip\.",
        constants=POSITION_IDS,
    )


POSITION_IDS = {r".*\.position_ids": COUNTED}
"""What older files have for each table of positions."""


def vision_rows(ours: str, theirs: str, tower: VisionTower) -> Rows:
    """Rows of a table for a vision tower, with its head or without."""
    rows = {
        f"{ours}/patches/projection/kernel": (f"{theirs}.embeddings.patch_embedding.weight", patch_kernel(tower.patch_size)),
        f"{ours}/patches/projection/bias": (f"{theirs}.embeddings.patch_embedding.bias", UNCHANGED),
        f"{ours}/positions/table": (f"{theirs}.embeddings.position_embedding.weight", UNCHANGED),
        **encoder_block(rf"{ours}/encoder/block_(\d+)", rf"{theirs}.encoder.layers.\1"),
        **norm(f"{ours}/encoder/norm", f"{theirs}.post_layernorm"),
    }
    if not tower.head:
        return rows
    return rows | {
        f"{ours}/head/probe": (f"{theirs}.head.probe", UNCHANGED),
        **packed_attention(f"{ours}/head/attention", f"{theirs}.head.attention"),
        **norm(f"{ours}/head/norm", f"{theirs}.head.layernorm"),
        **dense(f"{ours}/head/feed_forward/expand", f"{theirs}.head.mlp.fc1"),
        **dense(f"{ours}/head/feed_forward/contract", f"{theirs}.head.mlp.fc2"),
    }
