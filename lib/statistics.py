"""Intervals and tests: paired bootstrap over the units that were sampled (walks, prompts)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A value with its bootstrap percentile interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        return (self.low, self.high)

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


class Band(NamedTuple):
    """A curve [point] with a pointwise bootstrap percentile band."""

    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray


def resamples(n: int, n_resamples: int = 2000, seed: int = 0) -> Iterator[np.ndarray]:
    """Bootstrap resamples of n units: index arrays [n], the same for the same seed.

    Statistics that are compared share the seed, which makes the comparison paired.
    """
    rng = np.random.default_rng([seed, n])
    for _ in range(n_resamples):
        yield rng.integers(0, n, size=n)


def bootstrap(
    statistic: Callable[[np.ndarray], float | np.ndarray],
    n: int,
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile bootstrap of any statistic of the units with the given indices.

    Args:
        statistic: takes unit indices (with repetitions) and returns a number or an array. NaN
            marks a resample in which it is not defined; such resamples are left out.
        n: number of units.
        n_resamples, level, seed: of the interval.

    Returns:
        (value, low, high), each of the statistic's shape; value is the statistic of all units.
    """
    draws = np.stack([np.asarray(statistic(rows), dtype=float) for rows in resamples(n, n_resamples, seed)])
    tail = (1 - level) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail], axis=0)
    return np.asarray(statistic(np.arange(n)), dtype=float), low, high


def bootstrap_mean(
    values: np.ndarray, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of values [unit] with its percentile bootstrap interval over units.

    For a paired difference pass the differences: the interval is then that of the paired bootstrap.
    """
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).all():
        bad = (~np.isfinite(values)).sum()
        raise ValueError(f"{bad} of {values.size} values are not finite; leave them out first")
    band = bootstrap_band(values[:, None], n_resamples=n_resamples, level=level, seed=seed)
    return Estimate(*(float(curve[0]) for curve in band))


def bootstrap_band(
    values: np.ndarray, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Band:
    """Mean over units of curves [unit, point], with its pointwise percentile band."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    # A resample's mean is a weighted mean, so all of them are one matrix product.
    weights = np.stack([np.bincount(rows, minlength=n) for rows in resamples(n, n_resamples, seed)]) / n
    tail = (1 - level) / 2
    low, high = np.quantile(weights @ values, [tail, 1 - tail], axis=0)
    return Band(values.mean(axis=0), low, high)
