"""PaliGemma: Gemma answers a question about an image, which SigLIP's tower encodes (Beyer et al. 2024, arXiv:2407.07726; PaliGemma 2: Steiner et al. 2024, arXiv:2412.03555)."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxdl.data.location_tokens import WORDS
from jaxdl.data.prompts import PromptProcessor
from jaxdl.errors import UserError, unknown
from jaxdl.generate import Decode, Sampling, generate
from jaxdl.models import gemma, siglip
from jaxdl.models.gemma import Gemma
from jaxdl.models.siglip import VisionTower
from jaxdl.nn import Cache, known_tokens
from jaxdl.settings import Settings, count, fixed, section
from jaxdl.weights import Table, dense, image_settings


@flax.struct.dataclass
class PaliGemmaOutput:
    """`logits` (B T V) of the token after each position. Only those at the answer, and at the position before it, are trained."""

    logits: PyTree


class PaliGemma(nn.Module):
    """The patches of an image through the vision tower without its head, a linear map to the width of the decoder, and the decoder over patches and tokens (Beyer et al. 2024, section 2).

    `image_token` marks the positions of the patches among the tokens, one for each. Projected patches are not multiplied by √width as token embeddings are. Attention is bidirectional over the prefix (image and question) and causal over the answer. Positions count from 1.

    `PaliGemma.variant("3b")` is a published size; `jaxdl.data.prompts` makes its inputs.
    """

    vision: VisionTower
    text: Gemma
    image_token: int

    def setup(self) -> None:
        self.projection = nn.Dense(self.text.width, dtype=self.text.dtype, kernel_init=nn.initializers.normal(0.02))

    def __call__(
        self, images: Float[Array, "B H W C"], tokens: Int[Array, "B T"], prefix: Int[Array, "B"], *, train: bool = False
    ) -> PaliGemmaOutput:
        """Logits for full sequences; the first `prefix` tokens of each row are image and question, and padding is at the end."""
        x = self._embed(images, tokens, train)
        positions = 1 + jnp.arange(tokens.shape[1])[None]
        return PaliGemmaOutput(self.text.logits(self.text(x, prefix, positions=positions, train=train)))

    def empty_cache(self, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for `decode` of up to `slots` tokens, those of the image and padding included. Needs no parameters."""
        return self.text.clone(parent=None).empty_cache(batch, slots, dtype)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        images: Float[Array, "B H W C"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
    ) -> tuple[PaliGemmaOutput, Cache]:
        """Decodes the whole prefix, with its `images`, or the next tokens of the answer, any number at a time, and returns the extended cache. `valid` is true for real tokens: prefixes of different lengths are padded on the left."""
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        if images is None:
            x = self.text.embed(known_tokens(tokens, self.text.vocab_size, valid))
        else:
            x = self._embed(images, tokens, False, valid)
        positions = 1 + cache.positions(valid)
        x, cache = self.text.decode(x, cache, valid=valid, positions=positions, is_causal=images is None)
        return PaliGemmaOutput(self.text.logits(x)), cache

    def _embed(
        self, images: Float[Array, "B H W C"], tokens: Int[Array, "B T"], train: bool, valid: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Token embeddings, with those of the patches, in order, at the positions of `image_token`. Raises `UserError` where those are not as many, which under `jit` is not known and gives NaN."""
        patches = self.projection(self.vision(images, train=train))
        check_image_tokens(tokens, self.image_token, patches.shape[1])
        seen = tokens == self.image_token
        text = ~seen if valid is None else valid & ~seen
        x = self.text.embed(
            known_tokens(tokens, self.text.vocab_size, text)
        )  # Its own vector is not used, and may be beyond the vocabulary.
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
        return cls(tower, Gemma.variant(row.text, vocab_size=VOCABULARY, **changes), IMAGE_TOKEN)


def check_image_tokens(tokens: Int[Array, "B T"], image_token: int, patches: int) -> None:
    """Raises `UserError` where a row has other than a token for each patch of its image, if tokens are known."""
    if isinstance(tokens, jax.core.Tracer):
        return
    for row, given in enumerate((np.asarray(tokens) == image_token).sum(1)):
        if given != patches:
            raise UserError(
                f"row {row} has {given} tokens of an image (id {image_token}), and the image has {patches} patches: use a PromptProcessor of {patches} image tokens"
            )


def answer(
    module: PaliGemma,
    variables: PyTree,
    images: Float[Array, "B H W C"],
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    key: PRNGKeyArray | None = None,
    *,
    steps: int,
    end: int | Sequence[int] | None = None,
    sampling: Sampling = Sampling(temperature=0),
) -> Int[Array, "B steps"]:
    """Generates the answers to rows of image and question, padded on the left, in at most `steps` tokens, filled with `end`. Greedy by default; other `sampling` needs a `key`.

    Call it under `jit`, with its arrays as arguments. Raises `UserError` as `generate` does, and where a row has other than a token for each patch.
    """
    key = jax.random.key(0) if key is None else key
    side = module.vision.patch_size
    check_image_tokens(tokens, module.image_token, (images.shape[1] // side) * (images.shape[2] // side))
    cache = module.empty_cache(len(tokens), tokens.shape[1] + max(steps, 1) - 1)
    given = _next_logits(module), (variables, images), tokens, cache, key
    return generate(*given, steps=steps, sampling=sampling, valid=valid, end=end)


@functools.cache
def _next_logits(module: PaliGemma) -> Decode:
    """Cached, so that `generate` gets the same function and compiles once for a module."""

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
    """The SigLIP tower and the Gemma decoder of a published model."""

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


_SETTINGS = Settings(
    "PaliGemma",
    dict(projection_dim=count(2048), image_token_index=count(256_000, least=0), tie_word_embeddings=fixed(True)),
    aliases=dict(image_token_id="image_token_index"),
    # Those of the parts are read there.
    unused=("vision_config", "text_config", "num_image_tokens", *siglip.VISION.fields, *gemma.SETTINGS["gemma2"].fields),
)
"""Of transformers' `PaliGemmaConfig`."""


def from_config(
    config: dict, **changes: Any
) -> tuple[PaliGemma, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
    """The model that a Hugging Face `config.json` of type `paligemma` describes, and abstract images, tokens and numbers of prefix tokens.

    Fields that are left out have the defaults of transformers. `changes` (`attention`, `dtype`, `dropout`, `remat`) go to tower and decoder. Raises `UserError` for a setting that is not PaliGemma's.
    """
    given = _SETTINGS.read(config)
    text = gemma.fields_of_config(section(config, "text_config", _TEXT))
    vision = section(config, "vision_config", _VISION)
    if (kind := vision.get("model_type", "siglip_vision_model")) != "siglip_vision_model":
        raise UserError(f"a vision tower of type {kind!r} (model_type in vision_config): siglip_vision_model is read here")
    vision = siglip.VISION.read(vision, " in vision_config")
    if (projected := given["projection_dim"]) != text["width"]:
        raise UserError(
            f"patches become vectors of {projected} and tokens of {text['width']} (projection_dim, hidden_size in text_config): they must be of one width"
        )
    module = PaliGemma(
        VisionTower(head=False, **siglip.vision_fields(vision), **changes),
        Gemma(**text, **changes),
        given["image_token_index"],
    )
    images = siglip.image_shape(vision)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    tokens = jax.ShapeDtypeStruct((1, patches + 1), jnp.int32)
    return module, (images, tokens, jax.ShapeDtypeStruct((1,), jnp.int32))


def to_config(module: PaliGemma, params: PyTree) -> dict[str, Any]:
    """The `config.json` that `from_config` and transformers read as this module, whose `params` (or their shapes) say how large images are. Raises `UserError` for a vision tower with a head, a decoder that is neither Gemma 1 nor 2, and for images that are not square."""
    if module.vision.head:
        raise UserError("head of the vision tower is True: a published PaliGemma has a tower without one")
    kernel, places = params["vision"]["patches"]["projection"]["kernel"], len(params["vision"]["positions"]["table"])
    vision = siglip.tower_config(module.vision) | image_settings(module.vision.patch_size, kernel, places)
    vision |= dict(projection_dim=module.text.width, vision_use_head=False)
    return dict(
        architectures=["PaliGemmaForConditionalGeneration"],
        model_type="paligemma",
        vision_config=vision,
        text_config=gemma.to_config(module.text) | dict(num_image_tokens=places),
        hidden_size=module.text.width,
        projection_dim=module.text.width,
        image_token_index=module.image_token,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def preprocessor_fields(module: PaliGemma, params: PyTree) -> dict[str, Any]:
    """What transformers' `PaliGemmaProcessor` asks of `preprocessor_config.json`: how many tokens an image has."""
    return dict(processor_class="PaliGemmaProcessor", image_seq_length=len(params["vision"]["positions"]["table"]))


def load_texts(directory: str | os.PathLike) -> PromptProcessor:
    """Its texts are questions and answers, which may name places by words. Raises `UserError` as `PromptProcessor.from_pretrained` does."""
    return PromptProcessor.from_pretrained(directory, words=WORDS)


ARCHITECTURES = ("PaliGemmaForConditionalGeneration",)


def published(module: PaliGemma) -> Table:
    """The names of transformers' `PaliGemmaForConditionalGeneration`, which are not the same for Gemma 1 and 2."""
    return Table(
        {
            **siglip.vision_rows("vision", "vision_tower.vision_model", module.vision),
            **dense("projection", "multi_modal_projector.linear"),
            **gemma.published_rows("text", "language_model.model", module.text.sandwich_norm),
        },
        # What pools the patches is not used.
        ignored=r"vision_tower\.head\..*",
        # The hub's files have `vision_tower.vision_model` and `language_model.model`, memory since transformers 4.52 has
        # `model.vision_tower` and `model.language_model`, and what it saves is a mixture.
        optional=r"^model\.|(?<=vision_tower\.)vision_model\.|(?<=language_model\.)model\.",
        copies={r"(language_model\.)?lm_head\.weight": "language_model.model.embed_tokens.weight"},
        constants=siglip.POSITION_IDS,
    )
