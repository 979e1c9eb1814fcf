"""`aggregate`: the static points of a drive in one frame, one point a voxel, sweep after sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from stillhouse.core.errors import DataError

from ..io import Scan
from ._icp import IcpConfig, PoseRefiner
from ._voxels import VoxelMap

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Progress = Callable[[int, int], None]


def static_mask(labels: np.ndarray) -> np.ndarray:
    """Return bool [N]: semantic ids 1 < id < 252, that is neither unlabelled, nor outlier, nor moving."""
    return (labels > 1) & (labels < 252)


def aggregate(
    scans: Iterable[Scan],
    poses: ArrayLike,
    *,
    voxel: float = 0.1,
    min_range: float = 3.5,
    max_range: float | None = None,
    min_z: float | None = None,
    max_z: float | None = None,
    static: bool = True,
    icp: bool | IcpConfig = False,
    progress: Progress | None = None,
) -> np.ndarray:
    """Merge sweeps to a map.

    Each sweep is cut by label, range and height, moved by its pose, and of the points in a voxel the first
    one stays. Sweeps are taken one at a time: memory is the map and one sweep, however many there are.

    Args:
        scans: sweeps in the order of the poses; a generator is enough.
        poses: [S, 4, 4], sweep i into the frame of the map.
        voxel: side of a voxel in metres.
        min_range: points nearer to the sensor than this many metres (x, y and z) are dropped: the car itself.
            The published map code also counts the remission into that distance; here it is not.
        max_range: points farther than this are dropped; None keeps them.
        min_z: points lower than this in the sensor's frame are dropped; None keeps them.
        max_z: points higher than this in the sensor's frame are dropped; None keeps them.
        static: drop points that are unlabelled, outliers or moving where a sweep has labels. A sweep without
            labels is taken whole.
        icp: align each sweep with those before it first; True or an `IcpConfig`. Odometry drifts, and what
            drifts is smeared.
        progress: called as `progress(done, total)`.

    Returns:
        float32 [M, 3] in the frame of the map.

    Raises:
        DataError: another number of sweeps than poses, or nothing left of all of them.
        ValueError: poses of another shape, limits that leave nothing.

    Source: the map construction published with LiDiff (labels, range, voxel and order).

    Example:
        >>> scan = Scan(np.array([[5.0, 0, 0], [5.01, 0, 0], [1.0, 0, 0]], np.float32))
        >>> move = np.eye(4)
        >>> move[0, 3] = 1.0
        >>> aggregate([scan, scan], [np.eye(4), move])[:, 0].tolist()
        [5.0, 6.0]
    """
    moves = np.asarray(poses, dtype=np.float64)
    if moves.ndim != 3 or moves.shape[1:] != (4, 4):
        raise ValueError(f"poses must be [S, 4, 4], got {list(moves.shape)}")
    if max_range is not None and max_range <= min_range:
        raise ValueError(f"max_range: {max_range} must be greater than min_range ({min_range})")
    if min_z is not None and max_z is not None and max_z <= min_z:
        raise ValueError(f"max_z: {max_z} must be greater than min_z ({min_z})")
    refiner = PoseRefiner(icp if isinstance(icp, IcpConfig) else IcpConfig()) if icp else None
    grid = VoxelMap(voxel)
    done = 0
    for scan in scans:
        if done == len(moves):
            raise DataError(f"poses: {len(moves)} for more sweeps than that; one a sweep is needed")
        points = scan.points
        distance = np.linalg.norm(points, axis=1)
        keep = distance > min_range
        if max_range is not None:
            keep &= distance < max_range
        if min_z is not None:
            keep &= points[:, 2] > min_z
        if max_z is not None:
            keep &= points[:, 2] < max_z
        if static and scan.labels is not None:
            keep &= static_mask(scan.labels)
        points = points[keep]
        move = moves[done]
        if refiner is not None:
            move = refiner.refine(points, move)
        grid.add(points.astype(np.float64) @ move[:3, :3].T + move[:3, 3])
        done += 1
        if progress is not None:
            progress(done, len(moves))
    if done != len(moves):
        raise DataError(f"poses: {len(moves)} for {done} sweeps; one a sweep is needed")
    if len(grid) == 0:
        raise DataError("no point is left for the map; widen the range, or check labels and poses")
    return grid.points()
