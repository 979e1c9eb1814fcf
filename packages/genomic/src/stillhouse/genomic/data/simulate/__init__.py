"""Simulated genomes: genes with codon use, introns with splice motifs, promoters, and what lies between.

The demo and the tests work on them. They are no model of any species, and a score on them says nothing about
real genomes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..genome import Genome
from ..gff import Feature
from ..sequence import Bytes, N, reverse_complement
from ._gene import PROMOTER, Gene, draw_gene
from ._letters import LETTERS, Dialect, background, composition, draw_dialect

_SOURCE = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateConfig:
    """What to simulate.

    Args:
        name: name of the genome.
        records: sequence records, at least 1.
        record_length: length of each in bp, at least 5,000.
        spacing: mean distance of genes in bp, at least 100.
        codons: mean sense codons of a gene, at least 30.
        introns: mean introns of a gene.
        intron_length: mean length of an intron in bp, at least 60.
        gc: share of G and C outside genes, 0.2 … 0.8.
        codon_bias: how unlike synonymous codons are used; 0 is even.
        tata: share of promoters with a TATA box, 0 … 1.
        unknown: share of letters that are N, in runs between genes, 0 … 0.2.
        seed: the same seed gives the same bytes. Records are drawn one by one: more records leave the first
            as they are.

    Raises:
        ValueError: an argument out of range.
    """

    name: str = "simulated"
    records: int = 6
    record_length: int = 60_000
    spacing: int = 1_200
    codons: int = 150
    introns: float = 3.0
    intron_length: int = 150
    gc: float = 0.42
    codon_bias: float = 1.0
    tata: float = 0.5
    unknown: float = 0.002
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"records": 1, "record_length": 5_000, "spacing": 100, "codons": 30, "intron_length": 60}
        for name, least in {**lowest, "introns": 0, "codon_bias": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least {least}")
        for name, low, high in (("gc", 0.2, 0.8), ("tata", 0, 1), ("unknown", 0, 0.2)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: {getattr(self, name)} must lie in [{low}, {high}]")


def simulate_genome(config: SimulateConfig | None = None) -> Genome:
    """Draw a genome with its annotation, in the form that `read_genome` gives for FASTA and GFF3.

    Features: gene, mRNA, exon and CDS (with phase) of each gene, linked by ID and Parent; promoter (the 120
    letters before the start of transcription) and TATA_box, which stand alone. Genes do not overlap.

    Args:
        config: what to draw; the defaults when None.

    Returns:
        `Genome` with the records `sim1`, `sim2`, ….

    Example:
        >>> genome = simulate_genome(SimulateConfig(records=1, record_length=8_000))
        >>> genome.lengths, {f.type for f in genome.features} >= {"gene", "mRNA", "exon", "CDS"}
        ({'sim1': 8000}, True)
    """
    config = config or SimulateConfig()
    dialect = draw_dialect(np.random.default_rng([config.seed, 0]), config.gc, config.codon_bias)
    records: dict[str, Bytes] = {}
    features: list[Feature] = []
    for number in range(1, config.records + 1):
        name = f"sim{number}"
        rng = np.random.default_rng([config.seed, number])
        records[name], found = _record(rng, config, dialect, name)
        features += found
    return Genome(config.name, records, tuple(features))


def _record(
    rng: np.random.Generator, config: SimulateConfig, dialect: Dialect, name: str
) -> tuple[Bytes, list[Feature]]:
    letters = LETTERS[background(rng, config.record_length, composition(config.gc - 0.03))]
    features: list[Feature] = []
    free: list[tuple[int, int]] = []
    at = 0
    while True:
        start = at + 50 + int(rng.exponential(config.spacing - 50))
        gene = draw_gene(
            rng,
            dialect,
            codons=config.codons,
            introns=config.introns,
            intron_length=config.intron_length,
            tata=config.tata,
        )
        end = start + len(gene.codes)
        free.append((at, min(start, config.record_length)))
        if end > config.record_length:
            break
        plus = bool(rng.random() < 0.5)
        written = LETTERS[gene.codes]
        letters[start:end] = written if plus else reverse_complement(written)
        features += _annotate(gene, name, f"{name}.g{len(free)}", start, plus)
        at = end
    _hide(rng, letters, free, int(config.unknown * config.record_length))
    return letters, features


def _annotate(gene: Gene, record: str, name: str, start: int, plus: bool) -> list[Feature]:
    """Features of a gene at its place, in coordinates of the record."""
    length = len(gene.codes)

    def feature(
        kind: str, a: int, b: int, identity: str = "", parent: str = "", phase: int | None = None
    ) -> Feature:
        return Feature(
            record=record,
            source=_SOURCE,
            type=kind,
            start=start + (a if plus else length - b),
            end=start + (b if plus else length - a),
            strand="+" if plus else "-",
            phase=phase,
            id=identity,
            parents=(parent,) if parent else (),
        )

    transcript = f"{name}.t1"
    found = [
        feature("gene", PROMOTER, length, name),
        feature("mRNA", PROMOTER, length, transcript, name),
        *(feature("exon", a, b, "", transcript) for a, b in gene.exons),
    ]
    phase = 0
    for a, b in gene.exons:
        a, b = max(a, gene.coding[0]), min(b, gene.coding[1])
        if a < b:
            found.append(feature("CDS", a, b, f"{name}.cds", transcript, phase))
            phase = (phase - (b - a)) % 3
    found.append(feature("promoter", 0, PROMOTER))
    if gene.tata is not None:
        found.append(feature("TATA_box", gene.tata, gene.tata + 8))
    return found


def _hide(rng: np.random.Generator, letters: Bytes, free: list[tuple[int, int]], wanted: int) -> None:
    """Write runs of N between genes until enough letters are unknown, or no place is left."""
    places = [(a, b) for a, b in free if b - a >= 20]
    for i in rng.permutation(len(places)):
        if wanted <= 0:
            return
        a, b = places[i]
        size = min(wanted, int(rng.integers(1, b - a + 1)), 500)
        at = a + int(rng.integers(b - a - size + 1))
        letters[at : at + size] = N
        wanted -= size
