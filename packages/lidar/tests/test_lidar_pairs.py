"""Training pairs: fixed sizes, the rules of the crop, joint augmentation, determinism, maps kept on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.core.errors import DataError
from stillhouse.core.train import SeededLoader
from stillhouse.lidar.io import Scan, Sequence, read_sequence, write_cloud
from stillhouse.lidar.pairs import (
    MapCache,
    PairConfig,
    PairDataset,
    TiledMap,
    evaluation_pair,
    evaluation_truth,
    farthest_points,
    fill,
    make_pair,
    partial_points,
)
from stillhouse.lidar.simulate import SimulateConfig, SimulatedSequence, simulate_sequence, write_kitti

SMALL = SimulateConfig(seed=4, scans=3, rings=24, azimuths=256, map_step=3.0, map_rays=16_384)
PAIR = PairConfig(points=200, factor=5, max_range=20.0)


@pytest.fixture(scope="module")
def drive() -> SimulatedSequence:
    return simulate_sequence(SMALL)


@pytest.fixture(scope="module")
def folder(drive: SimulatedSequence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kitti(drive, tmp_path_factory.mktemp("drives") / "00")


def test_farthest_points_spread() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(0, 0.01, (500, 3)), [[5.0, 0, 0], [0, 5, 0], [0, 0, 5]]])
    rows = farthest_points(points, 4)
    assert {500, 501, 502} <= set(rows.tolist())
    assert len(set(rows.tolist())) == 4
    assert rows.tolist() == farthest_points(points, 4).tolist()
    assert farthest_points(points, 4, start=7).tolist() != rows.tolist()


def test_farthest_points_equal_the_plain_algorithm() -> None:
    points = np.random.default_rng(1).normal(size=(300, 3)).astype(np.float32)
    for start in (0, 3, 299):
        rows = farthest_points(points, 40, start=start).tolist()
        expected, distance = rows[:1], np.full(300, np.inf)
        for _ in range(39):
            distance = np.minimum(distance, ((points - points[expected[-1]]) ** 2).sum(axis=1))
            expected.append(int(distance.argmax()))
        assert rows == expected


def test_too_few_points_are_repeated() -> None:
    points = np.arange(21.0).reshape(7, 3)
    counts = np.bincount(farthest_points(points, 17), minlength=7)
    assert sorted(counts.tolist()) == [2, 2, 2, 2, 3, 3, 3]
    filled = fill(points, 17, np.random.default_rng(0))
    assert filled.shape == (17, 3)
    assert {tuple(row) for row in filled} == {tuple(row) for row in points.astype(np.float32)}
    for bad in (lambda: farthest_points(points[:0], 3), lambda: farthest_points(points, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            bad()
    with pytest.raises(ValueError, match="start"):
        farthest_points(points, 3, start=9)


def test_pair_sizes_and_determinism(drive: SimulatedSequence) -> None:
    def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
        made = make_pair(drive[1], drive.map, drive.poses[1], PAIR, np.random.default_rng(seed))
        return made.partial, made.full

    partial, full = pair(0)
    assert (partial.shape, full.shape) == ((200, 3), (1000, 3))
    assert partial.dtype == full.dtype == np.float32
    for a, b in zip(pair(0), (partial, full), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(pair(1)[0], partial)


def test_without_augmentation_the_clouds_fit(drive: SimulatedSequence) -> None:
    """In the sensor's frame every partial point lies by the map, and both keep to the rules of the crop."""
    from dataclasses import replace

    from scipy.spatial import cKDTree

    config = replace(PAIR, augment=False)
    pair = make_pair(drive[2], drive.map, drive.poses[2], config, np.random.default_rng(0))
    local = (drive.map - drive.poses[2][:3, 3]) @ drive.poses[2][:3, :3]
    assert np.median(cKDTree(local).query(pair.partial)[0]) < 0.1
    assert cKDTree(local).query(pair.full)[0].max() < 1e-4
    distance = np.linalg.norm(pair.partial, axis=1)
    assert distance.min() > 3.5
    assert distance.max() < 20
    assert np.linalg.norm(pair.full, axis=1).max() < 20
    assert min(pair.partial[:, 2].min(), pair.full[:, 2].min()) > -4
    cells = {tuple(cell) for cell in np.floor(partial_points(drive[2], config) / 10).astype(int)}
    assert {tuple(cell) for cell in np.floor(pair.full / 10).astype(int)} <= cells


