"""What is said of several agents: no mean that one of them decides, and no number without its interval."""

import numpy as np
from jaxtyping import Float


def interquartile_mean(returns: Float[np.ndarray, "*batch S"]) -> Float[np.ndarray, "*batch"]:
    """The mean of the middle half of the last axis (Agarwal et al. 2021, arXiv:2108.13264, section 4.3)."""
    from scipy import stats

    return np.asarray(stats.trim_mean(returns, 0.25, axis=-1))


def interquartile_interval(
    returns: Float[np.ndarray, "S"], confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Of `interquartile_mean`, by the percentile bootstrap over agents (ibid.), the same at every call; the value itself where there is one agent, or all are alike."""
    middle = float(interquartile_mean(returns))
    if np.ptp(returns) == 0:
        return middle, middle
    from scipy import stats

    found = stats.bootstrap(
        (returns,),
        lambda x, axis=-1: interquartile_mean(np.moveaxis(x, axis, -1)),
        confidence_level=confidence,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
