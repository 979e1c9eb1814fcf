"""One point per voxel, the first that falls into it; keys are packed into 64 bits, nothing is a grid."""

from __future__ import annotations

import numpy as np

_BITS = 21
_HALF = 1 << (_BITS - 1)


def voxel_keys(points: np.ndarray, voxel: float) -> np.ndarray:
    """Return one int64 key per point: ⌊p / voxel⌋ of the three axes, 21 bits each.

    Args:
        points: [N, 3], metres.
        voxel: side of a voxel in metres, > 0.

    Raises:
        ValueError: voxel ≤ 0, or coordinates of more than 2²⁰ voxels (105 km at 0.1 m).

    Example:
        >>> keys = voxel_keys(np.array([[0.01, 0.0, 0.0], [0.09, 0.0, 0.0], [-0.01, 0.0, 0.0]]), 0.1)
        >>> bool(keys[0] == keys[1]), bool(keys[0] == keys[2])
        (True, False)
    """
    if not voxel > 0:
        raise ValueError(f"voxel: {voxel} must be > 0 (metres)")
    cells = np.floor(np.asarray(points, dtype=np.float64) / voxel).astype(np.int64)
    if len(cells) and (cells.min() < -_HALF or cells.max() >= _HALF):
        raise ValueError(
            f"points: reach {float(np.abs(points).max()):.3g} m, more than {_HALF} voxels of {voxel} m; use "
            "a frame nearer to the points or larger voxels"
        )
    cells += _HALF
    return (cells[:, 0] << (2 * _BITS)) | (cells[:, 1] << _BITS) | cells[:, 2]


def thin(points: np.ndarray, voxel: float) -> np.ndarray:
    """Return the rows (int64 [M], ascending) of the first point in each occupied voxel."""
    _, first = np.unique(voxel_keys(points, voxel), return_index=True)
    return np.sort(first)


class VoxelMap:
    """Points that come in portions; of those in one voxel the first stays.

    Memory is that of the kept points and one key each; what has been added and not kept leaves no trace. Keys
    lie in sorted runs whose lengths at least halve from one to the next, so that adding a sweep costs the
    sweep times the logarithm of the map and rarely touches the whole map.

    Args:
        voxel: side of a voxel in metres, > 0.

    Example:
        >>> grid = VoxelMap(0.1)
        >>> grid.add(np.array([[0.01, 0, 0], [0.02, 0, 0], [0.11, 0, 0]], np.float32)).tolist()
        [0, 2]
        >>> grid.add(np.array([[0.03, 0, 0], [5.0, 0, 0]], np.float32)).tolist(), len(grid)
        ([1], 3)
    """

    def __init__(self, voxel: float) -> None:
        if not voxel > 0:
            raise ValueError(f"voxel: {voxel} must be > 0 (metres)")
        self.voxel = voxel
        self._runs: list[np.ndarray] = []
        self._chunks: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def add(self, points: np.ndarray) -> np.ndarray:
        """Add points [N, 3]; return the rows (int64, ascending) that were new and have been kept."""
        points = np.asarray(points, dtype=np.float32)
        if len(points) == 0:
            return np.zeros(0, dtype=np.int64)
        keys, first = np.unique(voxel_keys(points, self.voxel), return_index=True)
        new = np.ones(len(keys), dtype=bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            new &= run[place] != keys
        if not new.any():
            return np.zeros(0, dtype=np.int64)
        rows = np.sort(first[new])
        self._chunks.append(points[rows])
        self._push(keys[new])
        return rows

    def points(self) -> np.ndarray:
        """Return the kept points, float32 [M, 3], in the order in which they came."""
        if not self._chunks:
            return np.zeros((0, 3), dtype=np.float32)
        self._chunks = [np.concatenate(self._chunks)]
        return self._chunks[0].copy()

    def _push(self, keys: np.ndarray) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(keys):
            keys = np.concatenate([self._runs.pop(), keys])
            keys.sort(kind="stable")
        self._runs.append(keys)
