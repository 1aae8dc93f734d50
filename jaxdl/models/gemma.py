"""Gemma 1 and 2: decoders whose prompts may be read both ways (Gemma Team 2024, arXiv:2403.08295; Riviere et al. 2024, arXiv:2408.00118)."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxdl.errors import UserError, unknown
from jaxdl.nn import (
    Attention,
    Cache,
    GatedFeedForward,
    MultiHeadAttention,
    RMSNorm,
    Transformer,
    TransformerBlock,
    dot_product_attention,
    gelu_tanh,
    rope,
    rotary_frequencies,
)
from jaxdl.nn.transformer import as_rows
from jaxdl.settings import Settings, anything, count, depth, fixed, number, optional
from jaxdl.weights import UNCHANGED, Rows, dense, norm


class Gemma(nn.Module):
    """RMS norms that scale by 1 + w, rotary positions, few key heads, gated feed-forwards, and logits by the token embeddings, which enter the stack multiplied by √width.

    It works on embeddings, so that those of image patches can stand among those of tokens: `embed`, then the call or `decode`, then `logits`. `PaliGemma` is the model around it.

    - `query_scale` takes the place of the head width in the scale of the attention, `1/√query_scale`.
    - `window`: in every other block, from the first on, a token attends to the last `window` tokens, itself included, and within the prefix to all of it (Gemma 2). None: no window.
    - `attention_soft_cap` and `logit_soft_cap` bound logits by `cap · tanh(logit / cap)` (Gemma 2, section 2); `sandwich_norm` is that of `TransformerBlock`, which Gemma 2 has.

    `Gemma.variant("2-2b")` is a published size. `scan` and `remat` are those of `Transformer`; `scan` needs blocks without windows.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_dim: int
    query_scale: float | None = None
    window: int | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    sandwich_norm: bool = False
    rope_base: float = 10_000.0
    attention: Attention = dot_product_attention
    eps: float = 1e-6
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        self.tokens = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype)
        self.decoder = self._decoder()

    def _decoder(self, **options: Any) -> Transformer:
        def block(layer: int) -> TransformerBlock:
            """Weights start as those of GPT-2 do: no report says how Gemma's did."""
            init = dict(
                kernel_init=nn.initializers.normal(0.02),
                out_init=nn.initializers.normal(0.02 / math.sqrt(2 * max(1, self.depth))),
            )
            window = self.window if layer % 2 == 0 else None
            attend = functools.partial(self.attention, scale=(self.query_scale or self.head_width) ** -0.5)
            if self.attention_soft_cap:
                attend = functools.partial(attend, logits_soft_cap=self.attention_soft_cap)
            return TransformerBlock(
                self.num_heads,
                self.mlp_dim,
                attend,
                attention_layer=functools.partial(
                    MultiHeadAttention,
                    num_kv_heads=self.num_kv_heads,
                    head_width=self.head_width,
                    use_bias=False,
                    rotary=functools.partial(rope, frequencies=rotary_frequencies(self.head_width, self.rope_base)),
                    local_window_size=None if window is None else (window - 1, 0),
                    **init,
                ),
                feed_forward_layer=functools.partial(GatedFeedForward, activation=gelu_tanh, **init),
                norm=functools.partial(RMSNorm, self.eps, offset=1.0),
                sandwich_norm=self.sandwich_norm,
                is_causal=True,
                dropout=self.dropout,
                dtype=self.dtype,
                parent=None,
            )

        return Transformer(self.depth, block(0) if self.window is None else block, scan=self.scan, remat=self.remat, **options)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings multiplied by √width, in float32 or wider, the dtype of the residual stream."""
        vectors = self.tokens(tokens)
        return vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32)) * math.sqrt(self.width)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        prefix: Int[Array, "B"] | None = None,
        *,
        positions: Int[Array, "#B T"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """The decoder on full sequences of embeddings, bidirectional over the first `prefix` of them and causal after that."""
        return self.decoder(x, prefix=prefix, positions=positions, train=train)

    def empty_cache(self, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for `decode` of up to `slots` tokens, prompt and padding included. Needs no parameters."""
        return self._decoder(parent=None).empty_cache(batch, slots, self.width, dtype or self.dtype)

    def decode(
        self, x: Float[Array, "B T D"], cache: Cache, *, valid: Bool[Array, "B T"] | None = None, **options: Any
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Decodes the next `T` embeddings and returns the extended cache; `options` are those of `MultiHeadAttention.decode`, such as `is_causal=False` for a prefix."""
        return self.decoder.decode(x, cache, valid=valid, **options)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of the token after each position, in float32 or wider."""
        logits = self.tokens.attend(as_rows(x)).reshape(*x.shape[:-1], -1)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits if self.logit_soft_cap is None else self.logit_soft_cap * jnp.tanh(logits / self.logit_soft_cap)

    @classmethod
    def variant(cls, name: str, **changes: Any) -> "Gemma":
        """The published decoder `name` of `VARIANTS`; `changes` are fields (`attention`, `dtype`, `dropout`, `scan`, `remat`, `vocab_size`)."""
        if name not in VARIANTS:
            raise unknown("Gemma variant", name, VARIANTS)
        return cls(**(VARIANTS[name] | changes))


_GEMMA_2 = dict(vocab_size=256_000, window=4096, attention_soft_cap=50.0, logit_soft_cap=30.0, sandwich_norm=True)

# Gemma Team 2024, table 1; Riviere et al. 2024, table 1; feed-forwards: half of what these tables say, since both kernels of the first layer count there. The scale of 2-27b is its width per head (ibid., in its published config.json).
VARIANTS: dict[str, dict[str, Any]] = {
    "2b": dict(vocab_size=256_000, width=2048, depth=18, num_heads=8, num_kv_heads=1, head_width=256, mlp_dim=16_384),
    "7b": dict(vocab_size=256_000, width=3072, depth=28, num_heads=16, num_kv_heads=16, head_width=256, mlp_dim=24_576),
    "2-2b": dict(width=2304, depth=26, num_heads=8, num_kv_heads=4, head_width=256, mlp_dim=9216, **_GEMMA_2),
    "2-9b": dict(width=3584, depth=42, num_heads=16, num_kv_heads=8, head_width=256, mlp_dim=14_336, **_GEMMA_2),
    "2-27b": dict(
        width=4608, depth=46, num_heads=32, num_kv_heads=16, head_width=128, mlp_dim=36_864, query_scale=144.0, **_GEMMA_2
    ),
}  # fmt: skip


_BOTH = dict(
    vocab_size=count(256_000),
    head_dim=count(256),
    rms_norm_eps=number(1e-6),
    attention_bias=fixed(False, None),
    tie_word_embeddings=fixed(True, None),
    # A prefix is seen both ways, as PaliGemma's always is.
    use_bidirectional_attention=fixed(None, True),
    layer_types=anything(),
    rope_theta=anything(10_000.0),
    rope_scaling=anything(),
    rope_parameters=anything(),
    partial_rotary_factor=fixed(1.0, None),
)
_UNUSED = ("max_position_embeddings", "num_image_tokens", "original_max_position_embeddings")
SETTINGS = {
    "gemma": Settings(
        "Gemma",
        _BOTH
        | dict(hidden_size=count(3072), intermediate_size=count(24_576), num_hidden_layers=depth(28))
        | dict(num_attention_heads=count(16), num_key_value_heads=count(16))
        # Its first files say "gelu" and mean its approximation by tanh; a cap of the logits would be applied.
        | dict(hidden_act=anything("gelu_pytorch_tanh"), hidden_activation=anything(), final_logit_softcapping=fixed(None)),
        unused=_UNUSED,
    ),
    "gemma2": Settings(
        "Gemma 2",
        _BOTH
        | dict(hidden_size=count(2304), intermediate_size=count(9216), num_hidden_layers=depth(26))
        | dict(num_attention_heads=count(8), num_key_value_heads=count(4))
        | dict(
            hidden_activation=anything("gelu_pytorch_tanh"),
            query_pre_attn_scalar=number(256, above=0),
            sliding_window=optional(count(4096)),
        )
        | dict(attn_logit_softcapping=optional(number(50.0, above=0)), final_logit_softcapping=optional(number(30.0, above=0))),
        unused=(*_UNUSED, "hidden_act", "is_sliding", "sliding_window_size"),
    ),
}
"""Of transformers' `GemmaConfig` and `Gemma2Config`."""


def fields_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the `Gemma` that a Hugging Face configuration of type `gemma` or `gemma2` describes; what is left out has the defaults of `GemmaConfig` or `Gemma2Config`. Raises `UserError` for a setting that is not Gemma's."""
    kind = config.get("model_type", "gemma")
    if kind not in [*SETTINGS]:
        raise UserError(f"a decoder of type {kind!r} (model_type in text_config): gemma and gemma2 are read here")
    given = SETTINGS[kind].read(config, " of the decoder")
    _check_activation(given)
    if given["num_attention_heads"] % given["num_key_value_heads"]:
        raise UserError(
            f"{given['num_attention_heads']} heads (num_attention_heads) of the decoder cannot share {given['num_key_value_heads']} "
            "of keys and values (num_key_value_heads): correct one of them"
        )
    if given["head_dim"] % 2:
        raise UserError(f"head_dim of the decoder is {given['head_dim']}: rotary positions turn pairs, so give an even number")
    turns = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(given["num_hidden_layers"])]
    everywhere = ["full_attention"] * given["num_hidden_layers"]
    kinds = given["layer_types"] or (turns if kind == "gemma2" else everywhere)
    if kinds != everywhere and (kind != "gemma2" or kinds != turns):
        raise UserError(
            f"layer_types of the decoder is {str(kinds)[:80]} for {len(turns)} blocks (num_hidden_layers): Gemma has windows in every "
            "other block, or in none"
        )
    fields = dict(
        vocab_size=given["vocab_size"],
        width=given["hidden_size"],
        depth=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        num_kv_heads=given["num_key_value_heads"],
        head_width=given["head_dim"],
        mlp_dim=given["intermediate_size"],
        rope_base=_rope_base(given),
        eps=given["rms_norm_eps"],
    )
    if kind == "gemma":
        return fields
    if kinds != everywhere and given["sliding_window"] is None:
        raise UserError("sliding_window of the decoder is null though layer_types has windows: say how long they are")
    return fields | dict(
        query_scale=float(given["query_pre_attn_scalar"]),
        window=None if kinds == everywhere else given["sliding_window"],
        attention_soft_cap=given["attn_logit_softcapping"],
        logit_soft_cap=given["final_logit_softcapping"],
        sandwich_norm=True,
    )


