"""`make_pair`: a sweep and the part of the map that belongs to it, augmented together, both of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stillhouse.core.errors import DataError

from ..io import Scan
from ..mapping import static_mask, voxel_keys
from ._maps import TiledMap
from ._sample import farthest_points, fill


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig:
    """What a training pair is made of; the defaults are those of LiDiff's published data sets.

    Args:
        points: partial points n.
        factor: complete points are n · factor.
        max_range: metres around the sensor.
        min_range: points of the sweep nearer than this are dropped.
        min_z: points lower than this in the sensor's frame are dropped, metres.
        max_z: ground truth of an evaluation higher than this is dropped, metres; training keeps it.
        grid: side of the viewpoint grid's cells, metres: the complete cloud is kept only in cells that the
            sweep occupies.
        static: drop points of the sweep that move or are unlabelled, where it has labels.
        augment: turn, tilt, scale and mirror both clouds together.
        tilt: standard deviation of the small rotation about each axis, radians; clipped at three of it.
        scale: both clouds are scaled by a factor between 1 − scale and 1 + scale.

    Raises:
        ValueError: a value out of range.
    """

    points: int = 18_000
    factor: int = 10
    max_range: float = 50.0
    min_range: float = 3.5
    min_z: float = -4.0
    max_z: float = 4.4
    grid: float = 10.0
    static: bool = True
    augment: bool = True
    tilt: float = 0.06
    scale: float = 0.05

    def __post_init__(self) -> None:
        if self.points < 1 or self.factor < 1:
            raise ValueError(f"points, factor: {self.points}, {self.factor} must be at least 1")
        if not 0 <= self.min_range < self.max_range:
            raise ValueError(f"min_range, max_range: {self.min_range}, {self.max_range} must ascend from 0")
        if not self.min_z < self.max_z:
            raise ValueError(f"min_z, max_z: {self.min_z}, {self.max_z} must ascend")
        if not self.grid > 0:
            raise ValueError(f"grid: {self.grid} must be > 0")
        if not (self.tilt >= 0 and 0 <= self.scale < 1):
            raise ValueError(f"tilt, scale: {self.tilt}, {self.scale} must be ≥ 0, and the scale below 1")


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A partial and a complete cloud in the frame of the sensor.

    Args:
        partial: float32 [n, 3].
        full: float32 [m, 3]; n · factor points in training, all there are in an evaluation.
    """

    partial: np.ndarray
    full: np.ndarray


def make_pair(
    scan: Scan,
    map_points: np.ndarray | TiledMap,
    pose: np.ndarray,
    config: PairConfig,
    rng: np.random.Generator,
) -> Pair:
    """Make a training pair.

    The sweep is cut by label, range and height; the map by distance from the sensor and height, and moved to
    its frame. Both are augmented together. The sweep is thinned to n points by farthest-point sampling, the
    map restricted to the cells of the viewpoint grid in which the sweep has points, shuffled, and repeated or
    cut to n · factor.

    Args:
        scan: the sweep.
        map_points: [M, 3], or a `TiledMap`, in the frame of the map.
        pose: [4, 4], sensor's frame into the map's.
        config: what is made.
        rng: all randomness; the same state gives the same pair.

    Returns:
        Pair: partial float32 [n, 3], full float32 [n · factor, 3].

    Raises:
        DataError: nothing is left of the sweep or of the map.

    Source: LiDiff's published data sets. That the viewpoint grid lies after the augmentation follows the
    order in which the steps are described.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> points = rng.uniform([-20, -20, -2], [20, 20, 2], (4000, 3)).astype(np.float32)
        >>> config = PairConfig(points=100, factor=4, max_range=25.0)
        >>> pair = make_pair(Scan(points[:1000]), points, np.eye(4), config, rng)
        >>> pair.partial.shape, pair.full.shape
        ((100, 3), (400, 3))
    """
    partial = partial_points(scan, config)
    full = _crop(map_points, pose, config, scan.name)
    if config.augment:
        move = _augmentation(config, rng)
        partial, full = partial @ move.T, full @ move.T
    full = full[_seen(full, partial, config.grid)]
    if len(full) == 0:
        raise DataError(f"{scan.name}: the map has no point near the sweep; check the poses")
    rows = farthest_points(partial, config.points, start=int(rng.integers(len(partial))))
    return Pair(partial[rows].astype(np.float32), fill(full, config.points * config.factor, rng))


