"""Layers over `SparseTensor`: convolutions, linear, norms, activation, residual block."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import Backend, check_backend, spconv_submanifold
from .coordinates import CoordinateSet
from .functional import sparse_conv
from .tensor import SparseTensor

Norm = Literal["batch", "layer", "none"]


class _Convolution(nn.Module):
    """Weight [K, C, D] and an optional bias, drawn as `torch.nn.Conv3d` draws them, with `fan_in` offsets."""

    def __init__(self, in_channels: int, out_channels: int, size: int, bias: bool, fan_in: int) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"channels are {in_channels} → {out_channels}; both must be at least 1")
        self.in_channels = in_channels
        self.out_channels = out_channels
        bound = 1 / math.sqrt(in_channels * fan_in)
        self.weight = nn.Parameter(torch.empty(size, in_channels, out_channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound)) if bias else None

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_channels}, {self.out_channels}, offsets={len(self.weight)}, bias={bias}"


class SubmanifoldConv3d(_Convolution):
    """Convolution whose outputs are its inputs: no voxel appears, none goes.

    Equals `conv3d` (cross-correlation, padded by half a kernel) of the dense volume with 0 at empty cells,
    read at the occupied ones. `dense_weight()` gives the weight of that `conv3d`.

    Args:
        in_channels: C.
        out_channels: D.
        kernel: odd side length k.
        bias: add a bias.
        backend: "torch", or "spconv" for the kernels of that library (CUDA, or inference on CPU).

    Shape:
        features [M, C] → [M, D], the same voxels.

    Example:
        >>> import torch
        >>> coords = CoordinateSet(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]]))
        >>> SubmanifoldConv3d(3, 8)(SparseTensor(torch.randn(2, 3), coords)).features.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        bias: bool = False,
        backend: Backend = "torch",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel**3, bias, kernel**3)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; a submanifold kernel must be odd")
        self.kernel = kernel
        self.backend: Backend = check_backend(backend)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve."""
        if self.backend == "spconv":
            return x.replace(self._add_bias(spconv_submanifold(x, self.weight, self.kernel)))
        return x.replace(
            self._add_bias(sparse_conv(x.features, self.weight, x.coords.submanifold(self.kernel)))
        )

    def dense_weight(self) -> Tensor:
        """The weight of the equal `conv3d`: [D, C, k, k, k]."""
        k = self.kernel
        return self.weight.permute(2, 1, 0).reshape(self.out_channels, self.in_channels, k, k, k)


class StridedConv3d(_Convolution):
    """Convolution to voxels `stride` times as large: the parents floor(cell / stride) of the inputs.

    Args:
        in_channels: C.
        out_channels: D.
        stride: at least 2.
        kernel: `stride` (default: each voxel meets its parent alone), or odd (a parent c takes the voxels
            around stride · c).
        bias: add a bias.

    Shape:
        features [M, C] → [M', D] on the coarser set.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 2,
        *,
        kernel: int | None = None,
        bias: bool = False,
    ) -> None:
        kernel = stride if kernel is None else kernel
        super().__init__(in_channels, out_channels, kernel**3, bias, kernel**3)
        self.stride = stride
        self.kernel = kernel

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve."""
        coarse, kernel_map = x.coords.coarser(self.stride, self.kernel)
        return SparseTensor(self._add_bias(sparse_conv(x.features, self.weight, kernel_map)), coarse)


class TransposedConv3d(_Convolution):
    """Transposed convolution back to the finer set that a strided one came from, through the same map.

    Args:
        in_channels: C.
        out_channels: D.
        stride: that of the strided convolution.
        kernel: that of the strided convolution, by default `stride`.
        bias: add a bias.

    Shape:
        features [M', C] on `fine.coarser(stride)` → [M, D] on `fine`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 2,
        *,
        kernel: int | None = None,
        bias: bool = False,
    ) -> None:
        kernel = stride if kernel is None else kernel
        # a child has one parent where kernel = stride; elsewhere about (k/s)³ of them reach it
        super().__init__(in_channels, out_channels, kernel**3, bias, max(1, (kernel // stride) ** 3))
        self.stride = stride
        self.kernel = kernel

    def forward(self, x: SparseTensor, fine: CoordinateSet) -> SparseTensor:
        """Convolve.

        Raises:
            ValueError: the voxels of `x` are not the coarser ones of `fine`.
        """
        coarse, kernel_map = fine.coarser(self.stride, self.kernel)
        if coarse is not x.coords and not torch.equal(coarse.coords, x.coords.coords):
            raise ValueError(
                f"x lies on {x.coords}; a transposed convolution to {fine} takes its coarser set {coarse}"
            )
        y = sparse_conv(x.features, self.weight, kernel_map, transposed=True)
        return SparseTensor(self._add_bias(y), fine)


class SparseLinear(nn.Linear):
    """`torch.nn.Linear` on the features: a convolution with kernel 1."""

    def forward(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """[M, C] → [M, D]."""
        return x.replace(super().forward(x.features))


class SparseBatchNorm(nn.BatchNorm1d):
    """Batch norm over all voxels of the batch.

    A single voxel has no spread: then the running statistics are used in training as well, and left alone.
    """

    def forward(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """[M, C] → [M, C]."""
        if self.training and len(x.features) == 1 and self.running_mean is not None:
            y = F.batch_norm(
                x.features, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
            return x.replace(y)
        return x.replace(super().forward(x.features))


class SparseLayerNorm(nn.LayerNorm):
    """Layer norm of each voxel's channels: independent of the batch."""

    def forward(self, x: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """[M, C] → [M, C]."""
        return x.replace(super().forward(x.features))


class SparseReLU(nn.Module):
    """Rectifier; `slope` > 0 makes it leaky."""

    def __init__(self, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: SparseTensor) -> SparseTensor:
        """[M, C] → [M, C]."""
        return x.replace(F.leaky_relu(x.features, self.slope) if self.slope else F.relu(x.features))


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """The norm of that name: "batch", "layer" or "none"."""
    if norm == "batch":
        return SparseBatchNorm(channels)
    if norm == "layer":
        return SparseLayerNorm(channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm is {norm!r}; allowed: 'batch', 'layer', 'none'")


class ConvBlock(nn.Sequential):
    """Submanifold convolution, norm, ReLU: [M, C] → [M, D]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        norm: Norm = "batch",
        backend: Backend = "torch",
    ) -> None:
        super().__init__(
            SubmanifoldConv3d(in_channels, out_channels, kernel, bias=norm == "none", backend=backend),
            norm_layer(norm, out_channels),
            SparseReLU(),
        )


class ResidualBlock(nn.Module):
    """ReLU(shortcut(x) + norm(conv(ReLU(norm(conv(x)))))), convolutions of side 3.

    The shortcut is the identity, or a linear layer with norm where the channels change.

    Args:
        in_channels: C.
        out_channels: D.
        norm: "batch", "layer" or "none".
        backend: of the convolutions.

    Shape:
        features [M, C] → [M, D].
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, norm: Norm = "batch", backend: Backend = "torch"
    ) -> None:
        super().__init__()
        bias = norm == "none"
        self.first = ConvBlock(in_channels, out_channels, norm=norm, backend=backend)
        self.second = nn.Sequential(
            SubmanifoldConv3d(out_channels, out_channels, bias=bias, backend=backend),
            norm_layer(norm, out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                SparseLinear(in_channels, out_channels, bias=bias), norm_layer(norm, out_channels)
            )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Apply the block."""
        y = self.second(self.first(x))
        return x.replace(F.relu(y.features + self.shortcut(x).features))
