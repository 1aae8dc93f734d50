"""Multi-head latent attention: keys and values of all heads are read from one small vector per token, and the cache holds nothing else (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1)."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxdl.errors import UserError
from jaxdl.nn.attention import Attention, Rotary, dot_product_attention, within
from jaxdl.nn.cache import Cache, cache_dtype, from_cache, state_decoder
from jaxdl.nn.masks import Window
from jaxdl.nn.normalization import rms_norm
from jaxdl.nn.positions import rope


class LatentAttention(nn.Module):
    """Self-attention whose keys and values are `W c` of a latent `c` of width `kv_rank`, with positions in a separate part (DeepSeek-V2, eq. 9 to 19, and V3).

    - A head's query and key are `key_width` features without position beside `rotary_width` features that are turned. The turned key is one for all heads: a rotation between the latent and the query would keep the two decoding forms apart (ibid., section 2.1.3).
    - Values have a width of their own, `value_width`: `attention` must take it, as `dot_product_attention` does and `jax.nn.dot_product_attention` does not.
    - `query_rank` is the width of the queries' latent; None projects at once, as in V2-Lite.
    - Both latents pass an RMS normalisation before they are expanded.
    - `rotary` has neighbours for pairs, as the published weights need; `jaxdl.nn.rope` itself has halves.
    - `scale` is `1/√(key_width + rotary_width)` where left out.
    - `local_window_size` is that of `MultiHeadAttention`.

    The widths are V3's. Nothing has a bias. For a context stretched by YaRN with DeepSeek's `mscale` and `mscale_all_dim`, take `yarn_frequencies` and the quotient of magnitudes for `rotary`, and multiply the scale by the square of the second:

    ```python
    sharper = yarn_magnitude(factor, mscale_all_dim)
    frequencies = yarn_frequencies(64, factor, original_length)
    rotary = functools.partial(rope, frequencies=frequencies, interleaved=True, magnitude=yarn_magnitude(factor, mscale) / sharper)
    LatentAttention(num_heads, rotary=rotary, scale=(128 + 64) ** -0.5 * sharper**2)
    ```
    """

    num_heads: int
    key_width: int = 128
    rotary_width: int = 64
    value_width: int = 128
    kv_rank: int = 512
    query_rank: int | None = 1536
    attention: Attention = dot_product_attention
    rotary: Rotary = functools.partial(rope, interleaved=True)
    scale: float | None = None
    local_window_size: Window | None = None
    eps: float = 1e-6
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "#B #N #T #T"] | None = None,
        bias: Float[Array, "#B #N #T #T"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        is_causal: bool = False,
        prefix: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Self-attention over full sequences, in the expanded form; `positions` and `prefix` as in `MultiHeadAttention`."""
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        query, turned = self._queries(x, positions)
        latents = self._latents(x, positions)
        how = within(x.shape[1], mask, self.local_window_size, prefix, is_causal)
        return self._out(self._expanded(query, turned, latents, bias, **how), x)

    def empty_cache(self, batch: int, slots: int, width: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty cache for up to `slots` tokens, prompt and padding included: `kv_rank + rotary_width` numbers each, independent of the heads and of the model width `width`."""
        shape = (batch, slots, self.kv_rank + self.rotary_width)
        return Cache.empty(jnp.zeros(shape, cache_dtype(dtype, self.dtype, self.param_dtype)))

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        *,
        valid: Bool[Array, "B T"] | None = None,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        bias: Float[Array, "#B #N #T #S"] | None = None,
        positions: Int[Array, "#B T"] | None = None,
        is_causal: bool = True,
        absorbed: bool | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Causal self-attention of the next `T` tokens (a whole prompt or a single one), and the cache extended by them; see `MultiHeadAttention.decode`.

        There are two forms of the same function. The expanded one computes the keys and values of all cached tokens anew. The absorbed one multiplies the query by the keys' matrix and the sum by the values' one: the heads then attend to the latents themselves, as to one shared head (ibid., section 2.1.2). Left open, `absorbed` is true for as few tokens as make it the cheaper of the two: below 170 with the widths of V3. Raises `UserError` for an attention that keeps a state and no keys.
        """
        if state_decoder(from_cache(self.attention)) is not None:
            raise UserError(
                "latents are cached to be looked at one by one, and a linear attention looks at none: decode with another"
            )
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        positions = cache.positions(valid) if positions is None else positions
        query, turned = self._queries(x, positions)
        cache = cache.append(self._latents(x, positions), valid)
        seen = cache.mask(x.shape[1], self.local_window_size, is_causal=is_causal)
        seen = seen if mask is None else seen & mask
        if absorbed is None:
            # For each head and cached token: multiplications of T wider queries against those of expanding the token.
            expanding = self.kv_rank * (self.key_width + self.value_width)
            absorbed = x.shape[1] * (2 * self.kv_rank - self.key_width - self.value_width) < expanding
        attend = self._absorbed if absorbed else self._expanded
        return self._out(attend(query, turned, cache.entries.astype(query.dtype), bias, seen), x), cache

    def _queries(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N R"]]:
        """The parts without and with position (ibid., eq. 12 to 14)."""
        widths = self.key_width, self.rotary_width
        if self.query_rank is not None:
            x = self._normalized("query_norm", self._project("query_down", x, self.query_rank))
        query = self._project("query" if self.query_rank is None else "query_up", x, self.num_heads * sum(widths))
        query, turned = jnp.split(query.reshape(*x.shape[:2], self.num_heads, sum(widths)), widths[:1], axis=-1)
        return query, self.rotary(turned, positions)

    def _latents(self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]) -> Float[Array, "B T C"]:
        """What is cached: the latent of keys and values beside the turned key (ibid., eq. 9 and 15)."""
        latent, turned = jnp.split(self._project("kv_down", x, self.kv_rank + self.rotary_width), [self.kv_rank], axis=-1)
        turned = self.rotary(turned[:, :, None], positions)[:, :, 0]
        return jnp.concatenate([self._normalized("kv_norm", latent), turned], axis=-1)

    def _expansion(self, dtype: DTypeLike) -> tuple[Float[Array, "R N H"], Float[Array, "R N V"]]:
        """From a latent to the keys (`W^UK`) and to the values (`W^UV`) of all heads."""
        widths = self.key_width, self.value_width
        kernel = self._parameter("kv_up", self.kernel_init, (self.kv_rank, self.num_heads * sum(widths)))
        key, value = jnp.split(kernel.astype(dtype).reshape(self.kv_rank, self.num_heads, -1), widths[:1], axis=-1)
        return key, value

    def _expanded(
        self,
        query: Float[Array, "B T N H"],
        turned: Float[Array, "B T N R"],
        latents: Float[Array, "B S C"],
        bias: Float[Array, "#B #N #T #S"] | None,
        mask: Bool[Array, "#B #N #T #S"] | None,
        **options: Any,
    ) -> Float[Array, "B T N V"]:
        latent, turned_key = jnp.split(latents, [self.kv_rank], axis=-1)
        to_key, to_value = self._expansion(query.dtype)
        shared = jnp.broadcast_to(turned_key[:, :, None], (*turned_key.shape[:2], self.num_heads, self.rotary_width))
        key = jnp.concatenate([jnp.einsum("bsr,rnh->bsnh", latent, to_key), shared], axis=-1)
        value = jnp.einsum("bsr,rnv->bsnv", latent, to_value)
        query = jnp.concatenate([query, turned], axis=-1)
        return self.attention(query, key, value, bias, mask, scale=self._scale, **options)

    def _absorbed(
        self,
        query: Float[Array, "B T N H"],
        turned: Float[Array, "B T N R"],
        latents: Float[Array, "B S C"],
        bias: Float[Array, "#B #N #T #S"] | None,
        mask: Bool[Array, "#B #N #T #S"] | None,
    ) -> Float[Array, "B T N V"]:
        to_key, to_value = self._expansion(query.dtype)
        query = jnp.concatenate([jnp.einsum("btnh,rnh->btnr", query, to_key), turned], axis=-1)
        key = latents[:, :, None]
        latent = self.attention(query, key, key[..., : self.kv_rank], bias, mask, scale=self._scale)
        return jnp.einsum("btnr,rnv->btnv", latent, to_value)

    def _out(self, attended: Float[Array, "B T N V"], like: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self._project("out", attended.reshape(*like.shape[:2], -1), like.shape[-1])

    @property
    def _scale(self) -> float:
        return (self.key_width + self.rotary_width) ** -0.5 if self.scale is None else self.scale

    def _project(self, name: str, x: Float[Array, "B T D"], features: int) -> Float[Array, "B T E"]:
        kernel = self._parameter(name, self.kernel_init, (x.shape[-1], features))
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return x @ kernel

    def _normalized(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, self._parameter(name, nn.initializers.ones, x.shape[-1:]), self.eps)

    @nn.compact
    def _parameter(self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return self.param(name, init, shape, self.param_dtype)
