"""Batches for teacher and student: a labelled block and a block of images without labels, by rule of
position.

Every list of indices that a sampler yields is laid out the same way, so that the losses cut a batch by
position:

    labelled block | images without labels | the same images without labels again

Indices refer to the labelled collection followed by the unlabelled one. Each appearance of an image gets
its own window and augmentation, since the loader seeds a sample by its position in the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the blocks of one batch (of one process).

    Attributes:
        classes: classes in the labelled block.
        per_class: labelled images of each, neighbours in the block.
        support: how many of them are the support of an episode; 0 where the block is not an episode.
        pool: images without labels; each appears twice.
    """

    classes: int
    per_class: int
    support: int
    pool: int

    @property
    def labelled(self) -> int:
        """Length of the labelled block."""
        return self.classes * self.per_class

    @property
    def size(self) -> int:
        """Length of the whole batch."""
        return self.labelled + 2 * self.pool


class EpisodeSampler:
    """N-way K-shot episodes whose support and query images differ, and a share of the pool.

    Where a class has fewer than K + Q images, it is cut in the ratio K : Q (at least one image on each
    side) and images appear several times, in different windows; a class with one image is support and query
    at once.

    Args:
        labels: class number of each labelled image [M]; each of 0 … C−1 must occur.
        layout: sizes; `support` is K, `per_class` K + Q, `classes` N (all classes where it equals C).
        pool: number of images without labels, whose indices follow the labelled ones. The labelled images
            join the pool.
        seed: with the epoch it decides everything.
        length: batches of an epoch.
        replicas: how many layouts a batch holds, one for each process.

    Raises:
        ValueError: a class without images, or sizes that do not fit.
    """

    def __init__(
        self,
        labels: Sequence[int],
        layout: Layout,
        *,
        pool: int,
        seed: int,
        length: int = 100,
        replicas: int = 1,
    ) -> None:
        self.members = [np.flatnonzero(np.asarray(labels) == c) for c in range(max(labels, default=-1) + 1)]
        empty = [c for c, rows in enumerate(self.members) if not len(rows)]
        if empty or not self.members:
            raise ValueError(f"labels: class {empty[0] if empty else 0} has no image")
        if not 0 < layout.support < layout.per_class or not 0 < layout.classes <= len(self.members):
            raise ValueError(f"layout {layout} does not fit {len(self.members)} classes")
        self.layout, self.seed, self.length, self.replicas = layout, seed, length, replicas
        self.everything = len(labels) + pool
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self._epoch))
        pool = _Shuffled(self.everything, rng)
        for _ in range(self.length):
            yield [int(i) for _ in range(self.replicas) for i in self._episode(rng, pool)]

    def _episode(self, rng: np.random.Generator, pool: _Shuffled) -> list[int]:
        layout, chosen = self.layout, []
        ways = range(len(self.members))
        if layout.classes < len(self.members):
            ways = np.sort(rng.permutation(len(self.members))[: layout.classes])  # type: ignore[assignment]
        for c in ways:
            rows = rng.permutation(self.members[c])
            share = layout.support / layout.per_class
            cut = min(max(1, round(share * len(rows))), len(rows) - 1) if len(rows) > 1 else 1
            support, query = rows[:cut], rows[cut:] if len(rows) > 1 else rows
            chosen += np.resize(support, layout.support).tolist()
            chosen += np.resize(query, layout.per_class - layout.support).tolist()
        unlabelled = pool.take(layout.pool)
        return [*chosen, *unlabelled, *unlabelled]


class GuidedSampler:
    """m images of each class by pytorch-metric-learning's `MPerClassSampler`, and a share of the pool.

    Args:
        labels: class number of each labelled image.
        layout: sizes; `classes` × `per_class` labelled images a batch.
        pool: number of images without labels, whose indices follow the labelled ones.
        seed: with the epoch it decides everything.
        length: batches of an epoch.
        replicas: how many layouts a batch holds, one for each process.
    """

    def __init__(
        self,
        labels: Sequence[int],
        layout: Layout,
        *,
        pool: int,
        seed: int,
        length: int = 100,
        replicas: int = 1,
    ) -> None:
        from pytorch_metric_learning.samplers import MPerClassSampler

        self.layout, self.seed, self.length, self.replicas = layout, seed, length, replicas
        self.labels, self.pool, self._epoch = np.asarray(labels), pool, 0
        total = layout.labelled * length * replicas
        self._per_class = MPerClassSampler(
            self.labels, m=layout.per_class, batch_size=layout.labelled, length_before_new_iter=total
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        from pytorch_metric_learning.utils import common_functions

        # The library draws from a module-level generator that it documents as replaceable; it is put back at
        # once.
        before = common_functions.NUMPY_RANDOM
        common_functions.NUMPY_RANDOM = np.random.RandomState((self.seed * 1_000_003 + self._epoch) % 2**32)
        try:
            labelled = list(self._per_class)
        finally:
            common_functions.NUMPY_RANDOM = before
        pool = _Shuffled(self.pool, np.random.default_rng((self.seed, self._epoch, 1)))
        size = self.layout.labelled
        for number in range(self.length):
            batch: list[int] = []
            for replica in range(self.replicas):
                start = (number * self.replicas + replica) * size
                unlabelled = [len(self.labels) + i for i in pool.take(self.layout.pool)]
                batch += [int(i) for i in labelled[start : start + size]] + unlabelled + unlabelled
            yield batch


class _Shuffled:
    """Goes through 0 … n−1 in random order again and again."""

    def __init__(self, count: int, rng: np.random.Generator) -> None:
        self._count, self._rng, self._left = count, rng, np.zeros(0, np.int64)

    def take(self, number: int) -> list[int]:
        """The next `number` of them; an image comes twice only when the order ran out."""
        if number and not self._count:
            raise ValueError("the pool is empty; set the number of images without labels to 0")
        while len(self._left) < number:
            self._left = np.concatenate([self._left, self._rng.permutation(self._count)])
        taken, self._left = self._left[:number], self._left[number:]
        return [int(i) for i in taken]
