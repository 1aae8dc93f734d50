"""The encoder-decoder Transformer: a sentence is read as a whole and its translation written token by token (Vaswani et al. 2017).

Published weights are those of Marian (Junczys-Dowmunt et al. 2018), with which Helsinki-NLP's opus-mt models are trained.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdl.errors import UserError, unknown
from jaxdl.generate import Beam, Decode, Sampling, beam_search, generate
from jaxdl.nn import (
    Attention,
    Cache,
    FeedForward,
    LayerNorm,
    Transformer,
    TransformerBlock,
    dot_product_attention,
    gelu,
    gelu_tanh,
    padding_mask,
    segment_mask,
    silu,
    sinusoidal,
)
from jaxdl.nn.transformer import as_rows
from jaxdl.weights import Table, dense, norm, separate_attention, unchanged

ACTIVATIONS = {"relu": jax.nn.relu, "swish": silu, "silu": silu, "gelu": gelu, "gelu_new": gelu_tanh}
"""Of the feed-forwards, by HF's names: the paper has ReLU (eq. 2), opus-mt swish."""


@flax.struct.dataclass
class EncoderDecoderOutput:
    """`logits` (B T V): `logits[b, t]` are those of target token t + 1, given the source and the target up to t."""

    logits: PyTree


@dataclasses.dataclass(frozen=True)
class Stack:
    """The sizes of an encoder or a decoder; the defaults are the paper's base model (table 3)."""

    depth: int = 6
    num_heads: int = 8
    hidden: int = 2048


