"""Simulated streets: geometry that is exact, things that move, seeds, and files that read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stillhouse.core.errors import DataError
from stillhouse.lidar.io import ScanSource, read_sequence
from stillhouse.lidar.mapping import VoxelMap
from stillhouse.lidar.simulate import (
    LABELS,
    SimulateConfig,
    SimulatedSequence,
    simulate_sequence,
    write_kitti,
)

CONFIG = SimulateConfig(seed=1, scans=4, rings=32, azimuths=512, map_step=2.0, map_rays=32_768)


@pytest.fixture(scope="module")
def drive() -> SimulatedSequence:
    return simulate_sequence(CONFIG)


def moved(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    return points @ pose[:3, :3].T + pose[:3, 3]


def test_shapes(drive: SimulatedSequence) -> None:
    assert isinstance(drive, ScanSource)
    assert len(drive) == 4
    assert drive.poses.shape == (4, 4, 4)
    np.testing.assert_allclose(drive.poses[0], np.eye(4), atol=1e-12)
    for scan in drive:
        assert 5000 < len(scan) <= 32 * 512
        assert scan.remission is not None
        assert scan.remission.min() >= 0
        assert scan.remission.max() <= 1
    assert len(drive.labels) == len(drive.map)


def test_poses_drive_along_a_road(drive: SimulatedSequence) -> None:
    steps = np.linalg.norm(np.diff(drive.poses[:, :3, 3], axis=0), axis=1)
    np.testing.assert_allclose(steps, CONFIG.spacing, rtol=0.1)
    for pose in drive.poses:
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        assert pose[2, 2] > 0.99  # upright


def test_the_road_is_as_far_below_as_the_sensor_is_high(drive: SimulatedSequence) -> None:
    for scan in drive:
        assert scan.labels is not None
        near = (scan.labels == LABELS["road"]) & (np.linalg.norm(scan.points, axis=1) < 6)
        assert near.sum() > 100
        assert np.median(scan.points[near, 2]) == pytest.approx(-CONFIG.height, abs=0.05)


def test_what_a_street_has() -> None:
    seen: set[int] = set()
    for seed in range(4):
        made = simulate_sequence(
            SimulateConfig(seed=seed, scans=2, azimuths=512, map_step=10.0, map_rays=4096)
        )
        for scan in made:
            assert scan.labels is not None
            seen |= set(np.unique(scan.labels).tolist())
    assert seen == set(LABELS.values())


def test_static_points_lie_on_the_map_and_moving_ones_do_not(drive: SimulatedSequence) -> None:
    from scipy.spatial import cKDTree

    tree = cKDTree(drive.map)
    moving_distance = []
    for scan, pose in zip(drive, drive.poses, strict=True):
        assert scan.labels is not None
        near = np.linalg.norm(scan.points, axis=1) < 15
        still = scan.points[near & (scan.labels < 252)]
        assert np.percentile(tree.query(moved(still, pose))[0], 95) < 0.3
        moving_distance.append(tree.query(moved(scan.points[near & (scan.labels >= 252)], pose))[0])
    distance = np.concatenate(moving_distance)
    assert len(distance) > 50
    assert np.median(distance) > 0.3


def test_map_is_exact() -> None:
    """Without range noise a sweep from a place of the map lies within a voxel's diagonal of dense map points,
    and every point of the map is on a surface: casting towards it stops there."""
    from stillhouse.lidar.simulate._drive import _Caster
    from stillhouse.lidar.simulate._street import Street

    config = SimulateConfig(seed=6, scans=1, rings=16, azimuths=128, map_rays=8192, map_lead=0.0)
    made = simulate_sequence(config)
    street = Street(config)
    caster = _Caster(street.static)
    sensor = street.sensor(0.0)
    # The first sweep's frame differs from the unswayed sensor of the map by a sideways sway alone.
    wander = 0.15 * np.sin(np.random.default_rng([config.seed, 2]).uniform(0, 6))
    world = moved(made.map.astype(np.float64), street.sensor(0.0, wander))
    ray = world - sensor[:3, 3]
    length = np.linalg.norm(ray, axis=1)
    distance, label, _ = caster.cast(sensor[:3, 3], ray / length[:, None])
    assert np.percentile(np.abs(distance - length), 99) < 1e-3
    assert (label == made.labels).mean() > 0.99
    assert set(np.unique(made.labels)) <= set(LABELS.values()) - {252, 254}
    assert len(VoxelMap(config.map_voxel).add(made.map)) > 0.995 * len(made.map)


def test_range_noise_and_reach() -> None:
    base = {"seed": 3, "scans": 1, "rings": 16, "azimuths": 256, "map_rays": 1024, "dropout": 0.0}
    exact = simulate_sequence(SimulateConfig(**base, range_noise=0.0))[0]
    noisy = simulate_sequence(SimulateConfig(**base, range_noise=0.05))[0]
    error = np.linalg.norm(noisy.points, axis=1) - np.linalg.norm(exact.points, axis=1)
    assert np.std(error) == pytest.approx(0.05, rel=0.1)
    assert abs(np.mean(error)) < 0.005
    near = simulate_sequence(SimulateConfig(**base, max_range=15.0, range_noise=0.0))[0]
    assert np.linalg.norm(near.points, axis=1).max() < 15
    half = simulate_sequence(SimulateConfig(**{**base, "dropout": 0.5}))[0]
    assert len(half) == pytest.approx(len(exact) / 2, rel=0.1)
    elevation = np.degrees(np.arcsin(exact.points[:, 2] / np.linalg.norm(exact.points, axis=1)))
    assert len(np.unique(np.round(elevation, 2))) == 16


def test_traffic_moves_between_sweeps(drive: SimulatedSequence) -> None:
    from scipy.spatial import cKDTree

    clouds = []
    for index in (0, 3):
        scan = drive[index]
        assert scan.labels is not None
        clouds.append(moved(scan.points[scan.labels == 252], drive.poses[index]))
    assert min(map(len, clouds)) > 20
    assert np.median(cKDTree(clouds[0]).query(clouds[1])[0]) > 0.2


def test_seeds() -> None:
    small = {"scans": 2, "rings": 8, "azimuths": 64, "map_rays": 1024, "map_step": 10.0}
    a, again, b = (simulate_sequence(SimulateConfig(seed=seed, **small)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a[1].points, again[1].points)
    np.testing.assert_array_equal(a.map, again.map)
    assert (a.name, b.name) == ("street-0", "street-1")
    assert a.map.shape != b.map.shape or not np.array_equal(a.map, b.map)


def test_files_read_back(drive: SimulatedSequence, tmp_path: Path) -> None:
    folder = write_kitti(drive, tmp_path / "sequences" / "03")
    read = read_sequence(folder)
    assert (read.name, len(read)) == ("03", 4)
    assert read.poses is not None
    np.testing.assert_allclose(read.poses, drive.poses, atol=1e-12)
    for ours, theirs in zip(drive, read, strict=True):
        np.testing.assert_array_equal(ours.points, theirs.points)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(ours.remission, theirs.remission)
    np.testing.assert_array_equal(np.load(folder / "map.npy"), drive.map)
    with pytest.raises(DataError, match="not empty"):
        write_kitti(drive, folder)
    assert sorted(path.name for path in (tmp_path / "sequences").iterdir()) == ["03"]


def test_progress_and_refusals() -> None:
    steps: list[tuple[int, int]] = []
    simulate_sequence(
        SimulateConfig(scans=2, rings=4, azimuths=32, map_rays=64, map_step=10.0),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(done, steps[0][1]) for done in range(1, steps[0][1] + 1)]
    for wrong in (
        {"scans": 0}, {"rings": 1}, {"spacing": 0.0}, {"dropout": 1.0}, {"elevation": (5.0, -5.0)},
        {"seed": -1}, {"range_noise": float("nan")}, {"map_lead": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SimulateConfig(**wrong)  # type: ignore[arg-type]
