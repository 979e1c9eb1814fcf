"""`Scan`: one sweep of a LiDAR."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """One sweep of a LiDAR in the frame of the sensor (x forward, y left, z up).

    Args:
        points: float32 [N, 3], metres, N ≥ 1, all finite.
        remission: float32 [N], strength of the echo, 0 to 1 where the sensor scales it; None where unknown.
        labels: int [N], semantic ids of SemanticKITTI (0 to 259); None where unknown.
        name: what the sweep is called, for messages.

    Raises:
        TypeError: points that are not floating-point, labels that are not integers.
        ValueError: a wrong shape, no points, a NaN or an infinite coordinate, lengths that differ.

    Example:
        >>> scan = Scan(np.zeros((4, 3), np.float32), name="000000")
        >>> len(scan), scan.labels is None
        (4, True)
    """

    points: np.ndarray
    remission: np.ndarray | None = None
    labels: np.ndarray | None = None
    name: str = field(default="scan")

    def __post_init__(self) -> None:
        points = np.asarray(self.points)
        if points.dtype.kind != "f":
            raise TypeError(f"points must be floating-point, got {points.dtype}")
        if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
            raise ValueError(f"points must be [N, 3] with N at least 1, got {list(points.shape)}")
        if not np.isfinite(points).all():
            raise ValueError(f"points of {self.name!r} hold NaN or Inf; remove those rows")
        object.__setattr__(self, "points", np.ascontiguousarray(points, dtype=np.float32))
        for name in ("remission", "labels"):
            values = getattr(self, name)
            if values is None:
                continue
            values = np.asarray(values)
            if values.shape != (len(points),):
                raise ValueError(f"{name} must be [{len(points)}], one a point, got {list(values.shape)}")
            if name == "labels" and values.dtype.kind not in "iu":
                raise TypeError(f"labels must be integers, got {values.dtype}")
            kind = np.float32 if name == "remission" else np.int32
            object.__setattr__(self, name, np.ascontiguousarray(values, dtype=kind))

    def __len__(self) -> int:
        return len(self.points)

    def select(self, rows: np.ndarray) -> Scan:
        """Return the points named by a mask bool [N] or by indices; at least one must remain."""
        return Scan(
            self.points[rows],
            None if self.remission is None else self.remission[rows],
            None if self.labels is None else self.labels[rows],
            self.name,
        )