class EncoderDecoder(nn.Module):
    """An encoder, and a decoder that attends to what it has made of the source. One table embeds the tokens of both languages and gives the logits (section 3.4).

    - Embeddings are multiplied by `√width` with `scale_embedding`, since they start `√width` times smaller than the positions that are added to them.
    - `norm_first` is False in the paper (post-norm), which needs a warm-up of the learning rate.
    - `interleaved` positions are the paper's; Marian has all sines before all cosines. `length` is how many there are.
    - `pad` fills up sources and is not looked at; `start` is what a target begins with, in Marian `pad` itself.
    - `logits_bias` adds a learned bias to the logits, as Marian can.

    `EncoderDecoder.variant("base")` has the paper's sizes. `scan` and `remat` are those of `Transformer`.
    """

    vocabulary: int
    width: int = 512
    encoder_stack: Stack = Stack()
    decoder_stack: Stack = Stack()
    length: int = 512
    pad: int = 0
    start: int = 0
    activation: str = "relu"
    norm_first: bool = False
    scale_embedding: bool = True
    interleaved: bool = True
    logits_bias: bool = False
    attention: Attention = dot_product_attention
    eps: float = 1e-5
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        self.tokens = nn.Embed(
            self.vocabulary, self.width, embedding_init=nn.initializers.normal(self.width**-0.5), dtype=self.dtype
        )
        if self.logits_bias:
            self.bias = self.param("logits_bias", nn.initializers.zeros, (self.vocabulary,))
        self.drop = nn.Dropout(self.dropout)
        self.encoder = self._stack(self.encoder_stack)
        self.decoder = self._stack(self.decoder_stack, decodes=True)

    def _stack(self, sizes: Stack, *, decodes: bool = False, **options: Any) -> Transformer:
        block = TransformerBlock(
            sizes.num_heads,
            sizes.hidden,
            self.attention,
            feed_forward_layer=functools.partial(FeedForward, activation=ACTIVATIONS[self.activation]),
            norm=functools.partial(LayerNorm, self.eps),
            norm_first=self.norm_first,
            is_causal=decodes,
            cross_attention=decodes,
            dropout=self.dropout,
            dtype=self.dtype,
            parent=None,
        )
        return Transformer(sizes.depth, block, scan=self.scan, remat=self.remat, **options)

    def __call__(
        self,
        source: Int[Array, "B S"],
        target: Int[Array, "B T"],
        *,
        source_segments: Int[Array, "B S"] | None = None,
        target_segments: Int[Array, "B T"] | None = None,
        train: bool = False,
    ) -> EncoderDecoderOutput:
        """Teacher forcing: `target` is what is written so far, from `start` on and without its last token, so that all its next tokens are predicted at once.

        Sources are padded with `pad`; how a target is padded does not matter, since nothing looks ahead. Several pairs packed into a row (Krell et al. 2021) are told apart by segments 1, 2 …, in source and target the same, 0 where there is nothing. Raises `UserError` for more tokens than positions, and if only one side has segments.
        """
        if (source_segments is None) != (target_segments is None):
            raise UserError("give the segments of both source and target, or of neither")
        memory = self.encode(source, segments=source_segments, train=train)
        if source_segments is None or target_segments is None:
            mask, memory_mask, places = None, padding_mask(source != self.pad), self._places(target)
        else:
            mask, memory_mask = segment_mask(target_segments), segment_mask(target_segments, source_segments)
            places = segment_positions(target_segments)
        x = self._embed(target, places, train)
        x = self.decoder(x, memory, mask=mask, memory_mask=memory_mask, train=train)
        return EncoderDecoderOutput(self._logits(x))

    def encode(
        self, source: Int[Array, "B S"], *, segments: Int[Array, "B S"] | None = None, train: bool = False
    ) -> Float[Array, "B S D"]:
        """What the encoder makes of each source token."""
        if segments is None:
            mask, places = padding_mask(source != self.pad), self._places(source)
        else:
            mask, places = segment_mask(segments), segment_positions(segments)
        return self.encoder(self._embed(source, places, train), mask=mask, train=train)

    def remember(self, source: Int[Array, "B S"]) -> Cache:
        """The encoded sources as keys and values for `decode`, computed once."""
        return self.decoder.remember(self.encode(source), source != self.pad)

    def empty_cache(self, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
        """For `decode` of up to `slots` target tokens. Needs no parameters. Raises `UserError` if there are not so many positions."""
        if slots > self.length:
            raise UserError(f"{slots} tokens are more than the {self.length} positions that there are: ask for fewer")
        return self._stack(self.decoder_stack, decodes=True, parent=None).empty_cache(
            batch, slots, self.width, dtype or self.dtype
        )

    def decode(
        self, target: Int[Array, "B T"], cache: Cache, memory: Cache, *, valid: Bool[Array, "B T"] | None = None
    ) -> tuple[EncoderDecoderOutput, Cache]:
        """The next `T` target tokens, the first of all being `start`, and the cache with them; `memory` is that of `remember`."""
        valid = jnp.ones(target.shape, bool) if valid is None else valid
        places = jnp.clip(cache.positions(valid), 0, self.length - 1)
        x, cache = self.decoder.decode(self._embed(target, places, False), cache, memory, valid=valid)
        return EncoderDecoderOutput(self._logits(x)), cache

    def _places(self, tokens: Int[Array, "B T"]) -> Int[Array, "1 T"]:
        return jnp.arange(tokens.shape[1])[None]

    def _embed(self, tokens: Int[Array, "B T"], places: Int[Array, "#B T"], train: bool) -> Float[Array, "B T D"]:
        """In the wider of both types, float32: that of the residual stream."""
        if tokens.shape[1] > self.length:
            raise UserError(f"{tokens.shape[1]} tokens are more than the {self.length} positions that there are: give fewer")
        scale = self.width**0.5 if self.scale_embedding else 1.0
        positions = sinusoidal(self.length, self.width, interleaved=self.interleaved)[places]
        return self.drop(self.tokens(tokens) * scale + positions, deterministic=not train)

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits = self.tokens.attend(as_rows(x)).reshape(*x.shape[:-1], -1)
        return logits + self.bias if self.logits_bias else logits

    @classmethod
    def variant(cls, name: str, vocabulary: int, **changes: Any) -> "EncoderDecoder":
        """The model `name` of `VARIANTS`; `changes` are fields."""
        if name not in VARIANTS:
            raise unknown("variant", name, VARIANTS)
        return cls(vocabulary, **(VARIANTS[name] | changes))


# Vaswani et al. 2017, table 3.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": dict(width=512, encoder_stack=Stack(6, 8, 2048), decoder_stack=Stack(6, 8, 2048), dropout=0.1),
    "big": dict(width=1024, encoder_stack=Stack(6, 16, 4096), decoder_stack=Stack(6, 16, 4096), dropout=0.3),
}


