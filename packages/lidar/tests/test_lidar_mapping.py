"""Maps: first hit per voxel, static points, streaming memory, refined poses, real sweeps that align (T7)."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stillhouse.core.errors import DataError
from stillhouse.lidar.io import Scan, Sequence, read_calib, read_poses, read_sequence
from stillhouse.lidar.mapping import (
    IcpConfig,
    VoxelMap,
    aggregate,
    refine_poses,
    static_mask,
    thin,
    voxel_keys,
)
from stillhouse.lidar.simulate import SimulateConfig, SimulatedSequence, simulate_sequence


@pytest.fixture(scope="module")
def drive() -> SimulatedSequence:
    return simulate_sequence(
        SimulateConfig(
            seed=2, scans=6, rings=32, azimuths=512, moving_cars=6, people=8, map_step=2.0, map_rays=32_768
        )
    )


@pytest.fixture(scope="module")
def real() -> Sequence:
    folder = os.environ.get("STILLHOUSE_TEST_DATA")
    if not folder:
        pytest.skip("STILLHOUSE_TEST_DATA is not set")
    return read_sequence(Path(folder, "lidar", "sequences", "00"))


def test_voxel_map_equals_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    grid, seen, expected = VoxelMap(0.5), set(), []
    for _ in range(30):
        points = rng.uniform(-4, 4, (rng.integers(0, 200), 3)).astype(np.float32)
        kept = grid.add(points)
        rows = []
        for row, point in enumerate(points):
            key = tuple(np.floor(point.astype(np.float64) / 0.5).astype(int))
            if key not in seen:
                seen.add(key)
                rows.append(row)
                expected.append(point)
        assert kept.tolist() == rows
    assert len(grid) == len(expected)
    np.testing.assert_array_equal(grid.points(), np.array(expected))
    np.testing.assert_array_equal(grid.points(), np.array(expected))  # asking does not change it


def test_keys_are_one_to_one() -> None:
    rng = np.random.default_rng(1)
    points = rng.uniform(-5, 5, (5000, 3))
    assert len(np.unique(voxel_keys(points, 0.7))) == len(np.unique(np.floor(points / 0.7), axis=0))
    assert len(thin(points, 0.7)) == len(np.unique(np.floor(points / 0.7), axis=0))
    with pytest.raises(ValueError, match="voxels of"):
        voxel_keys(np.array([[1e6, 0, 0]]), 0.1)
    with pytest.raises(ValueError, match="voxel: 0"):
        voxel_keys(points, 0.0)


def test_rules_of_the_map() -> None:
    """Labels 1 < id < 252, range by x, y and z alone, limits of height, first hit."""
    points = np.array(
        [[5, 0, 0], [5.01, 0, 0], [6, 0, 0], [7, 0, 0], [8, 0, 0], [3.4, 0, 0], [0, 9, -5], [0, 9, 5]],
        np.float32,
    )
    labels = np.array([40, 40, 0, 1, 252, 40, 40, 40])
    remission = np.full(8, 5.0, np.float32)  # would push the near point beyond 3.5 m if it entered the range
    scan = Scan(points, remission, labels)
    pose = np.eye(4)[None]
    assert aggregate([scan], pose).tolist() == [[5, 0, 0], [0, 9, -5], [0, 9, 5]]
    assert aggregate([scan], pose, min_z=-4.0, max_z=4.4).tolist() == [[5, 0, 0]]
    assert len(aggregate([scan], pose, static=False)) == 6
    assert len(aggregate([Scan(points)], pose)) == 6
    assert aggregate([scan], pose, max_range=6.0).tolist() == [[5, 0, 0]]
    assert static_mask(np.array([0, 1, 2, 251, 252])).tolist() == [False, False, True, True, False]


def test_wrong_numbers() -> None:
    scan = Scan(np.full((1, 3), 5.0, np.float32))
    eye = np.eye(4)
    with pytest.raises(DataError, match="poses: 1 for more"):
        aggregate([scan, scan], [eye])
    with pytest.raises(DataError, match="poses: 2 for 1"):
        aggregate([scan], [eye, eye])
    with pytest.raises(DataError, match="no point is left"):
        aggregate([scan], [eye], min_range=20.0)
    with pytest.raises(ValueError, match="max_range"):
        aggregate([scan], [eye], max_range=1.0)
    with pytest.raises(ValueError, match="poses must be"):
        aggregate([scan], eye)


def test_moving_things_leave_no_trace(drive: SimulatedSequence) -> None:
    """What is kept of a simulated drive lies on the exact static map; with `static=False` it does not."""
    from scipy.spatial import cKDTree

    tree = cKDTree(drive.map)
    clean = aggregate(drive.scans, drive.poses, max_range=20.0)
    dirty = aggregate(drive.scans, drive.poses, max_range=20.0, static=False)
    assert (tree.query(clean)[0] > 0.6).mean() < 0.01
    moving = len(dirty) - len(clean)
    assert moving > 100
    far = tree.query(dirty)[0] > 0.6
    assert far.sum() > (tree.query(clean)[0] > 0.6).sum() + 50


def test_memory_does_not_grow_with_the_number_of_scans() -> None:
    """The same street swept 10 or 80 times gives the same map at the same peak."""
    base = np.random.default_rng(0).uniform(-30, 30, (30_000, 3)).astype(np.float32)

    def sweeps(count: int) -> Iterator[Scan]:
        for _ in range(count):
            yield Scan(base.copy(), None, np.full(len(base), 40))

    peaks, sizes = [], []
    for count in (10, 80):
        tracemalloc.start()
        sizes.append(len(aggregate(sweeps(count), np.tile(np.eye(4), (count, 1, 1)))))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert sizes[0] == sizes[1]
    assert peaks[1] < 1.05 * peaks[0]


def test_icp_mends_perturbed_poses(drive: SimulatedSequence) -> None:
    """Drift of odometry (a bias of 8 cm and 0.3° a sweep) is taken back to less than a third."""
    wrong = [drive.poses[0]]
    turn = np.radians(0.3)
    drift = np.eye(4)
    drift[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    drift[:3, 3] = [0.04, 0.08, 0.02]
    for before, after in zip(drive.poses, drive.poses[1:], strict=False):
        wrong.append(wrong[-1] @ np.linalg.inv(before) @ after @ drift)
    poses = np.stack(wrong)
    refined = refine_poses(drive.scans, poses)
    np.testing.assert_array_equal(refined[0], drive.poses[0])

    def error(found: np.ndarray) -> float:
        return float(np.linalg.norm(found[1:, :3, 3] - drive.poses[1:, :3, 3], axis=1).mean())

    assert error(poses) > 0.2
    assert error(refined) < error(poses) / 3
    from scipy.spatial import cKDTree

    tree = cKDTree(drive.map)
    crisp, smeared = (
        float(tree.query(aggregate(drive.scans, poses, max_range=20.0, icp=icp))[0].mean())
        for icp in (True, False)
    )
    assert crisp < smeared


def test_icp_leaves_good_poses_alone(drive: SimulatedSequence) -> None:
    """Exact poses stay within the noise of the ranges: a tenth of a voxel of the alignment."""
    refined = refine_poses(drive.scans, drive.poses)
    assert np.linalg.norm(refined[:, :3, 3] - drive.poses[:, :3, 3], axis=1).max() < 0.03


def test_icp_leaves_out_what_is_too_much(drive: SimulatedSequence) -> None:
    poses = drive.poses.copy()
    poses[1:, 1, 3] += 0.3
    limited = refine_poses(drive.scans, poses, IcpConfig(max_shift=1e-6))
    np.testing.assert_array_equal(limited, poses)
    with pytest.raises(ValueError, match="window"):
        IcpConfig(window=0)


def upright(points: np.ndarray) -> np.ndarray:
    """Points above the ground, 3.5 to 30 m away."""
    distance = np.linalg.norm(points, axis=1)
    return points[(points[:, 2] > -1.0) & (distance > 3.5) & (distance < 30)]


@pytest.mark.real_data
def test_real_sweeps_align(real: Sequence) -> None:
    """T7: median distance of points above the ground, as they are and after the poses."""
    from scipy.spatial import cKDTree

    assert real.poses is not None
    move = np.linalg.inv(real.poses[0]) @ real.poses[1]
    np.testing.assert_allclose(move[:3, 3], [0.859, 0.047, 0.022], atol=1e-3)
    tree = cKDTree(upright(real[0].points))
    folder = real.paths[0].parents[1]
    camera, tr = read_poses(folder / "poses.txt"), read_calib(folder / "calib.txt")
    for index, raw, aligned in ((1, 0.155, 0.068), (5, 0.454, 0.164)):
        points = upright(real[index].points)

        def median(pose: np.ndarray, points: np.ndarray = points) -> float:
            return float(np.median(tree.query(points @ pose[:3, :3].T + pose[:3, 3])[0]))

        assert median(np.eye(4)) == pytest.approx(raw, abs=3e-3)
        assert median(np.linalg.inv(real.poses[0]) @ real.poses[index]) == pytest.approx(aligned, abs=3e-3)
        assert median(camera[index] @ tr) > 2 * aligned  # without Tr⁻¹ the sweeps do not meet


@pytest.mark.real_data
def test_real_map(real: Sequence) -> None:
    """Six sweeps within 50 m at 0.1 m: 239,703 voxels, one sweep 58,054."""
    assert real.poses is not None
    assert len(aggregate(real, real.poses, max_range=50.0)) == 239_703
    assert len(aggregate([real[0]], real.poses[:1], max_range=50.0)) == 58_054


@pytest.mark.real_data
def test_real_poses_are_mended(real: Sequence) -> None:
    """ICP brings the real sweeps closer together than the given poses do, wherever it starts."""
    from scipy.spatial import cKDTree

    assert real.poses is not None
    refined = refine_poses(real, real.poses)
    tree = cKDTree(upright(real[0].points))
    points = upright(real[5].points)
    given, found = (
        float(np.median(tree.query(points @ pose[:3, :3].T + pose[:3, 3])[0]))
        for pose in (real.poses[5], refined[5])
    )
    assert given > 0.15
    assert found < 0.06
    turn = np.radians(1.0)
    knock = np.eye(4)
    knock[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    knock[:3, 3] = [0.2, 0.2, 0.1]
    poses = real.poses.copy()
    poses[1::2] = poses[1::2] @ knock
    again = refine_poses(real, poses)
    assert np.linalg.norm(again[:, :3, 3] - refined[:, :3, 3], axis=1).max() < 0.02
