"""Distance-aware tiling: far points, which stand for more surface, get more copies, further apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tiling:
    """Copies of partial points.

    Attributes:
        points: [B, N, 3], the partial point that each copy was made of.
        index: int64 [B, N], which one; ascending.
        scale: [B, N], metres: how far the copies of that point spread (standard deviation).
    """

    points: Tensor
    index: Tensor
    scale: Tensor


def tile_by_distance(
    partial: Tensor, total: int, *, spread: float = 0.05, crowding: float = 1.0, floor: float = 0.1
) -> Tiling:
    """Copy partial points until there are `total`, each at least once.

    Every point gets one copy; the other N − n go by the largest remainder in proportion to r^crowding, r its
    distance from the sensor at the origin. The rays of a spinning sensor fan out, so the spacing of its
    points grows with r. (The idea is LiNeXt's, arXiv 2511.10209, of which the abstract was read; the rule is
    ours.)

    Args:
        partial: [B, n, 3] metres.
        total: N ≥ n.
        spread: standard deviation of the copies as a share of r.
        crowding: 0 gives every point the same number of copies.
        floor: least standard deviation, metres.

    Returns:
        A `Tiling`.

    Example:
        >>> import torch
        >>> tiling = tile_by_distance(torch.tensor([[[1.0, 0, 0], [3.0, 0, 0]]]), 6)
        >>> tiling.index.tolist()
        [[0, 0, 1, 1, 1, 1]]
    """
    size, n, _ = partial.shape
    if total < n:
        raise ValueError(f"total is {total}, with {n} partial points; it must be at least as large")
    distance = partial.detach().norm(dim=2).double()
    weight = distance.clamp_min(floor).pow(crowding)
    shares = weight / weight.sum(1, keepdim=True) * (total - n)
    copies = shares.floor()
    missing = total - n - copies.sum(1).long()
    ranks = torch.argsort(
        torch.argsort(copies - shares, dim=1, stable=True), dim=1
    )  # largest remainder first
    copies = 1 + copies.long() + (ranks < missing[:, None]).long()
    flat = torch.arange(size * n, device=partial.device).repeat_interleave(
        copies.reshape(-1), output_size=size * total
    )
    index = flat.reshape(size, total) - n * torch.arange(size, device=partial.device)[:, None]
    points = partial.reshape(-1, 3)[flat].reshape(size, total, 3)
    scale = (spread * distance).clamp_min(floor).to(partial.dtype).gather(1, index)
    return Tiling(points, index, scale)
