"""Linear probe: what a frozen representation holds, read by a logistic regression.

Features are standardised with the training windows' mean and spread; the strength of the L2 penalty is chosen
by cross-validation over whole groups *inside the training windows*; the score on the test windows carries an
interval that resamples whole groups. No group may be on both sides.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stillhouse.core.metrics import Interval

from .metrics import score

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe found on its test windows.

    Attributes:
        accuracy, mcc, auroc: with bootstrap intervals over groups; AUROC is one against the rest.
        strength: the inverse penalty C that cross-validation chose.
        validation: mean log-loss of the held-out folds at that C.
        probabilities: [n_test, C].
        predictions: [n_test].
        labels: [n_test].
        groups: test groups, None where none were given.
        train: windows fitted on.
        test: windows scored on.
    """

    accuracy: Interval
    mcc: Interval
    auroc: Interval
    strength: float
    validation: float
    probabilities: npt.NDArray[np.float64]
    predictions: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[Any] | None
    train: int
    test: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: intervals as {estimate, low, high}."""
        table: dict[str, Any] = {
            name: {"estimate": found.estimate, "low": found.low, "high": found.high}
            for name, found in (("accuracy", self.accuracy), ("mcc", self.mcc), ("auroc", self.auroc))
        }
        return {
            **table,
            "strength": self.strength,
            "validation": self.validation,
            "train": self.train,
            "test": self.test,
            "groups": None if self.groups is None else len(np.unique(self.groups)),
        }


def linear_probe(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    train: npt.ArrayLike,
    test: npt.ArrayLike,
    groups: Sequence[Any] | npt.ArrayLike | None = None,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = 4,
    resamples: int = 1000,
    iterations: int = 300,
) -> ProbeResult:
    """Fit a logistic regression on frozen features and score it.

    Args:
        features: [N, d], finite.
        labels: [N] classes 0…C − 1.
        train: indices, or booleans [N], of the windows to fit on.
        test: the same for the windows to score on.
        groups: [N] origin of each window (gene, record); None takes each window for itself.
        seed: seed of the folds and of the bootstrap.
        strengths: inverse penalties C to choose from: |w|²/2 + C · (sum of the log-losses) is minimised.
        folds: folds of the cross-validation (≥ 2), fewer where there are fewer groups.
        resamples: bootstrap samples.
        iterations: most iterations of the solver.

    Returns:
        The result on the test windows.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, windows or groups on both sides, a
            class that the training windows lack, or fewer than two groups to fit or to score on.

    Example:
        >>> y = np.repeat([0, 1], 40)
        >>> x = np.random.default_rng(0).normal(3 * y[:, None], 1, (80, 3))
        >>> found = linear_probe(x, y, train=np.arange(0, 80, 2), test=np.arange(1, 80, 2))
        >>> found.accuracy.estimate > 0.9
        True
    """
    x, y, marks = _checked(features, labels, groups)
    fit, held = _index(train, len(y), "train"), _index(test, len(y), "test")
    _check_apart(fit, held, y, marks)
    mean, spread = x[fit].mean(axis=0), x[fit].std(axis=0)
    x = (x - mean) / np.where(spread > 1e-12 * (1 + np.abs(mean)), spread, np.inf)
    strength, loss = _choose(
        x[fit], y[fit], None if marks is None else marks[fit], strengths, folds, seed, iterations
    )
    classes = int(y.max()) + 1
    probabilities = _probabilities(_fit(x[fit], y[fit], strength, iterations), x[held], classes)
    held_groups = None if marks is None else marks[held]
    found = score(y[held], probabilities, groups=held_groups, resamples=resamples, seed=seed)
    return ProbeResult(
        accuracy=found["accuracy"],
        mcc=found["mcc"],
        auroc=found["auroc"],
        strength=strength,
        validation=loss,
        probabilities=probabilities,
        predictions=probabilities.argmax(axis=1),
        labels=y[held],
        groups=held_groups,
        train=len(fit),
        test=len(held),
    )


def paired_difference(
    first: ProbeResult,
    second: ProbeResult,
    *,
    key: str = "mcc",
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Difference of two probes on the same test windows, first minus second, with a paired interval.

    Args:
        first, second: probes of the same test windows in the same order.
        key: "accuracy", "mcc" or "auroc".
        resamples: bootstrap samples of whole groups.
        seed: seed of the resampling.

    Raises:
        ValueError: the test windows differ.
    """
    from stillhouse.core.metrics import bootstrap_interval

    from .metrics import accuracy, auroc, confusion, mcc

    same = np.array_equal(first.labels, second.labels)
    if first.groups is not None:
        same = same and second.groups is not None and np.array_equal(first.groups, second.groups)
    if not same:
        raise ValueError("first and second were scored on different windows; give probes of the same ones")
    classes = first.probabilities.shape[1]

    def tabled(found: ProbeResult) -> npt.NDArray[np.float64]:
        return np.column_stack([found.labels, found.predictions, found.probabilities])

    def statistic(rows: npt.NDArray[Any]) -> float:
        if key == "auroc":
            return auroc(rows[:, 0], rows[:, 2:])
        counts = confusion(rows[:, 0].astype(int), rows[:, 1].astype(int), classes)
        return accuracy(counts) if key == "accuracy" else mcc(counts)

    if key not in ("accuracy", "mcc", "auroc"):
        raise ValueError(f"key is {key!r}; give accuracy, mcc or auroc")
    return bootstrap_interval(
        tabled(first),
        paired_with=tabled(second),
        statistic=statistic,
        groups=first.groups,
        resamples=resamples,
        seed=seed,
    )


