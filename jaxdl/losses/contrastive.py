"""Objectives that compare every image of a batch with every text."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def sigmoid_loss(
    image_embeddings: Float[Array, "B D"],
    text_embeddings: Float[Array, "B D"],
    log_temperature: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, ""]:
    """Pairwise sigmoid loss: summed over all B×B pairs, averaged over images (SigLIP, Algorithm 1).

    Embeddings must be L2-normalised; row `i` of both belongs together. Every pair is its own binary problem, so there is no softmax over the batch and no need to see it whole. The inverse temperature is `exp(log_temperature)`.
    """
    logits = image_embeddings @ text_embeddings.T * jnp.exp(log_temperature) + bias
    labels = 2 * jnp.eye(len(logits), dtype=logits.dtype) - 1
    return -jax.nn.log_sigmoid(labels * logits).sum() / len(logits)
