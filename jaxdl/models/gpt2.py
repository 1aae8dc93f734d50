"""GPT: a decoder-only Transformer that predicts the next token (Radford et al. 2018; GPT-2: Radford et al. 2019)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxdl.errors import UserError, unknown
from jaxdl.generate import Decode, Sampling, generate
from jaxdl.nn import (
    Attention,
    Cache,
    FeedForward,
    LayerNorm,
    MultiHeadAttention,
    Transformer,
    TransformerBlock,
    dot_product_attention,
    known_tokens,
)
from jaxdl.nn.transformer import as_rows
from jaxdl.settings import Settings, count, depth, fixed, number, optional, refuse_uneven
from jaxdl.weights import UNCHANGED, Constant, Rows, Table, norm, packed


@flax.struct.dataclass
class GPTOutput:
    """`logits` (B T V): `logits[b, t]` are those of token t + 1, given the tokens up to t."""

    logits: PyTree


class GPT(nn.Module):
    """GPT-2: pre-norm blocks, learned positions, and logits by the token embeddings (Radford et al. 2019, section 2.3).

    Weights start from a normal distribution of deviation 0.02, those of projections into the residual stream from one `√(2 · depth)` times smaller, since that many outputs are added up. Biases start from 0.

    `GPT.variant("124M")` is a published size. `mlp_dim` is `4 · width` unless given; `length` is the number of positions. `scan` and `remat` are those of `Transformer`.
    """

    vocab_size: int
    length: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int | None = None
    attention: Attention = dot_product_attention
    eps: float = 1e-5
    dropout: float = 0.0
    scan: bool = False
    remat: bool = False
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        self.tokens = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype)
        self.positions = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        self.drop = nn.Dropout(self.dropout)
        self.decoder = self._decoder()

    def _decoder(self, **options: Any) -> Transformer:
        init = dict(
            kernel_init=nn.initializers.normal(0.02), out_init=nn.initializers.normal(0.02 / math.sqrt(2 * max(1, self.depth)))
        )
        block = TransformerBlock(
            self.num_heads,
            self.mlp_dim or 4 * self.width,
            self.attention,
            attention_layer=functools.partial(MultiHeadAttention, **init),
            feed_forward_layer=functools.partial(FeedForward, **init),
            norm=functools.partial(LayerNorm, self.eps),
            is_causal=True,
            dropout=self.dropout,
            dtype=self.dtype,
            parent=None,
        )
        return Transformer(self.depth, block, scan=self.scan, remat=self.remat, **options)

    def __call__(self, tokens: Int[Array, "B T"], *, train: bool = False) -> GPTOutput:
        """Logits for full sequences of at most `length` tokens. Raises `UserError` for longer ones."""
        count = tokens.shape[1]
        if count > self.length:
            raise UserError(f"{count} tokens are more than the {self.length} positions that this GPT has: give fewer")
        x = self._embed(known_tokens(tokens, self.vocab_size), self.positions[:count], train)
        return GPTOutput(self._logits(self.decoder(x, train=train)))

    def empty_cache(self, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for `decode` of up to `slots` tokens, prompt and padding included. Needs no parameters. Raises `UserError` for more slots than positions."""
        if slots > self.length:
            raise UserError(f"{slots} tokens are more than the {self.length} positions that this GPT has: ask for fewer")
        return self._decoder(parent=None).empty_cache(batch, slots, self.width, dtype or self.dtype)

    def decode(
        self, tokens: Int[Array, "B T"], cache: Cache, *, valid: Bool[Array, "B T"] | None = None
    ) -> tuple[GPTOutput, Cache]:
        """Decodes the next `T` tokens (a whole prompt or a single one) and returns the extended cache. `valid` is true for real tokens; padding may be on either side."""
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        tokens = known_tokens(tokens, self.vocab_size, valid)
        places = jnp.clip(cache.positions(valid), 0, self.length - 1)
        x, cache = self.decoder.decode(self._embed(tokens, self.positions[places], False), cache, valid=valid)
        return GPTOutput(self._logits(x)), cache

    def _embed(self, tokens: Int[Array, "B T"], positions: Float[Array, "*#B T D"], train: bool) -> Float[Array, "B T D"]:
        """Token plus position embeddings in float32, the dtype of the residual stream."""
        return self.drop(self.tokens(tokens) + positions, deterministic=not train)

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.tokens.attend(as_rows(x)).reshape(*x.shape[:-1], -1)

    @classmethod
    def variant(cls, name: str, **changes: Any) -> "GPT":
        """The published model `name` of `VARIANTS`; `changes` are fields (`attention`, `dtype`, `dropout`, `scan`, `remat`, `vocab_size`, `length`)."""
        if name not in VARIANTS:
            raise unknown("GPT variant", name, VARIANTS)
        return cls(**(dataclasses.asdict(VARIANTS[name]) | changes))


