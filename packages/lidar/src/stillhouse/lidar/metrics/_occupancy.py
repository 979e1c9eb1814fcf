"""`CompletionIoU`: overlap of the occupied voxels, pooled over all clouds of a set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..mapping import voxel_keys
from ._check import Convention, check_cloud, check_convention

_REACH = 50.0  # metres, and voxels in the old code


class CompletionIoU:
    """Counts of voxels that are right, missing or too many, pooled over scans; then tp / (tp + fn + fp).

    Args:
        levels: sides of the voxels, metres.
        convention: "correct" takes points within ±50 m at every level, as the published code does since June
            2025. "reference" is the older form, with which most printed numbers were made: it keeps voxel
            *numbers* up to ±50, that is only ±25, ±10 and ±5 m at 0.5, 0.2 and 0.1 m. Never mix the two.

    Example:
        >>> metric = CompletionIoU()
        >>> metric.update(np.eye(3), np.eye(3))
        >>> metric.compute()
        {0.5: 1.0, 0.2: 1.0, 0.1: 1.0}
    """

    def __init__(
        self, levels: Sequence[float] = (0.5, 0.2, 0.1), *, convention: Convention = "correct"
    ) -> None:
        check_convention(convention)
        if not levels or min(levels) <= 0:
            raise ValueError(f"levels: {tuple(levels)} must be voxel sides > 0 (metres)")
        self.levels = tuple(float(level) for level in levels)
        self.convention: Convention = convention
        self.counts = {level: np.zeros(3, dtype=np.int64) for level in self.levels}

    def update(self, pred: np.ndarray, gt: np.ndarray) -> None:
        """Add one pair of clouds [N, 3] and [M, 3], metres, in the frame of the sensor."""
        pred, gt = check_cloud("pred", pred), check_cloud("gt", gt)
        for level in self.levels:
            a, b = self._keys(pred, level), self._keys(gt, level)
            both = len(np.intersect1d(a, b, assume_unique=True))
            self.counts[level] += (both, len(b) - both, len(a) - both)

    def merge(self, other: CompletionIoU) -> None:
        """Add the counts of another accumulator with the same levels and convention."""
        if other.levels != self.levels or other.convention != self.convention:
            raise ValueError("other: has other levels or another convention; make both alike")
        for level in self.levels:
            self.counts[level] += other.counts[level]

    def compute(self) -> dict[float, float]:
        """Return level → IoU in [0, 1]; NaN where no voxel has been seen."""
        return {
            level: float(counts[0] / counts.sum()) if counts.sum() else float("nan")
            for level, counts in self.counts.items()
        }

    def _keys(self, points: np.ndarray, level: float) -> np.ndarray:
        if self.convention == "correct":
            inside = (np.abs(points) <= _REACH).all(axis=1)
            return np.unique(voxel_keys(points[inside], level))
        cells = np.round(points.astype(np.float64) / level)
        cells = cells[(np.abs(cells) <= _REACH).all(axis=1)]
        return np.unique(voxel_keys(cells, 1.0))
