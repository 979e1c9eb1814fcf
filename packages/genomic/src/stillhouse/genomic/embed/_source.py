"""What is embedded: the records of a FASTA, or intervals of it, cut into tiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stillhouse.core.errors import DataError


@dataclass(frozen=True, slots=True)
class Piece:
    """One window of a record.

    Attributes:
        record: name of the record.
        name: name of the interval, empty without a BED.
        start, end: coordinates on the forward strand, 0-based, half-open.
        strand: "+" or "-"; "-" is embedded as its reverse complement.
        letters: uint8 [end − start].
    """

    record: str
    name: str
    start: int
    end: int
    strand: str
    letters: npt.NDArray[np.uint8]


def tiles_of(length: int, window: int, overlap: int = 0) -> list[tuple[int, int]]:
    """Cut 0…length into windows that share `overlap` positions; the last one may be shorter.

    Args:
        length: ≥ 0.
        window: longest window, ≥ 1.
        overlap: 0 ≤ overlap < window.

    Returns:
        (start, end) of each; they cover everything, and none lies inside the one before it.

    Example:
        >>> tiles_of(10, 4, 1), tiles_of(3, 4), tiles_of(0, 4)
        ([(0, 4), (3, 7), (6, 10)], [(0, 3)], [])
    """
    if window < 1 or not 0 <= overlap < window:
        raise ValueError(f"window is {window} and overlap {overlap}; give 0 ≤ overlap < window")
    if length <= 0:
        return []
    count = 1 if length <= window else 1 + -(-(length - window) // (window - overlap))
    starts = [at * (window - overlap) for at in range(count)]
    return [(start, min(start + window, length)) for start in starts]


def pieces_of(
    fasta: str | os.PathLike[str],
    *,
    bed: str | os.PathLike[str] | None = None,
    length: int,
    overlap: int = 0,
) -> Iterator[Piece]:
    """Read the windows of a FASTA, a record or an interval at a time.

    Args:
        fasta: plain, gz or bgzf; with a BED it needs random access.
        bed: intervals, or None for whole records.
        length: longest window.
        overlap: bases that neighbouring tiles of one record or interval share.

    Raises:
        DataError: a file cannot be used.
    """
    from ..data import Fasta, read_bed, read_fasta

    if bed is None:
        for record in read_fasta(Path(fasta)):
            if not len(record.sequence):
                raise DataError(f"{fasta}: the record {record.name!r} is empty; take it out")
            for start, end in tiles_of(len(record.sequence), length, overlap):
                yield Piece(record.name, "", start, end, "+", record.sequence[start:end])
        return
    source = Fasta(Path(fasta))
    lengths = {name: source.length(name) for name in source.names}
    for interval in read_bed(Path(bed), lengths):
        for start, end in tiles_of(interval.end - interval.start, length, overlap):
            low, high = interval.start + start, interval.start + end
            if interval.strand == "-":  # tiles count from the 5' end of the strand that is read
                low, high = interval.end - end, interval.end - start
            letters = source.fetch(interval.record, low, high, interval.strand)
            yield Piece(interval.record, interval.name, low, high, interval.strand, letters)


def batches_of(pieces: Iterator[Piece], size: int) -> Iterator[list[Piece]]:
    """Collect pieces into lists of `size`; the last one may be shorter."""
    found: list[Piece] = []
    for piece in pieces:
        found.append(piece)
        if len(found) == size:
            yield found
            found = []
    if found:
        yield found


def padded(pieces: list[Piece]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Letters of pieces side by side, N on the right: uint8 [B, L], and their lengths [B]."""
    lengths = np.array([len(piece.letters) for piece in pieces], dtype=np.int64)
    windows = np.full((len(pieces), int(lengths.max())), ord("N"), np.uint8)
    for row, piece in zip(windows, pieces, strict=True):
        row[: len(piece.letters)] = piece.letters
    return windows, lengths
