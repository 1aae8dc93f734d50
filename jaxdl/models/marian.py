"""The encoder-decoder Transformer: a sentence is read as a whole and its translation written token by token (Vaswani et al. 2017).

Published weights are those of Marian (Junczys-Dowmunt et al. 2018), with which Helsinki-NLP's opus-mt models are trained.
"""

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
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdl.data.text import Tokenizer
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
    known_tokens,
    padding_mask,
    segment_mask,
    silu,
    sinusoidal,
)
from jaxdl.nn.transformer import as_rows
from jaxdl.settings import Settings, anything, count, depth, fixed, flag, optional, refuse_uneven
from jaxdl.weights import BATCHED, UNCHANGED, ZERO, Constant, Rows, Table, dense, norm, reordered, separate_attention

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
    mlp_dim: int = 2048


class EncoderDecoder(nn.Module):
    """An encoder, and a decoder that attends to its output. One embedding table is shared by both languages and the logits (section 3.4).

    - Embeddings are multiplied by `√width` with `scale_embedding`, since they start `√width` times smaller than the positions that are added to them.
    - `norm_first` is False in the paper (post-norm), which needs a warm-up of the learning rate.
    - `interleaved` positions are the paper's; Marian has all sines before all cosines. `length` is how many there are.
    - `pad` pads sources and is masked; `start` begins a target, in Marian `pad` itself.
    - `logits_bias` adds a learned bias to the logits, as Marian can.

    `EncoderDecoder.variant("base")` has the paper's sizes. `scan` and `remat` are those of `Transformer`.
    """

    vocab_size: int
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
            self.vocab_size, self.width, embedding_init=nn.initializers.normal(self.width**-0.5), dtype=self.dtype
        )
        if self.logits_bias:
            self.bias = self.param("logits_bias", nn.initializers.zeros, (self.vocab_size,))
        self.drop = nn.Dropout(self.dropout)
        self.encoder = self._stack(self.encoder_stack)
        self.decoder = self._stack(self.decoder_stack, decodes=True)

    def _stack(self, sizes: Stack, *, decodes: bool = False, **options: Any) -> Transformer:
        block = TransformerBlock(
            sizes.num_heads,
            sizes.mlp_dim,
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
        x = self._embed(known_tokens(target, self.vocab_size), places, train)
        x = self.decoder(x, memory, mask=mask, memory_mask=memory_mask, train=train)
        return EncoderDecoderOutput(self._logits(x))

    def encode(
        self, source: Int[Array, "B S"], *, segments: Int[Array, "B S"] | None = None, train: bool = False
    ) -> Float[Array, "B S D"]:
        """The encoder's output for each source token."""
        if segments is None:
            mask, places = padding_mask(source != self.pad), self._places(source)
        else:
            mask, places = segment_mask(segments), segment_positions(segments)
        real = source != self.pad if segments is None else segments != 0
        return self.encoder(self._embed(known_tokens(source, self.vocab_size, real), places, train), mask=mask, train=train)

    def cache_memory(self, source: Int[Array, "B S"]) -> Cache:
        """Encodes sources and projects them to keys and values for `decode`, once."""
        return self.decoder.cache_memory(self.encode(source), source != self.pad)

    def empty_cache(self, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for `decode` of up to `slots` target tokens. Needs no parameters. Raises `UserError` for more slots than positions."""
        if slots > self.length:
            raise UserError(f"{slots} tokens are more than the {self.length} positions that there are: ask for fewer")
        return self._stack(self.decoder_stack, decodes=True, parent=None).empty_cache(
            batch, slots, self.width, dtype or self.dtype
        )

    def decode(
        self, target: Int[Array, "B T"], cache: Cache, memory: Cache, *, valid: Bool[Array, "B T"] | None = None
    ) -> tuple[EncoderDecoderOutput, Cache]:
        """Decodes the next `T` target tokens, the very first being `start`, and returns the extended cache; `memory` is from `cache_memory`."""
        valid = jnp.ones(target.shape, bool) if valid is None else valid
        places = jnp.clip(cache.positions(valid), 0, self.length - 1)
        target = known_tokens(target, self.vocab_size, valid)
        x, cache = self.decoder.decode(self._embed(target, places, False), cache, memory, valid=valid)
        return EncoderDecoderOutput(self._logits(x)), cache

    def _places(self, tokens: Int[Array, "B T"]) -> Int[Array, "1 T"]:
        return jnp.arange(tokens.shape[1])[None]

    def _embed(self, tokens: Int[Array, "B T"], places: Int[Array, "#B T"], train: bool) -> Float[Array, "B T D"]:
        """Token plus position embeddings in float32, the dtype of the residual stream."""
        if tokens.shape[1] > self.length:
            raise UserError(f"{tokens.shape[1]} tokens are more than the {self.length} positions that there are: give fewer")
        scale = self.width**0.5 if self.scale_embedding else 1.0
        positions = sinusoidal(self.length, self.width, interleaved=self.interleaved)[places]
        return self.drop(self.tokens(tokens) * scale + positions, deterministic=not train)

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits = self.tokens.attend(as_rows(x)).reshape(*x.shape[:-1], -1)
        return logits + self.bias if self.logits_bias else logits

    @classmethod
    def variant(cls, name: str, vocab_size: int, **changes: Any) -> "EncoderDecoder":
        """The model `name` of `VARIANTS`; `changes` are fields."""
        if name not in VARIANTS:
            raise unknown("variant", name, VARIANTS)
        return cls(vocab_size, **(VARIANTS[name] | changes))


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
    end: int | Sequence[int],
    beam: Beam | None = Beam(),
) -> Int[Array, "B steps"]:
    """The best translation of each source by beam search, in at most `steps` tokens, filled with `end`, the first of several. Without a beam it is greedy.

    Call it under `jit`, with its arrays as arguments. Padding is never generated. Raises `UserError` for more steps than positions.
    """
    width = 1 if beam is None else beam.width
    rows_axis = int(module.scan)
    memory = module.apply(variables, source, method="cache_memory")
    memory = memory.replace(
        entries=jax.tree.map(lambda entry: jnp.repeat(entry, width, axis=rows_axis), memory.entries),
        valid=jnp.repeat(memory.valid, width, axis=0),
    )
    prompt = jnp.full((len(source), 1), module.start, jnp.int32)
    cache = module.empty_cache(len(source) * width, steps)
    given = _next_logits(module), (variables, memory), prompt, cache
    if beam is None:
        greedy = Sampling(temperature=0, suppressed_tokens=(module.pad,))
        return generate(*given, jax.random.key(0), steps=steps, sampling=greedy, end=end)
    beam = dataclasses.replace(beam, suppressed_tokens=(*beam.suppressed_tokens, module.pad))
    written, _ = beam_search(*given, steps=steps, end=end, beam=beam, rows_axis=rows_axis)
    return written[:, 0]


@functools.cache
def _next_logits(module: EncoderDecoder) -> Decode:
    """Cached, so that the search gets the same function and compiles once for a module."""

    def decode(given: PyTree, target: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"]) -> tuple[Array, Cache]:
        variables, memory = given
        out, cache = module.apply(variables, target, cache, memory, valid=valid, method="decode")
        return out.logits, cache

    return decode


_SAME = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_python_tanh": "gelu_new", "gelu_python": "gelu"}
"""Other names in transformers of the activations above."""

_SETTINGS = Settings(
    "Marian",
    dict(
        vocab_size=count(58_101),
        decoder_vocab_size=optional(count(None, least=0)),
        d_model=count(1024),
        encoder_layers=depth(12),
        decoder_layers=depth(12),
        encoder_attention_heads=count(16),
        decoder_attention_heads=count(16),
        encoder_ffn_dim=count(4096),
        decoder_ffn_dim=count(4096),
        max_position_embeddings=count(1024),
        pad_token_id=count(58_100, least=0),
        decoder_start_token_id=count(58_100, least=0),
        activation_function=anything("gelu"),
        scale_embedding=flag(False),
        share_encoder_decoder_embeddings=fixed(True),
        tie_word_embeddings=fixed(True),
        # What the first files had, and transformers reads no more.
        normalize_before=fixed(False),
        normalize_embedding=fixed(False),
        add_final_layer_norm=fixed(False),
        static_position_embeddings=fixed(True),
        add_bias_logits=fixed(False),
        do_blenderbot_90_layernorm=fixed(False),
        # Ours.
        interleaved_positions=flag(False),
        logits_bias=flag(True),
    ),
    aliases=dict(num_attention_heads="encoder_attention_heads", hidden_size="d_model", num_hidden_layers="encoder_layers"),
    unused=("extra_pos_embeddings", "force_bos_token_to_be_generated", "save_step"),
)
"""Of transformers' `MarianConfig`."""


def from_config(config: dict, **changes: Any) -> tuple[EncoderDecoder, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
    """The model that a Hugging Face `config.json` of type `marian` describes, and abstract source and target tokens.

    Fields that are left out have the defaults of transformers' `MarianConfig`. Two that only `to_config` writes are the `logits_bias`, unless it is there, and `interleaved_positions`, see `published`. Raises `UserError` for a setting that is not read here: separate vocabularies or embeddings, pre-norm, a learned table of positions.
    """
    given = _SETTINGS.read(config)
    vocab_size, width, activation = given["vocab_size"], given["d_model"], given["activation_function"]
    if (other := given["decoder_vocab_size"] or vocab_size) != vocab_size:
        raise UserError(f"decoder_vocab_size is {other} and vocab_size {vocab_size}: only a shared vocabulary is read here")
    stacks = {}
    for name in ("encoder", "decoder"):
        refuse_uneven(given, "d_model", f"{name}_attention_heads")
        stacks[f"{name}_stack"] = Stack(*(given[f"{name}_{size}"] for size in ("layers", "attention_heads", "ffn_dim")))
    if activation not in [*ACTIVATIONS, *_SAME]:
        raise unknown("activation_function", str(activation), ACTIVATIONS)
    module = EncoderDecoder(
        vocab_size,
        width,
        **stacks,
        length=given["max_position_embeddings"],
        pad=given["pad_token_id"],
        start=given["decoder_start_token_id"],
        activation=_SAME.get(activation, activation),
        scale_embedding=given["scale_embedding"],
        interleaved=given["interleaved_positions"],
        logits_bias=given["logits_bias"],
        **changes,
    )
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return module, (tokens, tokens)


def to_config(module: EncoderDecoder, params: PyTree) -> dict[str, Any]:
    """The `config.json` that `from_config` and transformers read as this module. Which token ends a text is left open. Raises `UserError` for what transformers' Marian has not: `norm_first`, and another `eps` than 1e-5."""
    for field, only in (("norm_first", False), ("eps", 1e-5)):
        if (given := getattr(module, field)) != only:
            raise UserError(f"{field} is {given!r}: a published Marian model has {only!r}, and no other can be written")
    stacks = {"encoder": module.encoder_stack, "decoder": module.decoder_stack}
    sizes = {f"{name}_layers": sizes.depth for name, sizes in stacks.items()}
    sizes |= {f"{name}_attention_heads": sizes.num_heads for name, sizes in stacks.items()}
    sizes |= {f"{name}_ffn_dim": sizes.mlp_dim for name, sizes in stacks.items()}
    return dict(
        architectures=["MarianMTModel"],
        model_type="marian",
        vocab_size=module.vocab_size,
        decoder_vocab_size=module.vocab_size,
        d_model=module.width,
        max_position_embeddings=module.length,
        pad_token_id=module.pad,
        decoder_start_token_id=module.start,
        eos_token_id=None,
        forced_eos_token_id=None,
        activation_function=module.activation,
        scale_embedding=module.scale_embedding,
        dropout=module.dropout,
        attention_dropout=0.0,
        activation_dropout=0.0,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
        static_position_embeddings=True,
        **sizes,
        **({} if module.logits_bias else dict(logits_bias=False)),
        **(dict(interleaved_positions=True) if module.interleaved else {}),
    )


def load_texts(directory: str | os.PathLike) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers of source and target. Raises `UserError` as `Tokenizer.load_pair` does."""
    return Tokenizer.load_pair(directory)


ARCHITECTURES = ("MarianMTModel",)


def published(module: EncoderDecoder) -> Table:
    """The names of transformers' `MarianMTModel`.

    There all sines come before all cosines. A model with `interleaved` positions is the same function with its channels in another order, and is published in that order: every map into and out of the residual stream has them so.
    """
    rows = {"tokens/embedding": ("model.shared.weight", UNCHANGED), "logits_bias": ("final_logits_bias", BATCHED)}
    rows |= _stack("encoder", cross=False) | _stack("decoder", cross=True)
    if module.interleaved:
        order = [*range(0, module.width, 2), *range(1, module.width, 2)]
        axes = {path: _stream_axis(path) for path in rows}
        rows = {
            path: (name, form if axes[path] is None else reordered(order, axes[path], form))
            for path, (name, form) in rows.items()
        }
    places = Constant("sines and cosines", functools.partial(_are_sinusoids, (module.length, module.width)))
    constants = {r"(en|de)coder\.embed_positions\.weight": places}
    if not module.logits_bias:
        constants |= {"final_logits_bias": ZERO}  # Transformers keeps zeros for a bias that is not there.
    return Table(
        rows,
        optional=r"^model\.",
        copies={r"lm_head\.weight|(en|de)coder\.embed_tokens\.weight": "model.shared.weight"},
        constants=constants,
        zero="final_logits_bias",
    )


def _are_sinusoids(shape: tuple[int, int], tensor: np.ndarray) -> bool:
    """Whether a stored table of positions is that which is computed, all sines first, to what its type can hold."""
    if tensor.shape != shape:
        return False
    wanted = np.asarray(sinusoidal(*shape, interleaved=False))
    # The angle of the last place is rounded to 32 bits here.
    tolerance = max(2 * float(jnp.finfo(tensor.dtype).eps), shape[0] * 2e-7)
    return bool(np.abs(tensor.astype(np.float64) - wanted).max() <= tolerance)


def _stream_axis(path: str) -> int | None:
    """Which axis of a parameter is the residual stream, of the last in `path` if there is any."""
    if path.endswith(("query/kernel", "key/kernel", "value/kernel", "expand/kernel")):
        return 0
    return None if path.endswith(("query/bias", "key/bias", "value/bias", "expand/bias", "logits_bias")) else -1


def _stack(name: str, *, cross: bool) -> Rows:
    block, layer = rf"{name}/block_(\d+)", rf"model.{name}.layers.\1"
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
