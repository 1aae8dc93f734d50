"""Our side of a comparison of training steps."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Key

from jaxdl.training import Batch, Objective, Update, init_state, make_step


def training_step(
    objective: Objective, optimizer: optax.GradientTransformation, init: Callable[[Key[Array, ""]], dict[str, Any]], batch: Batch
) -> Callable[[], None]:
    """A function that makes one step on `batch`, compiled as in training, and waits for it."""
    update = Update(objective, optimizer)
    state = init_state(init, [update], seed=0)
    step = jax.jit(make_step(update), donate_argnums=0)

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state)

    return run
