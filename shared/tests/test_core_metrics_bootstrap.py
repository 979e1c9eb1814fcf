from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.metrics import (
    Interval,
    bootstrap,
    bootstrap_interval,
    proportion_interval,
    seed_interval,
)

RNG = np.random.default_rng(7)
SKEWED = RNG.lognormal(sigma=1.0, size=60)


def variance(x: np.ndarray) -> float:
    return float(x.var(ddof=1))


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize(
    ("statistic", "oracle"), [("mean", np.mean), (np.median, np.median), (variance, variance)]
)
def test_scipy_gives_the_same_interval(method: str, statistic: object, oracle: object) -> None:
    ours = bootstrap_interval(SKEWED, statistic=statistic, method=method, resamples=20_000, level=0.9)
    theirs = scipy.stats.bootstrap(
        (SKEWED,), oracle, n_resamples=20_000, confidence_level=0.9, method=method, rng=1, vectorized=False
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.estimate == pytest.approx(float(oracle(SKEWED)))
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_bca_differs_from_percentile_on_skewed_data_in_the_right_direction() -> None:
    plain = bootstrap_interval(SKEWED, resamples=10_000)
    corrected = bootstrap_interval(SKEWED, resamples=10_000, method="bca")
    assert corrected.low > plain.low  # positive skew: both ends move up
    assert corrected.high > plain.high


def test_a_large_normal_sample_gives_the_normal_interval() -> None:
    x = np.random.default_rng(1).normal(3.0, 2.0, size=10_000)
    interval = bootstrap_interval(x, resamples=4000)
    half = 1.959964 * x.std() / math.sqrt(len(x))
    assert interval.estimate == pytest.approx(x.mean(), rel=1e-12)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.04)
    assert interval.level == 0.95
    assert interval.method == "percentile over 10000 items"


