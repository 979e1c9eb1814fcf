"""Tiles, and splits that share no base.

Splitting comes first, tiling second: `split_records` cuts the genome into regions for train, validation and
test, `tile` cuts each region into tiles, and neither ever reaches over a border. The loader that most genomic
language models share does it the other way round (it stretches the rows of a split BED file to 2²⁰ bp), so
that its train rows overlap the validation and test rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Literal

import numpy as np

from stillhouse.core.errors import DataError

from .intervals import Interval, unknown_record

PARTS = ("train", "validation", "test")

_CUTS = 8  # random cuts, of which the one nearest to the shares is taken


def tile(
    lengths: Mapping[str, int] | Iterable[Interval],
    size: int,
    stride: int | None = None,
    *,
    remainder: bool = False,
) -> list[Interval]:
    """Cut records or regions into tiles of equal size.

    Args:
        lengths: record → length in bp, or regions (`Interval`), e.g. one part of `split_records`.
        size: length of a tile in bp.
        stride: distance of neighbouring starts; `size` when None, so that tiles do not overlap.
        remainder: keep the shorter last piece of each region too (windows of it are padded with N); without
            it, a region shorter than `size` gives nothing.

    Returns:
        list of `Interval`, in the order of the regions; names are kept.

    Raises:
        ValueError: size or stride below 1.

    Example:
        >>> [str(t) for t in tile({"one": 10, "two": 3}, 4)]
        ['one:0-4', 'one:4-8']
        >>> [str(t) for t in tile({"one": 10, "two": 3}, 4, remainder=True)]
        ['one:0-4', 'one:4-8', 'one:8-10', 'two:0-3']
    """
    stride = size if stride is None else stride
    if size < 1 or stride < 1:
        raise ValueError(f"size is {size} and stride {stride}; both must be at least 1")
    tiles: list[Interval] = []
    for region in _regions(lengths):
        start = region.start
        while start + size <= region.end:
            tiles.append(Interval(region.record, start, start + size, region.strand, region.name))
            start += stride
        covered = start - stride + size if start > region.start else region.start
        if remainder and max(covered, start) < region.end:
            tiles.append(Interval(region.record, start, region.end, region.strand, region.name))
    return tiles


def split_records(
    lengths: Mapping[str, int],
    *,
    by: Literal["record", "block"] = "record",
    validation: float = 0.1,
    test: float = 0.1,
    named: Mapping[str, Sequence[str]] | None = None,
    block: int = 50_000,
    guard: int = 1_000,
    seed: int = 0,
) -> dict[str, list[Interval]]:
    """Cut a genome into regions for train, validation and test that share no base.

    Args:
        lengths: record → length in bp.
        by: `record` gives whole records (chromosomes, contigs) to one part each; `block` cuts each record
            into blocks and leaves `guard` bases out wherever two neighbours lie in different parts: for
            genomes of one or few long records.
        validation: share of the bases for validation, 0 to below 1.
        test: the same for the test part.
        named: `record` only: part → names of its records, overriding the shares; the records that are not
            named go to train.
        block: length of a block in bp.
        guard: bases left out at each border between parts; take at least the window length, so that no
            window touches two parts even when a tile is widened later.
        seed: the same seed gives the same parts.

    Returns:
        {"train": …, "validation": …, "test": …}, each a list of `Interval` regions; a part whose share is 0
        is empty. Give each to `tile`.

    Raises:
        ValueError: an argument out of range.
        DataError: too few records or blocks for the parts asked for, or an unknown name in `named`.

    Example:
        >>> parts = split_records({"a": 900, "b": 100, "c": 120})
        >>> [str(r) for r in parts["train"]], len(parts["validation"]), len(parts["test"])
        (['a:0-900'], 1, 1)
    """
    _check(by, validation, test, named, block, guard)
    rng = np.random.default_rng(seed)
    if named is not None:
        parts = _named(lengths, named)
    elif by == "record":
        whole = [Interval(name, 0, size) for name, size in lengths.items()]
        parts = _assign(whole, validation, test, rng, "records (use by='block')")
    else:
        parts = _blocks(lengths, validation, test, block, guard, rng)
    check_disjoint(parts)
    return parts


def check_disjoint(parts: Mapping[str, Iterable[Interval]], *, gap: int = 0) -> None:
    """Refuse parts that share a base, on either strand, or lie closer than a gap.

    Args:
        parts: part → its intervals; intervals of the *same* part may overlap.
        gap: fewest bases between intervals of different parts.

    Raises:
        ValueError: naming the two parts and the first two intervals that meet.

    Example:
        >>> check_disjoint({"train": [Interval("a", 0, 10)], "test": [Interval("a", 9, 20)]})
        Traceback (most recent call last):
        ValueError: parts: train a:0-10 and test a:9-20 overlap; the parts of a split must share no base
    """
    rows = sorted((i.record, i.start, i.end, part) for part, items in parts.items() for i in items)
    for _, group in groupby(rows, key=lambda row: row[0]):
        reach: dict[str, tuple[int, int]] = {}  # part → (furthest end so far, its start)
        for record, start, end, part in group:
            for other, (other_end, other_start) in reach.items():
                if other != part and start < other_end + gap:
                    what = "overlap" if start < other_end else f"lie closer than {gap} bp"
                    raise ValueError(
                        f"parts: {other} {record}:{other_start}-{other_end} and {part} {record}:{start}-"
                        f"{end} {what}; the parts of a split must share no base"
                    )
            if part not in reach or end > reach[part][0]:
                reach[part] = (end, start)


def _regions(lengths: Mapping[str, int] | Iterable[Interval]) -> Iterable[Interval]:
    if isinstance(lengths, Mapping):
        return [Interval(name, 0, size) for name, size in lengths.items()]
    return lengths


def _check(
    by: str, validation: float, test: float, named: Mapping[str, Sequence[str]] | None, block: int, guard: int
) -> None:
    if by not in ("record", "block"):
        raise ValueError(f"by is {by!r}; it must be 'record' or 'block'")
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; it must be at least 0 and below 1")
    if validation + test >= 1:
        raise ValueError(f"validation + test is {validation + test}; it must leave something to train on")
    if named is not None:
        if by != "record":
            raise ValueError("named gives whole records to parts; it goes with by='record' only")
        if unknown := set(named) - set(PARTS):
            raise ValueError(f"named has the parts {sorted(unknown)}; they must be among {PARTS}")
    if guard < 0 or block <= 2 * guard:
        raise ValueError(f"block is {block} and guard {guard}; guard ≥ 0, block > 2 × guard")


def _named(lengths: Mapping[str, int], named: Mapping[str, Sequence[str]]) -> dict[str, list[Interval]]:
    where: dict[str, str] = {}
    for part, names in named.items():
        for name in names:
            if name not in lengths:
                raise DataError(f"named[{part!r}]: {unknown_record(name, lengths)}")
            if name in where:
                raise ValueError(f"named has {name!r} in {where[name]} and in {part}; a record has one part")
            where[name] = part
    parts: dict[str, list[Interval]] = {part: [] for part in PARTS}
    for name, size in lengths.items():
        parts[where.get(name, "train")].append(Interval(name, 0, size))
    return parts


def _assign(
    pieces: Sequence[Interval], validation: float, test: float, rng: np.random.Generator, what: str
) -> dict[str, list[Interval]]:
    """Give pieces to parts so that the bases come near the shares; each part asked for gets at least one."""
    wanted = {"test": test, "validation": validation}
    asked = [part for part, share in wanted.items() if share > 0]
    if len(pieces) < len(asked) + 1:
        raise DataError(
            f"{len(pieces)} pieces cannot be split into {len(asked) + 1} parts; give more {what}, or set "
            "validation or test to 0"
        )
    total = sum(map(len, pieces))
    cuts = [_one_cut(pieces, {part: wanted[part] * total for part in asked}, rng) for _ in range(_CUTS)]
    chosen = min(cuts, key=lambda cut: cut[0])[1]
    parts: dict[str, list[Interval]] = {part: [] for part in PARTS}
    for i, piece in enumerate(pieces):
        parts[chosen.get(i, "train")].append(piece)
    return parts


def _one_cut(
    pieces: Sequence[Interval], goals: Mapping[str, float], rng: np.random.Generator
) -> tuple[float, dict[int, str]]:
    """In random order, a piece joins a part where that brings it nearer its goal; with the summed error."""
    free = [int(i) for i in rng.permutation(len(pieces))]
    chosen: dict[int, str] = {}
    error = 0.0
    for number, (part, goal) in enumerate(goals.items()):
        reserve = len(goals) - number  # pieces that must be left for the parts to come and for train
        have = 0
        for i in list(free):
            if len(free) > reserve and abs(have + len(pieces[i]) - goal) < abs(have - goal):
                chosen[i] = part
                have += len(pieces[i])
                free.remove(i)
        if not have:  # every piece is more than twice the goal
            smallest = min(free, key=lambda i: len(pieces[i]))
            chosen[smallest], have = part, len(pieces[smallest])
            free.remove(smallest)
        error += abs(have - goal)
    return error, chosen


def _blocks(
    lengths: Mapping[str, int],
    validation: float,
    test: float,
    block: int,
    guard: int,
    rng: np.random.Generator,
) -> dict[str, list[Interval]]:
    pieces: list[Interval] = []
    for name, size in lengths.items():
        count = max(1, round(size / block))
        edges = [size * i // count for i in range(count + 1)]
        pieces += [Interval(name, a, b) for a, b in pairwise(edges)]
    cut = _assign(pieces, validation, test, rng, "sequence, or a smaller block")
    where = {(piece.record, piece.start): part for part, items in cut.items() for piece in items}
    parts: dict[str, list[Interval]] = {part: [] for part in PARTS}
    before, after = guard - guard // 2, guard // 2
    for _, group in groupby(pieces, key=lambda piece: piece.record):
        runs = [list(run) for _, run in groupby(group, key=lambda p: where[p.record, p.start])]
        for number, run in enumerate(runs):
            start = run[0].start + (after if number else 0)
            end = run[-1].end - (before if number + 1 < len(runs) else 0)
            if end > start:
                parts[where[run[0].record, run[0].start]].append(Interval(run[0].record, start, end))
    return parts
