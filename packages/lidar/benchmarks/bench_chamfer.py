"""Chamfer distance of two clouds of 180,000 points, against Open3D and SciPy on the same work.

    python packages/lidar/benchmarks/bench_chamfer.py

The clouds are a simulated street's map and the same points moved by N(0, 0.1 m). All ways use every core that
this process may use. Results are checked equal first; repetitions are interleaved; medians are printed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
from scipy.spatial import cKDTree

from stillhouse.lidar.io import import_open3d
from stillhouse.lidar.metrics import chamfer
from stillhouse.lidar.pairs import fill
from stillhouse.lidar.simulate import SimulateConfig, simulate_sequence


def by_scipy(pred: np.ndarray, gt: np.ndarray) -> float:
    there = cKDTree(gt).query(pred, workers=-1)[0]
    return float(0.5 * (there.mean() + cKDTree(pred).query(gt, workers=-1)[0].mean()))


def by_open3d(pred: np.ndarray, gt: np.ndarray) -> float:
    open3d = import_open3d("the benchmark")
    a, b = (
        open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points.astype(np.float64)))
        for points in (pred, gt)
    )
    there, back = a.compute_point_cloud_distance(b), b.compute_point_cloud_distance(a)
    return float(0.5 * (np.mean(there) + np.mean(back)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=180_000)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    gt = fill(simulate_sequence(SimulateConfig(seed=0)).map, arguments.points, rng)
    pred = rng.permutation(gt) + rng.normal(0, 0.1, gt.shape).astype(np.float32)
    ways: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "stillhouse.lidar.metrics.chamfer": chamfer,
        "scipy cKDTree, workers=-1": by_scipy,
        "open3d compute_point_cloud_distance": by_open3d,
    }
    values = {name: way(pred, gt) for name, way in ways.items()}
    first = next(iter(values.values()))
    for name, value in values.items():
        if abs(value - first) > 1e-6 * first:
            raise SystemExit(f"{name} gives {value}, not {first}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeat):
        for name, way in ways.items():
            start = time.perf_counter()
            way(pred, gt)
            seconds[name].append(time.perf_counter() - start)
    ours = float(np.median(seconds["stillhouse.lidar.metrics.chamfer"]))
    cores = len(os.sched_getaffinity(0))
    print(f"{arguments.points:,} × {arguments.points:,} points, {cores} cores, Chamfer {first:.6f} m\n")
    print(f"| way | seconds, median of {arguments.repeat} | ours / this |")
    print("|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {np.median(times):.3f} | {ours / np.median(times):.2f} |")


if __name__ == "__main__":
    main()