def split_groups(
    groups: Sequence[Any] | npt.ArrayLike, *, test: float = 0.3, seed: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split windows at random so that no group is on both sides.

    Args:
        groups: [N] origin of each window.
        test: share of the *groups* for the test side, in (0, 1).
        seed: seed.

    Returns:
        Indices of the training and of the test windows.

    Example:
        >>> train, test = split_groups(["a", "a", "b", "c"], test=0.34)
        >>> len(train) + len(test), {"a", "b", "c"} >= {"a"}
        (4, True)
    """
    marks = np.asarray(groups)
    names = np.unique(marks)
    if not 0 < test < 1 or len(names) < 2:
        raise ValueError(f"test is {test} for {len(names)} groups; give 0 < test < 1 and at least 2 groups")
    count = min(max(round(test * len(names)), 1), len(names) - 1)
    chosen = np.random.default_rng(seed).permutation(names)[:count]
    inside = np.isin(marks, chosen)
    return np.flatnonzero(~inside), np.flatnonzero(inside)


# ---- parts


def _checked(
    features: npt.ArrayLike, labels: npt.ArrayLike, groups: Sequence[Any] | npt.ArrayLike | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[Any] | None]:
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise ValueError(
            f"features has shape {x.shape} and labels {y.shape}, {y.dtype}; give [N, d], whole [N]"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"features has {int((~np.isfinite(x)).sum())} values that are not finite")
    marks = None
    if groups is not None:
        marks = np.asarray(groups)
        if marks.shape != y.shape:
            raise ValueError(f"groups has shape {marks.shape}; give one for each of {len(y)} windows")
    return x, y.astype(np.int64), marks


def _index(chosen: npt.ArrayLike, count: int, name: str) -> npt.NDArray[np.int64]:
    rows = np.asarray(chosen)
    if rows.dtype == bool:
        if rows.shape != (count,):
            raise ValueError(f"{name} has shape {rows.shape}; booleans need one for each of {count} windows")
        rows = np.flatnonzero(rows)
    if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu":
        raise ValueError(f"{name} has shape {rows.shape} and dtype {rows.dtype}; give at least one index")
    if rows.min() < 0 or rows.max() >= count or len(np.unique(rows)) != len(rows):
        raise ValueError(f"{name} must hold different indices in 0…{count - 1}")
    return rows.astype(np.int64)


def _check_apart(
    fit: npt.NDArray[np.int64],
    held: npt.NDArray[np.int64],
    y: npt.NDArray[np.int64],
    marks: npt.NDArray[Any] | None,
) -> None:
    if len(np.intersect1d(fit, held)):
        raise ValueError("train and test share windows; a probe needs them apart")
    if marks is not None:
        shared = np.intersect1d(marks[fit], marks[held])
        if len(shared):
            raise ValueError(
                f"train and test share {len(shared)} groups, for example {shared[0]!r}; split by group"
            )
    missing = sorted(set(range(int(y.max()) + 1)) - set(y[fit].tolist()))
    if missing:
        raise ValueError(f"train has no window of class {missing[0]}; give every class")


def _fit(x: npt.NDArray[np.float64], y: npt.NDArray[np.int64], strength: float, iterations: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a near-optimum scores the same
        return model.fit(x, y)


def _probabilities(model: Any, x: npt.NDArray[np.float64], classes: int) -> npt.NDArray[np.float64]:
    out = np.zeros((len(x), classes))
    out[:, model.classes_] = model.predict_proba(x)
    return out


def _choose(
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.int64],
    marks: npt.NDArray[Any] | None,
    strengths: Sequence[float],
    folds: int,
    seed: int,
    iterations: int,
) -> tuple[float, float]:
    """The strength of the smallest log-loss on held-out groups, and that loss."""
    if not strengths or min(strengths) <= 0 or folds < 2:
        raise ValueError(f"strengths is {strengths!r} and folds {folds}; give numbers > 0 and folds ≥ 2")
    units = np.arange(len(y)) if marks is None else np.unique(marks, return_inverse=True)[1]
    count = int(units.max()) + 1
    if count < 2:
        raise ValueError("train has one group; choosing a penalty needs at least 2")
    fold_of = np.random.default_rng(seed).permutation(count) % min(folds, count)
    classes = int(y.max()) + 1
    losses = np.full(len(strengths), np.nan)
    for at, strength in enumerate(strengths):
        total, seen = 0.0, 0
        for fold in range(min(folds, count)):
            inside = fold_of[units] == fold
            if len(np.unique(y[~inside])) < 2:
                continue
            p = _probabilities(_fit(x[~inside], y[~inside], strength, iterations), x[inside], classes)
            right = p[np.arange(len(p)), y[inside]]
            total += float(-np.log(np.clip(right, 1e-12, None)).sum())
            seen += len(p)
        if seen:
            losses[at] = total / seen
    if np.isnan(losses).all():
        raise ValueError("every fold of the training windows lacks all classes but one; give more groups")
    best = int(np.nanargmin(losses))
    return float(strengths[best]), float(losses[best])
