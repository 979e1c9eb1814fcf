"""Confidence intervals: bootstrap over items or over clusters of items, paired differences, proportions, few
seeds.

Items that share an origin (patches of one stone, frames of one drive, sentences of one document) are not
independent, and an interval that pretends they are is too narrow. Give `groups`, and whole groups are
resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Statistic = Callable[[npt.NDArray[Any]], float]
_BLOCK = 4_000_000  # indices drawn at a time: 32 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: The value on the data at hand.
        low: Lower end.
        high: Upper end.
        level: Nominal coverage, in (0, 1).
        method: How it was made, for example "bca over 12 groups".

    Example:
        >>> f"{Interval(0.842, 0.794, 0.883):.2f}"
        '0.84 [0.79, 0.88]'
    """

    estimate: float
    low: float
    high: float
    level: float = 0.95
    method: str = ""

    def __format__(self, spec: str) -> str:
        spec = spec or ".3g"
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def bootstrap_interval(
    values: npt.ArrayLike,
    *,
    statistic: str | Statistic = "mean",
    groups: npt.ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    paired_with: npt.ArrayLike | None = None,
    method: str = "percentile",
) -> Interval:
    """Bootstrap the confidence interval of a statistic.

    Args:
        values: Array `[N]`, or `[N, ...]` for a callable statistic; resampled along the first axis. For
            accuracy give 0/1 per item, which makes it a mean.
        statistic: "mean", or a function from an array `[M, ...]` of items to a number. A function is called
            once per resample, "mean" is vectorised.
        groups: `[N]` labels of the cluster each item belongs to; whole clusters are resampled. None: items
            are independent.
        level: Coverage, in (0, 1).
        resamples: Number of bootstrap samples, at least 100.
        seed: Seed of the resampling; the same seed gives the same interval.
        paired_with: A second array of the shape of `values`, measured on the same items in the same order.
            The interval is then that of statistic(values) − statistic(paired_with), both on the same
            resample.
        method: "percentile", or "bca" (bias-corrected and accelerated), which is closer to its level for
            skewed statistics and costs one more evaluation per item or group.

    Returns:
        The interval. When all values are equal it has no width: for a proportion near 0 or 1 use
        `proportion_interval`.

    Raises:
        ValueError: For empty or non-finite data, fewer than two items or groups, shapes that do not match, a
            statistic that is not finite on some resample, or an option out of range.
        TypeError: For a statistic that is neither "mean" nor callable.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 (percentile) and 14 (BCa);
    Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 3.8 (resampling whole clusters).

    Example:
        >>> right = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1, 1] * 20)
        >>> print(f"{bootstrap_interval(right):.2f}")
        0.80 [0.74, 0.85]
    """
    _check_options(level, resamples, method)
    data = _check_values(values, "values")
    other = None
    if paired_with is not None:
        other = _check_values(paired_with, "paired_with")
        if other.shape != data.shape:
            raise ValueError(
                f"paired_with has shape {other.shape}, values has {data.shape}; give the same items"
            )
    if statistic == "mean":
        if data.ndim != 1:
            raise ValueError(
                f"values has shape {data.shape}; statistic 'mean' needs one number per item, [N]"
            )
        difference = data if other is None else data - other
        sampler: _Means | _Calls = _Means(difference, _index_groups(groups, len(data)))
    elif callable(statistic):
        sampler = _Calls(statistic, data, other, _index_groups(groups, len(data)))
    else:
        raise TypeError(f"statistic is {statistic!r}; give 'mean' or a function from an array to a number")
    if sampler.units < 2:
        raise ValueError(f"there is {sampler.units} independent item or group; an interval needs at least 2")
    estimate = sampler.estimate()
    samples = sampler.resample(np.random.default_rng(seed), resamples)
    if not (math.isfinite(estimate) and np.isfinite(samples).all()):
        bad = int((~np.isfinite(samples)).sum())
        raise ValueError(
            f"statistic is not finite on {bad} of {resamples} resamples (on all data: {estimate}); "
            "make it return a finite number on every resample, or choose another"
        )
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        tails = _bca_tails(tails, samples, estimate, sampler.jackknife())
    low, high = np.quantile(samples, tails)
    over = f"{sampler.units} groups" if groups is not None else f"{sampler.units} items"
    return Interval(estimate, float(low), float(high), level, f"{method} over {over}")


