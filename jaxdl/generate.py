"""Generation: token after token from a model that decodes with a cache, in one compiled loop."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Le
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxdl.errors import UserError
from jaxdl.nn import Cache

Decode = Callable[[PyTree, Int[Array, "B T"], Cache, Bool[Array, "B T"]], tuple[Float[Array, "B T V"], Cache]]
"""`(variables, tokens, cache, valid) -> (logits, cache)`: the next tokens of each row, of which `valid` ones are no padding."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen by its logits."""

    temperature: Annotated[float, Ge(0)] = 1.0
    """What logits are divided by: below 1 the likely becomes likelier. 0: always the most likely token."""
    top_k: Annotated[int, Ge(0)] = 0
    """Choose among so many most likely tokens only. 0: among all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Choose among the fewest most likely tokens that have this probability together (Holtzman et al. 2020, section 3.1)."""


def filter_logits(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """Logits divided by the temperature, −∞ where `top_k` and then `top_p` exclude a token; the most likely one is always left.

    Tokens as likely as the last one that is kept are kept too. Raises `UserError` for a temperature of 0, at which there are no probabilities.
    """
    if sampling.temperature == 0:
        raise UserError("at a temperature of 0 there is nothing to draw: take the most likely token")
    logits = logits.astype(jnp.float32) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        # A token is kept if those that are likelier have not reached the sum.
        kept = jnp.cumsum(probabilities, -1) - probabilities < sampling.top_p
        least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def choose(logits: Float[Array, "*batch V"], sampling: Sampling, key: PRNGKeyArray) -> Int[Array, "*batch"]:
    """The next token of each row."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return jax.random.categorical(key, filter_logits(logits, sampling))


@functools.partial(jax.jit, static_argnames=("decode", "steps", "sampling", "end", "stream"))
def generate(
    decode: Decode,
    variables: PyTree,
    prompt: Int[Array, "B T"],
    cache: Cache,
    key: PRNGKeyArray,
    *,
    steps: int,
    sampling: Sampling = Sampling(),
    valid: Bool[Array, "B T"] | None = None,
    end: int | None = None,
    stream: Callable[[Array], None] | None = None,
) -> Int[Array, "B steps"]:
    """Up to `steps` tokens that go on from each prompt; the loop ends when all rows have ended, and what follows an `end` is `end`.

    `cache` is an empty one with room for prompt and steps but the last. `valid` is false where a prompt is padding, which has to be on the left: the last token of each row is the one to go on from. `stream` is called with the tokens `B` of each step as they are made. The same key gives the same tokens on the same machine.

    It is compiled for each `decode` (give the same function again, not a new one), shape and setting.
    """
    rows = len(prompt)
    valid = jnp.ones(prompt.shape, bool) if valid is None else valid
    logits, cache = decode(variables, prompt, cache, valid)

    def take(step: Int[Array, ""], logits: Float[Array, "B V"], ended: Bool[Array, "B"]) -> tuple[Array, Array]:
        token = choose(logits, sampling, jax.random.fold_in(key, step)).astype(jnp.int32)
        if end is not None:
            token = jnp.where(ended, end, token)
            ended |= token == end
        if stream is not None:
            jax.debug.callback(stream, token, ordered=True)
        return token, ended

    def more(carry: tuple) -> Bool[Array, ""]:
        step, _, ended, *_ = carry
        return (step < steps) & ~ended.all()

    def advance(carry: tuple) -> tuple:
        step, token, ended, cache, written = carry
        logits, cache = decode(variables, token[:, None], cache, jnp.ones((rows, 1), bool))
        token, ended = take(step, logits[:, -1], ended)
        return step + 1, token, ended, cache, written.at[:, step].set(token)

    token, ended = take(jnp.int32(0), logits[:, -1], jnp.zeros(rows, bool))
    written = jnp.full((rows, steps), 0 if end is None else end, jnp.int32).at[:, 0].set(token)
    *_, written = jax.lax.while_loop(more, advance, (jnp.int32(1), token, ended, cache, written))
    return written