def test_augmentation_moves_both_alike() -> None:
    """A cloud paired with itself stays itself: each complete point has a partial one in the same place."""
    from scipy.spatial import cKDTree

    points = np.random.default_rng(0).uniform([-15, -15, -2], [15, 15, 2], (300, 3)).astype(np.float32)
    config = PairConfig(points=300, factor=1, max_range=30.0, min_range=0.0)
    scales, tilts = [], []
    for seed in range(40):
        pair = make_pair(Scan(points), points, np.eye(4), config, np.random.default_rng(seed))
        assert cKDTree(pair.partial).query(pair.full)[0].max() < 1e-4
        scales.append(np.linalg.norm(pair.partial, axis=1).mean() / np.linalg.norm(points, axis=1).mean())
        # The flat cloud's normal, which the augmentation leans over by little.
        tilts.append(abs(np.linalg.eigh(np.cov(pair.partial.T))[1][2, 0]))
    assert 0.95 <= min(scales) < 0.97 < 1.03 < max(scales) <= 1.05
    assert min(tilts) > np.cos(3 * np.sqrt(3) * 0.06 + 0.05)
    assert min(tilts) < 0.9999


def test_half_of_the_pairs_are_mirrored() -> None:
    """Three points around the sensor are told apart by their distance; mirrored, their order turns round."""
    points = np.array([[6.0, 0, 0], [0, 8, 0], [-10, 0, 0]], np.float32)
    config = PairConfig(points=3, factor=1, max_range=30.0, min_range=0.0)
    signs = []
    for seed in range(200):
        pair = make_pair(Scan(points), points, np.eye(4), config, np.random.default_rng(seed))
        a, b, _ = pair.partial[np.argsort(np.linalg.norm(pair.partial, axis=1))]
        signs.append(a[0] * b[1] - a[1] * b[0] > 0)
    assert 70 < sum(signs) < 130


def test_moving_things_are_no_input(drive: SimulatedSequence) -> None:
    labels = drive[0].labels
    assert labels is not None
    assert (labels >= 252).sum() > 20
    with_all = partial_points(drive[0], PairConfig(static=False, max_range=20.0))
    without = partial_points(drive[0], PairConfig(max_range=20.0))
    assert len(without) < len(with_all)


def test_evaluation_truth(drive: SimulatedSequence) -> None:
    truth = evaluation_truth(drive[0], drive.map, drive.poses[0], PAIR)
    assert truth[:, 2].max() < 4.4
    assert truth[:, 2].min() > -4
    assert np.linalg.norm(truth, axis=1).max() < 20
    again = evaluation_pair(drive[0], TiledMap(drive.map), drive.poses[0], PAIR)
    assert len(again.full) == len(truth)
    assert {tuple(p) for p in again.full} == {tuple(p) for p in truth}
    np.testing.assert_array_equal(
        again.partial, evaluation_pair(drive[0], drive.map, drive.poses[0], PAIR).partial
    )
    # The grid is that of the whole sweep, moving things included.
    scan = Scan(np.array([[5.0, 5, 0], [15, 5, 0]], np.float32), labels=np.array([40, 252]))
    marks = np.array([[6.0, 6, 0], [16, 6, 0], [6, -6, 0]], np.float32)
    kept = evaluation_truth(scan, marks, np.eye(4), PAIR)
    assert kept.tolist() == [[6, 6, 0], [16, 6, 0]]


def test_tiles_find_what_a_search_finds() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-100, 100, (5000, 3)).astype(np.float32)
    tiled = TiledMap(points, tile=7.0)
    for centre in (np.zeros(3), np.array([95.0, -99, 0]), np.array([300.0, 0, 0])):
        near = tiled.near(centre, 20.0)
        wanted = points[np.linalg.norm(points - centre, axis=1) < 20]
        assert {tuple(p) for p in wanted} <= {tuple(p) for p in near}
        assert len(near) < len(points)


