"""Maps of whole drives: cut near a place without reading all of it, kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stillhouse.core.errors import DataError

from ..io import ScanSource, Sequence, atomic_file
from ..mapping import aggregate

Progress = Callable[[int, int], None]
_VERSION = 1  # of what `aggregate` makes; raise it when the same files give another map


class TiledMap:
    """Points sorted by square tiles, so that those near a place are read without the others.

    Args:
        points: float32 [M, 3]; may be a memory map whose rows are sorted already (see `offsets`).
        tile: side of a tile, metres.

    Example:
        >>> grid = TiledMap(np.array([[0, 0, 0], [100, 0, 0]], np.float32))
        >>> grid.near(np.zeros(3), 10.0).tolist()
        [[0.0, 0.0, 0.0]]
    """

    def __init__(self, points: np.ndarray, *, tile: float = 10.0) -> None:
        if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
            raise ValueError(f"points must be [M, 3] with M at least 1, got {list(points.shape)}")
        if not tile > 0:
            raise ValueError(f"tile: {tile} must be > 0")
        self.tile = tile
        cells = np.floor(np.asarray(points[:, :2], dtype=np.float64) / tile).astype(np.int64)
        self._low = cells.min(axis=0)
        self._shape = cells.max(axis=0) - self._low + 1
        key = (cells[:, 0] - self._low[0]) * self._shape[1] + (cells[:, 1] - self._low[1])
        if (key[1:] < key[:-1]).any():
            order = np.argsort(key, kind="stable")
            points, key = np.asarray(points)[order], key[order]
        self.points = points
        self._offsets = np.searchsorted(key, np.arange(int(self._shape.prod()) + 1))

    def __len__(self) -> int:
        return len(self.points)

    def near(self, centre: np.ndarray, reach: float) -> np.ndarray:
        """Return a copy of the points [K, 3] of all tiles that touch the square of ±reach around a place."""
        low = np.floor((np.asarray(centre)[:2] - reach) / self.tile).astype(np.int64) - self._low
        high = np.floor((np.asarray(centre)[:2] + reach) / self.tile).astype(np.int64) - self._low
        first, last = max(int(low[1]), 0), min(int(high[1]), int(self._shape[1]) - 1)
        if first > last:
            return np.zeros((0, 3), dtype=np.float32)
        parts = [np.zeros((0, 3), dtype=np.float32)]
        for column in range(max(int(low[0]), 0), min(int(high[0]), int(self._shape[0]) - 1) + 1):
            base = column * int(self._shape[1])
            parts.append(self.points[self._offsets[base + first] : self._offsets[base + last + 1]])
        return np.concatenate(parts)


class MapCache:
    """Makes maps of drives, and keeps them where there is a folder for it.

    A kept map is used again only when the files of the drive (names, sizes, times of change), its poses and
    the settings are the same.

    Args:
        folder: where maps are kept; None makes them anew. Made when the first map is.
        voxel: one point a voxel of this side, metres.
        min_range: points nearer to the sensor than this are dropped, metres.
        max_range: points farther than this are dropped, metres; None keeps them.
        static: drop points that move or are unlabelled, where there are labels.
        icp: refine the poses first.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        voxel: float = 0.1,
        min_range: float = 3.5,
        max_range: float | None = None,
        static: bool = True,
        icp: bool = False,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.voxel = voxel
        self.min_range = min_range
        self.max_range = max_range
        self.static = static
        self.icp = icp

    def get(self, source: ScanSource, *, progress: Progress | None = None) -> TiledMap:
        """Return the map of a drive; one that brings its own (`source.map`) gives that.

        Raises:
            DataError: the drive has no poses, or a sweep of it cannot be used.
        """
        own = getattr(source, "map", None)
        if own is not None:
            return TiledMap(own)
        if source.poses is None:
            raise DataError(f"{source.name}: has no poses, and a map needs them; add poses.txt")
        path = self._path(source)
        if path is not None and path.is_file():
            kept = self._load(path)
            if kept is not None:
                return kept
        points = aggregate(
            (source[index] for index in range(len(source))),
            source.poses,
            voxel=self.voxel,
            min_range=self.min_range,
            max_range=self.max_range,
            static=self.static,
            icp=self.icp,
            progress=progress,
        )
        tiled = TiledMap(points)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                np.save(file, np.ascontiguousarray(tiled.points))
        return tiled

    def _load(self, path: Path) -> TiledMap | None:
        """A kept map, or None where the file is damaged and the map is to be made anew."""
        try:
            points = np.load(path, mmap_mode="r", allow_pickle=False)
            return TiledMap(points)
        except (ValueError, OSError, EOFError):
            return None

    def _path(self, source: ScanSource) -> Path | None:
        if self.folder is None or not isinstance(source, Sequence):
            return None
        digest = hashlib.sha256()
        settings = [_VERSION, self.voxel, self.min_range, self.max_range, self.static, self.icp]
        digest.update(json.dumps(settings).encode())
        for path in (*source.paths, *(source.labels or ())):
            state = path.stat()
            digest.update(f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}\n".encode())
        digest.update(np.ascontiguousarray(source.poses).tobytes())
        return self.folder / f"map-{source.name}-{digest.hexdigest()[:16]}.npy"
