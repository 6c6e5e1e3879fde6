from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from lib.statistics import Estimate, bootstrap, bootstrap_band, bootstrap_mean


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=40)
    ours = bootstrap_mean(values, n_resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.interval == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_coverage_is_near_the_level():
    """Of 300 samples of 40 normal values, about 95% of the intervals hold the true mean."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        estimate = bootstrap_mean(rng.normal(2.0, 1.0, size=40), n_resamples=400)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.89 <= hits / 300 <= 0.98


def test_all_three_forms_agree():
    curves = np.random.default_rng(1).normal(size=(16, 5))
    middle, low, high = bootstrap_band(curves, n_resamples=500, seed=4)
    value, low_2, high_2 = bootstrap(lambda rows: curves[rows].mean(0), 16, n_resamples=500, seed=4)
    np.testing.assert_allclose([value, middle], [curves.mean(0)] * 2)
    np.testing.assert_allclose([low, high], [low_2, high_2])
    one = bootstrap_mean(curves[:, 2], n_resamples=500, seed=4)
    assert one.interval == pytest.approx((low[2], high[2]))


def test_paired_difference_is_narrower_than_unpaired():
    rng = np.random.default_rng(2)
    base = rng.normal(scale=5, size=30)
    change = base + rng.normal(0.5, 0.1, size=30)
    paired = bootstrap_mean(change - base)
    assert paired.low > 0.4 and paired.high < 0.6


def test_undefined_resamples_are_left_out_and_values_are_not():
    value, low, high = bootstrap(lambda rows: np.nan if 0 not in rows else 1.0, 5, n_resamples=200)
    assert (value, low, high) == (1, 1, 1)
    with pytest.raises(ValueError, match="1 of 3 values are not finite"):
        bootstrap_mean([1.0, np.nan, 2.0])


def test_estimate_prints_its_interval():
    assert f"{Estimate(0.5, 0.25, 0.75):.2f}" == "0.50 [0.25, 0.75]"
