"""Where the windows of a task may lie: whole on a record, without N, in one block of coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from stillhouse.core.errors import DataError

from ..genome import Genome
from ..intervals import Interval
from ..sequence import Bytes, N


def block_size(length: int, block: int | None) -> int:
    """Length of the blocks that make the groups.

    Raises:
        ValueError: length below 1, or a block shorter than two windows.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1")
    if block is None:
        return max(10_000, 16 * length)
    if block < 2 * length:
        raise ValueError(f"block is {block}; it must be at least twice the window length, {length}")
    return block


def usable(genome: Genome, places: Iterable[Interval], block: int) -> list[Interval]:
    """Places that lie whole on their record, hold no N and cross no border of a block, each once."""
    kept: dict[tuple[str, int, int, str], Interval] = {}
    for place in places:
        letters = genome.records[place.record]
        if place.end > len(letters) or place.start // block != (place.end - 1) // block:
            continue
        if (letters[place.start : place.end] == N).any():
            continue
        kept.setdefault((place.record, place.start, place.end, place.strand), place)
    return list(kept.values())


def group_name(genome: Genome, place: Interval, block: int) -> str:
    """Name of the group of a place: genome, record and block."""
    return f"{genome.name}/{place.record}:{place.start // block * block}"


def pick(items: Sequence[Interval], count: int, rng: np.random.Generator) -> list[Interval]:
    """Some of the items without repetition, in their order; all where there are not more."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.sort(rng.choice(len(items), count, replace=False))]


def enough(found: int, wanted: int, what: str, genome: Genome) -> None:
    """Refuse a task that a genome cannot give.

    Raises:
        DataError: fewer found than wanted.
    """
    if found < wanted:
        raise DataError(
            f"{genome.name}: {found} {what}, {wanted} needed; give an annotated genome with more of them, or "
            "a shorter length"
        )


def stack(genome: Genome, places: Sequence[Interval]) -> Bytes:
    """Letters of places of one length, uint8 [N, L]."""
    return np.stack([genome.fetch(place) for place in places])
