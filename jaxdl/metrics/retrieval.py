"""How well one thing finds another."""

import numpy as np
from jaxtyping import Float, Int


def recall_at(
    similarity: Float[np.ndarray, "Q C"], relevant: Int[np.ndarray, "Q"] | None = None, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[int, float]:
    """The share of queries whose relevant candidate is among the k most similar, for each k.

    `relevant[q]` is the index of the one right candidate of query q; query q belongs to candidate q where it is left out. Ties count against the query, so that a constant similarity earns nothing.
    """
    relevant = np.arange(len(similarity)) if relevant is None else relevant
    own = np.take_along_axis(similarity, relevant[:, None], axis=1)
    rank = (similarity >= own).sum(axis=1)
    return {k: float((rank <= k).mean()) for k in ks}
