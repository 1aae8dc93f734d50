"""PaliGemma: an image, seen by SigLIP's tower, and a question stand before an answer that Gemma writes (Beyer et al. 2024, arXiv:2407.07726; PaliGemma 2: Steiner et al. 2024, arXiv:2412.03555)."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxdl.errors import UserError, unknown
from jaxdl.generate import Decode, Sampling, generate
from jaxdl.models import gemma, siglip
from jaxdl.models.gemma import Gemma
from jaxdl.models.siglip import VisionTower
from jaxdl.nn import Cache
from jaxdl.weights import Table, dense, encoder_block, norm, patch_kernel, unchanged


@flax.struct.dataclass
class PaliGemmaOutput:
    """`logits` (B T V): the token that follows each place. Only those of the answer, and the one before it, have been trained to mean something."""

    logits: PyTree


class PaliGemma(nn.Module):
    """The patches of an image through the vision tower without its head, a linear map to the width of the decoder, and the decoder over patches and tokens (Beyer et al. 2024, section 2).

    Among the tokens, `image_token` keeps the places of the patches, as many as there are of them: a row with another number gives NaN. What the projection puts there is not multiplied by √width, as embeddings of tokens are. The prefix, image and question, is read both ways, the answer causally. Positions count from 1.

    `PaliGemma.variant("3b")` is a published size; `jaxdl.data.paligemma` makes its inputs.
    """

    vision: VisionTower
    text: Gemma
    image_token: int

    def setup(self) -> None:
        self.projection = nn.Dense(self.text.width, dtype=self.text.dtype, kernel_init=nn.initializers.normal(0.02))

    def __call__(
        self, images: Float[Array, "B H W C"], tokens: Int[Array, "B T"], prefix: Int[Array, "B"], *, train: bool = False
    ) -> PaliGemmaOutput:
        """Whole sequences, of which the first `prefix` tokens of each row are image and question, and whose padding is at the end."""
        x = self._embed(images, tokens, train)
        positions = 1 + jnp.arange(tokens.shape[1])[None]
        return PaliGemmaOutput(self.text.logits(self.text(x, prefix, positions=positions, train=train)))

    def empty_cache(self, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
        """For `decode` of up to `slots` tokens, those of the image and padding included. Needs no parameters."""
        return self.text.clone(parent=None).empty_cache(batch, slots, dtype)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        images: Float[Array, "B H W C"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
    ) -> tuple[PaliGemmaOutput, Cache]:
        """First the prefix with its `images`, whole; then the tokens of the answer, any number at a time. `valid` is true for real tokens: prefixes of different lengths are padded on the left. The cache comes with what is known after them."""
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        x = self.text.embed(tokens) if images is None else self._embed(images, tokens, False)
        positions = 1 + cache.positions(valid)
        x, cache = self.text.decode(x, cache, valid=valid, positions=positions, is_causal=images is None)
        return PaliGemmaOutput(self.text.logits(x)), cache

    def _embed(self, images: Float[Array, "B H W C"], tokens: Int[Array, "B T"], train: bool) -> Float[Array, "B T D"]:
        """Vectors of tokens, and those of patches where `image_token` keeps their places, in order."""
        patches = self.projection(self.vision(images, train=train))
        seen = tokens == self.image_token
        x = self.text.embed(jnp.where(seen, 0, tokens))  # Its own vector is not used, and may be beyond the vocabulary.
        patch = jnp.clip(jnp.cumsum(seen, 1) - 1, 0, patches.shape[1] - 1)
        x = jnp.where(seen[..., None], jnp.take_along_axis(patches, patch[..., None], axis=1), x)
        return jnp.where((seen.sum(1) == patches.shape[1])[:, None, None], x, jnp.nan)

    @classmethod
    def variant(cls, name: str, **changes: Any) -> "PaliGemma":
        """The published model `name` of `VARIANTS`; `changes` (`attention`, `dtype`, `dropout`, `remat`) go to tower and decoder."""
        if name not in VARIANTS:
            raise unknown("PaliGemma variant", name, VARIANTS)
        row = VARIANTS[name]
        tower = siglip.SigLIP.variant(row.vision, **changes).vision.clone(head=False)
        return cls(tower, Gemma.variant(row.text, vocabulary=VOCABULARY, **changes), IMAGE_TOKEN)


def answer(
    module: PaliGemma,
    variables: PyTree,
    images: Float[Array, "B H W C"],
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    key: PRNGKeyArray | None = None,
    *,
    steps: int,
    end: int | None = None,
    sampling: Sampling = Sampling(temperature=0),
) -> Int[Array, "B steps"]:
    """What the model writes, in at most `steps` tokens, to rows of image and question whose padding is on the left; where there is an `end`, it is `end` from there on. Greedy, unless there is another way of `sampling`, for which there has to be a `key`.

    To be compiled with its arrays as arguments.
    """
    key = jax.random.key(0) if key is None else key
    cache = module.empty_cache(len(tokens), tokens.shape[1] + steps - 1)
    given = _next_logits(module), (variables, images), tokens, cache, key
    return generate(*given, steps=steps, sampling=sampling, valid=valid, end=end)


@functools.cache
def _next_logits(module: PaliGemma) -> Decode:
    """The same function for the same module, so that the loop is compiled once."""

    def decode(given: PyTree, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"]) -> tuple[Array, Cache]:
        variables, images = given
        asked = tokens.shape[1] > 1  # The question, which is longer than one token since the image is; what is written is not.
        out, cache = module.apply(variables, tokens, cache, images=images if asked else None, valid=valid, method="decode")
        return out.logits, cache

    return decode


VOCABULARY = 257_216
"""Gemma's 256,000 tokens, 1,024 places `<loc....>`, 128 outlines `<seg...>`, `<image>`, and what fills it up to a multiple of 64."""
IMAGE_TOKEN = 257_152


