"""Generation with a cache, in one compiled loop: sampling, greedy decoding and beam search."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Le
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxdl.errors import UserError
from jaxdl.nn import Cache

Decode = Callable[[PyTree, Int[Array, "B T"], Cache, Bool[Array, "B T"]], tuple[Float[Array, "B T V"], Cache]]
"""`(variables, tokens, cache, valid) -> (logits, cache)`: decodes the next tokens of each row; `valid` is false for padding."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits."""

    temperature: Annotated[float, Ge(0)] = 1.0
    """Logits are divided by it: below 1 the distribution is sharper. 0 always takes the most likely token."""
    top_k: Annotated[int, Ge(0)] = 0
    """Sample from this many of the most likely tokens. 0: from all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the smallest set of most likely tokens with at least this total probability (nucleus sampling; Holtzman et al. 2020, section 3.1)."""
    suppressed_tokens: tuple[int, ...] = ()
    """Tokens that are never chosen, such as padding."""


def filter_logits(logits: Float[Array, "*batch V"], sampling: Sampling) -> Float[Array, "*batch V"]:
    """Logits divided by the temperature, −∞ where `top_k` and then `top_p` exclude a token; the most likely one is always left.

    Ties with the last token kept are kept too. Raises `UserError` for a temperature of 0, which has no probabilities.
    """
    if sampling.temperature == 0:
        raise UserError("at a temperature of 0 there is nothing to sample: take the most likely token")
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
    if sampling.suppressed_tokens:
        logits = logits.at[..., jnp.array(sampling.suppressed_tokens)].set(-jnp.inf)
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
    limit: Int[Array, ""] | None = None,
    stream: Callable[[Array], None] | None = None,
) -> Int[Array, "B steps"]:
    """Up to `steps` tokens that continue each prompt. The loop stops when every row has produced `end`; later positions are filled with `end`. `limit` is a traced bound on the number of new tokens (at least one); positions after it are undefined.

    `cache` is empty, with `T + steps − 1` slots. `valid` is false for the padding of a prompt, which must be on the left, so that the last token of each row is real. `stream` is called with the tokens `B` of each step as they are made. The same key gives the same tokens on the same machine.

    Compiled once for each `decode`, shape and setting: pass the same function object every time.
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
        return (step < (steps if limit is None else jnp.minimum(limit, steps))) & ~ended.all()

    def advance(carry: tuple) -> tuple:
        step, token, ended, cache, written = carry
        logits, cache = decode(variables, token[:, None], cache, jnp.ones((rows, 1), bool))
        token, ended = take(step, logits[:, -1], ended)
        return step + 1, token, ended, cache, written.at[:, step].set(token)

    token, ended = take(jnp.int32(0), logits[:, -1], jnp.zeros(rows, bool))
    written = jnp.full((rows, steps), 0 if end is None else end, jnp.int32).at[:, 0].set(token)
    *_, written = jax.lax.while_loop(more, advance, (jnp.int32(1), token, ended, cache, written))
    return written


@dataclasses.dataclass(frozen=True)
class Beam:
    """The settings of a beam search.

    The score of a finished hypothesis Y of `|Y|` tokens, its end included, is `log P(Y) / lp(|Y|)` with `lp(n) = ((offset + n) / (offset + 1))^length_penalty` (Wu et al. 2016, eq. 14). Without the penalty short ones win, as each token costs probability.
    """

    width: Annotated[int, Ge(1)] = 4
    """Hypotheses that are kept at every step. 1 is not quite greedy: when the likeliest token is an end, the second is followed too, until it cannot win."""
    length_penalty: Annotated[float, Ge(0)] = 0.6
    """The exponent; 0.6 in Vaswani et al. 2017, section 6.1, 1 by default in HF."""
    offset: Annotated[float, Ge(0)] = 5.0
    """5 in Wu et al.; with 0 the score is `log P(Y) / |Y|^length_penalty`, HF's."""
    stop: Literal["surely", "likely"] = "surely"
    """A sentence is done when its `width` best finished hypotheses cannot be surpassed by the likeliest unfinished one: `surely`, at whatever length that may end (HF's early_stopping="never"), or `likely`, if it ended at the present length (HF's early_stopping=False, its default)."""
    suppressed_tokens: tuple[int, ...] = ()
    """Tokens that are never chosen, such as padding. The probabilities of the others are not renormalised, as with HF's bad_words_ids."""

    def penalty(self, length: float | Array) -> float | Array:
        """`lp(length)`, what log probabilities are divided by."""
        return ((self.offset + length) / (self.offset + 1)) ** self.length_penalty