def test_two_groups_enumerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups give three resamples, with probabilities 1/4, 1/2, 1/4: their means are the quantiles."""
    values = [1.0, 2.0, 3.0, 10.0]
    groups = ["a", "a", "a", "b"]
    wide = bootstrap_interval(values, groups=groups, level=0.6)
    assert (wide.low, wide.estimate, wide.high) == (2.0, 4.0, 10.0)
    narrow = bootstrap_interval(values, groups=groups, level=0.4)
    assert (narrow.low, narrow.high) == (4.0, 4.0)
    called = bootstrap_interval(values, groups=groups, level=0.6, statistic=np.mean)
    assert (called.low, called.estimate, called.high) == (2.0, 4.0, 10.0)


def test_groups_of_one_are_no_groups_and_order_does_not_matter() -> None:
    x = RNG.normal(size=50)
    assert bootstrap_interval(x, groups=np.arange(50)).low == bootstrap_interval(x).low
    groups = RNG.integers(0, 12, size=50)
    shuffle = RNG.permutation(50)
    first = bootstrap_interval(x, groups=groups)
    second = bootstrap_interval(x[shuffle], groups=groups[shuffle])
    assert (first.low, first.high) == pytest.approx((second.low, second.high), rel=1e-12)


@pytest.mark.parametrize("method", ["percentile", "bca"])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_vectorised_mean_is_the_called_mean(method: str, grouped: bool) -> None:
    x = RNG.exponential(size=45)
    groups = np.repeat(np.arange(9), [1, 2, 3, 4, 5, 6, 7, 8, 9]) if grouped else None
    fast = bootstrap_interval(x, groups=groups, method=method, resamples=300)
    slow = bootstrap_interval(x, groups=groups, method=method, resamples=300, statistic=lambda v: v.mean())
    assert (fast.low, fast.estimate, fast.high) == pytest.approx(
        (slow.low, slow.estimate, slow.high), rel=1e-12
    )


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.normal(size=33)
    whole = bootstrap_interval(x, resamples=250)
    monkeypatch.setattr(bootstrap, "_BLOCK", 100)
    assert bootstrap_interval(x, resamples=250) == whole
    assert bootstrap_interval(x, resamples=250, seed=1) != whole


def test_pairing_takes_out_what_the_two_share() -> None:
    rng = np.random.default_rng(3)
    hardness = rng.normal(size=400)
    teacher, student = hardness + 0.1 * rng.normal(size=400), hardness + 0.1 * rng.normal(size=400) - 0.05
    paired = bootstrap_interval(student, paired_with=teacher)
    assert paired == bootstrap_interval(student - teacher)
    assert 0.0 not in paired
    alone = bootstrap_interval(student)
    assert paired.high - paired.low < 0.2 * (alone.high - alone.low)
    same = bootstrap_interval(student, paired_with=student)
    assert (same.low, same.estimate, same.high) == (0.0, 0.0, 0.0)


def test_paired_calls_see_the_same_items() -> None:
    table = np.stack([np.arange(40), RNG.integers(0, 2, 40)], axis=1)

    def checksum(rows: np.ndarray) -> float:
        return float((rows[:, 0] ** 2).mean())

    shifted = table + np.array([0, 5])
    interval = bootstrap_interval(table, statistic=checksum, paired_with=shifted, resamples=200)
    assert (interval.low, interval.high) == (0.0, 0.0)


def test_clusters_cover_and_items_do_not() -> None:
    """Items of one cluster share half of their variance: naive intervals are too narrow, cluster ones not."""
    rng = np.random.default_rng(11)
    clusters, size, trials = 40, 10, 300
    groups = np.repeat(np.arange(clusters), size)
    covered = {"clusters": 0, "items": 0}
    for trial in range(trials):
        x = np.repeat(rng.normal(size=clusters), size) + rng.normal(size=clusters * size)
        covered["clusters"] += 0.0 in bootstrap_interval(x, groups=groups, resamples=300, seed=trial)
        covered["items"] += 0.0 in bootstrap_interval(x, resamples=300, seed=trial)
    assert 0.90 <= covered["clusters"] / trials <= 0.98
    assert (
        covered["items"] / trials < 0.70
    )  # theory: the true standard error is √5.5 times the naive one: 0.60


def test_no_spread_is_no_width_and_the_proportion_interval_knows_better() -> None:
    interval = bootstrap_interval(np.ones(20), method="bca")
    assert (interval.low, interval.high) == (1.0, 1.0)
    assert proportion_interval(20, 20).low == pytest.approx(0.8389, abs=1e-4)


@pytest.mark.oracle
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_proportions_are_scipys_wilson_intervals(total: int, share: float, level: float) -> None:
    successes = round(share * total)
    theirs = scipy.stats.binomtest(successes, total).proportion_ci(level, method="wilson")
    ours = proportion_interval(successes, total, level=level)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("runs", [2, 3, 10])
def test_seeds_are_scipys_t_intervals(runs: int) -> None:
    x = RNG.normal(0.8, 0.02, size=runs)
    theirs = scipy.stats.t.interval(0.9, runs - 1, loc=x.mean(), scale=scipy.stats.sem(x))
    ours = seed_interval(x, level=0.9)
    assert (ours.low, ours.high) == pytest.approx(theirs, rel=1e-10)
    assert ours.method == f"t over {runs} runs"


def test_three_seeds_cover_as_promised() -> None:
    rng = np.random.default_rng(5)
    covered = sum(0.0 in seed_interval(rng.normal(size=3)) for _ in range(2000))
    assert 0.93 <= covered / 2000 <= 0.97


def test_intervals_print_themselves() -> None:
    interval = Interval(0.8423, 0.794, 0.8831)
    assert f"{interval:.2f}" == "0.84 [0.79, 0.88]"
    assert str(interval) == "0.842 [0.794, 0.883]"
    assert 0.8 in interval
    assert 0.9 not in interval


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least one item"),
        ([1.0], {}, "at least 2"),
        ([1.0, np.nan], {}, "1 values that are not finite"),
        ([1.0, 2.0], {"groups": ["a", "a"]}, "there is 1 independent"),
        ([1.0, 2.0], {"groups": [0]}, r"groups has shape \(1,\)"),
        ([1.0, 2.0], {"paired_with": [1.0]}, r"paired_with has shape \(1,\)"),
        ([1.0, 2.0], {"level": 95}, "level is 95"),
        ([1.0, 2.0], {"resamples": 10}, "resamples is 10"),
        ([1.0, 2.0], {"method": "basic"}, "'percentile' or 'bca'"),
        ([[1.0, 2.0]], {}, "one number per item"),
        (["a", "b"], {}, "give numbers"),
        ([1.0, 2.0], {"statistic": lambda v: np.nan}, "not finite on 2000 of 2000"),
    ],
)
def test_wrong_arguments(values: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)


def test_wrong_statistic_and_counts() -> None:
    with pytest.raises(TypeError, match="statistic is 'median'"):
        bootstrap_interval([1.0, 2.0], statistic="median")
    with pytest.raises(ValueError, match="3 successes of 2"):
        proportion_interval(3, 2)
    with pytest.raises(ValueError, match="at least two runs"):
        seed_interval([0.5])
