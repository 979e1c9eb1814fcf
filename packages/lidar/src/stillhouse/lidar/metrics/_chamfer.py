"""Distances to the nearest point, and what is made of them: Chamfer, precision, recall, F, RMSE."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from ._check import Convention, check_cloud, check_convention

_THRESHOLDS = np.linspace(0.05, 0.10, 100)


def nearest_distances(pred: np.ndarray, gt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance of each point to the nearest point of the other cloud.

    Points are asked for in spatial order, which keeps the tree in the processor's cache; all processor cores
    that this process may use take part.

    Args:
        pred: [N, 3], metres.
        gt: [M, 3], metres.

    Returns:
        (float64 [N], float64 [M]) in the order of the points.

    Raises:
        ValueError: a cloud of another shape, without points, or with NaN or Inf.

    Example:
        >>> there, back = nearest_distances(np.zeros((1, 3)), np.array([[3.0, 4, 0], [0, 0, 0]]))
        >>> there.tolist(), back.tolist()
        ([0.0], [5.0, 0.0])
    """
    pred, gt = check_cloud("pred", pred), check_cloud("gt", gt)
    order_pred, order_gt = _spatial_order(pred), _spatial_order(gt)
    pred, gt = pred[order_pred], gt[order_gt]
    return _query(gt, pred, order_pred), _query(pred, gt, order_gt)


def chamfer(pred: np.ndarray, gt: np.ndarray, *, squared: bool = False) -> float:
    """Chamfer distance ½(mean d(pred → gt) + mean d(gt → pred)), in metres.

    The convention of the published evaluation of scene completion: unsquared, and halved.

    Args:
        pred: [N, 3], metres.
        gt: [M, 3], metres.
        squared: take d² instead of d, in m².

    Raises:
        ValueError: a cloud of another shape, without points, or with NaN or Inf.

    Example:
        >>> chamfer(np.zeros((1, 3)), np.array([[0.0, 0, 2]]))
        2.0
        >>> chamfer(np.eye(3), np.eye(3))
        0.0
    """
    there, back = nearest_distances(pred, gt)
    return _chamfer(there, back, squared)


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    """Areas under curves over the thresholds 0.05 to 0.10 m, in percent of the best possible.

    Args:
        precision: share of predicted points with ground truth within the threshold.
        recall: share of ground-truth points with a prediction within the threshold.
        f_score: harmonic mean of the two at each threshold.
    """

    precision: float
    recall: float
    f_score: float


def precision_recall(
    pred: np.ndarray, gt: np.ndarray, *, thresholds: np.ndarray | None = None
) -> PrecisionRecall:
    """Precision, recall and F as areas under their curves over distance thresholds.

    Args:
        pred: [N, 3], metres.
        gt: [M, 3], metres.
        thresholds: ascending distances in metres, at least two; the published 100 from 0.05 to 0.10 where
            None.

    Example:
        >>> precision_recall(np.eye(3), np.eye(3)).f_score
        100.0
    """
    there, back = nearest_distances(pred, gt)
    return areas(there, back, thresholds)


def rmse(pred: np.ndarray, gt: np.ndarray, *, convention: Convention = "correct") -> float:
    """Root mean square of d(pred → gt), metres; "reference" gives the plain mean that bears this name there.

    Example:
        >>> pred, gt = np.array([[0.0, 0, 0], [0, 0, 2]]), np.zeros((1, 3))
        >>> rmse(pred, gt, convention="reference"), round(rmse(pred, gt), 3)
        (1.0, 1.414)
    """
    check_convention(convention)
    return root_mean_square(nearest_distances(pred, gt)[0], convention)


def root_mean_square(there: np.ndarray, convention: Convention) -> float:
    """What `rmse` makes of the distances."""
    return float(there.mean() if convention == "reference" else np.sqrt((there**2).mean()))


def areas(there: np.ndarray, back: np.ndarray, thresholds: np.ndarray | None = None) -> PrecisionRecall:
    """What `precision_recall` makes of the distances."""
    from scipy.integrate import simpson

    at = _THRESHOLDS if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    if at.ndim != 1 or len(at) < 2 or not (np.diff(at) > 0).all():
        raise ValueError("thresholds must be at least two ascending distances")
    precision = 100.0 * np.searchsorted(np.sort(there), at, side="left") / len(there)
    recall = 100.0 * np.searchsorted(np.sort(back), at, side="left") / len(back)
    total = precision + recall
    f_score = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    best = simpson(np.ones_like(at), x=at)
    values = (float(round(simpson(curve, x=at) / best, 10)) for curve in (precision, recall, f_score))
    return PrecisionRecall(*values)


def _chamfer(there: np.ndarray, back: np.ndarray, squared: bool) -> float:
    if squared:
        there, back = there**2, back**2
    return float(0.5 * (there.mean() + back.mean()))


def _spatial_order(points: np.ndarray) -> np.ndarray:
    """Rows sorted by upright columns, 256 × 256 over the cloud: 16-bit keys, which are sorted by radix."""
    low, high = points[:, :2].min(axis=0), points[:, :2].max(axis=0)
    scale = 255.99 / max(float((high - low).max()), 1e-6)
    cells = ((points[:, :2] - low) * points.dtype.type(scale)).astype(np.uint16)
    return np.argsort((cells[:, 0] << 8) | cells[:, 1], kind="stable")


def _query(tree_points: np.ndarray, points: np.ndarray, order: np.ndarray) -> np.ndarray:
    from scipy.spatial import cKDTree

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = np.empty(len(points))
    found[order] = cKDTree(tree_points, balanced_tree=False).query(points, workers=cores)[0]
    return found
