"""Gemma 1 and 2: decoders whose prompts may be read both ways (Gemma Team 2024, arXiv:2403.08295; Riviere et al. 2024, arXiv:2408.00118)."""

import functools
import math
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
                kernel_init=nn.initializers.normal(0.02), out_init=nn.initializers.normal(0.02 / math.sqrt(2 * self.depth))
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


def fields_of_config(config: dict) -> dict[str, Any]:
    """The fields of the `Gemma` that a Hugging Face configuration of type `gemma` or `gemma2` describes; what is left out has the defaults of `GemmaConfig` or `Gemma2Config`. Raises `UserError` for a setting that is not Gemma's."""
    kind = config.get("model_type", "gemma")
    if kind not in ("gemma", "gemma2"):
        raise UserError(f"a decoder of type {kind!r}: gemma and gemma2 are read here")
    second = kind == "gemma2"
    depth = config.get("num_hidden_layers", 26 if second else 28)
    # Gemma 1's first files say "gelu" and mean its approximation by tanh.
    activation = config.get("hidden_activation" if second else "hidden_act") or "gelu_pytorch_tanh"
    if activation not in (("gelu_pytorch_tanh",) if second else ("gelu_pytorch_tanh", "gelu")):
        raise UserError(
            f"the activation of the decoder is {activation!r}: Gemma has 'gelu_pytorch_tanh', and nothing else is read here"
        )
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turns = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(depth)]
    only = dict(attention_bias=False, attention_dropout=0.0, tie_word_embeddings=True)
    everywhere = ["full_attention"] * depth
    only |= dict(layer_types=turns) if second and config.get("layer_types") != everywhere else {}
    for field, wanted in only.items():
        if (given := config.get(field, wanted)) != wanted and given is not None:
            raise UserError(f"{field} of the decoder is {given!r}: Gemma has {wanted!r}, and nothing else is read here")
    if (kind_of_rope := rotary.get("rope_type", "default")) != "default":
        raise UserError(
            f"the rotary positions of the decoder are {kind_of_rope!r}: Gemma's are not scaled, and nothing else is read here"
        )
    fields = dict(
        vocab_size=config.get("vocab_size", 256_000),
        width=config.get("hidden_size", 2304 if second else 3072),
        depth=depth,
        num_heads=config.get("num_attention_heads", 8 if second else 16),
        num_kv_heads=config.get("num_key_value_heads", 4 if second else 16),
        head_width=config.get("head_dim", 256),
        mlp_dim=config.get("intermediate_size", 9216 if second else 24_576),
        rope_base=float(rotary.get("rope_theta") or config.get("rope_theta") or 10_000),
        eps=config.get("rms_norm_eps", 1e-6),
    )
    if second:
        fields |= dict(
            query_scale=float(config.get("query_pre_attn_scalar", 256)),
            window=None if config.get("layer_types") == everywhere else config.get("sliding_window", 4096),
            attention_soft_cap=config.get("attn_logit_softcapping", 50.0),
            logit_soft_cap=config.get("final_logit_softcapping", 30.0),
            sandwich_norm=True,
        )
    return fields


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