def _check_activation(given: Mapping[str, Any]) -> None:
    names = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh", None)
    for field, more in (("hidden_activation", ()), ("hidden_act", ("gelu",))):
        if given.get(field) not in (*names, *more):
            raise UserError(
                f"the activation of the decoder is {given[field]!r} ({field}): Gemma has 'gelu_pytorch_tanh', and nothing else is read "
                "here"
            )


def _rope_base(given: Mapping[str, Any]) -> float:
    """The base of the rotary positions, which transformers before version 5 writes beside `rope_scaling` and later ones into `rope_parameters`."""
    field = "rope_scaling" if given["rope_scaling"] else "rope_parameters"
    rotary = given[field] or {}
    if not isinstance(rotary, Mapping) or any(isinstance(value, Mapping) for value in rotary.values()):
        raise UserError(f"{field} of the decoder is {str(rotary)[:80]}: one object for all blocks is read here; correct it")
    part = rotary.get("partial_rotary_factor", 1.0)
    kind = rotary.get("rope_type", rotary.get("type", "default")) if part in (None, 1.0) else f"of a part of {part!r}"
    if kind != "default":
        raise UserError(
            f"the rotary positions of the decoder are {kind!r} ({field}): Gemma's are not scaled, and nothing else is read here"
        )
    base = rotary.get("rope_theta", given["rope_theta"])
    if type(base) not in (int, float) or not 0 < base <= 1e30:
        raise UserError(f"rope_theta of the decoder is {base!r}: a number above 0 is read here; correct it")
    return float(base)