def seed_interval(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """Student's t interval of the mean of a few independent runs, typically three to ten seeds.

    The bootstrap is too narrow for so few; the t interval is exact when the runs are normally distributed.

    Args:
        values: `[N]`, one number per run, N ≥ 2.
        level: Coverage, in (0, 1).

    Returns:
        The interval; it says how the *training* varies, not how the test set does.

    Raises:
        ValueError: For fewer than two or non-finite values, or a level out of range.

    Example:
        >>> print(f"{seed_interval([0.80, 0.82, 0.84]):.3f}")
        0.820 [0.770, 0.870]
    """
    from scipy.special import stdtrit

    _check_options(level, 100, "percentile")
    data = _check_values(values, "values")
    if data.ndim != 1 or len(data) < 2:
        raise ValueError(f"values has shape {data.shape}; give one number per run and at least two runs")
    mean = float(data.mean())
    half = float(stdtrit(len(data) - 1, (1 + level) / 2) * data.std(ddof=1) / math.sqrt(len(data)))
    return Interval(mean, mean - half, mean + half, level, f"t over {len(data)} runs")


def proportion_interval(successes: int, total: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; sound for few items and near 0 and 1, where the bootstrap has
    no width.

    Args:
        successes: How many of the independent items succeeded.
        total: How many there are, at least 1.
        level: Coverage, in (0, 1).

    Raises:
        ValueError: When the counts are impossible or the level is out of range.

    Source: Wilson, JASA 22 (1927) 209–212.

    Example:
        >>> print(f"{proportion_interval(20, 20):.2f}")
        1.00 [0.84, 1.00]
    """
    from scipy.special import ndtri

    _check_options(level, 100, "percentile")
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(
            f"{successes} successes of {total} is impossible; give 0 ≤ successes ≤ total, total ≥ 1"
        )
    z = float(ndtri((1 + level) / 2))
    share = successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(
        share, max(0.0, centre - half), min(1.0, centre + half), level, f"Wilson over {total} items"
    )


# ------------------------------------------------------------------------------------------------- resampling


class _Means:
    """Means of items, or of all items in resampled groups: two sums over units, so resampling is a gather."""

    def __init__(self, values: npt.NDArray[Any], members: list[npt.NDArray[np.intp]] | None) -> None:
        if members is None:
            self.sums, self.counts = values.astype(np.float64), None
        else:
            self.sums = np.array([values[m].sum(dtype=np.float64) for m in members])
            self.counts = np.array([len(m) for m in members], dtype=np.float64)
        self.units = len(self.sums)

    def _of(self, index: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        if self.counts is None:
            return self.sums[index].mean(axis=1)
        return self.sums[index].sum(axis=1) / self.counts[index].sum(axis=1)

    def estimate(self) -> float:
        return float(self._of(np.arange(self.units)[None])[0])

    def resample(self, rng: np.random.Generator, resamples: int) -> npt.NDArray[np.float64]:
        block = max(1, _BLOCK // self.units)
        parts = [
            self._of(rng.integers(0, self.units, size=(min(block, resamples - start), self.units)))
            for start in range(0, resamples, block)
        ]
        return np.concatenate(parts)

    def jackknife(self) -> npt.NDArray[np.float64]:
        counts = np.ones(self.units) if self.counts is None else self.counts
        return (self.sums.sum() - self.sums) / (counts.sum() - counts)


class _Calls:
    """Any statistic, called on the items of each resample."""

    def __init__(
        self,
        statistic: Statistic,
        values: npt.NDArray[Any],
        other: npt.NDArray[Any] | None,
        members: list[npt.NDArray[np.intp]] | None,
    ) -> None:
        self.statistic, self.values, self.other, self.members = statistic, values, other, members
        self.units = len(values) if members is None else len(members)

    def _of(self, units: npt.NDArray[np.intp]) -> float:
        index = units if self.members is None else np.concatenate([self.members[u] for u in units])
        result = float(self.statistic(self.values[index]))
        return result if self.other is None else result - float(self.statistic(self.other[index]))

    def estimate(self) -> float:
        return self._of(np.arange(self.units))

    def resample(self, rng: np.random.Generator, resamples: int) -> npt.NDArray[np.float64]:
        return np.array([self._of(rng.integers(0, self.units, size=self.units)) for _ in range(resamples)])

    def jackknife(self) -> npt.NDArray[np.float64]:
        every = np.arange(self.units)
        return np.array([self._of(np.delete(every, unit)) for unit in range(self.units)])


def _bca_tails(
    tails: npt.NDArray[np.float64],
    samples: npt.NDArray[np.float64],
    estimate: float,
    left_out: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Shift the tail probabilities by bias z0 and acceleration a (Efron & Tibshirani 1993, section 14.3)."""
    from scipy.special import ndtr, ndtri

    below = ((samples < estimate).mean() + (samples <= estimate).mean()) / 2
    deviation = left_out.mean() - left_out
    spread = float((deviation**2).sum())
    if spread == 0 or not 0 < below < 1:
        return tails  # all equal: nothing to correct
    bias = ndtri(below)
    acceleration = float((deviation**3).sum()) / (6 * spread**1.5)
    shifted = bias + ndtri(tails)
    return ndtr(bias + shifted / (1 - acceleration * shifted))


# ----------------------------------------------------------------------------------------------------- checks


def _index_groups(groups: npt.ArrayLike | None, items: int) -> list[npt.NDArray[np.intp]] | None:
    if groups is None:
        return None
    labels = np.asarray(groups)
    if labels.shape != (items,):
        raise ValueError(f"groups has shape {labels.shape}; give one label per item, ({items},)")
    _, inverse = np.unique(labels, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.cumsum(np.bincount(inverse))[:-1])


def _check_values(values: npt.ArrayLike | Sequence[float], name: str) -> npt.NDArray[Any]:
    data = np.asarray(values)
    if data.ndim == 0 or data.size == 0:
        raise ValueError(f"{name} has shape {data.shape}; give at least one item along the first axis")
    if data.dtype.kind not in "biuf":
        raise ValueError(f"{name} has dtype {data.dtype}; give numbers or booleans")
    if not np.isfinite(data).all():
        raise ValueError(
            f"{name} has {int((~np.isfinite(data)).sum())} values that are not finite; remove them first"
        )
    return data.astype(np.float64) if data.dtype.kind in "bf" and data.dtype != np.float64 else data


def _check_options(level: float, resamples: int, method: str) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1, for example 0.95")
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}; give at least 100, better 2000")
    if method not in ("percentile", "bca"):
        raise ValueError(f"method is {method!r}; give 'percentile' or 'bca'")
