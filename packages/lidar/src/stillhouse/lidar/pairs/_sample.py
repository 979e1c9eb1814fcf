"""Fixed numbers of points: farthest-point sampling, and tiling where there are too few."""

from __future__ import annotations

import numpy as np


def farthest_points(points: np.ndarray, count: int, *, start: int = 0) -> np.ndarray:
    """Return rows int64 [count] of points that lie as far from each other as possible.

    Where there are fewer than `count`, all are taken as often as it takes, and the farthest ones once more.

    Args:
        points: [N, 3], N ≥ 1.
        count: number of rows wanted, ≥ 1.
        start: below N; chooses the point that is taken first. Which one it is follows from how the points
            are sorted, and is not row `start`.

    Raises:
        ValueError: no points, count < 1, a start out of range.

    Example:
        >>> line = np.array([[0.0, 0, 0], [1, 0, 0], [9, 0, 0], [10, 0, 0]])
        >>> sorted(farthest_points(line, 2).tolist())
        [0, 3]
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"points must be [N, 3] with N at least 1, got {list(points.shape)}")
    if count < 1:
        raise ValueError(f"count: {count} must be at least 1")
    if not 0 <= start < len(points):
        raise ValueError(f"start: {start} must be at least 0 and below {len(points)}, the number of points")
    whole, rest = divmod(count, len(points))
    rows = [np.tile(np.arange(len(points)), whole)] if whole else []
    if rest:
        rows.append(_sample(points, rest, start))
    return np.concatenate(rows)


def _sample(points: np.ndarray, count: int, start: int) -> np.ndarray:
    import fpsample

    # `height`: a tree of 2^height leaves; a leaf must hold some points for the buckets to pay.
    height = int(np.clip(np.log2(max(len(points) / 16, 2)), 1, 7))
    chosen = fpsample.bucket_fps_kdline_sampling(points, count, h=height, start_idx=start)
    return np.asarray(chosen).astype(np.int64)


def fill(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return float32 [count, 3]: the points shuffled, repeated where there are too few, and cut.

    Args:
        points: [N, 3], N ≥ 1.
        count: number of rows wanted.
        rng: shuffles.
    """
    if len(points) == 0:
        raise ValueError("points: is empty; at least one point is needed")
    order = rng.permutation(len(points))
    return np.asarray(points[np.resize(order, count)], dtype=np.float32)
