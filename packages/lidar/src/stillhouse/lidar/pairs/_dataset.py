"""`PairDataset`: training pairs of many drives, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from stillhouse.core.errors import DataError

from ..io import ScanSource
from ._maps import MapCache, TiledMap
from ._pair import PairConfig, make_pair

Progress = Callable[[int, int], None]


class PairDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Pairs of drives: `dataset[(index, seed)]` is sweep `index` with randomness that follows from `seed`.

    `dataset[index]` is the same with a seed that follows from the index. Sweeps are read at each use; maps
    are made when the data set is, one drive after the other, and kept in the cache's folder where it has one.

    Args:
        sources: drives with poses.
        config: what a pair is made of.
        cache: makes and keeps the maps; None makes them with the config's range and labels, in memory.
        progress: called as `progress(done, total)` over the drives while maps are made.

    Each sample is a dictionary of `partial` float32 [n, 3], `full` float32 [n · factor, 3] (tensors) and
    `index` int.

    Raises:
        DataError: a drive has no poses, its sweeps cannot be used, or two drives have one name.
        ValueError: no drives.

    Example:
        >>> from stillhouse.lidar.simulate import SimulateConfig, simulate_sequence
        >>> drive = simulate_sequence(SimulateConfig(scans=2, rings=16, azimuths=128, map_rays=2048))
        >>> dataset = PairDataset([drive], PairConfig(points=64, factor=4, max_range=20.0))
        >>> sample = dataset[(1, 7)]
        >>> len(dataset), tuple(sample["partial"].shape), tuple(sample["full"].shape), sample["index"]
        (2, (64, 3), (256, 3), 1)
    """

    seeded = True

    def __init__(
        self,
        sources: Iterable[ScanSource],
        config: PairConfig,
        *,
        cache: MapCache | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.sources = list(sources)
        self.config = config
        if not self.sources:
            raise ValueError("sources: is empty; at least one drive is needed")
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"two drives are called {twice[0]!r}; give each its own name")
        cache = cache or MapCache(min_range=config.min_range, static=config.static)
        self.maps: list[TiledMap] = []
        self._poses: list[np.ndarray] = []
        for done, source in enumerate(self.sources, start=1):
            if source.poses is None:
                raise DataError(f"{source.name}: has no poses, and training pairs need them; add poses.txt")
            self.maps.append(cache.get(source))
            self._poses.append(source.poses)
            if progress is not None:
                progress(done, len(self.sources))
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the drive and the number of the sweep in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        drive = int(np.searchsorted(self._ends, index, side="right"))
        return drive, index - (int(self._ends[drive - 1]) if drive else 0)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple) else (key, key)
        drive, number = self.locate(index)
        source = self.sources[drive]
        pair = make_pair(
            source[number],
            self.maps[drive],
            self._poses[drive][number],
            self.config,
            np.random.default_rng(seed),
        )
        return {
            "partial": torch.from_numpy(pair.partial),
            "full": torch.from_numpy(pair.full),
            "index": index,
        }
