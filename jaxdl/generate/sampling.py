"""The choice of the next token from its logits."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxdl.errors import UserError
from jaxdl.generate.bounds import check_number, check_suppressed

_COLD = 1e-20
"""A temperature below which quotients of logits are not all finite."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits."""

    temperature: Annotated[float, Ge(0)] = 1.0
    """Logits are divided by it: below 1 the distribution is sharper. 0 always takes the most likely token."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sample from this many of the most likely tokens. 0: from all."""
    top_p: Annotated[float, Ge(0), Le(1)] = 1.0
    """Sample from the smallest set of most likely tokens with at least this total probability (nucleus sampling; Holtzman et al. 2020, section 3.1). 0 always takes the most likely token."""
    suppressed_tokens: tuple[int, ...] = ()
    """Tokens that are never chosen, such as padding."""

    def __post_init__(self) -> None:
        """Raises `UserError` for a value out of its bounds."""
        check_number("temperature", self.temperature)
        check_number("top_k", self.top_k, whole=True)
        check_number("top_p", self.top_p, most=1)
        check_suppressed(self.suppressed_tokens)


def filter_logits(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """Logits divided by the temperature, −∞ where `top_k` and then `top_p` exclude a token; the most likely one is always left.

    Ties with the last token kept are kept too. Raises `UserError` for a temperature of 0, which has no probabilities.
    """
    if sampling.temperature == 0:
        raise UserError("at a temperature of 0 there is nothing to sample: take the most likely token")
    logits = logits.astype(jnp.float32)
    if sampling.temperature < _COLD:  # The quotients would not be finite, but for that of the most likely token.
        logits = logits - logits.max(-1, keepdims=True)
    logits /= max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        # A token is kept if those that are likelier have not reached the sum.
        kept = jnp.cumsum(probabilities, -1) - probabilities < max(sampling.top_p, float(jnp.finfo(jnp.float32).tiny))
        least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def choose(logits: Float[Array, "*batch V"], sampling: Sampling, key: PRNGKeyArray) -> Int[Array, "*batch"]:
    """The next token of each row. Raises `UserError` for suppressed tokens that there are none of, and if no token is left."""
    logits = suppress(logits, sampling.suppressed_tokens)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return jax.random.categorical(key, filter_logits(logits, sampling))


def suppress(logits: Float[Array, "*batch V"], tokens: tuple[int, ...]) -> Float[Array, "*batch V"]:
    """Logits, or logarithms of probabilities, with −∞ for these tokens."""
    return logits.at[..., jnp.array(tokens)].set(-jnp.inf) if tokens else logits
