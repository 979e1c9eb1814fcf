"""Sparse convolution against spconv on CPU and against dense conv3d; forward + backward; growth in points.

    python shared/benchmarks/bench_sparse.py             # print the tables
    python shared/benchmarks/bench_sparse.py --write     # and append them to shared/benchmarks/RESULTS.md

A cloud as a spinning LiDAR sees a street: ground, two rows of façades, boxes, noise of 2 cm; voxels of 0.2 m.
One submanifold convolution 32 → 32 of side 3, one thread, float32. "First call" builds the kernel map, "next
calls" have it cached, as the other layers of a network do. Peers: spconv's CPU path (Native algorithm,
forward alone: it has no backward on CPU) and torch's dense conv3d over the bounding box. Results are checked
equal before anything is timed. Time is CPU time, the median of interleaved repeats, because wall time on a
shared machine measures the neighbours.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.core.sparse import (
    CoordinateSet,
    SparseTensor,
    SparseUNet,
    SubmanifoldConv3d,
    devoxelize,
    nearest_voxels,
    voxelize,
)

CHANNELS, VOXEL = 32, 0.2
RESULTS = Path(__file__).parent / "RESULTS.md"


def street(count: int, *, reach: float = 50.0, seed: int = 0) -> Tensor:
    """Points [count, 3], metres: half ground, a third façades, the rest boxes; denser near the sensor."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng)

    n_ground, n_wall = count // 2, count // 3
    r, a = reach * draw(n_ground).pow(1.5), 2 * torch.pi * draw(n_ground)
    ground = torch.stack((r * a.cos(), r * a.sin(), torch.full_like(r, -1.7)), 1)
    along = reach * (2 * draw(n_wall) - 1).pow(3)
    side = torch.where(draw(n_wall) < 0.5, -8.0, 8.0)
    wall = torch.stack((along, side, 8 * draw(n_wall) - 1.7), 1)
    n_box = count - n_ground - n_wall
    centres = (2 * draw(40, 3) - 1) * torch.tensor([30.0, 6.0, 0.0]) - torch.tensor([0.0, 0.0, 1.0])
    box = centres[torch.randint(40, (n_box,), generator=rng)]
    face = (2 * draw(n_box, 3) - 1) * torch.tensor([2.0, 0.9, 0.7])
    face[:, 1] = face[:, 1].sign() * 0.9
    cloud = torch.cat((ground, wall, box + face))
    return cloud + 0.02 * torch.randn(count, 3, generator=rng)


def timed(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(1000 * (time.process_time() - start))
    return times


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} | {min(values):.2f}–{max(values):.2f}"