def evaluation_pair(
    scan: Scan,
    map_points: np.ndarray | TiledMap,
    pose: np.ndarray,
    config: PairConfig,
    *,
    start: int = 0,
) -> Pair:
    """Make what an evaluation needs: the thinned sweep and all of the ground truth; nothing is random.

    Args:
        scan: the sweep.
        map_points: [M, 3], or a `TiledMap`, in the frame of the map.
        pose: [4, 4], sensor's frame into the map's.
        config: what is made; `augment` is ignored.
        start: chooses the point with which the farthest-point sampling begins.

    Returns:
        Pair: partial float32 [n, 3], full float32 [m, 3] as `evaluation_truth` has it.
    """
    partial = partial_points(scan, config)
    rows = farthest_points(partial, config.points, start=start)
    return Pair(partial[rows].astype(np.float32), evaluation_truth(scan, map_points, pose, config))


def evaluation_truth(
    scan: Scan, map_points: np.ndarray | TiledMap, pose: np.ndarray, config: PairConfig
) -> np.ndarray:
    """Return the ground truth of an evaluation, float32 [m, 3] in the sensor's frame.

    The map within `max_range`, min_z < z < max_z, in the cells of the viewpoint grid in which the sweep
    (within `max_range`, moving things included) has points.

    Source: evaluation script of Distillation-DPO.

    Raises:
        DataError: nothing is left.
    """
    full = _crop(map_points, pose, config, scan.name)
    full = full[full[:, 2] < config.max_z]
    near = scan.points[np.linalg.norm(scan.points, axis=1) < config.max_range]
    full = full[_seen(full, near, config.grid)] if len(near) else full[:0]
    if len(full) == 0:
        raise DataError(f"{scan.name}: the map has no point near the sweep; check the poses")
    return full.astype(np.float32)


def partial_points(scan: Scan, config: PairConfig) -> np.ndarray:
    """Return the points of a sweep that count, float64 [N, 3]: static, within range, above `min_z`.

    Raises:
        DataError: none is left.
    """
    points = scan.points.astype(np.float64)
    distance = np.linalg.norm(points, axis=1)
    keep = (distance > config.min_range) & (distance < config.max_range) & (points[:, 2] > config.min_z)
    if config.static and scan.labels is not None:
        keep &= static_mask(scan.labels)
    if not keep.any():
        raise DataError(
            f"{scan.name}: no point is left between {config.min_range} and {config.max_range} m above "
            f"{config.min_z} m; check the sweep's unit, frame and labels"
        )
    return points[keep]


def _crop(map_points: np.ndarray | TiledMap, pose: np.ndarray, config: PairConfig, name: str) -> np.ndarray:
    """The map within range of the sensor, float64 [M, 3] in its frame."""
    centre = pose[:3, 3]
    near = map_points.near(centre, config.max_range) if isinstance(map_points, TiledMap) else map_points
    offset = np.asarray(near, dtype=np.float64) - centre
    offset = offset[(offset**2).sum(axis=1) < config.max_range**2]
    moved = offset @ pose[:3, :3]  # the inverse of a rotation is its transpose
    moved = moved[moved[:, 2] > config.min_z]
    if len(moved) == 0:
        raise DataError(f"{name}: the map has no point within {config.max_range} m; check the poses")
    return moved


def _seen(points: np.ndarray, viewpoints: np.ndarray, grid: float) -> np.ndarray:
    """Mask bool [N] of the points in cells that hold a viewpoint."""
    return np.isin(voxel_keys(points, grid), np.unique(voxel_keys(viewpoints, grid)))


def _augmentation(config: PairConfig, rng: np.random.Generator) -> np.ndarray:
    """A turn about z, a small tilt, a scale and a mirroring of y, as one matrix [3, 3]."""
    yaw = rng.uniform(0, 2 * np.pi)
    angles = np.clip(config.tilt * rng.standard_normal(3), -3 * config.tilt, 3 * config.tilt)
    move = _rotation(2, yaw)
    for axis, angle in enumerate(angles):
        move = _rotation(axis, angle) @ move
    move = move * rng.uniform(1 - config.scale, 1 + config.scale)
    if rng.random() < 0.5:
        move = np.diag([1.0, -1.0, 1.0]) @ move
    return move


def _rotation(axis: int, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = cos
    matrix[i, j], matrix[j, i] = -sin, sin
    return matrix
