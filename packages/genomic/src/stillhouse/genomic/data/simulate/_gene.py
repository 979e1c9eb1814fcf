"""One simulated gene: promoter, exons, introns with splice motifs, untranslated ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._letters import A, C, Codes, Dialect, G, T, background, coding, composition, motif

PROMOTER = 120
"""Letters before the start of transcription that belong to the promoter."""

_TATA_AT = -31  # first letter of the TATA box, from the start of transcription

# Two families of donors: that their letters go together is what a model of single columns cannot see.
_DONORS = ("GTaagt", "GTgtga")


@dataclass(frozen=True, slots=True)
class Gene:
    """A gene on its own strand.

    Args:
        codes: int [L] of A C G T as 0 … 3: promoter, then the transcript.
        exons: (start, end) of each exon in `codes`, in order.
        coding: first and one past the last coding letter in `codes`.
        tata: first letter of the TATA box, or None.
    """

    codes: Codes
    exons: tuple[tuple[int, int], ...]
    coding: tuple[int, int]
    tata: int | None


def draw_gene(
    rng: np.random.Generator,
    dialect: Dialect,
    *,
    codons: int,
    introns: float,
    intron_length: int,
    tata: float,
) -> Gene:
    """A gene with about the given size.

    Args:
        rng: source of randomness.
        dialect: how the genome writes.
        codons: mean number of sense codons.
        introns: mean number of introns.
        intron_length: mean length of an intron in bp.
        tata: share of promoters with a TATA box.
    """
    shares = composition(dialect.gc)
    five = background(rng, int(rng.integers(30, 120)), composition(dialect.gc, -0.1))
    body = coding(rng, dialect, max(30, int(rng.gamma(4, codons / 4))))
    three = background(rng, int(rng.integers(80, 220)), composition(dialect.gc - 0.05, 0.1))
    three[-26:-20] = (A, A, T, A, A, A)
    mature = np.concatenate([five, body, three])
    cuts = _cuts(rng, mature, len(five), len(five) + len(body), int(rng.poisson(introns)))
    promoter, box = _promoter(rng, shares, tata)
    pieces, exons, at, last = [promoter], [], len(promoter), 0
    places: list[int] = []  # of the mature transcript's letters in the gene
    for number, cut in enumerate([*cuts, len(mature)]):
        piece = mature[last:cut]
        places += range(at, at + len(piece))
        exons.append((at, at + len(piece)))
        pieces.append(piece)
        at += len(piece)
        if number < len(cuts):
            gap = _intron(rng, dialect, max(60, int(rng.gamma(3, intron_length / 3))))
            pieces.append(gap)
            at += len(gap)
        last = cut
    begin, end = places[len(five)], places[len(five) + len(body) - 1] + 1
    return Gene(np.concatenate(pieces), tuple(exons), (begin, end), box)


def _promoter(rng: np.random.Generator, shares: np.ndarray, tata: float) -> tuple[Codes, int | None]:
    codes = background(rng, PROMOTER, composition(min(0.9, shares[C] + shares[G] + 0.08)))
    codes[-2:] = (T, C)[int(rng.integers(2))], C  # initiator: pyrimidines before the start
    if rng.random() >= tata:
        return codes, None
    at = PROMOTER + _TATA_AT
    codes[at : at + 8] = motif(rng, "TATAaaag", 0.8, shares)
    return codes, at


def _cuts(rng: np.random.Generator, mature: Codes, begin: int, end: int, wanted: int) -> list[int]:
    """Places for introns: after AG, inside the coding part, with exons of 40 letters or more between them."""
    pairs = np.flatnonzero((mature[begin + 38 : end - 42] == A) & (mature[begin + 39 : end - 41] == G))
    candidates = rng.permutation(pairs + begin + 40).tolist()
    cuts: list[int] = []
    for place in candidates:
        if len(cuts) == wanted:
            break
        if all(abs(place - other) >= 40 for other in cuts):
            cuts.append(place)
    return sorted(cuts)


def _intron(rng: np.random.Generator, dialect: Dialect, length: int) -> Codes:
    """GT…AG with a branch point 18 to 35 letters before the end and a pyrimidine tract after it."""
    shares = composition(max(0.1, dialect.gc - 0.08), 0.1)
    codes = background(rng, length, shares)
    codes[:6] = motif(rng, _DONORS[int(rng.random() < 0.4)], 0.8, shares)
    branch = length - int(rng.integers(18, 36)) - 5
    codes[branch : branch + 5] = motif(rng, "ctAac", 0.85, shares)
    tract = int(rng.integers(10, 15))
    rich = (0.08, 0.12, 0.05, 0.75) if rng.random() < 0.5 else (0.08, 0.52, 0.05, 0.35)
    codes[length - 3 - tract : length - 3] = rng.choice(4, tract, p=rich)
    codes[-3:] = (C if rng.random() < 0.65 else T, A, G)
    return codes
