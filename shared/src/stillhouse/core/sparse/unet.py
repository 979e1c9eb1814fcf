"""A sparse residual UNet with any number of stages, and its encoder alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from .backend import Backend
from .coordinates import CoordinateSet
from .modules import ConvBlock, Norm, ResidualBlock, SparseReLU, StridedConv3d, TransposedConv3d, norm_layer
from .tensor import SparseTensor

Modulate = Callable[[int, SparseTensor], SparseTensor]


def split_channels(channels: Sequence[int]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Stem, encoder and decoder widths of a list of 1 + 2·stages channels.

    Raises:
        ValueError: the number of channels is even or below 3, or one is below 1.

    Example:
        >>> split_channels((16, 32, 64, 64, 32))
        (16, (32, 64), (64, 32))
    """
    stages = len(channels) // 2
    if len(channels) < 3 or len(channels) % 2 == 0 or min(channels) < 1:
        raise ValueError(
            f"channels is {tuple(channels)}; give the stem, then as many encoder as decoder widths, each at "
            "least 1"
        )
    return channels[0], tuple(channels[1 : 1 + stages]), tuple(channels[1 + stages :])


def _blocks(first: int, width: int, blocks: int, norm: Norm, backend: Backend) -> nn.Sequential:
    widths = [first] + [width] * blocks
    return nn.Sequential(*(ResidualBlock(a, b, norm=norm, backend=backend) for a, b in pairwise(widths)))


class DownStage(nn.Module):
    """Strided convolution (side 2), norm, ReLU, then residual blocks: [M, C] → [M', D] on the coarser set."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int = 2,
        norm: Norm = "batch",
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        self.down = nn.Sequential(
            StridedConv3d(in_channels, in_channels, bias=norm == "none"),
            norm_layer(norm, in_channels),
            SparseReLU(),
        )
        self.blocks = _blocks(in_channels, out_channels, blocks, norm, backend)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Apply the stage."""
        y: SparseTensor = self.blocks(self.down(x))
        return y


class UpStage(nn.Module):
    """Transposed convolution (side 2), norm, ReLU, skip beside it, residual blocks: to the skip's voxels."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        *,
        blocks: int = 2,
        norm: Norm = "batch",
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        self.up = TransposedConv3d(in_channels, out_channels, bias=norm == "none")
        self.after = nn.Sequential(norm_layer(norm, out_channels), SparseReLU())
        self.blocks = _blocks(out_channels + skip_channels, out_channels, blocks, norm, backend)

    def forward(self, x: SparseTensor, skip: SparseTensor) -> SparseTensor:
        """Apply the stage."""
        y = self.after(self.up(x, skip.coords))
        y = self.blocks(y.replace(torch.cat((y.features, skip.features), 1)))
        return y


class SparseEncoder(nn.Module):
    """Stem (two convolutions of side 3) and encoder stages, each halving the resolution.

    Args:
        in_channels: C of the input features.
        stem: channels of the stem.
        widths: channels of the stages, finest first.
        blocks: residual blocks of a stage.
        norm: "batch", "layer" (samples of a batch stay independent in training, too) or "none".
        backend: of the submanifold convolutions.

    Shape:
        features [M, C] → a list of 1 + stages tensors, finest first.
    """

    def __init__(
        self,
        in_channels: int,
        stem: int,
        widths: Sequence[int],
        *,
        blocks: int = 2,
        norm: Norm = "batch",
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvBlock(in_channels, stem, norm=norm, backend=backend),
            ConvBlock(stem, stem, norm=norm, backend=backend),
        )
        ins = (stem, *widths)[:-1]
        self.stages = nn.ModuleList(
            DownStage(a, b, blocks=blocks, norm=norm, backend=backend)
            for a, b in zip(ins, widths, strict=True)
        )

    def forward(self, x: SparseTensor, modulate: Modulate | None = None) -> list[SparseTensor]:
        """Encode.

        Args:
            x: the input.
            modulate: called as `modulate(i, x)` on the input of stage i; what it returns goes into the stage,
                while the skip connection keeps the tensor as it was.
        """
        x = self.stem(x)
        levels = [x]
        for i, stage in enumerate(self.stages):
            x = stage(x if modulate is None else modulate(i, x))
            levels.append(x)
        return levels


class SparseUNet(nn.Module):
    """UNet of residual stages over sparse voxels.

    Args:
        in_channels: C of the input features.
        channels: stem, encoder widths, decoder widths: 1 + 2·stages numbers.
        blocks: residual blocks of a stage.
        norm: "batch", "layer" or "none".
        backend: of the submanifold convolutions.

    Shape:
        features [M, C] → [M, channels[-1]] on the same voxels.

    Example:
        >>> import torch
        >>> from stillhouse.core.sparse import voxelize
        >>> points = torch.randn(200, 3)
        >>> voxels = voxelize(points, size=0.2)
        >>> net = SparseUNet(3, (8, 8, 16, 16, 8))
        >>> net(SparseTensor(voxels.mean(points), voxels.coordinates)).features.shape[1]
        8
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        *,
        blocks: int = 2,
        norm: Norm = "batch",
        backend: Backend = "torch",
    ) -> None:
        super().__init__()
        stem, down, up = split_channels(channels)
        self.encoder = SparseEncoder(in_channels, stem, down, blocks=blocks, norm=norm, backend=backend)
        skips = (stem, *down)[-2::-1]
        ins = (down[-1], *up)[:-1]
        self.stages = nn.ModuleList(
            UpStage(a, skip, b, blocks=blocks, norm=norm, backend=backend)
            for a, skip, b in zip(ins, skips, up, strict=True)
        )
        self.input_widths = (stem, *down, *up)[:-1]
        """Channels of the input of each of the 2·stages stages, in the order of `modulate`."""

    def forward(self, x: SparseTensor, modulate: Modulate | None = None) -> SparseTensor:
        """Apply the network.

        Args:
            x: the input.
            modulate: called as `modulate(i, x)` on the input of stage i, the encoder's stages first, then the
                decoder's; the stage takes what it returns.
        """
        levels = self.encoder(x, modulate)
        x = levels.pop()
        for i, stage in enumerate(self.stages, start=len(levels)):
            x = stage(x if modulate is None else modulate(i, x), levels.pop())
        return x


def level_sizes(coords: CoordinateSet, stages: int) -> list[int]:
    """Voxels of each level of a UNet on these coordinates, finest first: 1 + `stages` numbers."""
    sizes = [len(coords)]
    for _ in range(stages):
        coords = coords.coarser(2)[0]
        sizes.append(len(coords))
    return sizes
