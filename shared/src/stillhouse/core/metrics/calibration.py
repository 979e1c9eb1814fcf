"""Calibration: do the student's probabilities mean what they say?

Probabilities are arrays `[N, C]` with rows summing to 1, labels are integers `[N]` in 0…C−1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReliabilityCurve:
    """Confidence against accuracy, bin by bin, for the bins that hold items.

    Attributes:
        confidence: `[B]` mean confidence of the predicted class in each bin.
        accuracy: `[B]` share of right predictions in each bin.
        count: `[B]` number of items in each bin.
        edges: `[B, 2]` lower and upper edge of each bin.
    """

    confidence: Floats
    accuracy: Floats
    count: npt.NDArray[np.int64]
    edges: Floats

    @property
    def error(self) -> float:
        """Expected calibration error: Σ_b n_b/N · |accuracy_b − confidence_b|, in [0, 1]."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())

    @property
    def worst(self) -> float:
        """Maximum calibration error: the largest |accuracy_b − confidence_b|, in [0, 1]."""
        return float(np.abs(self.accuracy - self.confidence).max())


def reliability_curve(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, bins: int = 15, scheme: str = "width"
) -> ReliabilityCurve:
    """Bin predictions by the confidence of the predicted class.

    Args:
        probabilities: `[N, C]`, rows summing to 1.
        labels: `[N]` integers in 0…C−1.
        bins: Number of bins, at least 1. Empty bins are left out of the result.
        scheme: "width": bins of equal width, (k/bins, (k+1)/bins]. "mass": bins of equal numbers of items,
            as near as N allows; ties in confidence may fall into neighbouring bins.

    Returns:
        The curve.

    Raises:
        ValueError: When the shapes, probabilities, labels, bins or scheme are not as above.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2 (equal width).

    Example:
        >>> curve = reliability_curve([[0.8, 0.2], [0.7, 0.3], [0.1, 0.9]], [0, 1, 1], bins=2)
        >>> curve.confidence.round(2).tolist(), curve.accuracy.round(2).tolist()
        ([0.8], [0.67])
    """
    p, y = _check(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins is {bins}; give at least 1")
    confidence = p.max(axis=1)
    right = (p.argmax(axis=1) == y).astype(np.float64)
    if scheme == "width":
        edges = np.linspace(0.0, 1.0, bins + 1)
        which = np.searchsorted(edges[1:-1], confidence, side="left")
        limits = np.stack([edges[:-1], edges[1:]], axis=1)
    elif scheme == "mass":
        which = np.empty(len(y), dtype=np.intp)
        which[np.argsort(confidence, kind="stable")] = np.arange(len(y)) * bins // len(y)
        limits = np.full((bins, 2), np.nan)
        for b in np.unique(which):
            limits[b] = confidence[which == b].min(), confidence[which == b].max()
    else:
        raise ValueError(f"scheme is {scheme!r}; give 'width' or 'mass'")
    count = np.bincount(which, minlength=bins)
    full = count > 0
    return ReliabilityCurve(
        confidence=np.bincount(which, weights=confidence, minlength=bins)[full] / count[full],
        accuracy=np.bincount(which, weights=right, minlength=bins)[full] / count[full],
        count=count[full].astype(np.int64),
        edges=limits[full],
    )


def expected_calibration_error(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, bins: int = 15, scheme: str = "width"
) -> float:
    """Expected calibration error of the predicted class, in [0, 1]; 0 is perfect.

    It is biased upwards for small N: compare models on the same items, with the same bins.

    Args:
        probabilities: `[N, C]`, rows summing to 1.
        labels: `[N]` integers in 0…C−1.
        bins: Number of bins.
        scheme: "width" or "mass", see `reliability_curve`.

    Raises:
        ValueError: As `reliability_curve`.

    Example:
        >>> round(expected_calibration_error([[0.8, 0.2], [0.7, 0.3], [0.1, 0.9]], [0, 1, 1], bins=2), 4)
        0.1333
    """
    return reliability_curve(probabilities, labels, bins=bins, scheme=scheme).error


def brier_score(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Brier score: mean over items of Σ_c (p_c − [c = label])², in [0, 2]; 0 is perfect.

    For two classes this is twice the one-class form that some libraries report.

    Args:
        probabilities: `[N, C]`, rows summing to 1.
        labels: `[N]` integers in 0…C−1.

    Raises:
        ValueError: When the shapes, probabilities or labels are not as above.

    Source: Brier, Monthly Weather Review 78 (1950) 1–3.

    Example:
        >>> round(brier_score([[0.8, 0.2], [0.5, 0.5]], [0, 1]), 3)
        0.29
    """
    p, y = _check(probabilities, labels)
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1).mean())


def negative_log_likelihood(
    logits: npt.ArrayLike, labels: npt.ArrayLike, *, temperature: float = 1.0
) -> float:
    """Mean negative log-likelihood of the labels, in nats; 0 is perfect.

    Args:
        logits: `[N, C]`; log-probabilities are logits too. −inf is allowed for classes that are ruled out.
        labels: `[N]` integers in 0…C−1.
        temperature: The logits are divided by this, > 0.

    Returns:
        The mean; infinite where a label's class is ruled out.

    Raises:
        ValueError: When the shapes, logits, labels or temperature are not as above.

    Example:
        >>> round(negative_log_likelihood([[0.0, 0.0], [0.0, 0.0]], [0, 1]), 4)
        0.6931
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be > 0")
    z, y = _check_logits(logits, labels)
    return float(-_log_softmax(z / temperature)[np.arange(len(y)), y].mean())


def fit_temperature(
    logits: npt.ArrayLike, labels: npt.ArrayLike, *, low: float = 0.05, high: float = 20.0
) -> float:
    """Find the temperature that makes the probabilities fit held-out labels best.

    Minimises the negative log-likelihood of softmax(logits / T). In β = 1/T that is convex, so the root of
    its derivative, Σ_i (E_p[z_i] − z_i,label) = 0, is the only minimum and is found by bracketing. The
    predicted class does not change.

    Args:
        logits: `[N, C]` of items that were not trained on. −inf is allowed for classes that are ruled out.
        labels: `[N]` integers in 0…C−1.
        low: Smallest temperature considered, > 0.
        high: Largest temperature considered, > low.

    Returns:
        The temperature, in [low, high].

    Raises:
        ValueError: When the shapes, logits, labels or bounds are not as above, or a label's class is ruled
            out.

    Warns:
        UserWarning: When the minimum lies outside [low, high] and a bound is returned: every item is right
            (T → 0), or the logits tell nothing of the labels (T → ∞).

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2.

    Example:
        >>> logits, labels = np.array([[4.0, 0.0]] * 4), np.array([0, 0, 0, 1])
        >>> round(fit_temperature(logits, labels), 4)   # three of four right: 4 / ln 3
        3.641
    """
    from scipy.optimize import brentq

    if not 0 < low < high:
        raise ValueError(f"low and high are {low} and {high}; they must satisfy 0 < low < high")
    z, y = _check_logits(logits, labels)
    if not np.isfinite(z[np.arange(len(y)), y]).all():
        raise ValueError(
            "logits are −inf at the label of some item; no temperature can mend that: check the labels"
        )
    if all(np.ptp(row[np.isfinite(row)]) == 0 for row in z):
        raise ValueError(
            "logits are constant in every row, so that every temperature fits alike; check the model"
        )
    shifted = z - z[np.arange(len(y)), y][:, None]  # the label's logit is 0
    finite = np.where(np.isfinite(shifted), shifted, 0.0)  # probability 0 there: the product must not be NaN

    def slope(beta: float) -> float:
        return float((np.exp(_log_softmax(shifted * beta)) * finite).sum(axis=1).mean())

    if slope(1 / low) <= 0:
        warnings.warn(f"the best temperature is below {low}: the logits separate the labels", stacklevel=2)
        return low
    if slope(1 / high) >= 0:
        warnings.warn(
            f"the best temperature is above {high}: the logits tell little of the labels", stacklevel=2
        )
        return high
    return 1.0 / float(brentq(slope, 1 / high, 1 / low, xtol=1e-14, rtol=1e-12))


def _log_softmax(z: Floats) -> Floats:
    top = z.max(axis=1, keepdims=True)
    shifted = z - top
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _check_labels(labels: npt.ArrayLike, items: int, classes: int) -> npt.NDArray[np.int64]:
    y = np.asarray(labels)
    if y.shape != (items,) or y.dtype.kind not in "iu":
        raise ValueError(f"labels has shape {y.shape} and dtype {y.dtype}; give integers of shape ({items},)")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"labels run from {y.min()} to {y.max()}; with {classes} classes give 0…{classes - 1}"
        )
    return y.astype(np.int64)


def _check_matrix(values: Any, name: str) -> Floats:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] == 0 or matrix.shape[1] < 2:
        raise ValueError(
            f"{name} has shape {matrix.shape}; give [items, classes] with items and at least 2 classes"
        )
    return matrix


def _check(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.int64]]:
    p = _check_matrix(probabilities, "probabilities")
    if not np.isfinite(p).all() or p.min() < -1e-6 or p.max() > 1 + 1e-6:
        raise ValueError("probabilities has values outside [0, 1]; apply softmax to logits first")
    off = float(np.abs(p.sum(axis=1) - 1).max())
    if off > 1e-3:
        raise ValueError(
            f"probabilities has rows that miss 1 by up to {off:.3g}; apply softmax to logits first"
        )
    return p.clip(0.0, 1.0), _check_labels(labels, *p.shape)


def _check_logits(logits: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.int64]]:
    z = _check_matrix(logits, "logits")
    if np.isnan(z).any() or np.isposinf(z).any() or not np.isfinite(z.max(axis=1)).all():
        raise ValueError("logits has NaN, +inf, or rows of −inf alone; check the model")
    return z, _check_labels(labels, *z.shape)