def continue_text(
    module: GPT,
    variables: PyTree,
    text: Sequence[int],
    key: PRNGKeyArray,
    *,
    tokens: int,
    sampling: Sampling = Sampling(),
    end: int | Sequence[int] | None = None,
    stream: Callable[[int], None] | None = None,
) -> list[int]:
    """Up to `tokens` tokens that continue `text`, stopping after `end`, or one of several. `stream` is called with each token as it is made.

    When the context is full, generation continues from its last half, as it does from a text longer than the context. Raises `UserError` for an empty text.
    """
    if not len(text):
        raise UserError("there is no token to continue from: give some text")
    ends = {int(token) for token in np.atleast_1d([] if end is None else end)}
    half = (module.length + 1) // 2
    cache = module.empty_cache(1, module.length)
    # One callback for all rounds, so that they share one compiled program.
    streamed = None if stream is None else lambda row: stream(int(row[0]))
    written: list[int] = []
    while len(written) < tokens and ends.isdisjoint(written):
        seen, missing = [*text, *written], tokens - len(written)
        if len(seen) > module.length:
            seen = seen[-half:]
        # No padding if everything fits. Otherwise more rounds of half a context follow, and this one gets their shape.
        width = len(seen) if len(seen) + missing <= module.length + 1 else max(half, len(seen))
        padding = width - len(seen)
        made = generate(
            _next_logits(module), variables, jnp.asarray([[0] * padding + seen]), cache, jax.random.fold_in(key, len(written)),
            steps=module.length + 1 - width, sampling=sampling, valid=jnp.arange(width)[None] >= padding, end=end,
            limit=jnp.asarray(missing), stream=streamed,
        )[0, :missing].tolist()  # fmt: skip
        last = next((place for place, token in enumerate(made) if token in ends), len(made))
        written += made[: last + 1]
    jax.effects_barrier()
    return written


