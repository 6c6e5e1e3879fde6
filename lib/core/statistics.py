"""Intervals and tests: paired bootstrap over the units that were sampled (walks, prompts), rates, agreement
of two judges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.spatial
import scipy.stats

MOST_UNDEFINED = 0.05  # share of resamples


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


def resamples(
    n: int, n_resamples: int = 2000, seed: int = 0, strata: Sequence[Hashable] | None = None
) -> Iterator[np.ndarray]:
    """Bootstrap resamples of n units: index arrays [n], the same for the same seed.

    Statistics that are compared share the seed, which makes the comparison paired.

    Args:
        strata: kind of each unit [n], of which the sample holds a fixed number: every resample holds as many.
            Units that are alone of their kind are drawn among one another.
    """
    if n < 1:
        raise ValueError("there is no unit to resample")
    rng = np.random.default_rng([seed, n])
    if strata is None:
        for _ in range(n_resamples):
            yield rng.integers(0, n, size=n)
        return
    groups = _strata(strata, n)
    for _ in range(n_resamples):
        rows = np.empty(n, dtype=int)
        for members in groups:
            rows[members] = members[rng.integers(0, len(members), size=len(members))]
        yield rows


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
        n: number of units, at least one.
        n_resamples, level, seed: of the interval.

    Returns:
        (value, low, high), each of the statistic's shape; value is the statistic of all units. The ends are
        NaN where more than `MOST_UNDEFINED` of the resamples are undefined: what is left is no fair draw.
    """
    draws = np.stack([np.asarray(statistic(rows), dtype=float) for rows in resamples(n, n_resamples, seed)])
    tail, undefined = (1 - level) / 2, np.isnan(draws)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all of them NaN
        ends = np.nanquantile(draws, [tail, 1 - tail], axis=0)
    low, high = np.where(undefined.mean(axis=0) > MOST_UNDEFINED, np.nan, ends)
    return np.asarray(statistic(np.arange(n)), dtype=float), low, high


def bootstrap_mean(
    values: np.ndarray,
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    strata: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """Mean of values [unit] with its percentile bootstrap interval over units.

    For a paired difference pass the differences: the interval is then that of the paired bootstrap.
    Arguments as for `bootstrap_band`.
    """
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).all():
        bad = (~np.isfinite(values)).sum()
        raise ValueError(f"{bad} of {values.size} values are not finite; leave them out first")
    options = {"n_resamples": n_resamples, "level": level, "seed": seed}
    band = bootstrap_band(values[:, None], **options, strata=strata, bounds=bounds)
    return Estimate(*(float(curve[0]) for curve in band))


def student_mean(values: np.ndarray, *, level: float = 0.95) -> Estimate:
    """Mean of values [unit] with Student's t-interval, for units too few to resample, such as four draws.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"two finite values at least make an interval, not {values}")
    middle, error = values.mean(), scipy.stats.sem(values)
    low, high = scipy.stats.t.interval(level, len(values) - 1, middle, error) if error else (middle, middle)
    return Estimate(float(middle), float(low), float(high))


def jackknife(
    statistic: Callable[[np.ndarray], float | np.ndarray], n: int, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of n units with the interval that leaving out one at a time gives (Tukey 1958).

    For fits that a bootstrap would bias, because its resamples hold fewer different units.

    Args:
        statistic: takes unit indices and returns a number or an array.

    Returns:
        (value, low, high), each of the statistic's shape.
    """
    every = np.arange(n)
    left_out = np.stack([np.asarray(statistic(np.delete(every, i)), dtype=float) for i in every])
    error = np.sqrt((n - 1) * left_out.var(axis=0))
    value = np.asarray(statistic(every), dtype=float)
    half = scipy.stats.t.ppf((1 + level) / 2, n - 1) * error
    return value, value - half, value + half