def test_nothing_left_is_said(drive: SimulatedSequence) -> None:
    rng = np.random.default_rng(0)
    far = drive.poses[0].copy()
    far[0, 3] = 5000.0
    with pytest.raises(DataError, match="check the poses"):
        make_pair(drive[0], drive.map, far, PAIR, rng)
    near = Scan(np.full((3, 3), 0.1, np.float32), name="000009")
    with pytest.raises(DataError, match="000009: no point is left"):
        make_pair(near, drive.map, drive.poses[0], PAIR, rng)
    for wrong in ({"points": 0}, {"max_range": 1.0}, {"grid": 0.0}, {"scale": 1.0}, {"max_z": -5.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PairConfig(**wrong)


def test_dataset(drive: SimulatedSequence) -> None:
    other = simulate_sequence(SMALL, name="other")
    dataset = PairDataset([drive, other], PAIR)
    assert len(dataset) == 6
    assert dataset.locate(2) == (0, 2)
    assert dataset.locate(3) == (1, 0)
    first, again, different = dataset[(4, 11)], dataset[(4, 11)], dataset[(4, 12)]
    assert torch.equal(first["full"], again["full"])
    assert not torch.equal(first["partial"], different["partial"])
    assert (first["partial"].shape, first["full"].shape, first["index"]) == ((200, 3), (1000, 3), 4)
    batch = next(iter(SeededLoader(dataset, batch_size=2, seed=0)))
    assert batch["partial"].shape == (2, 200, 3)
    assert batch["partial"].dtype == torch.float32
    with pytest.raises(DataError, match="two drives"):
        PairDataset([drive, drive], PAIR)
    with pytest.raises(IndexError):
        dataset[6]


def test_dataset_of_files_reads_lazily_and_keeps_maps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = read_sequence(folder)
    reads: list[int] = []
    plain = Sequence.__getitem__

    def counted(self: Sequence, index: int) -> Scan:
        reads.append(index)
        return plain(self, index)

    monkeypatch.setattr(Sequence, "__getitem__", counted)
    cache = MapCache(tmp_path / "maps")
    first = PairDataset([sequence], PAIR, cache=cache)
    assert reads == [0, 1, 2]  # once, for the map
    sample = first[(1, 3)]
    assert reads == [0, 1, 2, 1]
    files = list((tmp_path / "maps").iterdir())
    assert len(files) == 1
    reads.clear()
    second = PairDataset([read_sequence(folder)], PAIR, cache=cache)
    assert reads == []
    assert torch.equal(second[(1, 3)]["full"], sample["full"])
    # Another setting, and a damaged file, are made anew.
    PairDataset([sequence], PAIR, cache=MapCache(tmp_path / "maps", voxel=0.2))
    assert len(list((tmp_path / "maps").iterdir())) == 2
    files[0].write_bytes(files[0].read_bytes()[:200])
    third = PairDataset([sequence], PAIR, cache=cache)
    assert torch.equal(third[(1, 3)]["full"], sample["full"])


def test_a_changed_sweep_makes_another_map(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "00"))
    cache = MapCache(tmp_path / "maps")
    before = len(cache.get(read_sequence(copy)))
    write_cloud(copy / "velodyne" / "000002.bin", read_sequence(copy)[2].points + np.float32(0.02))
    assert len(cache.get(read_sequence(copy))) != before
    assert len(list((tmp_path / "maps").iterdir())) == 2


def test_drives_without_poses_are_refused(folder: Path) -> None:
    sequence = read_sequence(folder)
    sequence.poses = None
    with pytest.raises(DataError, match="no poses"):
        PairDataset([sequence], PAIR)


@pytest.mark.real_data
def test_real_pair_at_full_size() -> None:
    root = os.environ.get("STILLHOUSE_TEST_DATA")
    if not root:
        pytest.skip("STILLHOUSE_TEST_DATA is not set")
    sequence = read_sequence(Path(root, "lidar", "sequences", "00"))
    sample = PairDataset([sequence], PairConfig())[(2, 0)]
    assert sample["partial"].shape == (18_000, 3)
    assert sample["full"].shape == (180_000, 3)