@functools.cache
def _next_logits(module: GPT) -> Decode:
    """Cached, so that `generate` gets the same function and compiles once for a module."""

    def decode(
        variables: PyTree, tokens: Int[Array, "B T"], cache: Cache, valid: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T V"], Cache]:
        out, cache = module.apply(variables, tokens, cache, valid=valid, method="decode")
        return out.logits, cache

    return decode


@dataclasses.dataclass(frozen=True)
class Variant:
    """A published size. Heads are 64 wide in all; the vocabulary is that of the byte pair encoding."""

    width: int
    depth: int
    num_heads: int
    vocab_size: int = 50_257
    length: int = 1024


# Radford et al. 2019, table 2, whose smallest was later counted to have 124 and not 117 million parameters; heads: the hub's config.json.
VARIANTS = {
    "124M": Variant(768, 12, 12),
    "355M": Variant(1024, 24, 16),
    "774M": Variant(1280, 36, 20),
    "1558M": Variant(1600, 48, 25),
}


_SETTINGS = Settings(
    "GPT-2",
    dict(
        vocab_size=count(50_257),
        n_positions=count(1024),
        n_embd=count(768),
        n_layer=depth(12),
        n_head=count(12),
        n_inner=optional(count(None)),
        layer_norm_epsilon=number(1e-5),
        activation_function=fixed("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=fixed(True),
        scale_attn_by_inverse_layer_idx=fixed(False),
        reorder_and_upcast_attn=fixed(False),
        add_cross_attention=fixed(False),
        tie_word_embeddings=fixed(True),
    ),
    aliases=dict(
        hidden_size="n_embd", max_position_embeddings="n_positions", num_attention_heads="n_head", num_hidden_layers="n_layer"
    ),
    unused=(
        "n_ctx", "n_special", "predict_special_tokens", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels",
    ),
)  # fmt: skip
"""Of transformers' `GPT2Config`."""


def from_config(config: dict, **changes: Any) -> tuple[GPT, tuple[jax.ShapeDtypeStruct]]:
    """The model that a Hugging Face `config.json` of type `gpt2` describes, and abstract tokens.

    Fields that are left out have the defaults of transformers' `GPT2Config`. Raises `UserError` for a setting that is not GPT-2's.
    """
    given = _SETTINGS.read(config)
    refuse_uneven(given, "n_embd", "n_head")
    module = GPT(
        vocab_size=given["vocab_size"],
        length=given["n_positions"],
        width=given["n_embd"],
        depth=given["n_layer"],
        num_heads=given["n_head"],
        mlp_dim=given["n_inner"],
        eps=given["layer_norm_epsilon"],
        **changes,
    )
    return module, (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


def to_config(module: GPT, params: PyTree) -> dict[str, Any]:
    """The `config.json` that `from_config` and transformers read as this module. Which token ends a text is left open."""
    return dict(
        architectures=["GPT2LMHeadModel"],
        model_type="gpt2",
        vocab_size=module.vocab_size,
        n_positions=module.length,
        n_embd=module.width,
        n_layer=module.depth,
        n_head=module.num_heads,
        n_inner=module.mlp_dim,
        layer_norm_epsilon=module.eps,
        activation_function="gelu_new",
        embd_pdrop=module.dropout,
        resid_pdrop=module.dropout,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")


def published(module: GPT) -> Table:
    """The names of transformers' `GPT2LMHeadModel`."""
    block, layer = r"decoder/block_(\d+)", r"transformer.h.\1"
    third = {
        f"{block}/attention/{name}/{ours}": (f"{layer}.attn.c_attn.{theirs}", packed(part, 3, axis=-1))
        for part, name in enumerate(("query", "key", "value"))
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    }
    return Table(
        {
            "tokens/embedding": ("transformer.wte.weight", UNCHANGED),
            "positions": ("transformer.wpe.weight", UNCHANGED),
            **norm(f"{block}/attention_norm", f"{layer}.ln_1"),
            **third,
            **_linear(f"{block}/attention/out", f"{layer}.attn.c_proj"),
            **norm(f"{block}/feed_forward_norm", f"{layer}.ln_2"),
            **_linear(f"{block}/feed_forward/expand", f"{layer}.mlp.c_fc"),
            **_linear(f"{block}/feed_forward/contract", f"{layer}.mlp.c_proj"),
            **norm("decoder/norm", "transformer.ln_f"),
        },
        copies={r"lm_head\.weight": "transformer.wte.weight"},
        constants={
            r"h\.\d+\.attn\.bias": Constant("the causal mask", lambda mask: np.array_equal(mask, np.tril(np.ones_like(mask)))),
            r"h\.\d+\.attn\.masked_bias": Constant("a number that hides", lambda number: bool((number < -1e3).all())),
        },
        optional=r"^transformer\.",  # The hub's own files were saved without the head, and have none.
    )


def _linear(ours: str, published: str) -> Rows:
    """GPT-2's linear maps are kept as (in, out), as ours are."""
    return {f"{ours}/kernel": (f"{published}.weight", UNCHANGED), f"{ours}/bias": (f"{published}.bias", UNCHANGED)}
