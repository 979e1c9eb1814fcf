"""What simulated genes are written with: backgrounds, codons and motifs, as codes 0 … 3 of A C G T."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from Bio.Data.CodonTable import standard_dna_table
from numpy.typing import NDArray

Codes = NDArray[np.int64]

A, C, G, T = range(4)
LETTERS = np.frombuffer(b"ACGT", np.uint8)

# Rough abundance of amino acids in proteins, per cent; only that they differ matters here.
_AMINO = dict(
    zip(
        "ALGVESIKRDTPNQFYMHCW",
        (8.3, 9.7, 7.1, 6.9, 6.7, 6.6, 5.9, 5.8, 5.5, 5.5, 5.3, 4.7, 4.1, 3.9, 3.9, 2.9, 2.4, 2.3, 1.4, 1.1),
        strict=True,
    )
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one genome writes: drawn once from its seed.

    Args:
        codons: int [61, 3] codes of the sense codons.
        usage: float [61] probabilities.
        gc: share of G and C outside genes.
    """

    codons: Codes
    usage: NDArray[np.float64]
    gc: float


def draw_dialect(rng: np.random.Generator, gc: float, codon_bias: float) -> Dialect:
    """Codon use of a genome: synonymous codons at weights exp(bias · normal), times the GC at its end."""
    table = standard_dna_table.forward_table  # type: ignore[attr-defined]
    names = sorted(table)
    codons = np.array([["ACGT".index(letter) for letter in name] for name in names])
    weights = np.exp(codon_bias * rng.standard_normal(len(names)))
    third_gc = np.isin(codons[:, 2], (C, G))
    weights *= np.where(third_gc, gc, 1 - gc)
    usage = np.zeros(len(names))
    for amino, share in _AMINO.items():
        own = np.array([table[name] == amino for name in names])
        usage[own] = share * weights[own] / weights[own].sum()
    return Dialect(codons, usage / usage.sum(), gc)


def composition(gc: float, lean: float = 0.0) -> NDArray[np.float64]:
    """Letter probabilities; `lean` > 0 takes from A for T."""
    at = (1 - gc) / 2
    return np.array([at * (1 - lean), gc / 2, gc / 2, at * (1 + lean)])


def background(rng: np.random.Generator, length: int, shares: NDArray[np.float64]) -> Codes:
    """A first-order Markov chain with few CpG, as in most genomes."""
    step = np.tile(shares, (4, 1))
    step[C, G] *= 0.3
    step[np.arange(4), np.arange(4)] *= 1.15  # letters like company
    edges = np.cumsum(step / step.sum(1, keepdims=True), 1)[:, :3].tolist()
    chance = rng.random(length).tolist()
    codes = [0] * length
    state = int(rng.choice(4, p=shares))
    for i, u in enumerate(chance):
        a, b, c = edges[state]
        state = 0 if u < a else 1 if u < b else 2 if u < c else 3
        codes[i] = state
    return np.array(codes, np.int64)


def coding(rng: np.random.Generator, dialect: Dialect, codons: int) -> Codes:
    """ATG, sense codons by their usage, a stop; length 3 · (codons + 2)."""
    body = dialect.codons[rng.choice(len(dialect.usage), codons, p=dialect.usage)].ravel()
    stop = [(T, A, A), (T, A, G), (T, G, A)][int(rng.integers(3))]
    return np.concatenate([[A, T, G], body, stop])


def motif(rng: np.random.Generator, consensus: str, keep: float, shares: NDArray[np.float64]) -> Codes:
    """Letters of a consensus, each kept with a probability; capital letters always are."""
    drawn = rng.choice(4, len(consensus), p=shares)
    kept = rng.random(len(consensus)) < keep
    for i, letter in enumerate(consensus):
        if letter.isupper() or (kept[i] and letter != "n"):
            drawn[i] = "ACGT".index(letter.upper())
    return drawn
