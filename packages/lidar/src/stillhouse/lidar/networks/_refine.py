"""The refinement net: each point becomes several, within reach of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillhouse.core.sparse import SparseUNet

from ._config import NetworkConfig
from ._points import PointHead, cell_offsets, check_clouds, voxel_input, voxelize_clouds


class RefineNet(nn.Module):
    """UNet without condition; its head gives `offsets` displacements a point, by tanh within ±`reach` metres.

    Args:
        config: widths, voxel, `offsets` (6 in the reference) and `reach` (1 m in the reference).

    Shape:
        points [B, N, 3] metres → points [B, N, offsets, 3].

    Example:
        >>> import torch
        >>> RefineNet(NetworkConfig.reduced(stages=3))(torch.randn(1, 40, 3)).shape
        torch.Size([1, 40, 6, 3])
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        point_channels = 3 if config.point_offsets else 0
        self.unet = SparseUNet(
            3 + point_channels,
            config.channels,
            blocks=config.blocks,
            norm=config.norm,
            backend=config.backend,
        )
        self.head = PointHead(config.channels[-1], config.head_channels, 3 * config.offsets, point_channels)

    def forward(self, points: Tensor) -> Tensor:
        """The refined points; `.flatten(1, 2)` makes one cloud of them."""
        check_clouds("points", points)
        voxels = voxelize_clouds(points, self.config.voxel)
        flat = points.reshape(-1, 3)
        offsets = cell_offsets(flat, voxels) if self.config.point_offsets else None
        y = self.unet(voxel_input(flat, voxels, offsets))
        moves = torch.tanh(self.head(y.features, voxels, offsets)) * self.config.reach
        return points.unsqueeze(2) + moves.reshape(*points.shape[:2], -1, 3)
