"""Batches whose content depends on a seed and a position alone.

`SeededLoader` goes through a dataset epoch after epoch without end. Which samples a batch holds and which
random numbers a seeded dataset gets follow from (seed, epoch, position), never from the number of workers, of
ranks or of interruptions, so that a resumed run and a run on two ranks see what an undisturbed run on one
rank sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

_MASK64 = (1 << 64) - 1


class SizedBatches(Protocol):
    """A batch sampler: sized, iterable again and again, yields lists of dataset indices.

    If it has `set_epoch(epoch)`, that is called before each pass; its lists must then be a function of the
    epoch.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence[int]]: ...


def sample_seed(seed: int, epoch: int, position: int) -> int:
    """Seed of the sample at a position of an epoch, in [0, 2³²): a hash of the three numbers alone.

    Args:
        seed: seed of the run.
        epoch: zero-based epoch.
        position: zero-based position of the sample in the epoch's order.

    Example:
        >>> sample_seed(0, 0, 0) != sample_seed(0, 0, 1)
        True
    """
    state = 0
    for part in (seed, epoch, position):  # SplitMix64, absorbing one number a round
        state = (state + (part & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 32


class SeededLoader:
    """Endless batches, exact under resume, worker count and rank count.

    A dataset with the attribute `seeded = True` is asked for `dataset[(index, sample_seed)]` and draws its
    augmentation from that seed; any other is asked for `dataset[index]`. On several ranks each global batch
    is cut into equal runs of neighbours, rank r taking the r-th, so that its size must divide by the number
    of ranks.

    Args:
        dataset: sized and indexable; need not be a `torch.utils.data.Dataset`.
        batch_size: samples of a *global* batch (one micro-batch of all ranks together); exclusive with
            `batch_sampler`.
        batch_sampler: any sized iterable of index lists (m-per-class, episodes, …), each a global batch.
        shuffle: a new order each epoch; only with `batch_size`.
        seed: seed of order and samples (≥ 0).
        workers: worker processes; 0 loads in this process.
        drop_last: leave an incomplete last batch out; only with `batch_size`.
        collate: list of samples → batch; torch's `default_collate` when None.

    Attributes:
        epoch: zero-based epoch of the batch handed out last (0 before the first).
        position: global batches of the current epoch handed out.

    Raises:
        ValueError: neither or both of `batch_size` and `batch_sampler`, an empty dataset or sampler, fewer
            samples than one batch with `drop_last`, or (while iterating on several ranks) a batch that does
            not divide.

    Example:
        >>> loader = SeededLoader([10, 11, 12, 13], batch_size=2, shuffle=False)
        >>> batches = iter(loader)
        >>> [next(batches).tolist() for _ in range(3)], loader.epoch, loader.position
        ([[10, 11], [12, 13], [10, 11]], 1, 1)
        >>> resumed = SeededLoader([10, 11, 12, 13], batch_size=2, shuffle=False)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> next(iter(resumed)).tolist()
        [12, 13]
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int | None = None,
        batch_sampler: SizedBatches | None = None,
        shuffle: bool = True,
        seed: int = 0,
        workers: int = 0,
        drop_last: bool = True,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if (batch_size is None) == (batch_sampler is None):
            raise ValueError("give exactly one of batch_size and batch_sampler")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be ≥ 1")
        if workers < 0:
            raise ValueError(f"workers is {workers}; it must be ≥ 0")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be ≥ 0")
        if len(dataset) == 0:
            raise ValueError("dataset is empty; it must hold at least one sample")
        self.dataset = dataset
        self.batch_size = batch_size
        self.batch_sampler = batch_sampler
        self.shuffle = shuffle
        self.seed = seed
        self.workers = workers
        self.drop_last = drop_last
        self.collate = collate or default_collate
        self.epoch = 0
        self.position = 0
        self._rank, self._world_size, self._pin_memory = 0, 1, False
        if len(self) == 0:
            what = (
                f"{len(dataset)} samples < batch_size {batch_size} with drop_last"
                if batch_size
                else "batch_sampler is empty"
            )
            raise ValueError(f"an epoch holds no batch: {what}")

    def __len__(self) -> int:
        """Global batches of one epoch."""
        if self.batch_sampler is not None:
            return len(self.batch_sampler)
        assert self.batch_size is not None  # one of the two is given, see __init__
        count = len(self.dataset)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def shard(self, rank: int, world_size: int, *, pin_memory: bool = False) -> None:
        """Hand out the part of one rank from the next `iter` on; the trainer calls this.

        Args:
            rank: 0 ≤ rank < world_size.
            world_size: number of ranks.
            pin_memory: copy batches to page-locked memory, for faster transfer to a CUDA device.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must lie in [0, {world_size})")
        if self.batch_size is not None and self.batch_size % world_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, the size of the global batch; "
                f"it must divide by the {world_size} ranks"
            )
        self._rank, self._world_size, self._pin_memory = rank, world_size, pin_memory

    def __iter__(self) -> Iterator[Any]:
        """Batches without end, from the present position on, which moves with each batch taken."""
        workers = torch.Generator()
        workers.manual_seed(
            sample_seed(self.seed, self.epoch, self.position)
        )  # the global generator is left alone
        batches = DataLoader(
            self.dataset,
            batch_sampler=_Stream(self, self.epoch, self.position),
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=self._pin_memory,
            generator=workers,
        )
        for batch in batches:
            if self.position == len(self):
                self.epoch, self.position = self.epoch + 1, 0
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Position in the data, and the numbers a resumed loader must share."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "samples": len(self.dataset),
            "batches": len(self),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position; the next `iter` starts there.

        Raises:
            ValueError: the state belongs to another seed or to data of another size.
        """
        for name, value in (("seed", self.seed), ("samples", len(self.dataset)), ("batches", len(self))):
            if state[name] != value:
                raise ValueError(
                    f"the saved loader has {name} = {state[name]}, this one {value}: the run would not see "
                    "the same batches; use the data and settings of the saved run, or start a new run"
                )
        self.epoch, self.position = state["epoch"], state["position"]


class _Stream:
    """The keys of every batch from (epoch, position) on, for one rank."""

    def __init__(self, loader: SeededLoader, epoch: int, position: int) -> None:
        self._loader = loader
        self._epoch, self._position = epoch, position

    def __iter__(self) -> Iterator[list[Any]]:
        loader = self._loader
        seeded = bool(getattr(loader.dataset, "seeded", False))
        rank, world = loader._rank, loader._world_size
        epoch, skip = self._epoch, self._position
        while True:
            start = number = 0
            for number, indices in enumerate(self._epoch_batches(epoch), start=1):
                size = len(indices)
                if size % world:
                    raise ValueError(
                        f"batch {number - 1} holds {size} samples; "
                        f"a global batch must divide by {world} ranks"
                    )
                if number > skip:
                    part = range(rank * (size // world), (rank + 1) * (size // world))
                    if seeded:
                        yield [(indices[i], sample_seed(loader.seed, epoch, start + i)) for i in part]
                    else:
                        yield [indices[i] for i in part]
                start += size
            if number != len(loader):
                raise ValueError(
                    f"the batch_sampler gave {number} batches in epoch {epoch} and says len() = "
                    f"{len(loader)}; both must agree"
                )
            epoch, skip = epoch + 1, 0

    def _epoch_batches(self, epoch: int) -> Iterable[Sequence[int]]:
        loader = self._loader
        if loader.batch_sampler is not None:
            if hasattr(loader.batch_sampler, "set_epoch"):
                loader.batch_sampler.set_epoch(epoch)
            return loader.batch_sampler
        assert loader.batch_size is not None
        count, size = len(loader.dataset), loader.batch_size
        if loader.shuffle:
            order = np.random.default_rng((loader.seed, epoch)).permutation(count).tolist()
        else:
            order = list(range(count))
        return [order[i * size : (i + 1) * size] for i in range(len(loader))]


class Feed:
    """What the trainer draws batches from: a `SeededLoader`, or any iterable, started over when it ends.

    Args:
        data: with `shard(rank, world_size, pin_memory=…)` it gives each rank its part (otherwise it has to do
            so by itself); with `state_dict` and `load_state_dict` it knows its position (otherwise as many
            batches as were used are drawn and dropped on a resume, which is exact for data that repeat
            themselves).
        rank: index of this process.
        world_size: number of processes.
        pin_memory: hand batches over in page-locked memory.
    """

    def __init__(self, data: Iterable[Any], rank: int, world_size: int, *, pin_memory: bool) -> None:
        self._data = data
        self._stateful = hasattr(data, "state_dict") and hasattr(data, "load_state_dict")
        self._used = 0
        self._batches: Iterator[Any] | None = None
        if hasattr(data, "shard"):
            data.shard(rank, world_size, pin_memory=pin_memory)

    @property
    def epoch(self) -> int:
        """Zero-based epoch of the last batch."""
        if hasattr(self._data, "epoch"):
            return int(self._data.epoch)
        return max(self._used - 1, 0) // len(self._data) if isinstance(self._data, Sized) else 0

    def next(self) -> Any:
        """The next batch.

        Raises:
            ValueError: the data gave no batch when they were started (again).
        """
        if self._batches is None:
            self._batches = self._endless(0 if self._stateful else self._used)
        batch = next(self._batches)
        self._used += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position in the data."""
        state = {"used": self._used}
        return {**state, "data": self._data.state_dict()} if self._stateful else state  # type: ignore[attr-defined]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position."""
        self._used = state["used"]
        if self._stateful and "data" in state:
            self._data.load_state_dict(state["data"])  # type: ignore[attr-defined]

    def _endless(self, skip: int) -> Iterator[Any]:
        if isinstance(self._data, Sized) and len(self._data):
            skip %= len(self._data)
        while True:
            number = 0
            for number, batch in enumerate(self._data, start=1):
                if number > skip:
                    yield batch
            if number == 0:
                raise ValueError(
                    f"data ended after {self._used} batches and cannot be started over; give a longer or "
                    "repeatable iterable, or fewer steps"
                )
            skip = max(skip - number, 0)
