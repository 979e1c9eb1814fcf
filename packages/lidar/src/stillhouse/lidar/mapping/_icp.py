"""Poses made to fit: each sweep is aligned by point-to-plane ICP with a map of the sweeps just before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..io import Scan, import_open3d
from ._voxels import thin


@dataclass(frozen=True, slots=True, kw_only=True)
class IcpConfig:
    """How poses are refined.

    Args:
        voxel: sweeps are thinned to one point in this many metres first.
        window: number of sweeps before the present one that it is aligned with.
        distance: pairs farther apart than this many metres do not count, at the first pass; the second one
            takes a third of it.
        iterations: most iterations of a pass.
        max_range: points farther from the sensor than this many metres do not count.
        max_shift: a correction of more than this many metres is taken for a failure and left out.
        max_turn: the same in degrees.
    """

    voxel: float = 0.25
    window: int = 10
    distance: float = 1.0
    iterations: int = 40
    max_range: float = 60.0
    max_shift: float = 2.0
    max_turn: float = 10.0

    def __post_init__(self) -> None:
        for name in ("voxel", "distance", "max_range", "max_shift", "max_turn"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be > 0")
        for name in ("window", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")


class PoseRefiner:
    """Refines poses one after the other; the first one stays as it is.

    The correction found for one sweep is the start for the next, so that a drift that grows is followed. A
    correction that is larger than the limits is left out: that sweep keeps the correction before it.

    Args:
        config: how.
    """

    def __init__(self, config: IcpConfig | None = None) -> None:
        self.config = config or IcpConfig()
        self._open3d: Any = import_open3d("the refinement of poses")
        self._window: deque[np.ndarray] = deque(maxlen=self.config.window)
        self._correction = np.eye(4)

    def refine(self, points: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Return the refined pose float64 [4, 4] of a sweep.

        Args:
            points: [N, 3] in the sensor's frame, static points if possible.
            pose: [4, 4], sensor's frame into the map's, as odometry has it.
        """
        config = self.config
        near = points[np.linalg.norm(points, axis=1) < config.max_range].astype(np.float64)
        near = near[thin(near, config.voxel)]
        refined = self._correction @ pose
        if self._window and len(near) >= 10:
            found = self._align(near, refined)
            change = found @ np.linalg.inv(refined)
            turn = np.degrees(np.arccos(np.clip((np.trace(change[:3, :3]) - 1) / 2, -1, 1)))
            shift = np.linalg.norm(found[:3, 3] - refined[:3, 3])
            if shift <= config.max_shift and turn <= config.max_turn:
                refined = found
                self._correction = found @ np.linalg.inv(pose)
        if len(near):
            self._window.append(near @ refined[:3, :3].T + refined[:3, 3])
        return refined

    def _align(self, points: np.ndarray, start: np.ndarray) -> np.ndarray:
        open3d, config = self._open3d, self.config
        target_points = np.concatenate(list(self._window))
        centre = target_points.mean(
            axis=0
        )  # the solver is float64, small numbers keep its normal matrix sound
        target = open3d.geometry.PointCloud(
            open3d.utility.Vector3dVector(target_points[thin(target_points, config.voxel)] - centre)
        )
        target.estimate_normals(open3d.geometry.KDTreeSearchParamHybrid(radius=4 * config.voxel, max_nn=20))
        source = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
        pipeline = open3d.pipelines.registration
        move = start.copy()
        move[:3, 3] -= centre
        for distance in (config.distance, config.distance / 3):
            kernel = pipeline.TukeyLoss(k=distance)
            move = pipeline.registration_icp(
                source,
                target,
                distance,
                move,
                pipeline.TransformationEstimationPointToPlane(kernel),
                pipeline.ICPConvergenceCriteria(max_iteration=config.iterations),
            ).transformation
        move = np.array(move)
        move[:3, 3] += centre
        return move


def refine_poses(
    scans: Iterable[Scan], poses: np.ndarray, config: IcpConfig | None = None, *, static: bool = True
) -> np.ndarray:
    """Refine the poses of a drive by ICP.

    Args:
        scans: sweeps in the order of the poses.
        poses: [S, 4, 4].
        config: how; the defaults where None.
        static: leave moving and unlabelled points out of the alignment where there are labels.

    Returns:
        float64 [S, 4, 4]; the first one is unchanged.

    Raises:
        MissingDependencyError: Open3D is missing.
        ValueError: another number of sweeps than poses.
    """
    from ._aggregate import static_mask

    refiner = PoseRefiner(config)
    found = []
    for scan, pose in zip(scans, poses, strict=True):
        keep = static_mask(scan.labels) if static and scan.labels is not None else slice(None)
        found.append(refiner.refine(scan.points[keep], pose))
    return np.stack(found)