def to_config(module: Gemma) -> dict[str, Any]:
    """The configuration of type `gemma` or, with `sandwich_norm`, `gemma2` that `fields_of_config` and transformers read as this module. Raises `UserError` for a mixture of both."""
    second = module.sandwich_norm
    config = dict(
        model_type="gemma2" if second else "gemma",
        vocab_size=module.vocab_size,
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.num_heads,
        num_key_value_heads=module.num_kv_heads,
        head_dim=module.head_width,
        intermediate_size=module.mlp_dim,
        rms_norm_eps=module.eps,
        rope_theta=module.rope_base,
        attention_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
    )
    if second:
        scale = module.query_scale or module.head_width
        if scale != int(scale):
            raise UserError(f"query_scale of the decoder is {scale}: a published Gemma 2 has a whole number")
        turns = ["full_attention" if module.window is None or layer % 2 else "sliding_attention" for layer in range(module.depth)]
        return config | dict(
            query_pre_attn_scalar=int(scale),
            sliding_window=module.window or 4096,
            layer_types=turns,
            attn_logit_softcapping=module.attention_soft_cap,
            final_logit_softcapping=module.logit_soft_cap,
        )
    for field in ("query_scale", "window", "attention_soft_cap", "logit_soft_cap"):
        if (given := getattr(module, field)) is not None and (field, given) != ("query_scale", module.head_width):
            raise UserError(
                f"{field} of the decoder is {given} without sandwich_norm: neither Gemma 1 nor 2 is so, and no other can be written"
            )
    return config


def published_rows(ours: str, published: str, sandwich_norm: bool) -> Rows:
    """Rows of a table of published names for the parameters of a `Gemma`. With `sandwich_norm` they are Gemma 2's, where `post_attention_layernorm` comes after the attention; in Gemma 1 that is the name of the norm before the feed-forward."""
    block, layer = rf"{ours}/decoder/block_(\d+)", rf"{published}.layers.\1"
    table = {f"{ours}/tokens/embedding": (f"{published}.embed_tokens.weight", UNCHANGED)}
    table |= norm(f"{ours}/decoder/norm", f"{published}.norm") | norm(f"{block}/attention_norm", f"{layer}.input_layernorm")
    for name, theirs in dict(query="q_proj", key="k_proj", value="v_proj", out="o_proj").items():
        table |= dense(f"{block}/attention/{name}", f"{layer}.self_attn.{theirs}")
    for name, theirs in dict(gate="gate_proj", expand="up_proj", contract="down_proj").items():
        table |= dense(f"{block}/feed_forward/{name}", f"{layer}.mlp.{theirs}")
    if not sandwich_norm:
        return table | norm(f"{block}/feed_forward_norm", f"{layer}.post_attention_layernorm")
    table |= norm(f"{block}/attention_added_norm", f"{layer}.post_attention_layernorm")
    table |= norm(f"{block}/feed_forward_norm", f"{layer}.pre_feedforward_layernorm")
    return table | norm(f"{block}/feed_forward_added_norm", f"{layer}.post_feedforward_layernorm")
