"""Exon, intron or intergenic; and which genome a window is from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..genome import EXON, INTERGENIC, INTRON, Genome, region_map, transcripts
from ..intervals import Interval
from ..sequences import Sequences, pack
from ._places import block_size, enough, group_name, pick, stack, usable

CLASSES = ("exon", "intron", "intergenic")
_CODES = (EXON, INTRON, INTERGENIC)


def regions(
    genome: Genome,
    *,
    length: int = 256,
    core: int = 64,
    limit: int | None = None,
    block: int | None = None,
    seed: int = 0,
) -> Sequences:
    """What the middle of a window is: exon, intron or intergenic.

    The `core` letters in the middle all belong to one class by `region_map` (an exon or intron of every
    transcript that covers them, or outside all gene models); what lies around them may differ, since exons
    are shorter than windows. Windows in genes are read on the strand of the gene, intergenic ones on a
    strand drawn at random. Classes are balanced.

    Args:
        genome: with gene models.
        length: letters of a window.
        core: letters in the middle that must be of the class, at most `length`.
        limit: most windows of each class; None takes as many as the smallest class has, at most one for
            each `core` bases.
        block: length of the blocks that make the groups; 10,000 bp or 16 windows when None.
        seed: the same seed gives the same windows.

    Returns:
        `Sequences` with the classes exon, intron, intergenic. See `splice_sites` for groups and
        what is left out.

    Raises:
        DataError: fewer than 10 windows of some class.
        ValueError: an argument out of range.
    """
    if not 1 <= core <= length:
        raise ValueError(f"core is {core}; it must lie in [1, {length}], the window length")
    size = block_size(length, block)
    rng = np.random.default_rng(seed)
    strands = _strands(genome)
    candidates: dict[int, list[Interval]] = {code: [] for code in _CODES}
    for record, codes in region_map(genome).items():
        for start, end, code in _runs(codes):
            if code not in candidates:
                continue
            for middle in range(start, end - core + 1, core):
                spare = min(core, end - core - middle + 1)
                begin = middle + int(rng.integers(spare)) - (length - core) // 2
                if begin < 0:
                    continue
                strand = strands[record][min(begin + length // 2, len(codes) - 1)]
                if code == INTERGENIC:
                    strand = "+-"[int(rng.integers(2))]
                candidates[code].append(Interval(record, begin, begin + length, strand))
    kept = {code: usable(genome, places, size) for code, places in candidates.items()}
    for name, code in zip(CLASSES, _CODES, strict=True):
        enough(len(kept[code]), 10, f"usable windows in {name}", genome)
    count = min(len(places) for places in kept.values())
    count = count if limit is None else min(count, limit)
    chosen = [place for code in _CODES for place in pick(kept[code], count, rng)]
    return Sequences(
        f"{genome.name} exon, intron, intergenic",
        stack(genome, chosen),
        np.full(len(chosen), length, np.int64),
        np.repeat(np.arange(3), count).astype(np.int64),
        CLASSES,
        tuple(group_name(genome, place, size) for place in chosen),
    )


def species(
    genomes: Sequence[Genome],
    *,
    length: int = 256,
    limit: int | None = None,
    block: int | None = None,
    seed: int = 0,
) -> Sequences:
    """Which genome a window is from.

    Windows tile each genome without overlap, on a strand drawn at random; classes are balanced. Composition
    alone tells many genomes apart: look at a baseline of letter counts before calling it understanding.

    Args:
        genomes: two or more, with different names.
        length: letters of a window.
        limit: most windows of each genome; None takes as many as the smallest genome has.
        block: length of the blocks that make the groups; 10,000 bp or 16 windows when None.
        seed: the same seed gives the same windows.

    Returns:
        `Sequences` with the names of the genomes as classes, in the given order.

    Raises:
        DataError: fewer than 10 windows in some genome.
        ValueError: fewer than two genomes, names that repeat, or a length below 1.
    """
    names = tuple(genome.name for genome in genomes)
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"genomes have the names {names}; two or more with different names are needed")
    size = block_size(length, block)
    rng = np.random.default_rng(seed)
    kept: list[list[Interval]] = []
    for genome in genomes:
        places = [
            Interval(record, start, start + length, "+-"[int(rng.integers(2))])
            for record, letters in genome.records.items()
            for start in range(0, len(letters) - length + 1, length)
        ]
        kept.append(usable(genome, places, size))
        enough(len(kept[-1]), 10, f"usable windows of {length} bp", genome)
    count = min(map(len, kept)) if limit is None else min(limit, *map(len, kept))
    chosen = [pick(places, count, rng) for places in kept]
    return pack(
        "species: " + ", ".join(names),
        [genome.fetch(place) for genome, places in zip(genomes, chosen, strict=True) for place in places],
        np.repeat(np.arange(len(names)), count),
        names,
        [group_name(g, place, size) for g, places in zip(genomes, chosen, strict=True) for place in places],
    )


def _runs(codes: np.ndarray) -> list[tuple[int, int, int]]:
    """Runs of equal codes as (start, end, code)."""
    edges = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1, [len(codes)]])
    return [(a, b, int(codes[a])) for a, b in pairwise(edges.tolist())]


def _strands(genome: Genome) -> dict[str, np.ndarray]:
    strands = {name: np.full(len(letters), "+", "<U1") for name, letters in genome.records.items()}
    for exons in transcripts(genome).values():
        strands[exons[0].record][exons[0].start : exons[-1].end] = exons[0].strand
    return strands
