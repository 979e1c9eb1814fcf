"""The single-pass student: noise to coarse, then refine, in one evaluation."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from stillhouse.core.sparse import SparseUNet

from ._config import NetworkConfig
from ._points import PointHead, cell_offsets, check_clouds, voxel_input, voxelize_clouds
from ._tiling import tile_by_distance


class SinglePassNet(nn.Module):
    """A light network that completes a scan without diffusion.

    The partial points are tiled with regard to their distance and scattered by noise; a first UNet moves the
    scattered points to a coarse completion, a second, shallower one moves those by at most `reach`. The idea
    of noise-to-coarse and refinement in one pass with distance-aware tiling is LiNeXt's (arXiv 2511.10209);
    only its abstract was read, and every detail here is our own.

    Args:
        config: widths of the first UNet, voxel, `factor`, `spread`, `crowding`, `reach`. The second UNet has
            the two finest stages of the first.

    Shape:
        partial [B, n, 3] metres → [B, N, 3], N = n · factor.

    Example:
        >>> import torch
        >>> net = SinglePassNet(NetworkConfig.reduced(stages=3))
        >>> net(torch.randn(2, 30, 3)).shape
        torch.Size([2, 300, 3])
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        stages = min(2, config.stages)
        widths = (config.stem, *config.encoder[:stages], *config.decoder[-stages:])
        last, hidden = config.channels[-1], config.head_channels
        common = {"blocks": config.blocks, "norm": config.norm, "backend": config.backend}
        self.coarse = SparseUNet(10, config.channels, **common)  # type: ignore[arg-type]
        self.coarse_head = PointHead(last, hidden, 3, 7)
        self.fine = SparseUNet(6, widths, **common)  # type: ignore[arg-type]
        self.fine_head = PointHead(last, hidden, 3, 3)

    @overload
    def forward(
        self,
        partial: Tensor,
        *,
        total: int | None = ...,
        noise: Tensor | None = ...,
        generator: torch.Generator | None = ...,
        return_coarse: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        partial: Tensor,
        *,
        total: int | None = ...,
        noise: Tensor | None = ...,
        generator: torch.Generator | None = ...,
        return_coarse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        partial: Tensor,
        *,
        total: int | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_coarse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Complete partial scans of equal size.

        Args:
            partial: [B, n, 3] metres.
            total: N, by default n · factor.
            noise: standard normal [B, N, 3], in the order of `tile_by_distance`; drawn where it is None.
            generator: for the noise, on its own device.
            return_coarse: also return what went into the refinement, for its own loss.

        Returns:
            [B, N, 3], or that and the coarse completion [B, N, 3].
        """
        check_clouds("partial", partial)
        config = self.config
        total = partial.shape[1] * config.factor if total is None else total
        tiling = tile_by_distance(partial, total, spread=config.spread, crowding=config.crowding)
        if noise is None:
            device = partial.device if generator is None else generator.device
            noise = torch.randn(tiling.points.shape, generator=generator, dtype=partial.dtype, device=device)
        if noise.shape != tiling.points.shape:
            raise ValueError(f"noise is {tuple(noise.shape)}; it must be {tuple(tiling.points.shape)}")
        noise = noise.to(partial)
        scale = tiling.scale.unsqueeze(2)
        start = tiling.points + scale * noise

        voxels = voxelize_clouds(start, config.voxel)
        flat = start.reshape(-1, 3)
        own = torch.cat((noise, scale), 2).reshape(-1, 4)  # whence the point was scattered
        own = torch.cat((cell_offsets(flat, voxels), own), 1)
        y = self.coarse(voxel_input(flat, voxels, own))
        coarse = start + scale * self.coarse_head(y.features, voxels, own).reshape(start.shape)

        voxels = voxelize_clouds(coarse, config.voxel)
        flat = coarse.reshape(-1, 3)
        offsets = cell_offsets(flat, voxels)
        y = self.fine(voxel_input(flat, voxels, offsets))
        moves = torch.tanh(self.fine_head(y.features, voxels, offsets)) * config.reach
        fine = coarse + moves.reshape(coarse.shape)
        return (fine, coarse) if return_coarse else fine
