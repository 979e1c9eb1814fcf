"""Promoters against controls of the same composition, or from a genome."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from stillhouse.core.errors import DataError

from .._source import text_lines
from ..fasta import read_fasta
from ..genome import Genome
from ..intervals import Interval
from ..sequence import Bytes, normalise
from ..sequences import Sequences, copy_groups, pack
from ..shuffle import shuffle_dinucleotides
from ._places import block_size, enough, group_name, pick, usable


def read_promoters(path: str | Path) -> list[Bytes]:
    """Sequences of a FASTA file, or of a text file with one sequence a line.

    Raises:
        DataError: naming the file, the line and what to do.
    """
    path = Path(path)
    first = next((text for _, text in text_lines(path) if text.strip()), "")
    if first.startswith(">"):
        return [record.sequence for record in read_fasta(path)]
    found: list[Bytes] = []
    for line, text in text_lines(path):
        if text.strip():
            try:
                found.append(normalise(text))
            except ValueError as error:
                raise DataError(f"{path}, line {line}: {error}") from None
    if not found:
        raise DataError(f"{path}: holds no sequence; one a line, or FASTA, is expected")
    return found


def promoters(
    path: str | Path,
    controls: Literal["shuffled", "genomic"] = "shuffled",
    *,
    genome: Genome | None = None,
    limit: int | None = None,
    block: int | None = None,
    seed: int = 0,
) -> Sequences:
    """Promoters against as many controls.

    `shuffled` controls keep every count of two neighbouring letters of their promoter
    (`shuffle_dinucleotides`), so that composition and CpG tell nothing. `genomic` controls are windows of the
    same lengths from a genome, on both strands; take the same species, or the task is to tell species apart.

    Promoters that share a word of 32 bp (alternative starts of one gene, duplicates) form one group; exact
    copies are taken once. A shuffled control is in the group of its promoter.

    Args:
        path: FASTA, or one sequence a line, e.g. `hs_pos_TATA.txt` of DeePromoter (300 bp, the start of
            transcription after base 249 by its description).
        controls: see above.
        genome: where `genomic` controls come from.
        limit: most promoters; None takes all.
        block: blocks that make the groups of `genomic` controls; 10,000 bp or 16 windows when None.
        seed: the same seed gives the same sequences.

    Returns:
        `Sequences` with the classes (`control`, `promoter`).

    Raises:
        DataError: a file that cannot be read, or a genome without room for the controls.
        ValueError: other controls, or `genomic` without a genome.
    """
    if controls not in ("shuffled", "genomic"):
        raise ValueError(f"controls is {controls!r}; it must be 'shuffled' or 'genomic'")
    if (controls == "genomic") != (genome is not None):
        raise ValueError("genome is needed for controls='genomic', and for nothing else")
    rng = np.random.default_rng(seed)
    found = list({letters.tobytes(): letters for letters in read_promoters(path)}.values())
    if limit is not None and limit < len(found):
        found = [found[i] for i in np.sort(rng.choice(len(found), limit, replace=False))]
    groups = copy_groups([letters.tobytes() for letters in found])
    if genome is None:
        false, others = [shuffle_dinucleotides(letters, rng) for letters in found], groups
    else:
        places, size = _controls(genome, [len(letters) for letters in found], block, rng)
        false, others = [genome.fetch(p) for p in places], [group_name(genome, p, size) for p in places]
    labels = np.repeat([1, 0], [len(found), len(false)])
    name = f"{Path(path).stem} vs {controls} controls"
    return pack(name, [*found, *false], labels, ("control", "promoter"), [*groups, *others])


def _controls(
    genome: Genome, lengths: list[int], block: int | None, rng: np.random.Generator
) -> tuple[list[Interval], int]:
    longest = max(lengths)
    size = block_size(longest, block)
    places = [
        Interval(record, start, start + longest, "+-"[int(rng.integers(2))])
        for record, letters in genome.records.items()
        for start in range(0, len(letters) - longest + 1, longest)
    ]
    kept = usable(genome, places, size)
    enough(len(kept), len(lengths), f"windows of {longest} bp without N", genome)
    chosen = pick(kept, len(lengths), rng)
    pairs = zip(chosen, rng.permutation(lengths).tolist(), strict=True)
    return [Interval(p.record, p.start, p.start + n, p.strand) for p, n in pairs], size
