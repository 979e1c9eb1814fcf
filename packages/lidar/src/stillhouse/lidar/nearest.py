"""Nearest neighbours between two clouds, and the Chamfer distances a network can be trained by.

The neighbours are found by k-d trees on the CPU (exact, N log N) and by blocks of distances elsewhere; the
distance itself is then computed by torch from the chosen pairs, so that its gradient is exact wherever the
neighbour is unique.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

_BLOCK = 2**25  # entries of a block of distances


@torch.no_grad()
def nearest(a: Tensor, b: Tensor) -> Tensor:
    """For each point of `a` the index of the nearest point of `b`.

    Args:
        a: `[N, 3]`.
        b: `[M, 3]`, M ≥ 1.

    Returns:
        int64 `[N]`, on the device of `a`.

    Raises:
        ValueError: wrong shapes, or coordinates that are not finite.

    Example:
        >>> nearest(torch.tensor([[0.0, 0, 0]]), torch.tensor([[2.0, 0, 0], [1.0, 0, 0]])).tolist()
        [1]
    """
    for name, x in (("a", a), ("b", b)):
        if x.dim() != 2 or x.shape[1] != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}; give [N, 3]")
        if not torch.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or infinite coordinates")
    if len(b) == 0:
        raise ValueError("b is empty; nothing is nearest")
    if a.device.type == "cpu":
        # built two to three times as fast as a balanced tree, and no slower to ask on scans
        tree = cKDTree(_numpy(b), balanced_tree=False, compact_nodes=False)
        return torch.from_numpy(np.asarray(tree.query(_numpy(a))[1], dtype=np.int64))
    rows = max(1, _BLOCK // len(b))
    parts = [torch.cdist(part.float(), b.float()).argmin(1) for part in a.split(rows)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=a.device)


def chamfer_loss(points: Tensor, target: Tensor, *, squared: bool = False, backward: float = 1.0) -> Tensor:
    """½·(mean over points of their distance to the target + mean over the target of its distance to points).

    Args:
        points: generated cloud `[B, N, 3]` or `[N, 3]`; the gradient flows into it.
        target: `[B, M, 3]` or `[M, 3]`.
        squared: squared distances (the refinement net's loss) instead of metres.
        backward: weight of the second half relative to the first; above 1 it asks for coverage.

    Returns:
        Scalar, mean over the batch.

    Example:
        >>> chamfer_loss(torch.zeros(1, 2, 3), torch.tensor([[[0.0, 3.0, 4.0]]]))
        tensor(5.)
    """
    pairs = _pairs(points, target)
    values = [_two_sided(p, q, squared, backward) for p, q in pairs]
    return torch.stack(values).mean()


@torch.no_grad()
def chamfer_distances(points: Tensor, target: Tensor) -> Tensor:
    """The Chamfer distance of each cloud of a batch in metres, unsquared, `[B]`: it ranks a pair."""
    return torch.stack([_two_sided(p, q, False, 1.0) for p, q in _pairs(points, target)])


def _two_sided(p: Tensor, q: Tensor, squared: bool, backward: float) -> Tensor:
    forth = _distance(p, q[nearest(p.detach(), q)], squared).mean()
    back = _distance(q, p[nearest(q, p.detach())], squared).mean()
    return (forth + backward * back) / (1 + backward)


def _distance(a: Tensor, b: Tensor, squared: bool) -> Tensor:
    square = (a - b).square().sum(-1)
    if squared:
        return square
    # the root of 0 has an infinite slope; a point that sits on its neighbour wants no push
    zero = square == 0
    return torch.where(
        zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt()
    )


def _pairs(points: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
    p = points if points.dim() == 3 else points[None]
    q = target if target.dim() == 3 else target[None]
    if p.dim() != 3 or q.dim() != 3 or len(p) != len(q):
        raise ValueError(
            f"points {list(points.shape)} and target {list(target.shape)} are not [B, N, 3], [B, M, 3]"
        )
    return list(zip(p, q, strict=True))


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().to(torch.float64).numpy()
