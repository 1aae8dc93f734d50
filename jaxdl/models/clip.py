"""CLIP: an image tower and a text tower trained to match the images and texts of a batch (Radford et al. 2021, arXiv:2103.00020)."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxdl.data.image import ImageProcessor
from jaxdl.errors import UserError, unknown
from jaxdl.models.siglip import POSITION_IDS, image_shape, normalize, refuse_other_grid, tower_fields, vision_fields
from jaxdl.nn import (
    Attention,
    FeedForward,
    LayerNorm,
    LearnedPositions,
    MultiHeadAttention,
    Transformer,
    TransformerBlock,
    dot_product_attention,
    gelu,
    known_tokens,
    patchify,
    silu,
)
from jaxdl.settings import Settings, anything, count, depth, number, section, side
from jaxdl.weights import UNCHANGED, Table, dense, encoder_block, image_settings, norm, patch_kernel, scalar


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x σ(1.702 x)`, the coarser of two approximations of GELU (Hendrycks and Gimpel 2016, section 2), with which OpenAI's models were trained."""
    return silu(x, 1.702)


class VisionTower(nn.Module):
    """A ViT with a normalisation before its first block, read at its class token: images `B H W C` to vectors `B features`, not normalised.

    The number of positions is fixed by the resolution at initialisation. `scan` and `remat` are those of `Transformer`, `grid` that of `refuse_other_grid`. Raises `UserError` for images that cannot be cut into patches.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    features: int
    activation: Callable[[Array], Array] = quick_gelu
    attention: Attention = dot_product_attention
    eps: float = 1e-5
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None
    grid: tuple[int, int] | None = dataclasses.field(default=None, compare=False)

    @nn.compact
    def __call__(self, images: Float[Array, "B H W C"], *, train: bool = False) -> Float[Array, "B D"]:
        rows, columns = (side // self.patch_size for side in images.shape[1:3])
        refuse_other_grid(self.grid, (rows, columns))
        start = nn.initializers.normal(self.width**-0.5)
        # The patches have no bias: the positions that are added have one for each of them.
        x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="patches")(patchify(images, self.patch_size))
        token = self.param("class_token", start, (self.width,)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        x = LearnedPositions(name="positions")(x)
        x = LayerNorm(self.eps, name="norm")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = _encoder(self)(x, train=train)
        return nn.Dense(self.features, use_bias=False, kernel_init=start, dtype=self.dtype, name="head")(x[:, 0])


class TextTower(nn.Module):
    """A causal Transformer, like GPT-2, read where the text ends: tokens `B T` to vectors `B features`, not normalised.

    `end` is the token that ends a text. The first one counts, since the published tokenizer also pads with it; what follows is never seen. None takes the highest token id of a row, as OpenAI's code does, whose vocabulary has that token last.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    features: int
    end: int | None = None
    activation: Callable[[Array], Array] = quick_gelu
    attention: Attention = dot_product_attention
    eps: float = 1e-5
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], *, train: bool = False) -> Float[Array, "B D"]:
        embedding = nn.Embed(
            self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype, name="tokens"
        )
        x = LearnedPositions(name="positions")(embedding(known_tokens(tokens, self.vocab_size)))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        x = _encoder(self, is_causal=True)(x, train=train)
        ends = (tokens if self.end is None else tokens == self.end).argmax(1)
        x = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
        start = nn.initializers.normal(self.width**-0.5)
        return nn.Dense(self.features, use_bias=False, kernel_init=start, dtype=self.dtype, name="head")(x)


def _encoder(tower: VisionTower | TextTower, is_causal: bool = False) -> Transformer:
    """The encoder, the same in both towers. Weights start as in the text tower of OpenAI's code, smaller for projections into the residual stream."""
    normal = nn.initializers.normal
    back = normal((2 * max(1, tower.depth) * tower.width) ** -0.5)
    block = TransformerBlock(
        tower.num_heads,
        tower.mlp_dim,
        tower.attention,
        attention_layer=functools.partial(MultiHeadAttention, kernel_init=normal(tower.width**-0.5), out_init=back),
        feed_forward_layer=functools.partial(
            FeedForward, activation=tower.activation, kernel_init=normal((2 * tower.width) ** -0.5), out_init=back
        ),
        norm=functools.partial(LayerNorm, tower.eps),
        is_causal=is_causal,
        dropout=tower.dropout,
        dtype=tower.dtype,
        parent=None,
    )
    return Transformer(tower.depth, block, scan=tower.scan, remat=tower.remat, name="encoder")


@flax.struct.dataclass
class CLIPOutput:
    """`image_embeddings` (I D) and `text_embeddings` (J D) are L2-normalised; the softmax of `logits[i]` over the texts says which of them image i has.

    `log_temperature` is the learned scalar, named as in the paper: the logarithm of what similarities are multiplied by, the inverse of a temperature. Leaves may be abstract or stacked, as in any pytree.
    """

    image_embeddings: PyTree
    text_embeddings: PyTree
    log_temperature: PyTree

    @property
    def logits(self) -> Float[Array, "I J"]:
        """Cosine similarity · exp(log_temperature)."""
        return self.image_embeddings @ self.text_embeddings.T * jnp.exp(self.log_temperature)


