"""How like real examples generated ones are, by features of one's choice: those of Inception-v3 give the published FID, IS and KID."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from jaxdl.errors import UserError


def frechet_distance(features_a: Float[np.ndarray, "N D"], features_b: Float[np.ndarray, "M D"]) -> float:
    """Fréchet distance of two Gaussians with the means and unbiased covariances of the features, `‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)`, in float64 (FID: Heusel et al. 2017, eq. 6). From 0, which is best.

    The square root is taken through `Σ_a^½ Σ_b Σ_a^½`, which has the same eigenvalues and is symmetric, so that fewer examples than features, whose covariances are singular, are no special case. It is biased upwards by few examples: compare equal numbers. Raises `UserError` for fewer than two.
    """
    _check(features_a, features_b, least=2)
    (mean_a, covariance_a), (mean_b, covariance_b) = map(_gaussian, (features_a, features_b))
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_b @ root), 0)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return float(max(distance, 0.0))


def _gaussian(features: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "D D"]]:
    features = features.astype(np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def inception_score(probabilities: Float[np.ndarray, "N C"], splits: int = 10) -> tuple[float, float]:
    """`exp E KL(p(y|x) ‖ p(y))` of class probabilities of generated examples, from 1 to the number of classes, which is best: mean and standard deviation over `splits` consecutive parts (Salimans et al. 2016, section 4). Raises `UserError` for more splits than examples."""
    if not 1 <= splits <= len(probabilities):
        raise UserError(f"{splits} splits of {len(probabilities)} examples: choose from 1 to the number of examples")
    scores = []
    for part in np.array_split(probabilities.astype(np.float64), splits):
        joint = part * (_log(part) - _log(part.mean(0)))
        scores.append(np.exp(joint.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _log(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Of 0 some number, which is multiplied by 0."""
    return np.log(np.where(values > 0, values, 1.0))


def kernel_distance(features_a: Float[np.ndarray, "N D"], features_b: Float[np.ndarray, "M D"], block: int = 1024) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel `(x·y / D + 1)³` (KID: Bińkowski et al. 2018, section 4). 0 is expected of equal distributions, so that it may come out below.

    All examples are compared with all others, `block` rows at a time, not subsets of them. Raises `UserError` for fewer than two.
    """
    _check(features_a, features_b, least=2)

    a, b = features_a.astype(np.float64), features_b.astype(np.float64)

    def total(first: np.ndarray, second: np.ndarray) -> float:
        rows = (first[start : start + block] for start in range(0, len(first), block))
        return sum(float(((each @ second.T / second.shape[1] + 1) ** 3).sum()) for each in rows)

    def within(features: np.ndarray) -> float:
        itself = ((np.einsum("nd,nd->n", features, features) / features.shape[1] + 1) ** 3).sum()
        return (total(features, features) - itself) / (len(features) * (len(features) - 1))

    return float(within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b)))


def precision_recall(
    real: Float[np.ndarray, "N D"], generated: Float[np.ndarray, "M D"], k: int = 3, block: int = 1024
) -> tuple[float, float]:
    """The share of generated examples within the manifold of the real ones (precision, how faithful they are), and of real ones within that of the generated (recall, how much they cover), each from 0 to 1.

    A manifold is the union of the balls around all examples up to their k-th nearest other one (Kynkäänniemi et al. 2019, eq. 1 and 2). Raises `UserError` for no more than `k` examples.
    """
    _check(real, generated, least=k + 1)
    real, generated = real.astype(np.float64), generated.astype(np.float64)

    def inside(examples: np.ndarray, manifold: np.ndarray) -> float:
        radii = np.concatenate([np.partition(rows, k, axis=1)[:, k] for rows in _distances(manifold, manifold, block)])
        return float(np.concatenate([(rows <= radii).any(1) for rows in _distances(examples, manifold, block)]).mean())

    return inside(generated, real), inside(real, generated)


def _distances(first: Float[np.ndarray, "N D"], second: Float[np.ndarray, "M D"], block: int) -> Iterator[np.ndarray]:
    """Euclidean distances of some rows of the first to all of the second, block after block."""
    from scipy.spatial.distance import cdist

    for start in range(0, len(first), block):
        yield cdist(first[start : start + block], second)


def _check(first: np.ndarray, second: np.ndarray, least: int) -> None:
    if min(len(first), len(second)) < least:
        raise UserError(f"{len(first)} and {len(second)} examples are too few to compare: give at least {least} of each")
