"""Sets of occupied voxels and the kernel maps between them, cached with the set and gone with it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._keys import pack, pack_unchecked, unique, unpack
from .kernel_map import KernelMap, block_map, submanifold_map, window_map


class CoordinateSet:
    """Distinct occupied voxels of a batch, with every kernel map that was asked of them.

    Maps live here, not in a global: they are built at the first use, shared by all layers that see this set,
    and freed with it. A coarser set is reached through the finer one, so that a strided convolution and the
    transposed one that undoes it use the same map.

    Args:
        coords: int64 [M, 4], columns (batch, x, y, z), in units of this set's voxels, distinct, any order.
        batch_size: number of samples; by default the largest batch index + 1.
        stride: side of a voxel in voxels of the finest set.

    Raises:
        ValueError: no voxel, a voxel twice, a coordinate out of range, or a batch index ≥ `batch_size`.

    Example:
        >>> import torch
        >>> fine = CoordinateSet(torch.tensor([[0, -1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]))
        >>> coarse, kernel_map = fine.coarser(2)
        >>> coarse.coords[:, 1].tolist(), kernel_map.pairs
        ([-1, 0], 3)
    """

    def __init__(self, coords: Tensor, *, batch_size: int | None = None, stride: int = 1) -> None:
        keys = pack(coords)
        if not len(keys):
            raise ValueError("coords is empty; a coordinate set needs at least one voxel")
        steps = keys[1:] > keys[:-1]
        order: Tensor | None = None
        if not bool(steps.all()):
            order = torch.argsort(keys)
            keys = keys[order]
            if not bool((keys[1:] > keys[:-1]).all()):
                raise ValueError("coords holds a voxel twice; `voxelize` makes them distinct")
        last = int(coords[:, 0].max())
        if batch_size is not None and last >= batch_size:
            raise ValueError(
                f"coords holds batch index {last}; with batch_size={batch_size} it must be below"
            )
        self._set(coords, keys, order, last + 1 if batch_size is None else batch_size, stride)

    def _set(self, coords: Tensor, keys: Tensor, order: Tensor | None, batch_size: int, stride: int) -> None:
        self.coords = coords
        self.keys = keys
        self.order = order
        self.batch_size = batch_size
        self.stride = stride
        self._maps: dict[int, KernelMap] = {}
        self._coarser: dict[tuple[int, int], tuple[CoordinateSet, KernelMap]] = {}
        self._sets: dict[int, tuple[CoordinateSet, Tensor]] = {}
        self.spconv: tuple[Tensor, list[int], dict[str, object]] | None = (
            None  # cache of the optional backend
        )

    @classmethod
    def _sorted(cls, keys: Tensor, batch_size: int, stride: int) -> CoordinateSet:
        made = cls.__new__(cls)
        made._set(unpack(keys), keys, None, batch_size, stride)
        return made

    def __len__(self) -> int:
        return len(self.coords)

    def __repr__(self) -> str:
        return f"CoordinateSet({len(self)} voxels, batch_size={self.batch_size}, stride={self.stride})"

    @property
    def batch(self) -> Tensor:
        """Sample of each voxel, int64 [M]."""
        return self.coords[:, 0]

    def submanifold(self, kernel: int = 3) -> KernelMap:
        """Map of a convolution from this set to itself.

        Args:
            kernel: odd side length of the kernel, at most 15.
        """
        if kernel not in self._maps:
            _check_odd(kernel)
            self._maps[kernel] = submanifold_map(self.keys, self.order, kernel)
        return self._maps[kernel]

    def coarser(self, stride: int = 2, kernel: int | None = None) -> tuple[CoordinateSet, KernelMap]:
        """The voxels `stride` times as large that hold this set's, and the map from here to there.

        Parents are floor(cell / stride), also below 0. With `kernel == stride` (the default) each voxel meets
        its parent; with an odd kernel a parent c takes the voxels around stride · c.

        Args:
            stride: side of a coarse voxel in voxels of this set, at least 2.
            kernel: side of the kernel: `stride`, or odd.

        Returns:
            The coarse set and the map.
        """
        kernel = stride if kernel is None else kernel
        if (stride, kernel) not in self._coarser:
            coarse, parents = self._parents(stride)
            if kernel == stride:
                kernel_map = block_map(self.coords, parents, len(coarse), stride)
            else:
                _check_odd(kernel)
                middle = coarse.coords.clone()
                middle[:, 1:] *= stride
                kernel_map = window_map(self.keys, self.order, pack_unchecked(middle), kernel)
            self._coarser[stride, kernel] = coarse, kernel_map
        return self._coarser[stride, kernel]

    def _parents(self, stride: int) -> tuple[CoordinateSet, Tensor]:
        if stride not in self._sets:
            if stride < 2:
                raise ValueError(f"stride is {stride}; it must be at least 2")
            cells = self.coords.clone()
            cells[:, 1:] = torch.div(cells[:, 1:], stride, rounding_mode="floor")
            keys, parents, _ = unique(pack_unchecked(cells))
            self._sets[stride] = (
                CoordinateSet._sorted(keys, self.batch_size, self.stride * stride),
                parents,
            )
        return self._sets[stride]

    def centres(self) -> Tensor:
        """Centres in cells of the finest set, float64 [M, 3]; cell c at stride s spans c·s … c·s + s − 1."""
        return (self.coords[:, 1:].double() + 0.5) * self.stride - 0.5


def _check_odd(kernel: int) -> None:
    if kernel < 1 or kernel > 15 or kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}; it must be odd, 1 to 15 (or equal to the stride)")
