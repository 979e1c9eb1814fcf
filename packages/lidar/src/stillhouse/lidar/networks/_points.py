"""What all networks share: a batch of clouds into voxels, and the head that answers for points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.core.sparse import SparseTensor, Voxels, devoxelize, voxelize


def check_clouds(name: str, points: Tensor) -> None:
    """Raise unless `points` is a floating-point batch of clouds [B, N, 3], B and N at least 1."""
    shaped = points.ndim == 3 and points.shape[2] == 3 and points.numel() > 0
    if not shaped or not points.is_floating_point():
        raise ValueError(
            f"{name} is {points.dtype} {tuple(points.shape)}; it must be floating point [B, N, 3], B and N "
            "at least 1"
        )


def voxelize_clouds(points: Tensor, voxel: float) -> Voxels:
    """Voxels of a batch of clouds of equal size: [B, N, 3] → N·B points in B samples."""
    size, n, _ = points.shape
    batch = torch.arange(size, device=points.device).repeat_interleave(n)
    return voxelize(points.reshape(-1, 3), batch, voxel, batch_size=size)


def cell_offsets(points: Tensor, voxels: Voxels) -> Tensor:
    """Where in its voxel each point lies: [N, 3] metres → [N, 3] in [−½, ½] (of a voxel)."""
    return points / voxels.size - devoxelize(voxels.coords[:, 1:].to(points.dtype), voxels)


def voxel_input(points: Tensor, voxels: Voxels, extra: Tensor | None = None) -> SparseTensor:
    """Mean position of the points of each voxel, metres, and the mean of `extra`: [M, 3 + E]."""
    values = points if extra is None else torch.cat((points, extra), 1)
    return SparseTensor(voxels.mean(values), voxels.coordinates)


class PointHead(nn.Module):
    """Linear, LeakyReLU(0.1), linear, per point.

    The first layer sees its voxel's features and, if asked, features of the point itself; without those all
    points of a voxel get the same, and the head runs once a voxel.

    Args:
        channels: width of the voxel features C.
        hidden: width between the two layers.
        outputs: width of the answer D.
        point_channels: width of the points' own features E, 0 for none.

    Shape:
        voxel features [M, C] (and point features [N, E]) → [N, D].
    """

    def __init__(self, channels: int, hidden: int, outputs: int, point_channels: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(channels, hidden)
        self.point = nn.Linear(point_channels, hidden, bias=False) if point_channels else None
        self.second = nn.Linear(hidden, outputs)

    def forward(self, features: Tensor, voxels: Voxels, points: Tensor | None = None) -> Tensor:
        """Answer for every point."""
        hidden = self.first(features)
        if self.point is None:
            return devoxelize(self.second(F.leaky_relu(hidden, 0.1)), voxels)
        hidden = devoxelize(hidden, voxels) + self.point(points)
        answer: Tensor = self.second(F.leaky_relu(hidden, 0.1))
        return answer