@dataclasses.dataclass(frozen=True)
class Variant:
    """Which of SigLIP's towers and of Gemma's decoders are put together."""

    vision: str
    text: str
    resolutions: tuple[int, ...] = (224, 448, 896)
    """Sides of images in pixels."""


# Beyer et al. 2024, section 2; Steiner et al. 2024, section 3 and table 1.
VARIANTS = {
    "3b": Variant("So400m/14", "2b"),
    "2-3b": Variant("So400m/14", "2-2b"),
    "2-10b": Variant("So400m/14", "2-9b"),
    "2-28b": Variant("So400m/14", "2-27b"),
}

# What transformers' `PaliGemmaConfig` has where a part is left out altogether.
_VISION = dict(hidden_size=1152, intermediate_size=4096, patch_size=14, num_hidden_layers=27, num_attention_heads=16)
_TEXT = dict(
    model_type="gemma", hidden_size=2048, num_hidden_layers=18, intermediate_size=16_384, num_attention_heads=8,
    num_key_value_heads=1, vocab_size=257_152,
)  # fmt: skip


def from_config(
    config: dict, **changes: Any
) -> tuple[PaliGemma, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
    """The model that a Hugging Face `config.json` of type `paligemma` describes, and abstract images, tokens and numbers of prefix tokens.

    Fields that are left out have the defaults of transformers. `changes` (`attention`, `dtype`, `dropout`, `remat`) go to tower and decoder. Raises `UserError` for a setting that is not PaliGemma's.
    """
    vision, text = config.get("vision_config") or _VISION, gemma.fields_of_config(config.get("text_config") or _TEXT)
    patch, side = vision.get("patch_size", 16), vision.get("image_size", 224)
    if not (isinstance(patch, int) and isinstance(side, int)):
        raise UserError(f"images of {side} pixels in patches of {patch} are not read here: both must be the side of a square")
    if (projected := config.get("projection_dim", 2048)) != text["width"]:
        raise UserError(
            f"patches become vectors of {projected} and tokens of {text['width']} (projection_dim): they must be of one width"
        )
    module = PaliGemma(
        VisionTower(patch=patch, head=False, **siglip.tower_fields(vision, "vision_config"), **changes),
        Gemma(**text, **changes),
        config.get("image_token_index", config.get("image_token_id", 256_000)),
    )
    images = jax.ShapeDtypeStruct((1, side, side, vision.get("num_channels", 3)), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, (side // patch) ** 2 + 1), jnp.int32)
    return module, (images, tokens, jax.ShapeDtypeStruct((1,), jnp.int32))


_BLOCK, _LAYER = r"vision/encoder/block_(\d+)", r"vision_tower.encoder.layers.\1"


def PUBLISHED(config: dict) -> Table:
    """The names of transformers' `PaliGemmaForConditionalGeneration`, which are not the same for Gemma 1 and 2."""
    second = (config.get("text_config") or _TEXT).get("model_type") == "gemma2"
    return Table(
        {
            "vision/patches/projection/kernel": ("vision_tower.embeddings.patch_embedding.weight", patch_kernel),
            "vision/patches/projection/bias": ("vision_tower.embeddings.patch_embedding.bias", unchanged),
            "vision/positions/table": ("vision_tower.embeddings.position_embedding.weight", unchanged),
            **encoder_block(_BLOCK, _LAYER),
            **norm("vision/encoder/norm", "vision_tower.post_layernorm"),
            **dense("projection", "multi_modal_projector.linear"),
            **gemma.published_rows("text", "language_model.model", second),
        },
        # The head is the table of embeddings; older files have it twice, or have positions that are counted anyway.
        ignored=r"(language_model\.)?lm_head\.weight|.*\.position_ids",
        optional=r"(?<=^vision_tower\.)vision_model\.",  # The hub's own files have it.
    )
