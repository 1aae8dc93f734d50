"""Beam search."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Literal, get_args

import jax
import jax.numpy as jnp
from annotated_types import Ge
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdl.errors import UserError, unknown
from jaxdl.generate.bounds import check_number, check_suppressed
from jaxdl.generate.prompts import Decode, check_tokens, checked_prompt, end_tokens, padded_on_the_left
from jaxdl.generate.sampling import suppress
from jaxdl.nn import Cache

Stop = Literal["surely", "likely"]


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
    stop: Stop = "surely"
    """A sentence is done when its `width` best finished hypotheses cannot be surpassed by the likeliest unfinished one: `surely`, at whatever length that may end (HF's early_stopping="never"), or `likely`, if it ended at the present length (HF's early_stopping=False, its default)."""
    suppressed_tokens: tuple[int, ...] = ()
    """Tokens that are never chosen, such as padding. The probabilities of the others are not renormalised, as with HF's bad_words_ids."""

    def __post_init__(self) -> None:
        """Raises `UserError` for a value out of its bounds."""
        check_number("width", self.width, least=1, whole=True)
        check_number("length_penalty", self.length_penalty)
        check_number("offset", self.offset)
        if self.stop not in (accepted := get_args(Stop)):
            raise unknown("stop of a beam search", self.stop, accepted)
        check_suppressed(self.suppressed_tokens)

    def penalty(self, length: float | Array) -> float | Array:
        """`lp(length)`, what log probabilities are divided by."""
        return ((self.offset + length) / (self.offset + 1)) ** self.length_penalty


def beam_search(
    decode: Decode,
    variables: PyTree,
    prompt: Int[Array, "B T"],
    cache: Cache,
    *,
    steps: int,
    end: int | Sequence[int],
    beam: Beam = Beam(),
    valid: Bool[Array, "B T"] | None = None,
    rows_axis: int = 0,
) -> tuple[Int[Array, "B W steps"], Float[Array, "B W"]]:
    """The `W = beam.width` best continuations of each prompt, best first, and their scores; positions after an `end` are `end`, the first of several.

    Every step takes the `2 W` likeliest extensions of the current hypotheses. Those among the first `W` that end are finished; the likeliest `W` that do not end are kept, so a finished hypothesis never takes the place of an unfinished one. After `steps` tokens the remaining ones count as finished without an end, as in HF. Where fewer than `W` continuations exist, the other scores are −∞.

    `cache` is empty, with at least `T + steps − 1` slots and `B · W` rows: rows `b · W` to `(b + 1) · W − 1` belong to prompt `b`. Anything else in `variables` that `decode` reads row by row, such as an encoder's memory, is repeated in the same order. `rows_axis` is the axis of the rows in the cache's entries: 1 where a `Transformer` with `scan` has stacked its layers before it. The loop ends when all sentences are done. Padding of prompts and errors are those of `generate`.
    """
    ends = end_tokens(end)
    if not ends:
        raise UserError("a beam search ends hypotheses by a token: give its id as `end`")
    width = beam.width
    prompt, valid = checked_prompt(prompt, valid, cache, steps, rows=len(prompt) * width)
    prompt, valid = (jnp.repeat(x, width, axis=0) for x in (prompt, valid))
    check_tokens(decode, variables, prompt, cache, valid, ends, beam.suppressed_tokens)
    return _beam_search(decode, variables, prompt, cache, steps=steps, ends=ends, beam=beam, valid=valid, rows_axis=rows_axis)


@functools.partial(jax.jit, static_argnames=("decode", "steps", "beam", "ends", "rows_axis"))
def _beam_search(
    decode: Decode,
    variables: PyTree,
    prompt: Int[Array, "_ T"],
    cache: Cache,
    *,
    steps: int,
    ends: tuple[int, ...],
    beam: Beam,
    valid: Bool[Array, "_ T"],
    rows_axis: int,
) -> tuple[Int[Array, "B W steps"], Float[Array, "B W"]]:
    """With prompts that stand there `beam.width` times each."""
    width = beam.width
    batch = len(prompt) // width
    sentences = jnp.arange(batch)[:, None]
    prompt, valid = padded_on_the_left(prompt, valid)
    logits, cache = decode(variables, prompt, cache, valid)

    def best(scores: Float[Array, "B C"], *others: Array) -> tuple[Array, ...]:
        """The best `width`, with what belongs to them."""
        scores, kept = jax.lax.top_k(scores, width)
        return scores, *(other[sentences, kept] for other in others)

    def extend(step: Int[Array, ""], logits: Float[Array, "_ V"], found: tuple) -> tuple[tuple, Array, Array]:
        """With token number `step` of each hypothesis: what is found then, that token, and the row of the cache that each goes on from."""
        sums, written, scores, finished, searching = found
        likelihood = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        likelihood = suppress(likelihood, beam.suppressed_tokens)
        vocab_size = likelihood.shape[-1]
        extended = (sums[..., None] + likelihood.reshape(batch, width, vocab_size)).reshape(batch, -1)
        extended, chosen = jax.lax.top_k(extended, min(2 * width, extended.shape[-1]))
        origin, token = chosen // vocab_size, (chosen % vocab_size).astype(jnp.int32)
        candidates = written[sentences, origin].at[:, :, step].set(token)
        last = jnp.isin(token, jnp.array(ends)) | (step + 1 == steps)

        counts = last & (jnp.arange(token.shape[1]) < width) & searching[:, None]
        ended = jnp.where(counts, extended / beam.penalty(step + 1), -jnp.inf)
        merged = jnp.concatenate([finished, candidates], 1)
        scores, finished = best(jnp.concatenate([scores, ended], 1), merged)
        sums, written, origin, token = best(jnp.where(last, -jnp.inf, extended), candidates, origin, token)

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
    written = jnp.full((batch, width, steps), ends[0], jnp.int32)
    found = sums, written, jnp.full((batch, width), -jnp.inf), written, jnp.ones(batch, bool)
    found, token, rows = extend(jnp.int32(0), logits[:, -1], found)
    *_, (_, _, scores, finished, _) = jax.lax.while_loop(more, advance, (jnp.int32(1), token, rows, cache, found))
    return finished, scores
