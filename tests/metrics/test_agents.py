"""Interquartile means and their intervals."""

import numpy as np

from jaxdl.metrics import interquartile_interval, interquartile_mean


def test_the_middle_half_is_averaged():
    assert interquartile_mean(np.array([-1000.0, 1, 2, 3, 4, 1000, 5, 0])) == (1 + 2 + 3 + 4) / 4
    np.testing.assert_allclose(interquartile_mean(np.arange(24.0).reshape(3, 8)), np.arange(24.0).reshape(3, 8).mean(1))


def test_an_interval_is_around_its_value_and_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        returns = random.standard_normal(16)
        low, high = interquartile_interval(returns, resamples=200)
        assert low <= interquartile_mean(returns) <= high
        covered += low <= 0 <= high
    assert covered >= 48
    assert interquartile_interval(np.full(8, 500.0)) == (500.0, 500.0)
