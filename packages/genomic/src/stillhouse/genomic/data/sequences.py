"""Labelled sequences: what probes, fine-tuning and benchmarks work on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .intervals import Interval
from .sequence import Bytes, N


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Sequences with labels.

    Args:
        name: name of the task.
        sequences: uint8 [N, L] of A C G T N; shorter sequences are padded with N at the end.
        lengths: int [N], letters of each sequence before the padding, 1 … L.
        labels: int [N], index into `classes`.
        classes: names of the classes; their order is the order of the labels.
        groups: [N] names: sequences of one group (same gene, overlapping place, near copies) must not be
            parted between train and test.
        split: [N] `train`, `validation` or `test` where the data set comes with a split, else None.

    Raises:
        ValueError: shapes or values that do not fit together.

    Example:
        >>> items = pack("two", [b"ACG", b"AC"], [0, 1], ("no", "yes"), ["a", "b"])
        >>> items.sequences.shape, items.lengths.tolist(), items.sequences[1].tobytes()
        ((2, 3), [3, 2], b'ACN')
    """

    name: str
    sequences: Bytes
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    split: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.sequences.dtype != np.uint8 or self.sequences.ndim != 2:
            raise ValueError(
                f"sequences is {self.sequences.dtype} {self.sequences.shape}; it must be uint8 [N, L]"
            )
        count, width = self.sequences.shape
        for name in ("lengths", "labels"):
            array = getattr(self, name)
            if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(f"{name} is {array.dtype} {array.shape}; it must be integers [{count}]")
        for name in ("groups", "split"):
            if getattr(self, name) is not None and len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {count} sequences")
        if count and not (self.lengths.min() >= 1 and self.lengths.max() <= width):
            raise ValueError(f"lengths run from {self.lengths.min()} to {self.lengths.max()}; 1 … {width}")
        if count and not (self.labels.min() >= 0 and self.labels.max() < len(self.classes)):
            raise ValueError(
                f"labels run from {self.labels.min()} to {self.labels.max()}; there are "
                f"{len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.sequences)

    def subset(self, indices: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Sequences:
        """The sequences at some places, in that order; a boolean mask does too."""
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        return Sequences(
            self.name,
            self.sequences[chosen],
            self.lengths[chosen],
            self.labels[chosen],
            self.classes,
            tuple(self.groups[i] for i in chosen),
            None if self.split is None else tuple(self.split[i] for i in chosen),
        )

    def part(self, name: str) -> Sequences:
        """The sequences of one part of the split that the data came with.

        Raises:
            ValueError: there is no split, or no such part in it.
        """
        if self.split is None or name not in self.split:
            raise ValueError(f"name is {name!r}; {self.name!r} has the parts {sorted(set(self.split or ()))}")
        return self.subset(np.array([part == name for part in self.split]))


def pack(
    name: str,
    sequences: Sequence[Bytes | bytes],
    labels: Sequence[int] | NDArray[np.int64],
    classes: Sequence[str],
    groups: Sequence[str],
    split: Sequence[str] | None = None,
) -> Sequences:
    """`Sequences` from sequences of different lengths: the padding is done here.

    Args:
        name: name of the task.
        sequences: each bytes or uint8 [L] of A C G T N.
        labels: [N] index into `classes`.
        classes: names of the classes.
        groups: [N].
        split: [N] or None.
    """
    lengths = np.array([len(s) for s in sequences], np.int64)
    packed = np.full((len(sequences), int(lengths.max(initial=1))), N, np.uint8)
    for row, letters in zip(packed, sequences, strict=True):
        row[: len(letters)] = np.frombuffer(letters, np.uint8) if isinstance(letters, bytes) else letters
    return Sequences(
        name,
        packed,
        lengths,
        np.asarray(labels, np.int64),
        tuple(classes),
        tuple(groups),
        None if split is None else tuple(split),
    )


def overlap_groups(intervals: Sequence[Interval], *, gap: int = 0) -> list[str]:
    """Groups of intervals that overlap, on either strand, directly or through others.

    Args:
        intervals: places, in any order.
        gap: intervals with at most this many bases between them belong together too.

    Returns:
        [N] group names, `record:start` of the first member.

    Example:
        >>> overlap_groups([Interval("a", 0, 10), Interval("a", 20, 30), Interval("a", 9, 12)])
        ['a:0', 'a:20', 'a:0']
    """
    order = sorted(range(len(intervals)), key=lambda i: (intervals[i].record, intervals[i].start))
    groups = [""] * len(intervals)
    record, reach, name = "", -1, ""
    for i in order:
        item = intervals[i]
        if item.record != record or item.start >= reach + gap + (gap > 0):
            record, reach, name = item.record, item.end, f"{item.record}:{item.start}"
        reach = max(reach, item.end)
        groups[i] = name
    return groups


def copy_groups(sequences: Sequence[bytes], *, word: int = 32) -> list[str]:
    """Groups of sequences that share an exact word, directly or through others: near copies, neighbours.

    Args:
        sequences: ASCII letters.
        word: length of the word in bp; words with N do not count.

    Returns:
        [N] group names.

    Example:
        >>> copy_groups([b"AACCGGTT", b"CACCGGTA", b"TTTTTTTT"], word=4)
        ['group 0', 'group 0', 'group 2']
    """
    root = list(range(len(sequences)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    first: dict[bytes, int] = defaultdict(lambda: -1)
    for i, letters in enumerate(sequences):
        for start in range(len(letters) - word + 1):
            piece = letters[start : start + word]
            if b"N" in piece:
                continue
            j = first.setdefault(piece, i)
            a, b = find(i), find(j)
            if a != b:
                root[max(a, b)] = min(a, b)
    return [f"group {find(i)}" for i in range(len(sequences))]
