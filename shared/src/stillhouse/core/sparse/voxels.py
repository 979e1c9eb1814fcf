"""Points into voxels and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._keys import BATCH_LIMIT, LIMIT, pack_unchecked, unique
from .coordinates import CoordinateSet
from .functional import gather_rows, sum_rows
from .kernel_map import Bags


@dataclass(frozen=True, slots=True)
class Voxels:
    """Which voxel each point lies in.

    Attributes:
        coordinates: the occupied voxels, ascending by (batch, x, y, z) whatever the order of the points.
        inverse: int64 [N], voxel of each point.
        counts: int64 [M], points of each voxel, at least 1.
        size: side of a voxel in the unit of the points.
        origin: 0 where voxels are centred on multiples of their size, 0.5 where they begin there.
        bags: points, voxel by voxel.
    """

    coordinates: CoordinateSet
    inverse: Tensor
    counts: Tensor
    size: float
    origin: float
    bags: Bags

    @property
    def coords(self) -> Tensor:
        """int64 [M, 4], columns (batch, x, y, z)."""
        return self.coordinates.coords

    def __len__(self) -> int:
        return len(self.counts)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of the points' values in each voxel, differentiable: [N, C] → [M, C]."""
        return self.sum(values) / self.counts.to(values.dtype).unsqueeze(1)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of the points' values in each voxel, differentiable: [N, C] → [M, C]."""
        if values.ndim != 2 or len(values) != len(self.inverse):
            raise ValueError(f"values is {tuple(values.shape)}; it must be [{len(self.inverse)}, C]")
        return sum_rows(values, self.inverse, self.bags)

    def centres(self) -> Tensor:
        """Centres of the voxels in the unit of the points, float64 [M, 3]."""
        return (self.coords[:, 1:].double() + self.origin) * self.size


def voxelize(
    points: Tensor,
    batch: Tensor | None = None,
    size: float = 0.05,
    *,
    rounding: Literal["nearest", "floor"] = "nearest",
    batch_size: int | None = None,
) -> Voxels:
    """Sort points into cubic voxels.

    Args:
        points: float [N, 3], N ≥ 1, finite.
        batch: int64 [N], sample of each point in [0, 32768); None puts all into sample 0.
        size: side of a voxel, in the unit of the points, above 0.
        rounding: "nearest": cell = round(p / size), as the LiDAR completion networks do; "floor": cell =
            floor(p / size).
        batch_size: number of samples; by default the largest batch index + 1.

    Raises:
        ValueError: a shape is wrong, a point is NaN or infinite, or a point is 32760 voxels or more from the
            origin.

    Example:
        >>> import torch
        >>> voxels = voxelize(torch.tensor([[0.0, 0, 0], [0.4, 0, 0], [1.0, 0, 0]]), size=1.0)
        >>> voxels.coords.tolist(), voxels.inverse.tolist(), voxels.counts.tolist()
        ([[0, 0, 0, 0], [0, 1, 0, 0]], [0, 0, 1], [2, 1])
    """
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or not points.is_floating_point():
        raise ValueError(
            f"points is {points.dtype} {tuple(points.shape)}; it must be floating point [N, 3] with at least "
            "one row"
        )
    if not 0 < size < float("inf"):
        raise ValueError(f"size is {size!r}; it must be above 0 and finite")
    if rounding not in ("nearest", "floor"):
        raise ValueError(f"rounding is {rounding!r}; allowed: 'nearest', 'floor'")
    scaled = points.detach().to(torch.float64 if points.dtype == torch.float64 else torch.float32) / size
    low, high = (float(bound) for bound in torch.aminmax(scaled))
    if not (low > 0.5 - LIMIT and high < LIMIT - 0.5):  # NaN fails as well
        bad = int((~torch.isfinite(points)).any(1).sum())
        if bad:
            raise ValueError(f"points holds {bad} rows with NaN or infinity; drop them first")
        raise ValueError(
            f"points reach from {low * size:g} to {high * size:g}; with voxels of {size:g} they must stay "
            f"within ±{(LIMIT - 1) * size:g}: take larger voxels or drop far points"
        )
    cells = (scaled.round_() if rounding == "nearest" else scaled.floor_()).long()
    if batch is None:
        samples = cells.new_zeros(len(cells))
        last = 0
    else:
        if batch.shape != (len(points),) or batch.dtype != torch.int64:
            raise ValueError(f"batch is {batch.dtype} {tuple(batch.shape)}; it must be int64 [{len(points)}]")
        first, last = (int(bound) for bound in torch.aminmax(batch))
        if first < 0 or last >= (BATCH_LIMIT if batch_size is None else batch_size):
            raise ValueError(
                f"batch reaches from {first} to {last}; allowed: 0 to batch_size − 1 ({batch_size})"
            )
        samples = batch
    keys, inverse, counts = unique(pack_unchecked(torch.cat((samples[:, None], cells), 1)))
    coordinates = CoordinateSet._sorted(keys, last + 1 if batch_size is None else batch_size, 1)
    bags = Bags.of(inverse, len(keys), counts)
    return Voxels(coordinates, inverse, counts, size, 0.0 if rounding == "nearest" else 0.5, bags)


def devoxelize(features: Tensor, voxels: Voxels) -> Tensor:
    """Give each point the features of its voxel: [M, C] → [N, C].

    The gradient is the sum over the points of a voxel, in a fixed order.

    Example:
        >>> import torch
        >>> points = torch.tensor([[0.0, 0, 0], [3.0, 0, 0]])
        >>> voxels = voxelize(points, size=1.0)
        >>> torch.equal(devoxelize(voxels.mean(points), voxels), points)
        True
    """
    if features.ndim != 2 or len(features) != len(voxels):
        raise ValueError(
            f"features is {tuple(features.shape)}; it must be [{len(voxels)}, C], one row a voxel"
        )
    return gather_rows(features, voxels.inverse, voxels.bags)