@functools.partial(jax.jit, static_argnames=("decode", "steps", "beam", "end", "rows_axis"))
def beam_search(
    decode: Decode,
    variables: PyTree,
    prompt: Int[Array, "B T"],
    cache: Cache,
    *,
    steps: int,
    end: int,
    beam: Beam = Beam(),
    valid: Bool[Array, "B T"] | None = None,
    rows_axis: int = 0,
) -> tuple[Int[Array, "B W steps"], Float[Array, "B W"]]:
    """The `W = beam.width` best continuations of each prompt, best first, and their scores; positions after an `end` are `end`.

    Every step takes the `2 W` likeliest extensions of the current hypotheses. Those among the first `W` that end are finished; the likeliest `W` that do not end are kept, so a finished hypothesis never takes the place of an unfinished one. After `steps` tokens the remaining ones count as finished without an end, as in HF. Where fewer than `W` continuations exist, the other scores are −∞.

    `cache` is empty, with `T + steps − 1` slots and `B · W` rows: rows `b · W` to `(b + 1) · W − 1` belong to prompt `b`. Anything else in `variables` that `decode` reads row by row, such as an encoder's memory, is repeated in the same order. `rows_axis` is the axis of the rows in the cache's entries: 1 where a `Transformer` with `scan` has stacked its layers before it. The loop ends when all sentences are done. Padding of prompts is on the left, as for `generate`.
    """
    (batch, _), width = prompt.shape, beam.width
    sentences = jnp.arange(batch)[:, None]
    valid = jnp.ones(prompt.shape, bool) if valid is None else valid
    logits, cache = decode(variables, jnp.repeat(prompt, width, axis=0), cache, jnp.repeat(valid, width, axis=0))

    def best(scores: Float[Array, "B C"], *others: Array) -> tuple[Array, ...]:
        """The best `width`, with what belongs to them."""
        scores, kept = jax.lax.top_k(scores, width)
        return scores, *(other[sentences, kept] for other in others)

    def extend(step: Int[Array, ""], logits: Float[Array, "_ V"], found: tuple) -> tuple[tuple, Array, Array]:
        """With token number `step` of each hypothesis: what is found then, that token, and the row of the cache that each goes on from."""
        sums, written, scores, finished, searching = found
        likelihood = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        if beam.suppressed_tokens:
            likelihood = likelihood.at[:, jnp.array(beam.suppressed_tokens)].set(-jnp.inf)
        vocab_size = likelihood.shape[-1]
        extended = (sums[..., None] + likelihood.reshape(batch, width, vocab_size)).reshape(batch, -1)
        extended, chosen = jax.lax.top_k(extended, min(2 * width, extended.shape[-1]))
        origin, token = chosen // vocab_size, (chosen % vocab_size).astype(jnp.int32)
        candidates = written[sentences, origin].at[:, :, step].set(token)
        ends = (token == end) | (step + 1 == steps)

        counts = ends & (jnp.arange(token.shape[1]) < width) & searching[:, None]
        ended = jnp.where(counts, extended / beam.penalty(step + 1), -jnp.inf)
        merged = jnp.concatenate([finished, candidates], 1)
        scores, finished = best(jnp.concatenate([scores, ended], 1), merged)
        sums, written, origin, token = best(jnp.where(ends, -jnp.inf, extended), candidates, origin, token)

        longest = steps if beam.stop == "surely" else step + 1
        searching &= sums[:, 0] / beam.penalty(longest) > scores[:, -1]
        rows = (sentences * width + origin).ravel()
        return (sums, written, scores, finished, searching), token.ravel(), rows

    def more(carry: tuple) -> Bool[Array, ""]:
        step, _, _, _, (*_, searching) = carry
        return (step < steps) & searching.any()

    def advance(carry: tuple) -> tuple:
        step, token, rows, cache, found = carry
        cache = cache.replace(entries=jax.tree.map(lambda entry: jnp.take(entry, rows, axis=rows_axis), cache.entries))
        logits, cache = decode(variables, token[:, None], cache, jnp.ones((batch * width, 1), bool))
        found, token, rows = extend(step, logits[:, -1], found)
        return step + 1, token, rows, cache, found

    # At first all hypotheses of a sentence are the same one, so that only one of them counts.
    sums = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf) * jnp.ones((batch, 1))
    written = jnp.full((batch, width, steps), end, jnp.int32)
    found = sums, written, jnp.full((batch, width), -jnp.inf), written, jnp.ones(batch, bool)
    found, token, rows = extend(jnp.int32(0), logits[:, -1], found)
    *_, (_, _, scores, finished, _) = jax.lax.while_loop(more, advance, (jnp.int32(1), token, rows, cache, found))
    return finished, scores
