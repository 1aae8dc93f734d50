"""Objectives that compare every image of a batch with every text."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdl.errors import UserError
from jaxdl.losses.classification import cross_entropy


def sigmoid_loss(
    image_embeddings: Float[Array, "B D"],
    text_embeddings: Float[Array, "B D"],
    log_temperature: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Pairwise sigmoid loss: summed over all B×B pairs, averaged over images (SigLIP, Algorithm 1).

    Embeddings must be L2-normalised; row `i` of both belongs together. Every pair is its own binary problem, so there is no softmax over the batch and no need to see it whole. The inverse temperature is `exp(log_temperature)`.

    `chunk_size` compares that many texts at a time, in the backward pass too: B×chunk_size logits are held and not B×B. `axis_name` is for one device's rows of a larger batch, under `pmap` or `shard_map`: the texts go around the ring of devices (SigLIP, section 3.3), and the mean over the devices is the loss of the whole batch. Raises `UserError` if the chunks do not divide the rows.
    """
    count = len(image_embeddings)
    chunk_size = _checked(chunk_size, count)

    def pairs(texts: Float[Array, "C D"], partners: Int[Array, "C"]) -> Float[Array, ""]:
        """Summed over all images and these texts; `partners` are the images that the texts belong to."""
        logits = image_embeddings @ texts.T * jnp.exp(log_temperature) + bias
        labels = jnp.where(jnp.arange(count)[:, None] == partners, 1, -1)
        return -jax.nn.log_sigmoid(labels * logits).sum()

    def compare(texts: Float[Array, "B D"], partners: Int[Array, "B"]) -> Float[Array, ""]:
        if chunk_size == count:
            return pairs(texts, partners)
        chunks = texts.reshape(-1, chunk_size, texts.shape[-1]), partners.reshape(-1, chunk_size)
        return jax.lax.map(lambda chunk: jax.checkpoint(pairs)(*chunk), chunks).sum()

    if axis_name is None:
        return compare(text_embeddings, jnp.arange(count)) / count

    devices = jax.lax.axis_size(axis_name)

    def turn(texts: Float[Array, "B D"], step: Int[Array, ""]) -> tuple[Float[Array, "B D"], Float[Array, ""]]:
        partners = jnp.where(step == 0, jnp.arange(count), -1)  # Later texts belong to images of other devices.
        total = jax.checkpoint(compare)(texts, partners)
        return jax.lax.ppermute(texts, axis_name, [(source, (source + 1) % devices) for source in range(devices)]), total

    return jax.lax.scan(turn, text_embeddings, jnp.arange(devices))[1].sum() / count


def softmax_loss(
    image_embeddings: Float[Array, "B D"],
    text_embeddings: Float[Array, "B D"],
    log_temperature: Float[Array, ""],
    *,
    largest_scale: float = 100.0,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Symmetric cross-entropy: which text belongs to each image, and which image to each text, as the mean of both questions (CLIP, figure 3; InfoNCE, van den Oord et al. 2018, eq. 4, both ways).

    Embeddings must be L2-normalised; row `i` of both belongs together. Cosine similarities are multiplied by `exp(log_temperature)`, but by no more than `largest_scale` (CLIP, section 2.5). A parameter beyond that has no gradient, which could bring it back: keep it within by the update's `project`, as `experiments/clip.py` does.

    `chunk_size` asks that many images, and then texts, at a time, in the backward pass too: chunk_size×B logits are held and not B×B. `axis_name` is for one device's rows of a larger batch, under `pmap` or `shard_map`: each device compares its own with all that the others have (CLIP, section 2.5), and the mean over the devices is the loss of the whole batch. Raises `UserError` if the chunks do not divide the rows.
    """
    count = len(image_embeddings)
    chunk_size = _checked(chunk_size, count)
    limit = math.log(largest_scale)
    scale = jnp.exp(jnp.where(log_temperature > limit, limit, log_temperature))  # At the limit itself there is a gradient.
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * count

    def one_way(asked: Float[Array, "B D"], answers: Float[Array, "B D"]) -> Float[Array, ""]:
        if axis_name is not None:
            answers = jax.lax.all_gather(answers, axis_name, tiled=True)

        def choose(asked: Float[Array, "C D"], partners: Int[Array, "C"]) -> Float[Array, ""]:
            return cross_entropy(scale * asked @ answers.T, partners)

        partners = first + jnp.arange(count)
        if chunk_size == count:
            return choose(asked, partners)
        chunks = asked.reshape(-1, chunk_size, asked.shape[-1]), partners.reshape(-1, chunk_size)
        return jax.lax.map(lambda chunk: jax.checkpoint(choose)(*chunk), chunks).mean()

    return (one_way(image_embeddings, text_embeddings) + one_way(text_embeddings, image_embeddings)) / 2


def _checked(chunk_size: int | None, count: int) -> int:
    chunk_size = count if chunk_size is None else min(chunk_size, count)
    if chunk_size < 1 or count % chunk_size:
        raise UserError(f"{count} texts cannot be cut into chunks of {chunk_size}: choose a divisor of {count}")
    return chunk_size
