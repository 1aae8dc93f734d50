"""Generation: token after token from a model that decodes with a cache, in one compiled loop; by chance, greedily, or as a search for the likeliest."""

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
    barred: tuple[int, ...] = ()
    """Tokens that are never chosen, such as padding."""


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
    if sampling.barred:
        logits = logits.at[..., jnp.array(sampling.barred)].set(-jnp.inf)
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
    """Up to `steps` tokens that go on from each prompt; the loop ends when all rows have ended, and what follows an `end` is `end`. With a `limit`, which is no matter of compilation, it ends after so many of the `steps`, at least one, and what follows has no meaning.

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
    """How the likeliest continuations are searched for, and which of them is the best.

    The score of a finished hypothesis Y of `|Y|` tokens, its end included, is `log P(Y) / lp(|Y|)` with `lp(n) = ((offset + n) / (offset + 1))^length_penalty` (Wu et al. 2016, eq. 14). Without the penalty short ones win, as each token costs probability.
    """

    width: Annotated[int, Ge(1)] = 4
    """Hypotheses that go on at every step. 1 is not quite greedy: when the likeliest token is an end, the second is followed too, until it cannot win."""
    length_penalty: Annotated[float, Ge(0)] = 0.6
    """The exponent; 0.6 in Vaswani et al. 2017, section 6.1, 1 by default in HF."""
    offset: Annotated[float, Ge(0)] = 5.0
    """5 in Wu et al.; with 0 the score is `log P(Y) / |Y|^length_penalty`, HF's."""
    stop: Literal["surely", "likely"] = "surely"
    """A sentence is done when its `width` best finished hypotheses cannot be surpassed by the likeliest unfinished one: `surely`, at whatever length that may end (HF's early_stopping="never"), or `likely`, if it ended at the present length (HF's early_stopping=False, its default)."""
    barred: tuple[int, ...] = ()
    """Tokens that are never written, such as padding. The probabilities of the others stay as they are, as with HF's bad_words_ids."""

    def penalty(self, length: float | Array) -> float | Array:
        """`lp`."""
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
    """The `W = beam.width` best continuations of each prompt, the best first, and their scores; what follows an `end` is `end`.

    At every step the `2 W` likeliest extensions of the hypotheses at hand are found. Those among the first `W` of them that end are finished; the likeliest `W` that do not end go on. So a hypothesis that ends never costs one that goes on its place. After `steps` tokens all that are left count as finished, without an end, as in HF. Where fewer than `W` continuations exist, the scores of the others are −∞.

    `cache` is an empty one of `B · W` rows, of which `b · W` to `(b + 1) · W − 1` belong to prompt `b`, with room for prompt and steps but the last; so are the rows of whatever `variables` hold for `decode` beside the parameters, such as the memory of an encoder. `rows_axis` is the axis of the rows in the cache's entries: 1 where a `Transformer` with `scan` has stacked its layers before it. The loop ends when all sentences are done. Padding of prompts is on the left, as for `generate`.
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
        if beam.barred:
            likelihood = likelihood.at[:, jnp.array(beam.barred)].set(-jnp.inf)
        vocabulary = likelihood.shape[-1]
        extended = (sums[..., None] + likelihood.reshape(batch, width, vocabulary)).reshape(batch, -1)
        extended, chosen = jax.lax.top_k(extended, min(2 * width, extended.shape[-1]))
        origin, token = chosen // vocabulary, (chosen % vocabulary).astype(jnp.int32)
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
