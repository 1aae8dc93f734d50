"""One token after another, by sampling or the most likely one."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxdl.generate.prompts import Decode, check_tokens, checked_prompt, end_tokens, padded_on_the_left
from jaxdl.generate.sampling import Sampling, choose
from jaxdl.nn import Cache


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
    end: int | Sequence[int] | None = None,
    limit: Int[Array, ""] | None = None,
    stream: Callable[[Array], None] | None = None,
) -> Int[Array, "B steps"]:
    """Up to `steps` tokens that continue each prompt. The loop stops when every row has produced `end`, or one of several; later positions are filled with it, the first of several. `limit` is a traced bound on the number of new tokens (at least one); positions after it are undefined.

    `cache` is empty, with at least `T + steps − 1` slots. `valid` is false for the padding of a prompt, on whichever side: what it holds is not looked at. `stream` is called with the tokens `B` of each step as they are made. The same key gives the same tokens on the same machine.

    Compiled once for each `decode`, shape and setting: pass the same function object every time. Raises `UserError` for a cache that is too small, an empty prompt, `steps` below 1, and, as far as they are known outside of `jit`, tokens that the model has not.
    """
    ends = end_tokens(end)
    prompt, valid = checked_prompt(prompt, valid, cache, steps, rows=len(prompt))
    check_tokens(decode, variables, prompt, cache, valid, ends, sampling.suppressed_tokens)
    return _generate(
        decode, variables, prompt, cache, key, steps=steps, sampling=sampling, valid=valid, ends=ends, limit=limit, stream=stream
    )


@functools.partial(jax.jit, static_argnames=("decode", "steps", "sampling", "ends", "stream"))
def _generate(
    decode: Decode,
    variables: PyTree,
    prompt: Int[Array, "B T"],
    cache: Cache,
    key: PRNGKeyArray,
    *,
    steps: int,
    sampling: Sampling,
    valid: Bool[Array, "B T"],
    ends: tuple[int, ...],
    limit: Int[Array, ""] | None,
    stream: Callable[[Array], None] | None,
) -> Int[Array, "B steps"]:
    rows = len(prompt)
    prompt, valid = padded_on_the_left(prompt, valid)
    logits, cache = decode(variables, prompt, cache, valid)

    def take(step: Int[Array, ""], logits: Float[Array, "B V"], ended: Bool[Array, "B"]) -> tuple[Array, Array]:
        token = choose(logits, sampling, jax.random.fold_in(key, step)).astype(jnp.int32)
        if ends:
            token = jnp.where(ended, ends[0], token)
            ended |= jnp.isin(token, jnp.array(ends))
        if stream is not None:
            jax.debug.callback(stream, token, ordered=True)
        return token, ended

    def more(carry: tuple) -> Bool[Array, ""]:
        step, _, ended, *_ = carry
        return (step < (steps if limit is None else jnp.minimum(limit, steps))) & ~ended.all()

    def advance(carry: tuple) -> tuple:
        step, token, ended, cache, written = carry
        logits, cache = decode(variables, token[:, None], cache, jnp.ones((rows, 1), bool))
        token, ended = take(step, logits[:, -1], ended)
        return step + 1, token, ended, cache, written.at[:, step].set(token)

    token, ended = take(jnp.int32(0), logits[:, -1], jnp.zeros(rows, bool))
    written = jnp.full((rows, steps), ends[0] if ends else 0, jnp.int32).at[:, 0].set(token)
    *_, written = jax.lax.while_loop(more, advance, (jnp.int32(1), token, ended, cache, written))
    return written