class CLIP(nn.Module):
    """The two towers with a learned scale of the similarities (from log 1/0.07, section 2.5 of the paper).

    `CLIP.variant("B/32")` is a published size. `apply(variables, images, tokens)` gives a `CLIPOutput`; with `method="embed_images"` or `"embed_texts"` one tower alone is run.
    """

    vision: VisionTower
    text: TextTower

    def setup(self) -> None:
        self.log_temperature = self.param("log_temperature", nn.initializers.constant(math.log(1 / 0.07)), ())

    def __call__(self, images: Float[Array, "I H W C"], tokens: Int[Array, "J T"], *, train: bool = False) -> CLIPOutput:
        images, texts = self.embed_images(images, train=train), self.embed_texts(tokens, train=train)
        return CLIPOutput(images, texts, self.log_temperature)

    def embed_images(self, images: Float[Array, "I H W C"], *, train: bool = False) -> Float[Array, "I D"]:
        return normalize(self.vision(images, train=train))

    def embed_texts(self, tokens: Int[Array, "J T"], *, train: bool = False) -> Float[Array, "J D"]:
        return normalize(self.text(tokens, train=train))

    @classmethod
    def variant(cls, name: str, **changes: Any) -> "CLIP":
        """The published model `name` of `VARIANTS`; `changes` (`attention`, `dtype`, `dropout`, `scan`, `remat`) go to both towers."""
        if name not in VARIANTS:
            raise unknown("CLIP variant", name, VARIANTS)
        row = VARIANTS[name]
        size = lambda width, depth: dict(width=width, depth=depth, num_heads=width // HEAD_WIDTH, mlp_dim=4 * width)
        vision = VisionTower(patch_size=row.patch_size, features=row.features, **size(row.width, row.depth), **changes)
        text = TextTower(VOCABULARY, features=row.features, end=VOCABULARY - 1, **size(row.text_width, row.text_depth), **changes)
        return cls(vision, text)


HEAD_WIDTH = 64
"""Of every head in every published size (Radford et al. 2021, table 20: the heads are the widths divided by it)."""
VOCABULARY = 49_408
"""Byte pairs, a start and, last, an end of text (ibid., table 18)."""
LENGTH = 77
"""Tokens of a text, its start and end included: the context length in OpenAI's code (the paper, section 2.4, says 76)."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published size; head width, feed-forward ratio, vocabulary and text length are the same for all."""

    patch_size: int
    resolution: int
    """Side of an image in pixels."""
    width: int
    depth: int
    features: int
    """Width of the embeddings, into which both towers are projected."""
    text_width: int
    text_depth: int


# Radford et al. 2021, table 20.
VARIANTS = {
    "B/32": Variant(32, 224, 768, 12, 512, 512, 12),
    "B/16": Variant(16, 224, 768, 12, 512, 512, 12),
    "L/14": Variant(14, 224, 1024, 24, 768, 768, 12),
    "L/14@336": Variant(14, 336, 1024, 24, 768, 768, 12),
}

_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu_python": gelu, "gelu": gelu}
"""OpenAI's, and that of models which others have trained."""


def image_processor(size: int | tuple[int, int], **changes: Any) -> ImageProcessor:
    """The processor of the published models: mean and deviation of OpenAI's training images, and the centre of an image whose shorter side is scaled; `changes` are fields.

    The numbers are from github.com/openai/CLIP, clip.py, `_transform`. The crop is transformers': where an odd number of pixels is cut off, it may begin one pixel before that of torchvision, which OpenAI's code calls.
    """
    fields = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), resize_mode="crop")
    return ImageProcessor.symmetric(size, **{**fields, **changes})


_TOWER = dict(num_hidden_layers=depth(12), hidden_act=anything("quick_gelu"), layer_norm_eps=number(1e-5))
_VISION = Settings(
    "CLIP",
    _TOWER
    | dict(hidden_size=count(768), intermediate_size=count(3072), num_attention_heads=count(12))
    | dict(image_size=side(224), patch_size=side(32), num_channels=count(3)),
    unused=("projection_dim", "vocab_size"),
)
"""Of transformers' `CLIPVisionConfig`, which names a width of the embeddings that the whole model decides."""
_TEXT = Settings(
    "CLIP",
    _TOWER
    | dict(hidden_size=count(512), intermediate_size=count(2048), num_attention_heads=count(8))
    | dict(vocab_size=count(VOCABULARY), max_position_embeddings=count(LENGTH), eos_token_id=anything(VOCABULARY - 1)),
    unused=("projection_dim",),
)
"""Of its `CLIPTextConfig`."""
_SETTINGS = Settings(
    "CLIP",
    dict(projection_dim=count(512)),
    unused=("vision_config", "text_config", "vision_config_dict", "text_config_dict", *_VISION.fields, *_TEXT.fields),
)