def bootstrap_band(
    values: np.ndarray,
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    strata: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Band:
    """Mean over units of curves [unit, point], with its pointwise percentile band.

    Args:
        values: [unit, point].
        n_resamples, level, seed: of the band.
        strata: see `resamples`. Where each stratum's values are all equal a bootstrap within them has no
            width; there units are drawn as if there were none.
        bounds: (low, high) between which a value can lie. Where all values are equal, no bootstrap has a
            width; with bounds the interval is then Wilson's: so many units as 0 of n leaves possible may
            lie at the other end. For a rate of 0 or 1 that is Wilson's own interval.

    Raises:
        ValueError: a value outside of the bounds, or strata of another number of units.
    """
    values = np.asarray(values, dtype=float)
    if bounds is not None and not ((values >= bounds[0]) & (values <= bounds[1])).all():
        raise ValueError(f"values from {values.min():.3g} to {values.max():.3g} are not within {bounds}")
    if not len(values):
        raise ValueError("there is no unit to take a mean of")
    n, tail, middle = len(values), (1 - level) / 2, values.sum(axis=0) / len(values)

    def quantiles(strata: Sequence[Hashable] | None) -> np.ndarray:
        # A resample's mean is a weighted mean, so all of them are one matrix product.
        drawn = resamples(n, n_resamples, seed, strata)
        counts = np.stack([np.bincount(rows, minlength=n) for rows in drawn])
        return np.quantile(counts @ values / n, [tail, 1 - tail], axis=0)

    low, high = quantiles(strata)
    if strata is not None and (flat := high - low < 1e-12).any():
        low, high = np.where(flat, quantiles(None), (low, high))
    alike, most = np.ptp(values, axis=0) == 0, wilson(0, n, level=level).high
    least, largest = bounds if bounds is not None else (middle, middle)
    low = np.where(alike, middle - most * (middle - least), low)
    high = np.where(alike, middle + most * (largest - middle), high)
    return Band(middle, low, high)


def paired_difference(
    a: np.ndarray, b: np.ndarray, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of a - b, values [unit] of the same units, with its paired bootstrap interval over units."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"paired values must be [unit] and [unit], not {a.shape} and {b.shape}")
    return bootstrap_mean(a - b, n_resamples=n_resamples, level=level, seed=seed)


def known_mean(values: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray | float:
    """Mean of the finite values; NaN where there is none."""
    mean = np.ma.masked_invalid(values).mean(axis)
    return float(mean) if np.ndim(mean) == 0 and mean is not np.ma.masked else np.ma.filled(mean, np.nan)


def derangement(groups: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """An order in which every item is replaced by another one of its group, for shuffled nulls [item].

    Raises:
        ValueError: a group of one.
    """
    number = {label: i for i, label in enumerate(dict.fromkeys(groups))}
    labels, found = np.array([number[label] for label in groups], dtype=int), np.arange(len(groups))
    rng = np.random.default_rng(seed)
    for label in number:
        members = np.flatnonzero(labels == number[label])
        if len(members) < 2:
            raise ValueError(f"group {label!r} has one item, which no other can replace; take more items")
        cycle = rng.permutation(members)
        found[cycle] = np.roll(cycle, 1)
    return found


def wilson(successes: int, n: int, *, level: float = 0.95) -> Estimate:
    """A rate, successes of n independent trials, with Wilson's score interval: right near 0 and 1 too."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} trials is no rate")
    found = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Estimate(successes / n, float(found.low), float(found.high))


class Agreement(NamedTuple):
    """How far two judges agree on the same units."""

    table: np.ndarray  # int [label of a, label of b]
    observed: Estimate  # share of units with the same label
    kappa: Estimate
    ac1: Estimate


def confusion(a: Sequence[Hashable], b: Sequence[Hashable], labels: Sequence[Hashable]) -> np.ndarray:
    """Counts int [label of a, label of b] over units.

    Raises:
        ValueError: a label that is not among `labels` (leave invalid verdicts out first), or different
            lengths.
    """
    cells = _cells(a, b, labels)
    return np.bincount(cells, minlength=len(labels) ** 2).reshape(len(labels), len(labels))


def cohen_kappa(table: np.ndarray) -> float:
    """Cohen's kappa of a confusion table: agreement beyond that of independent judges with these margins.

    It falls to zero when nearly all units have one label, however well the judges agree: report `gwet_ac1`
    beside it. NaN when both judges give all units the same label, or there are no units.
    """
    share = _shares(table)
    return _beyond_chance(np.trace(share), share.sum(axis=0) @ share.sum(axis=1))


def gwet_ac1(table: np.ndarray) -> float:
    """Gwet's AC1 of a confusion table: chance agreement is taken from the units that are hard to label.

    NaN without units.
    """
    share = _shares(table)
    margin = (share.sum(axis=0) + share.sum(axis=1)) / 2
    return _beyond_chance(np.trace(share), (margin * (1 - margin)).sum() / (len(margin) - 1))


def agreement(
    a: Sequence[Hashable],
    b: Sequence[Hashable],
    labels: Sequence[Hashable],
    *,
    units: Sequence[Hashable] | None = None,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Confusion table, observed agreement, kappa and AC1, with bootstrap intervals over units.

    Where kappa is not defined (see `cohen_kappa`) its estimate is NaN.

    Args:
        a, b: labels by two judges.
        labels: all that there are.
        units: what each pair of labels belongs to, such as the request of an answer: pairs of one unit are
            drawn together. By default each is a unit of its own.
        n_resamples, level, seed: of the intervals.
    """
    cells, n = _cells(a, b, labels), len(labels)
    if not len(cells):
        raise ValueError("there is no unit to agree on")
    units = range(len(cells)) if units is None else units
    if len(units) != len(cells):
        raise ValueError(f"a unit for each of {len(cells)} pairs of labels is needed, not {len(units)}")
    places = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    counts = np.zeros((len(places), n**2), dtype=int)  # [unit, cell]
    np.add.at(counts, ([places[unit] for unit in units], cells), 1)

    def measures(rows: np.ndarray) -> np.ndarray:
        table = counts[rows].sum(axis=0).reshape(n, n)
        return np.array([np.trace(table) / table.sum(), cohen_kappa(table), gwet_ac1(table)])

    table = confusion(a, b, labels)
    if np.isnan(cohen_kappa(table)):  # so is that of every resample: all units lie in one cell
        nan = Estimate(np.nan, np.nan, np.nan)
        return Agreement(table, Estimate(1.0, 1.0, 1.0), nan, Estimate(1.0, 1.0, 1.0))
    curves = bootstrap(measures, len(counts), n_resamples=n_resamples, level=level, seed=seed)
    return Agreement(table, *(Estimate(*map(float, measure)) for measure in zip(*curves, strict=True)))


def _strata(strata: Sequence[Hashable], n: int) -> list[np.ndarray]:
    """Units of each stratum; those that are alone in theirs are one."""
    if len(strata) != n:
        raise ValueError(f"a stratum for each of {n} units is needed, not {len(strata)}")
    members: dict[Hashable, list[int]] = {}
    for unit, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(unit)
    several = [np.array(units) for units in members.values() if len(units) > 1]
    alone = [units[0] for units in members.values() if len(units) == 1]
    return [*several, np.array(alone)] if alone else several


def _cells(a: Sequence[Hashable], b: Sequence[Hashable], labels: Sequence[Hashable]) -> np.ndarray:
    """Cell of the flattened confusion table that each unit lies in."""
    index = {label: i for i, label in enumerate(labels)}
    if len(index) < len(labels) or len(index) < 2:
        raise ValueError(f"at least two different labels are needed, not {list(labels)}")
    if len(a) != len(b):
        raise ValueError(f"two judges of the same units are needed, not of {len(a)} and {len(b)}")
    if unknown := {*a, *b} - set(index):
        raise ValueError(f"not among the labels {list(labels)}: {sorted(map(str, unknown))}")
    return np.array([index[x] * len(index) + index[y] for x, y in zip(a, b, strict=True)], dtype=int)


def _shares(table: np.ndarray) -> np.ndarray:
    table = np.asarray(table, dtype=float)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < 2 or (table < 0).any():
        raise ValueError(f"a confusion table is [label, label] of counts, not {table.tolist()}")
    return table / table.sum() if table.any() else np.full_like(table, np.nan)


def _beyond_chance(observed: float, expected: float) -> float:
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def means_of(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Class means [..., class, d] of sums [..., class, d] and counts [..., class]; NaN where a count is 0."""
    return sums / np.where(counts > 0, counts, np.nan)[..., None]


def participation_ratio(singular_values: np.ndarray) -> float:
    """(sum s^2)^2 / sum s^4: how many directions share the variance, 1 to their number."""
    variance = _singular_values(singular_values) ** 2
    return float(variance.sum() ** 2 / (variance**2).sum())


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of s / sum s (Roy & Vetterli 2007), 1 to their number."""
    share = _singular_values(singular_values)
    share = share[share > 0] / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _singular_values(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise ValueError(f"singular values must be finite, none negative and not all 0, not {values}")
    return values
