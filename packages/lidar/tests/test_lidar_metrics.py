"""Metrics against closed forms, scipy's dense versions and the two conventions' known values (T6)."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.lidar.metrics import (
    CompletionIoU,
    chamfer,
    emd,
    evaluate_cloud,
    jsd,
    nearest_distances,
    precision_recall,
    rmse,
)


def cloud(seed: int, count: int = 400, size: float = 6.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-size, size, (count, 3)) * [1, 1, 0.2]


def sheet() -> np.ndarray:
    side = np.arange(20) * 0.5 + 0.25
    x, y = np.meshgrid(side, side, indexing="ij")
    return np.stack([x.ravel(), y.ravel(), np.full(400, 0.25)], axis=1)


@pytest.mark.parametrize("convention", ["reference", "correct"])
def test_identical_clouds(convention: str) -> None:
    scores = evaluate_cloud(cloud(0), cloud(0), convention=convention, emd=True)
    for name in ("chamfer", "rmse", "jsd_3d", "jsd_bev"):
        assert scores[name] == 0.0, name
    for name in ("iou_0.5", "iou_0.2", "iou_0.1"):
        assert scores[name] == 1.0, name
    assert scores["f_score"] == 100.0
    assert scores["emd"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["3d", "bev"])
def test_disjoint_histograms(kind: str) -> None:
    a = cloud(1)
    assert jsd(a, a + 20.0, kind=kind) == pytest.approx(math.sqrt(math.log(2)), abs=1e-12)
    assert jsd(a, a + 20.0, kind=kind) == pytest.approx(0.83255, abs=5e-6)
    assert jsd(a, a + 20.0, kind=kind, convention="correct") == pytest.approx(math.log(2), abs=1e-12)


def test_two_sheets() -> None:
    assert emd(sheet(), sheet() + 0.5) == pytest.approx(math.sqrt(0.75), abs=1e-9)
    assert emd(sheet(), sheet() + 0.5, convention="reference") == pytest.approx(5.28, abs=5e-3)


def test_a_far_point_counts_in_one_convention_only() -> None:
    near, far = np.array([[1.1, 0, 0]]), np.array([[30.0, 0, 0]])
    for convention, expected in (("reference", 1.0), ("correct", 0.5)):
        metric = CompletionIoU((0.5,), convention=convention)
        metric.update(np.concatenate([near, far]), near)
        assert metric.compute() == {0.5: expected}


def test_old_iou_reaches_fifty_voxels() -> None:
    metric = CompletionIoU((0.5, 0.2, 0.1), convention="reference")
    points = np.array([[0.0, 0, 0], [4.9, 0, 0], [9.9, 0, 0], [24.9, 0, 0], [26.0, 0, 0]])
    metric.update(points, np.array([[0.0, 0, 0]]))
    assert metric.compute() == {0.5: 1 / 4, 0.2: 1 / 3, 0.1: 1 / 2}


def test_iou_is_pooled_not_averaged() -> None:
    metric, other = CompletionIoU((1.0,)), CompletionIoU((1.0,))
    grid = np.arange(10)[:, None] + np.array([[0.5, 0.5, 0.5]])
    metric.update(grid, grid)  # 10 of 10
    other.update(grid[:1], grid[:1] + 5.0)  # 0 of 2
    metric.merge(other)
    assert metric.compute() == {1.0: 10 / 12}
    with pytest.raises(ValueError, match="convention"):
        metric.merge(CompletionIoU((1.0,), convention="reference"))
    assert math.isnan(CompletionIoU((1.0,)).compute()[1.0])


@pytest.mark.parametrize("kind", ["3d", "bev"])
@pytest.mark.oracle
def test_jsd_equals_dense_histograms(kind: str) -> None:
    from scipy.spatial.distance import jensenshannon

    a, b = cloud(2, 3000), cloud(3, 2000) + 0.3
    a = np.concatenate([a, [[10.0, 10, 10], [10.5, 0, 0], [-10, -10, -10]]])  # the last bin holds its edge

    def dense(points: np.ndarray) -> np.ndarray:
        counts, _ = np.histogramdd(points, bins=40, range=[(-10, 10)] * 3)
        return (counts if kind == "3d" else counts.clip(max=1).sum(axis=2)).ravel()

    expected = jensenshannon(dense(a), dense(b))
    assert jsd(a, b, kind=kind, reach=10.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.oracle
def test_chamfer_equals_brute_force() -> None:
    from scipy.spatial.distance import cdist

    a, b = cloud(4, 300), cloud(5, 500)
    distance = cdist(a, b)
    there, back = nearest_distances(a, b)
    np.testing.assert_allclose(there, distance.min(axis=1), atol=1e-12)
    np.testing.assert_allclose(back, distance.min(axis=0), atol=1e-12)
    assert chamfer(a, b) == pytest.approx((distance.min(1).mean() + distance.min(0).mean()) / 2)
    assert chamfer(a, b, squared=True) == pytest.approx(
        ((distance.min(1) ** 2).mean() + (distance.min(0) ** 2).mean()) / 2
    )
    assert rmse(a, b, convention="reference") == pytest.approx(distance.min(1).mean())
    assert rmse(a, b) == pytest.approx(math.sqrt((distance.min(1) ** 2).mean()))


def test_chamfer_of_shifts() -> None:
    a = np.stack([np.arange(50.0) * 10, np.zeros(50), np.zeros(50)], axis=1)
    assert chamfer(a, a + np.array([0, 3.0, 4.0])) == pytest.approx(5.0)
    assert chamfer(a.astype(np.float32), (a + np.array([0, 3.0, 4.0])).astype(np.float32)) == pytest.approx(
        5.0
    )
    assert chamfer(np.zeros((5, 3)), np.ones((2, 3))) == pytest.approx(math.sqrt(3))


def test_precision_and_recall_of_a_shift() -> None:
    """At a shift of 0.075 m both curves step from 0 to 100 % in the middle: half of the area."""
    a = np.stack([np.arange(50.0), np.zeros(50), np.zeros(50)], axis=1)
    scores = precision_recall(a, a + np.array([0, 0.075, 0]))
    assert scores.precision == pytest.approx(50.0, abs=1.0)
    assert scores.precision == scores.recall == scores.f_score
    none = precision_recall(a, a + np.array([0, 0.5, 0]))
    assert (none.precision, none.recall, none.f_score) == (0.0, 0.0, 0.0)
    half = precision_recall(np.concatenate([a, a + np.array([0, 5.0, 0])]), a)
    assert (half.precision, half.recall) == (50.0, 100.0)
    assert half.f_score == pytest.approx(200 / 3)


@pytest.mark.oracle
def test_exact_emd_equals_a_linear_programme() -> None:
    from scipy.optimize import linprog
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(6)
    a, b = rng.uniform(-2, 2, (25, 3)), rng.uniform(-2, 2, (30, 3))

    def weigh(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cells, counts = np.unique(np.floor(points / 0.5), axis=0, return_counts=True)
        return (cells + 0.5) * 0.5, counts / counts.sum()

    (x, p), (y, q) = weigh(a), weigh(b)
    rows = np.kron(np.eye(len(p)), np.ones(len(q)))
    columns = np.kron(np.ones(len(p)), np.eye(len(q)))
    solved = linprog(cdist(x, y).ravel(), A_eq=np.concatenate([rows, columns]), b_eq=np.concatenate([p, q]))
    assert emd(a, b) == pytest.approx(solved.fun, abs=1e-8)


@pytest.mark.oracle
def test_reference_emd_equals_the_dense_iteration() -> None:
    from scipy.spatial.distance import cdist

    a, b = cloud(7, 300, 3.0), cloud(8, 200, 3.0)

    def weigh(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cells, counts = np.unique(np.floor(points / 0.5), axis=0, return_counts=True)
        return (cells + 0.5) * 0.5, counts / counts.sum()

    (x, p), (y, q) = weigh(a), weigh(b)
    cost = cdist(x, y)
    kernel = np.exp(-cost / 0.001) + 1e-9
    u, v = np.ones(len(p)), np.ones(len(q))
    for _ in range(3000):
        before, u = u, p / (kernel @ v)
        v = q / (kernel.T @ u)
        if np.abs(u - before).max() < 1e-4:
            break
    expected = float((u[:, None] * kernel * v * cost).sum())
    assert emd(a, b, convention="reference") == pytest.approx(expected, rel=1e-9)
    assert expected > emd(a, b)  # type: ignore[operator]


def test_emd_of_a_shift_and_of_too_many_voxels() -> None:
    a = cloud(9, 200)
    assert emd(a, a + np.array([4.0, 0, 0])) == pytest.approx(4.0, abs=1e-9)
    assert emd(cloud(9, 3000), a, max_voxels=100) is None
    with pytest.raises(ValueError, match="voxel"):
        emd(a, a, convention="reference", voxel=0.2)


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_symmetry_and_bounds(seed: int, n: int, m: int) -> None:
    a, b = cloud(seed, n, 3.0), cloud(seed + 1, m, 3.0)
    assert chamfer(a, b) == pytest.approx(chamfer(b, a))
    for kind in ("3d", "bev"):
        value = jsd(a, b, kind=kind)
        assert 0 <= value <= math.sqrt(math.log(2)) + 1e-12
        assert value == pytest.approx(jsd(b, a, kind=kind), abs=1e-9)
        assert jsd(a, b, kind=kind, convention="correct") == pytest.approx(value**2, abs=1e-12)
    forward, backward = emd(a, b), emd(b, a)
    assert forward == pytest.approx(backward, abs=1e-9)
    scores = evaluate_cloud(a, b)
    assert scores["chamfer"] == pytest.approx(chamfer(a, b))
    for level in ("0.5", "0.2", "0.1"):
        value = scores[f"iou_{level}"]
        assert value is not None
        assert 0 <= value <= 1


def test_evaluate_pools_into_an_accumulator() -> None:
    pooled = CompletionIoU()
    first = evaluate_cloud(cloud(0), cloud(0), iou=pooled)
    assert pooled.compute()[0.5] == first["iou_0.5"] == 1.0
    evaluate_cloud(cloud(0), cloud(0) + 20.0, iou=pooled)
    assert 0 < pooled.compute()[0.5] < 1
    assert "emd" not in first


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros((4, 2)), np.full((4, 3), np.nan)])
def test_refused(bad: np.ndarray) -> None:
    good = cloud(0)
    for call in (chamfer, precision_recall, jsd, emd, evaluate_cloud, CompletionIoU().update):
        with pytest.raises(ValueError, match="pred"):
            call(bad, good)
        with pytest.raises(ValueError, match="gt"):
            call(good, bad)


def test_refused_options() -> None:
    a = cloud(0)
    with pytest.raises(ValueError, match="convention='other'"):
        evaluate_cloud(a, a, convention="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind="):
        jsd(a, a, kind="4d")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="divide"):
        jsd(a, a, voxel=0.3)
    with pytest.raises(ValueError, match="frame"):
        jsd(a + 200.0, a)
    with pytest.raises(ValueError, match="levels"):
        CompletionIoU((0.0,))


def test_memory_of_large_clouds() -> None:
    """Histograms and overlap of 200,000 points each stay below 300 MB: 8 million bins are never held."""
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(-49, 49, (200_000, 3)).astype(np.float32) for _ in range(2))
    tracemalloc.start()
    try:
        for convention in ("reference", "correct"):
            for kind in ("3d", "bev"):
                jsd(a, b, kind=kind, convention=convention)
            CompletionIoU(convention=convention).update(a, b)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300e6