def segment_positions(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of each token within its segment, from 0."""
    places = jnp.arange(segments.shape[1])
    begins = jnp.diff(segments, axis=1, prepend=-1) != 0
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def translate(
    module: EncoderDecoder,
    variables: PyTree,
    source: Int[Array, "B S"],
    *,
    steps: int,
    end: int,
    beam: Beam | None = Beam(),
) -> Int[Array, "B steps"]:
    """The best translation of each source that the search finds, in at most `steps` tokens; `end` from its end on. Without a beam the likeliest token is taken at each step (greedy).

    To be compiled with its arrays as arguments. Padding is never written. Raises `UserError` if there are not so many positions.
    """
    width = 1 if beam is None else beam.width
    rows_axis = int(module.scan)
    memory = module.apply(variables, source, method="remember")
    memory = memory.replace(
        entries=jax.tree.map(lambda entry: jnp.repeat(entry, width, axis=rows_axis), memory.entries),
        valid=jnp.repeat(memory.valid, width, axis=0),
    )
    prompt = jnp.full((len(source), 1), module.start, jnp.int32)
    cache = module.empty_cache(len(source) * width, steps)
    given = _next_logits(module), (variables, memory), prompt, cache
    if beam is None:
        greedy = Sampling(temperature=0, barred=(module.pad,))
        return generate(*given, jax.random.key(0), steps=steps, sampling=greedy, end=end)
    beam = dataclasses.replace(beam, barred=(*beam.barred, module.pad))
    written, _ = beam_search(*given, steps=steps, end=end, beam=beam, rows_axis=rows_axis)
    return written[:, 0]


@functools.cache
def _next_logits(module: EncoderDecoder) -> Decode:
    """The same function for the same module, so that the search is compiled once."""

    def decode(given: PyTree, target: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"]) -> tuple[Array, Cache]:
        variables, memory = given
        out, cache = module.apply(variables, target, cache, memory, valid=valid, method="decode")
        return out.logits, cache

    return decode


def from_config(config: dict, **changes: Any) -> tuple[EncoderDecoder, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
    """The model that a Hugging Face `config.json` of type `marian` describes, and abstract source and target tokens.

    Fields that are left out have the defaults of transformers' `MarianConfig`. Raises `UserError` for a setting that is not read here: separate vocabularies or embeddings, pre-norm, a learned table of positions.
    """
    only = dict(
        share_encoder_decoder_embeddings=True, tie_word_embeddings=True, normalize_before=False, normalize_embedding=False,
        add_final_layer_norm=False, static_position_embeddings=True, add_bias_logits=False,
    )  # fmt: skip
    for field, wanted in only.items():
        if (given := config.get(field, wanted)) != wanted:
            raise UserError(f"{field} is {given!r}: published Marian models have {wanted!r}, and nothing else is read here")
    vocabulary, width = config.get("vocab_size", 58_101), config.get("d_model", 1024)
    if (other := config.get("decoder_vocab_size") or vocabulary) != vocabulary:
        raise UserError(f"decoder_vocab_size is {other} and vocab_size {vocabulary}: only a shared vocabulary is read here")
    stacks = {}
    for name in ("encoder", "decoder"):
        sizes = config.get(f"{name}_layers", 12), config.get(f"{name}_attention_heads", 16), config.get(f"{name}_ffn_dim", 4096)
        stacks[f"{name}_stack"] = Stack(*sizes)
        if width % sizes[1]:
            raise UserError(f"d_model of {width} cannot be split into {sizes[1]} heads ({name}_attention_heads)")
    activation = config.get("activation_function", "gelu")
    if activation not in ACTIVATIONS:
        raise unknown("activation_function", activation, ACTIVATIONS)
    module = EncoderDecoder(
        vocabulary,
        width,
        **stacks,
        length=config.get("max_position_embeddings", 1024),
        pad=config.get("pad_token_id", 58_100),
        start=config.get("decoder_start_token_id", 58_100),
        activation=activation,
        scale_embedding=config.get("scale_embedding", False),
        interleaved=False,
        logits_bias=True,
        **changes,
    )
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return module, (tokens, tokens)


def _stack(name: str, *, cross: bool) -> dict:
    block, layer = rf"{name}/block_(\d+)", rf"{name}.layers.\1"
    rows = {
        **separate_attention(f"{block}/attention", f"{layer}.self_attn"),
        **norm(f"{block}/attention_norm", f"{layer}.self_attn_layer_norm"),
        **dense(f"{block}/feed_forward/expand", f"{layer}.fc1"),
        **dense(f"{block}/feed_forward/contract", f"{layer}.fc2"),
        **norm(f"{block}/feed_forward_norm", f"{layer}.final_layer_norm"),
    }
    if cross:
        rows |= separate_attention(f"{block}/cross_attention", f"{layer}.encoder_attn")
        rows |= norm(f"{block}/cross_attention_norm", f"{layer}.encoder_attn_layer_norm")
    return rows


# The names of transformers' `MarianMTModel`.
PUBLISHED = Table(
    {
        "tokens/embedding": ("shared.weight", unchanged),
        "logits_bias": ("final_logits_bias", np.ravel),
        **_stack("encoder", cross=False),
        **_stack("decoder", cross=True),
    },
    # Copies of the one table, and positions, which are computed.
    ignored=r"lm_head\.weight|(en|de)coder\.embed_(tokens|positions)\.weight",
    optional=r"^model\.",
)
