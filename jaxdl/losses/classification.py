"""Which of several classes it is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*batch C"],
    labels: Int[Array, "*batch"],
    *,
    smoothing: float = 0.0,
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Mean over the batch of `−Σ_c q_c · log softmax(logits)_c`, in nats, where `q` is 1 for the label and 0 elsewhere.

    `smoothing` mixes `q` with the uniform distribution, `q ← (1 − smoothing) · q + smoothing / C` (Szegedy et al. 2016, section 7; torch's `label_smoothing`). The mean is over the targets where the mask is true, and 0 where none is. The softmax is never formed, so that large logits do no harm; computed in float32 or wider. A label outside of 0 … C − 1 is not noticed where the mask is false, and gives NaN elsewhere.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    valid = (labels >= 0) & (labels < logits.shape[-1])
    index = jnp.where(valid, labels, 0)
    value = -jnp.take_along_axis(log_probabilities, index[..., None], axis=-1)[..., 0]
    if smoothing:
        value = (1 - smoothing) * value - smoothing * log_probabilities.mean(-1)
    value = jnp.where(valid, value, jnp.nan)
    if mask is None:
        return value.mean()
    return jnp.where(mask, value, 0).sum() / jnp.maximum(mask.sum(), 1)


def soft_cross_entropy(
    logits: Float[Array, "*batch C"], targets: Float[Array, "*batch C"], *, smoothing: float = 0.0
) -> Float[Array, ""]:
    """Mean over the batch of `−Σ_c q_c · log softmax(logits)_c`, in nats, for targets `q` that share their 1 among several classes, as those of mixed pictures do.

    With one-hot targets it is `cross_entropy`, whose `smoothing` it has. Computed in float32 or wider. Targets are taken as they are: it is not seen whether they sum to 1.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    targets = (1 - smoothing) * targets + smoothing / logits.shape[-1]
    return -(targets * log_probabilities).sum(-1).mean()
