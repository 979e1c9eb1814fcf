"""`simulate_sequence`: a spinning LiDAR driven through a street, and the map of what stands still in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..io import Scan, import_open3d
from ..mapping import VoxelMap
from ._config import SimulateConfig
from ._mesh import Mesh
from ._street import Street

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedSequence:
    """A simulated drive; indexing gives sweeps, as with a `Sequence` of files.

    Args:
        name: what the drive is called.
        scans: the sweeps with remission and labels.
        poses: float64 [S, 4, 4], sweep i into the frame of the first one; exact.
        map: float32 [M, 3], points exactly on the static surfaces that are seen from the drive, in the frame
            of the first sweep, one a voxel: no noise, nothing that moves.
        labels: int32 [M], semantic ids of the map's points.
        config: what it was made of.
    """

    name: str
    scans: tuple[Scan, ...]
    poses: np.ndarray
    map: np.ndarray
    labels: np.ndarray
    config: SimulateConfig

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> Scan:
        return self.scans[index]

    def __iter__(self) -> Iterator[Scan]:
        return iter(self.scans)


class _Caster:
    """Casts rays at a mesh; what is hit has a distance, a label and a strength of echo."""

    def __init__(self, mesh: Mesh) -> None:
        open3d = import_open3d("the street simulator")
        vertices, triangles, self.labels, self.reflectivity = mesh.finish()
        self._tensor: Any = open3d.core.Tensor
        self._scene: Any = open3d.t.geometry.RaycastingScene() if len(triangles) else None
        if self._scene is not None:
            self._scene.add_triangles(
                self._tensor(vertices.astype(np.float32)), self._tensor(triangles.astype(np.uint32))
            )

    def cast(self, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return distance [N] (inf: nothing hit), label [N] and remission [N] of rays [N, 3] of length 1."""
        count = len(directions)
        if self._scene is None:
            return np.full(count, np.inf), np.zeros(count, np.int32), np.zeros(count)
        rays = np.empty((count, 6), np.float32)
        rays[:, :3], rays[:, 3:] = origin, directions
        answer = self._scene.cast_rays(self._tensor(rays))
        distance = answer["t_hit"].numpy().astype(np.float64)
        hit = np.isfinite(distance)
        triangle = np.where(hit, answer["primitive_ids"].numpy(), 0).astype(np.int64)
        facing = np.abs((answer["primitive_normals"].numpy() * directions).sum(axis=1))
        return distance, self.labels[triangle].astype(np.int32), self.reflectivity[triangle] * np.sqrt(facing)


def simulate_sequence(
    config: SimulateConfig | None = None, *, name: str | None = None, progress: Progress | None = None
) -> SimulatedSequence:
    """Simulate one drive.

    Args:
        config: the drive; the defaults where None.
        name: what it is called; `street-SEED` where None.
        progress: called as `progress(done, total)` over sweeps and places of the map.

    Returns:
        SimulatedSequence: the same for the same configuration.

    Raises:
        MissingDependencyError: Open3D is missing.

    Example:
        >>> drive = simulate_sequence(SimulateConfig(scans=2, rings=16, azimuths=128, map_rays=2048))
        >>> len(drive), drive.poses.shape, bool(len(drive.map) > 1000)
        (2, (2, 4, 4), True)
    """
    config = config or SimulateConfig()
    street = Street(config)
    static = _Caster(street.static)
    noise = np.random.default_rng([config.seed, 2])
    wander = 0.15 * np.sin(np.arange(config.scans) * config.spacing / 9 + noise.uniform(0, 6))
    world = np.stack([street.sensor(i * config.spacing, wander[i]) for i in range(config.scans)])
    to_first = np.linalg.inv(world[0])
    places = np.arange(
        -config.map_lead, (config.scans - 1) * config.spacing + config.map_lead + 1e-6, config.map_step
    )
    total = config.scans + len(places)
    rays = _turn(config)
    scans = []
    for index, pose in enumerate(world):
        moving = _Caster(street.traffic(index * config.spacing))
        scans.append(_sweep(config, static, moving, pose, rays, noise, f"{index:06d}"))
        if progress is not None:
            progress(index + 1, total)
    grid = VoxelMap(config.map_voxel)
    labels = []
    for number, s in enumerate(places):
        pose = street.sensor(float(s))
        directions = _random_directions(config, noise) @ pose[:3, :3].T
        distance, label, _ = static.cast(pose[:3, 3], directions)
        hit = distance < config.map_range
        points = pose[:3, 3] + distance[hit, None] * directions[hit]
        labels.append(label[hit][grid.add(points @ to_first[:3, :3].T + to_first[:3, 3])])
        if progress is not None:
            progress(config.scans + number + 1, total)
    return SimulatedSequence(
        name or f"street-{config.seed}",
        tuple(scans),
        to_first @ world,
        grid.points(),
        np.concatenate(labels),
        config,
    )


def _turn(config: SimulateConfig) -> np.ndarray:
    """Directions [rings · azimuths, 3] of one turn in the sensor's frame."""
    elevation = np.radians(np.linspace(config.elevation[1], config.elevation[0], config.rings))
    azimuth = 2 * np.pi * np.arange(config.azimuths) / config.azimuths - np.pi
    up, around = (grid.ravel() for grid in np.meshgrid(elevation, azimuth, indexing="ij"))
    return np.stack([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)], axis=1)


def _random_directions(config: SimulateConfig, rng: np.random.Generator) -> np.ndarray:
    low, high = np.radians(config.elevation)
    up = rng.uniform(low, high, config.map_rays)
    around = rng.uniform(-np.pi, np.pi, config.map_rays)
    return np.stack([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)], axis=1)


def _sweep(
    config: SimulateConfig,
    static: _Caster,
    moving: _Caster,
    pose: np.ndarray,
    rays: np.ndarray,
    rng: np.random.Generator,
    name: str,
) -> Scan:
    directions = rays @ pose[:3, :3].T
    distance, label, remission = static.cast(pose[:3, 3], directions)
    other, other_label, other_remission = moving.cast(pose[:3, 3], directions)
    nearer = other < distance
    distance = np.where(nearer, other, distance)
    label = np.where(nearer, other_label, label)
    remission = np.where(nearer, other_remission, remission)
    keep = (distance < config.max_range) & (rng.random(len(distance)) >= config.dropout)
    measured = distance[keep] + config.range_noise * rng.standard_normal(int(keep.sum()))
    strength = np.clip(remission[keep] + 0.02 * rng.standard_normal(int(keep.sum())), 0, 1)
    points = rays[keep] * measured[:, None]
    return Scan(points.astype(np.float32), strength.astype(np.float32), label[keep].astype(np.int32), name)
