"""What generation begins with: prompts, the room for what follows, and the tokens that end it."""

import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxdl.errors import UserError
from jaxdl.nn import Cache

Decode = Callable[[PyTree, Int[Array, "B T"], Cache, Bool[Array, "B T"]], tuple[Float[Array, "B T V"], Cache]]
"""`(variables, tokens, cache, valid) -> (logits, cache)`: decodes the next tokens of each row; `valid` is false for padding."""


def padded_on_the_left(prompt: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The real tokens of each row in their order, after the padding, which becomes token 0: the last one of each row is then real."""
    order = jnp.argsort(valid, axis=1, stable=True)
    prompt, valid = (jnp.take_along_axis(x, order, axis=1) for x in (prompt, valid))
    return jnp.where(valid, prompt, 0), valid


def end_tokens(end: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end a text: none, one or several. Raises `UserError` for what is no id."""
    try:
        return () if end is None else tuple(operator.index(token) for token in np.atleast_1d(end))
    except TypeError:
        raise UserError(f"end is {end}: give the id of the token that ends a text, or several") from None


def checked_prompt(
    prompt: Int[Array, "B T"], valid: Bool[Array, "B T"] | None, cache: Cache, steps: int, rows: int
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Prompt and `valid`, after it is seen that the cache has `rows` rows and room for them and for `steps` tokens."""
    if prompt.ndim != 2 or not prompt.size or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise UserError(f"a prompt is ids `B T` of at least one token, and was given as {prompt.dtype} {prompt.shape}")
    if not isinstance(steps, int | np.integer) or steps < 1:
        raise UserError(f"{steps} steps write nothing: give a number from 1 on")
    used = 0 if isinstance(cache.next, jax.core.Tracer) else int(cache.next)
    needed, have = prompt.shape[1] + int(steps) - 1, cache.slots - used
    if needed > have:
        raise UserError(
            f"a prompt of {prompt.shape[1]} tokens and {steps} steps need a cache of {needed} free slots, and it has {have}: make a larger one, or ask for fewer steps"
        )
    if len(cache.valid) != rows:
        raise UserError(
            f"the cache has {len(cache.valid)} rows and {rows} are needed, one for each row or hypothesis: make it so"
        )
    valid = jnp.ones(prompt.shape, bool) if valid is None else jnp.asarray(valid)
    if valid.shape != prompt.shape or valid.dtype != bool:
        raise UserError(f"valid is bool, of the prompt's shape {prompt.shape}, and was given as {valid.dtype} {valid.shape}")
    if not isinstance(valid, jax.core.Tracer) and (empty := np.flatnonzero(~np.asarray(valid).any(1))).size:
        raise UserError(f"row {empty[0]} of the prompts has no real token to continue: leave it out, or begin it with one")
    return jnp.asarray(prompt), valid


def check_tokens(
    decode: Decode,
    variables: PyTree,
    prompt: Int[Array, "B T"],
    cache: Cache,
    valid: Bool[Array, "B T"],
    ends: tuple[int, ...],
    suppressed: tuple[int, ...],
) -> None:
    """Raises `UserError` for tokens that the model has not, as far as they are known, and where all are suppressed."""
    vocab_size = jax.eval_shape(decode, variables, prompt, cache, valid)[0].shape[-1]
    for name, tokens in (("end", ends), ("suppressed_tokens", suppressed)):
        if beyond := [token for token in tokens if not 0 <= token < vocab_size]:
            raise UserError(f"{name} has the token {beyond[0]}, and the model has those from 0 to {vocab_size - 1}: leave it out")
    if len(set(suppressed)) >= vocab_size:
        raise UserError(f"all {vocab_size} tokens are suppressed, so that none is left: suppress fewer")
    if any(isinstance(x, jax.core.Tracer) for x in (prompt, valid)):
        return
    seen = np.asarray(prompt)[np.asarray(valid)]
    if seen.min() < 0 or seen.max() >= vocab_size:  # Which of them it takes all the same, the model knows: here it sees them.
        jax.eval_shape(lambda variables, cache: decode(variables, prompt, cache, valid), variables, cache)
