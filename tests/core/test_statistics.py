from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.stats

from lib.core.statistics import (
    agreement,
    bootstrap,
    bootstrap_band,
    bootstrap_mean,
    cohen_kappa,
    confusion,
    derangement,
    gwet_ac1,
    jackknife,
    known_mean,
    paired_difference,
    resamples,
    student_mean,
    wilson,
)


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=40)
    ours = bootstrap_mean(values, n_resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.interval == pytest.approx((theirs.low, theirs.high), abs=0.02)


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
    paired = paired_difference(change, base)
    assert paired == bootstrap_mean(change - base)
    assert paired.low > 0.4 and paired.high < 0.6
    with pytest.raises(ValueError, match="30, 1"):  # would broadcast to all pairs
        paired_difference(change, base[:, None])


def test_undefined_resamples_are_left_out_and_values_are_not():
    value, low, high = bootstrap(lambda rows: np.nan if len({*rows}) == 1 else 1.0, 5, n_resamples=2000)
    assert (value, low, high) == (1, 1, 1)
    ends = bootstrap(lambda rows: np.nan if 0 not in rows else 1.0, 5, n_resamples=200)[1:]
    assert np.isnan(ends).all(), "of a third of the resamples nothing is known"
    for nobody in (lambda: bootstrap(len, 0), lambda: bootstrap_band(np.ones((0, 3)))):
        with pytest.raises(ValueError, match="no unit"):
            nobody()
    with pytest.raises(ValueError, match="1 of 3 values"):
        bootstrap_mean([1.0, np.nan, 2.0])


# --- rates


@pytest.mark.parametrize("successes, n, level", [(0, 10, 0.95), (3, 10, 0.9), (1, 1, 0.95)])
def test_wilson_agrees_with_scipy(successes, n, level):
    ours = wilson(successes, n, level=level)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert ours.value == successes / n
    assert ours.interval == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_of_no_rate():
    for successes, n in ((0, 0), (6, 5)):
        with pytest.raises(ValueError, match=f"{successes} successes of {n}"):
            wilson(successes, n)


# --- agreement


def naive_kappa(a, b, labels):
    """From the units, without a table."""
    n = len(a)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    expected = sum((list(a).count(label) / n) * (list(b).count(label) / n) for label in labels)
    return (observed - expected) / (1 - expected)


def naive_ac1(a, b, labels):
    n, q = len(a), len(labels)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    share = {label: (list(a).count(label) + list(b).count(label)) / (2 * n) for label in labels}
    expected = sum(share[label] * (1 - share[label]) for label in labels) / (q - 1)
    return (observed - expected) / (1 - expected)


@pytest.mark.parametrize("labels", [(0.0, 0.5, 1.0), ("a", "b", "c", "d")])
def test_agreement_agrees_with_naive_ones(labels):
    rng = np.random.default_rng(len(labels))
    a = [labels[i] for i in rng.integers(0, len(labels), 60)]
    b = [x if rng.random() < 0.6 else labels[rng.integers(len(labels))] for x in a]
    table = confusion(a, b, labels)
    for i, x in enumerate(labels):
        for j, y in enumerate(labels):
            assert table[i, j] == sum(pair == (x, y) for pair in zip(a, b, strict=True))
    assert cohen_kappa(table) == pytest.approx(naive_kappa(a, b, labels))
    assert gwet_ac1(table) == pytest.approx(naive_ac1(a, b, labels))
    summary = agreement(a, b, labels, n_resamples=300)
    np.testing.assert_array_equal(summary.table, table)
    assert summary.observed.value == pytest.approx(np.mean([x == y for x, y in zip(a, b, strict=True)]))
    assert summary.kappa.value == pytest.approx(naive_kappa(a, b, labels))
    assert summary.ac1.value == pytest.approx(naive_ac1(a, b, labels))
    draws = [naive_kappa([a[i] for i in rows], [b[i] for i in rows], labels) for rows in resamples(60, 300)]
    assert summary.kappa.interval == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_agreement_draws_the_pairs_of_a_unit_together():
    rng = np.random.default_rng(0)
    units = [f"request {i}" for i in rng.integers(0, 12, 60)]
    a, b = rng.integers(0, 2, (2, 60)).tolist()
    summary = agreement(a, b, (0, 1), units=units, n_resamples=300)
    names, draws = list(dict.fromkeys(units)), []
    for rows in resamples(len(names), 300):
        drawn = [i for row in rows for i in range(60) if units[i] == names[row]]
        draws.append(naive_ac1([a[i] for i in drawn], [b[i] for i in drawn], (0, 1)))
    assert summary.ac1.interval == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert summary.ac1.value == pytest.approx(naive_ac1(a, b, (0, 1)))
    with pytest.raises(ValueError, match="unit"):
        agreement(a, b, (0, 1), units=names)


def test_agreement_on_one_label_has_no_kappa():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = agreement([1, 1, 1], [1, 1, 1], (0, 1), n_resamples=50)
    assert np.isnan(summary.kappa).all()
    assert summary.observed == summary.ac1 == (1, 1, 1)
    assert np.isnan(cohen_kappa(np.zeros((2, 2)))) and np.isnan(gwet_ac1(np.zeros((2, 2))))


@pytest.mark.parametrize(
    "a, b, labels, message",
    [
        ([0, None], [0, 1], (0, 1), "None"),
        ([0, 1], [0], (0, 1), "of 2 and 1"),
        ([0], [0], (0, 0), "two different labels"),
        ([], [], (0, 1), "no unit"),
    ],
)
def test_agreement_of_what_can_not_be_compared(a, b, labels, message):
    with pytest.raises(ValueError, match=message):
        agreement(a, b, labels)


def test_table_that_is_none():
    for table in ([[1, 2, 3], [4, 5, 6]], [[1, -1], [0, 2]]):
        with pytest.raises(ValueError, match="a confusion table is"):
            cohen_kappa(table)


def test_derangement_stays_in_the_group_and_moves_everyone():
    groups = ["a"] * 5 + ["b"] * 2 + ["a"] * 3
    order = derangement(groups, seed=1)
    assert sorted(order) == list(range(10)) and not (order == np.arange(10)).any()
    assert [groups[i] for i in order] == groups
    assert (order == derangement(groups, seed=1)).all() and (order != derangement(groups, seed=2)).any()
    with pytest.raises(ValueError, match="'c'"):
        derangement([*groups, "c"])


@pytest.mark.filterwarnings("error")
def test_known_mean_leaves_out_what_is_missing():
    values = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
    assert known_mean(values) == 2.0
    np.testing.assert_array_equal(known_mean(values, 1), [2.0, np.nan])


# --- strata, and samples without spread


def test_resamples_within_strata_hold_as_many_of_each():
    strata = ["a"] * 5 + ["b"] * 3 + ["c", "d"]
    rows = np.stack(list(resamples(10, 200, strata=strata)))
    assert (rows[:, :5] < 5).all() and ((rows[:, 5:8] >= 5) & (rows[:, 5:8] < 8)).all()
    assert {*rows[:, 8:].flatten()} == {8, 9}, "units alone of their kind are drawn among one another"
    with pytest.raises(ValueError, match="10 units"):
        next(resamples(10, 1, strata="abc"))


def test_interval_within_strata_is_that_of_the_stratified_mean():
    """Its standard error leaves out what lies between the strata."""
    rng = np.random.default_rng(5)
    strata = np.repeat(np.arange(4), 25)
    values = 3.0 * strata + rng.normal(size=100)
    within = bootstrap_mean(values, strata=strata)
    error = np.sqrt(np.mean([values[strata == s].var() / 25 for s in range(4)]) / 4)
    assert np.subtract(*within.interval[::-1]) == pytest.approx(2 * 1.96 * error, rel=0.08)
    across = bootstrap_mean(values)
    assert across.high - across.low > 3 * (within.high - within.low)


def test_strata_that_are_each_constant_are_pooled():
    values = np.repeat([0.0, 0.0, 1.0], 16)
    assert bootstrap_mean(values, strata=np.repeat([0, 1, 2], 16)) == bootstrap_mean(values)


@pytest.mark.parametrize(("value", "n"), [(0.0, 112), (1.0, 112), (1.0, 7)])
def test_rate_of_none_or_all_has_wilsons_interval(value, n):
    ours = bootstrap_mean(np.full(n, value), bounds=(0, 1), strata=np.arange(n) % 3)
    assert ours == pytest.approx(wilson(int(value * n), n))
    assert bootstrap_mean(np.full(n, value)).interval == pytest.approx((value, value))


def test_constant_difference_may_lie_either_way():
    ours, share = bootstrap_mean(np.zeros(50), bounds=(-1, 1)), wilson(0, 50).high
    assert ours == pytest.approx((0, -share, share))
    mixed = np.stack([np.zeros(50), np.arange(50) % 2], axis=1)
    band = bootstrap_band(mixed, bounds=(0, 1))
    assert (band.low[0], band.high[0]) == pytest.approx((0, share))
    assert band.high[1] == bootstrap_band(mixed).high[1], "what has a spread keeps its bootstrap"
    with pytest.raises(ValueError, match="0.5"):
        bootstrap_band(mixed, bounds=(0, 0.5))


def test_student_mean_is_the_textbook_interval():
    found = student_mean(np.array([0.26, 0.27, 0.70, 0.74]))
    # Mean .4925, standard error .1316, 3.182 of them for four values.
    assert found.value == pytest.approx(0.4925)
    assert found.high - found.value == pytest.approx(0.4189, abs=5e-4)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    with pytest.raises(ValueError, match="two"):
        student_mean(np.array([1.0]))


def test_jackknife_of_a_mean_is_students_interval_and_of_a_fit_covers_it():
    values = np.random.default_rng(0).normal(size=9)
    assert jackknife(lambda rows: values[rows].mean(), 9) == pytest.approx(tuple(student_mean(values)))
    inside = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=20)
        y = 2 * x + rng.normal(size=20)
        _, low, high = jackknife(lambda rows, x=x, y=y: (x[rows] @ y[rows]) / (x[rows] @ x[rows]), 20)
        inside += low < 2 < high
    assert 0.91 < inside / 400 < 0.99