def forward_table(counts: list[int], repeats: int) -> list[str]:
    header = [
        "| points | voxels | pairs a voxel | call | variant | CPU ms (median) | spread | ratio to spconv "
        "| error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return header + [line for count in counts for line in forward_rows(count, repeats)]


def forward_rows(count: int, repeats: int) -> list[str]:
    lines: list[str] = []
    cells = voxelize(street(count), size=VOXEL).coords
    features = torch.randn(len(cells), CHANNELS, generator=torch.Generator().manual_seed(1))
    ours = SubmanifoldConv3d(CHANNELS, CHANNELS)
    theirs = SubmanifoldConv3d(CHANNELS, CHANNELS, backend="spconv")
    theirs.load_state_dict(ours.state_dict())
    cached = SparseTensor(features, CoordinateSet(cells))
    result, peer = ours(cached).features, theirs(cached).features
    error = {"ours": 0.0, "spconv": (result - peer).abs().max().item()}
    runs: dict[str, dict[str, Callable[[], object]]] = {
        "first": {
            "spconv": lambda: theirs(SparseTensor(features, CoordinateSet(cells))),
            "ours": lambda: ours(SparseTensor(features, CoordinateSet(cells))),
        },
        "next": {"spconv": lambda: theirs(cached), "ours": lambda: ours(cached)},
    }
    size = (cells[:, 1:].amax(0) - cells[:, 1:].amin(0) + 1).prod().item() * CHANNELS * 4
    if size < 2**30:
        weight, (volume, low) = ours.dense_weight(), cached.dense()
        i, j, k = (cells[:, 1:] - low).unbind(1)
        dense = F.conv3d(volume, weight, padding=1)[0, :, i, j, k].T
        error["dense conv3d"] = (result - dense).abs().max().item()
        runs["next"]["dense conv3d"] = lambda: F.conv3d(volume, weight, padding=1)
    if max(error.values()) > 1e-5:
        raise SystemExit(f"results differ at {count} points: {error}")
    pairs = cached.coords.submanifold().pairs / len(cells) + 1
    for call, variants in runs.items():
        times = timed(variants, repeats)
        base = statistics.median(times["spconv"])
        for name, values in times.items():
            lines.append(
                f"| {count:,} | {len(cells):,} | {pairs:.1f} | {call} | {name} | {spread(values)} | "
                f"{statistics.median(values) / base:.2f} | {error[name]:.1e} |"
            )
    return lines


def training_table(counts: list[int], repeats: int) -> list[str]:
    header = [
        "| points | voxels | part | CPU ms (median) | spread | ms per 20k points |",
        "|---|---|---|---|---|---|",
    ]
    return header + [line for count in counts for line in training_rows(count, repeats)]


def training_rows(count: int, repeats: int) -> list[str]:
    lines: list[str] = []
    points = street(count)
    voxels = voxelize(points, size=VOXEL)
    x = torch.randn(len(voxels), CHANNELS, requires_grad=True)
    conv = SubmanifoldConv3d(CHANNELS, CHANNELS)
    unet = SparseUNet(3, (16, 16, 32, 64, 64, 64, 32, 24, 24))
    coarse = voxels.coordinates
    for _ in range(4):
        coarse = coarse.coarser()[0]
    ones = torch.ones(len(voxels), CHANNELS)

    def train_conv() -> None:
        conv(SparseTensor(x, voxels.coordinates)).features.backward(ones)

    def infer_unet() -> None:
        with torch.no_grad():
            made = voxelize(points, size=VOXEL)
            devoxelize(unet(SparseTensor(made.mean(points), made.coordinates)).features, made)

    def train_unet() -> None:
        made = voxelize(points, size=VOXEL)
        y = devoxelize(unet(SparseTensor(made.mean(points), made.coordinates)).features, made)
        y.square().mean().backward()

    runs: dict[str, Callable[[], object]] = {
        "voxelise": lambda: voxelize(points, size=VOXEL),
        "kernel map": lambda: CoordinateSet(voxels.coords).submanifold(),
        "match with stride 16": lambda: nearest_voxels(voxels.coordinates, coarse),
        "conv 32 → 32, forward + backward": train_conv,
        "UNet of 4 stages (16 … 64), forward": infer_unet,
        "UNet of 4 stages (16 … 64), forward + backward": train_unet,
    }
    for name, values in timed(runs, repeats).items():
        scaled = statistics.median(values) * 20000 / count
        lines.append(f"| {count:,} | {len(voxels):,} | {name} | {spread(values)} | {scaled:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, nargs="+", default=[2000, 5000, 20000, 80000, 180000])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="append the tables to RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with torch.no_grad():
        forward = forward_table(arguments.points, arguments.repeats)
    text = "\n".join((*forward, "", *training_table(arguments.points, max(3, arguments.repeats // 3))))
    print(text)
    if arguments.write:
        import spconv

        header = "## Sparse convolution\n\n`python shared/benchmarks/bench_sparse.py --write`, "
        header += f"torch {torch.__version__}, spconv {spconv.__version__}, {platform.machine()} CPU, "
        header += f"one thread, float32; one submanifold convolution {CHANNELS} → {CHANNELS} of side 3, "
        header += (
            f"synthetic street, voxels of {VOXEL} m. First call: with the kernel map; next: map cached. "
        )
        header += "spconv has no backward on CPU.\n\n"
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n{header}{text}\n")


if __name__ == "__main__":
    main()
