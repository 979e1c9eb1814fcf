"""Checks that all metrics share."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Convention = Literal["reference", "correct"]


def check_cloud(name: str, points: np.ndarray) -> np.ndarray:
    """Return points as a floating-point array [N, 3].

    Raises:
        ValueError: another shape, no points, NaN or Inf.
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"{name} must be [N, 3] with N at least 1, got {list(points.shape)}")
    if points.dtype.kind != "f" or points.dtype.itemsize < 4:
        points = points.astype(np.float64)
    if not np.isfinite(points).all():
        raise ValueError(f"{name} holds NaN or Inf; remove those rows")
    return points


def check_convention(convention: str) -> None:
    """Raise ValueError for a convention that does not exist."""
    if convention not in get_args(Convention):
        raise ValueError(f"convention={convention!r} is unknown; allowed: 'reference', 'correct'")
