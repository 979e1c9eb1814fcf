"""The nearest voxel of another set, sample by sample."""

from __future__ import annotations

import math

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .coordinates import CoordinateSet

# Queries are moved by this tiny vector, whose parts have no rational ratio, so that of several voxels at the
# same distance one wins by its place alone, whatever else the sets hold.
_NUDGE = (1e-6, 1e-6 * math.sqrt(2) / 2, 1e-6 * math.sqrt(3) / 3)
_PAIRS = 2**23  # distances at a time where there is no tree


def nearest_voxels(queries: CoordinateSet, keys: CoordinateSet) -> Tensor:
    """For every voxel of one set the voxel of another whose centre is nearest, within the same sample.

    Both sets must descend from voxels of the same size; strides may differ. A tie goes to the same place
    every time, whatever else the sets hold. On CPU a k-d tree for each sample, elsewhere all distances, in
    blocks.

    Args:
        queries: M voxels.
        keys: M' voxels; every sample of `queries` needs at least one.

    Returns:
        int64 [M], indices into `keys`.

    Raises:
        ValueError: a sample of `queries` has no voxel in `keys`.

    Example:
        >>> import torch
        >>> fine = CoordinateSet(torch.tensor([[0, 0, 0, 0], [0, 3, 0, 0], [0, 9, 0, 0]]))
        >>> coarse = fine.coarser(4)[0]
        >>> nearest_voxels(fine, coarse).tolist()
        [0, 0, 1]
    """
    centres = queries.centres()
    centres += torch.tensor(_NUDGE, dtype=centres.dtype, device=centres.device)
    targets = keys.centres()
    result = torch.empty(len(queries), dtype=torch.int64, device=centres.device)
    for sample in range(queries.batch_size):
        rows, candidates = _rows(queries, sample), _rows(keys, sample)
        query, target = centres[rows], targets[candidates]
        if not len(query):
            continue
        if not len(target):
            raise ValueError(
                f"keys has no voxel of sample {sample}; there is nothing to match its voxels with"
            )
        nearest = _nearest(query, target)
        if isinstance(candidates, slice):
            result[rows] = nearest + (candidates.start or 0)
        else:
            result[rows] = candidates[nearest]
    return result


def _rows(coords: CoordinateSet, sample: int) -> slice | Tensor:
    """Voxels of a sample: a slice where the set is sorted."""
    if coords.batch_size == 1:
        return slice(0, len(coords))
    if coords.order is not None:
        return (coords.batch == sample).nonzero().squeeze(1)
    bounds = torch.searchsorted(coords.batch.contiguous(), coords.batch.new_tensor([sample, sample + 1]))
    start, stop = bounds.tolist()
    return slice(start, stop)


def _nearest(query: Tensor, target: Tensor) -> Tensor:
    if query.device.type == "cpu":
        tree = cKDTree(target.numpy(), balanced_tree=False, compact_nodes=False)
        return torch.from_numpy(tree.query(query.numpy(), k=1)[1]).long()
    step = max(1, _PAIRS // len(target))
    blocks = [(block[:, None] - target[None]).square().sum(-1).argmin(1) for block in query.split(step)]
    return torch.cat(blocks)
