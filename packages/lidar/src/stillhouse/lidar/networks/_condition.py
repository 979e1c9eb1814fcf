"""The partial encoder (LiDiff's MinkGlobalEnc) and the condition that it makes of a scan."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stillhouse.core.sparse import CoordinateSet, SparseEncoder, SparseTensor

from ._config import NetworkConfig
from ._points import cell_offsets, check_clouds, voxel_input, voxelize_clouds


@dataclass(frozen=True, slots=True)
class Condition:
    """What the noise net is told of the partial scans: coarse voxels with features.

    Attributes:
        tensor: features [M, C] on voxels of side voxel · 2^stages, of all samples.
        encoder: what made it, for `null()`.
    """

    tensor: SparseTensor
    encoder: PartialEncoder = field(repr=False)

    @property
    def batch_size(self) -> int:
        """Number of samples B."""
        return self.tensor.coords.batch_size

    @property
    def features(self) -> Tensor:
        """[M, C]."""
        return self.tensor.features

    def null(self) -> Condition:
        """The condition that says nothing, for as many samples."""
        return self.encoder.null(self.batch_size)

    def detach(self) -> Condition:
        """The same without a graph."""
        return Condition(self.tensor.replace(self.features.detach()), self.encoder)

    def drop(self, which: Tensor) -> Condition:
        """Put the null condition in place of some samples.

        Args:
            which: bool [B], True where the condition is dropped.
        """
        if which.shape != (self.batch_size,) or which.dtype != torch.bool:
            raise ValueError(
                f"which is {which.dtype} {tuple(which.shape)}; it must be bool [{self.batch_size}]"
            )
        if not bool(which.any()):
            return self
        null = self.null()
        parts = ((self.tensor, ~which), (null.tensor, which))
        rows = [(tensor, mask.to(tensor.features.device)[tensor.coords.batch]) for tensor, mask in parts]
        coords = torch.cat([tensor.coords.coords[row] for tensor, row in rows])
        features = torch.cat([tensor.features[row] for tensor, row in rows])
        stride = self.tensor.coords.stride
        mixed = CoordinateSet(coords, batch_size=self.batch_size, stride=stride)
        return Condition(SparseTensor(features, mixed), self.encoder)


class PartialEncoder(nn.Module):
    """Stem and encoder stages over the partial scan.

    Args:
        config: widths and voxel; the noise net must be built from the same.

    Shape:
        points [B, n, 3] metres → `Condition` with `config.encoder[-1]` channels, at most one voxel a cell of
        side voxel · 2^stages.

    Example:
        >>> import torch
        >>> encoder = PartialEncoder(NetworkConfig.reduced(stages=3))
        >>> condition = encoder(torch.randn(2, 100, 3))
        >>> condition.batch_size, condition.features.shape[1], len(condition.null().features)
        (2, 64, 2)
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = SparseEncoder(
            6 if config.point_offsets else 3,
            config.stem,
            config.encoder,
            blocks=config.blocks,
            norm=config.norm,
            backend=config.backend,
        )

    def forward(self, points: Tensor) -> Condition:
        """Encode partial scans of equal size.

        Raises:
            ValueError: `points` is not [B, n, 3] of finite numbers.
        """
        check_clouds("points", points)
        voxels = voxelize_clouds(points, self.config.voxel)
        flat = points.reshape(-1, 3)
        offsets = cell_offsets(flat, voxels) if self.config.point_offsets else None
        return Condition(self.encoder(voxel_input(flat, voxels, offsets))[-1], self)

    def null(self, batch_size: int = 1) -> Condition:
        """The condition of no scan: that of a cloud of zeros, one voxel at the origin of each sample.

        It is computed with the running statistics of batch norms, in training as well: a single voxel has
        none of its own, and those of the scans stay untouched. It carries a graph like any other.
        """
        device = next(self.parameters()).device
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return self(torch.zeros(batch_size, 1, 3, device=device))
        finally:
            for module in training:
                module.training = True