def from_config(config: dict, **changes: Any) -> tuple[CLIP, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
    """The model that a Hugging Face `config.json` describes, and abstract images and tokens of the sizes it was trained on.

    Fields that are left out have the defaults of transformers' `CLIPVisionConfig` and `CLIPTextConfig`. `changes` (`attention`, `dtype`, `dropout`, `scan`, `remat`) go to both towers. Raises `UserError` for a setting that is not CLIP's.
    """
    features = _SETTINGS.read(config)["projection_dim"]
    vision, text = _section(config, "vision_config", _VISION), _section(config, "text_config", _TEXT)
    end = text["eos_token_id"]
    if type(end) is not int or end < 0:
        raise UserError(f"eos_token_id in text_config is {end!r}: one token ends a text here, a whole number from 0 on")
    module = CLIP(
        VisionTower(features=features, **vision_fields(vision), **_activation(vision, " in vision_config"), **changes),
        TextTower(
            vocab_size=text["vocab_size"],
            features=features,
            # Older files, OpenAI's among them, have a wrong token here, 2, and mean the highest of a row.
            end=None if end == 2 else end,
            **tower_fields(text, " in text_config"),
            **_activation(text, " in text_config"),
            **changes,
        ),
    )
    tokens = jax.ShapeDtypeStruct((1, text["max_position_embeddings"]), jnp.int32)
    return module, (image_shape(vision), tokens)


def to_config(module: CLIP, params: PyTree) -> dict[str, Any]:
    """The `config.json` that `from_config` and transformers read as this module, whose `params` (or their shapes) say how large images and how long texts are. Raises `UserError` for what cannot be said there: towers with embeddings of two widths, other activations, images that are not square, and token 2 as the `end`, which stands for a rule of older files."""
    vision, text, table = module.vision, module.text, params["vision"]["positions"]["table"]
    if vision.features != text.features:
        raise UserError(f"features are {vision.features} and {text.features}: those of both towers have to be equal")
    if text.end == 2:
        raise UserError("end of the text tower is token 2, which a published CLIP cannot say: give the tokenizer another one")
    images = image_settings(vision.patch_size, params["vision"]["patches"]["kernel"], len(table) - 1)
    texts = dict(vocab_size=text.vocab_size, max_position_embeddings=len(params["text"]["positions"]["table"]))
    texts |= dict(eos_token_id=2 if text.end is None else text.end)
    return dict(
        architectures=["CLIPModel"],
        model_type="clip",
        projection_dim=vision.features,
        vision_config=_tower_config(vision) | dict(model_type="clip_vision_model") | images,
        text_config=_tower_config(text) | dict(model_type="clip_text_model") | texts,
    )


def _tower_config(tower: VisionTower | TextTower) -> dict[str, Any]:
    activations = {function: name for name, function in _ACTIVATIONS.items()}
    if tower.activation not in activations:
        raise unknown("activation of a published CLIP", getattr(tower.activation, "__name__", "?"), _ACTIVATIONS)
    return dict(
        hidden_size=tower.width,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.num_heads,
        intermediate_size=tower.mlp_dim,
        hidden_act=activations[tower.activation],
        layer_norm_eps=tower.eps,
        projection_dim=tower.features,
        attention_dropout=0.0,
    )


def _section(config: dict, name: str, settings: Settings) -> dict[str, Any]:
    """The settings of one tower. Older files have them twice, and transformers lets the second one, `…_dict`, decide."""
    part = section(config, f"{name}_dict", section(config, name, {}))
    return settings.read(part, f" in {name}")


def _activation(given: dict[str, Any], where: str) -> dict[str, Any]:
    if given["hidden_act"] not in [*_ACTIVATIONS]:
        raise unknown(f"hidden_act{where}", str(given["hidden_act"]), _ACTIVATIONS)
    return dict(activation=_ACTIVATIONS[given["hidden_act"]])


_BLOCK, _LAYER = r"(vision|text)/encoder/block_(\d+)", r"\1_model.encoder.layers.\2"

ARCHITECTURES = ("CLIPModel",)


def published(module: CLIP) -> Table:
    """The names of transformers' `CLIPModel`, its misspelt `pre_layrnorm` included."""
    return Table(
        {
            "log_temperature": ("logit_scale", scalar()),
            "vision/patches/kernel": ("vision_model.embeddings.patch_embedding.weight", patch_kernel(module.vision.patch_size)),
            "vision/class_token": ("vision_model.embeddings.class_embedding", UNCHANGED),
            "text/tokens/embedding": ("text_model.embeddings.token_embedding.weight", UNCHANGED),
            "(vision|text)/positions/table": (r"\1_model.embeddings.position_embedding.weight", UNCHANGED),
            **norm("vision/norm", "vision_model.pre_layrnorm"),
            **encoder_block(_BLOCK, _LAYER),
            **norm("vision/encoder/norm", "vision_model.post_layernorm"),
            **norm("text/encoder/norm", "text_model.final_layer_norm"),
            **dense("vision/head", "visual_projection"),
            **dense("text/head", "text_projection"),
        },
        optional=r"^clip\.",
        constants=POSITION_IDS,
    )
