"""Voxel coordinates in one int64: 16 bits each for batch, x, y, z, so that an offset is one addition.

Sorted keys are sorted coordinates (batch first, then x, y, z). Cells stay `GUARD` away from the ends of the
16-bit range, so that adding a kernel offset never carries into the next field.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GUARD = 8
LIMIT = 2**15 - GUARD  # |x|, |y|, |z| of a cell stay below this
BATCH_LIMIT = 2**15  # the sign bit stays free
_OFFSET = 2**15


def pack(coords: Tensor) -> Tensor:
    """Keys of coordinates.

    Args:
        coords: int64 [M, 4], columns (batch, x, y, z); batch in [0, 32768), cells in (−32760, 32760).

    Returns:
        int64 [M].

    Raises:
        ValueError: the shape, the type or the range is another.
    """
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype != torch.int64:
        raise ValueError(
            f"coords is {coords.dtype} {tuple(coords.shape)}; it must be int64 [M, 4] with columns "
            "(batch, x, y, z)"
        )
    if len(coords):
        low, high = (bound.tolist() for bound in torch.aminmax(coords, dim=0))
        if min(low[1:]) <= -LIMIT or max(high[1:]) >= LIMIT:
            raise ValueError(
                f"coords reach from {low[1:]} to {high[1:]}; cells must lie within ±{LIMIT - 1}: take larger "
                "voxels or drop far points"
            )
        if low[0] < 0 or high[0] >= BATCH_LIMIT:
            raise ValueError(
                f"coords hold batch indices from {low[0]} to {high[0]}; allowed are 0 to {BATCH_LIMIT - 1}"
            )
    return pack_unchecked(coords)


def pack_unchecked(coords: Tensor) -> Tensor:
    """`pack` for coordinates that are known to be in range."""
    b, x, y, z = coords.unbind(1)
    return (((b << 16 | (x + _OFFSET)) << 16 | (y + _OFFSET)) << 16) | (z + _OFFSET)


def unpack(keys: Tensor) -> Tensor:
    """Coordinates int64 [M, 4] of keys int64 [M]."""
    mask = 0xFFFF
    fields = (keys >> 48, (keys >> 32 & mask) - _OFFSET, (keys >> 16 & mask) - _OFFSET)
    return torch.stack((*fields, (keys & mask) - _OFFSET), 1)


def shift(dx: int, dy: int, dz: int) -> int:
    """What moves a key by (dx, dy, dz) cells when it is added."""
    return (dx << 32) + (dy << 16) + dz


def unique(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted distinct keys [M], the index of each key among them [N], and how often each occurs [M]."""
    if keys.device.type == "cpu":  # numpy's sort is several times faster than torch's
        found, inverse, counts = np.unique(keys.numpy(), return_inverse=True, return_counts=True)
        return torch.from_numpy(found), torch.from_numpy(inverse.reshape(-1)), torch.from_numpy(counts)
    return torch.unique(keys, return_inverse=True, return_counts=True)


def search(keys: Tensor, queries: Tensor) -> Tensor:
    """First position in sorted `keys` that is not below each query, any shape."""
    if keys.device.type == "cpu":  # numpy gains from queries in ascending order, torch does not
        return torch.from_numpy(np.searchsorted(keys.numpy(), queries.numpy()))
    return torch.searchsorted(keys, queries)
