"""A genome with its annotation, and the gene models in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse.core.errors import DataError

from .fasta import read_fasta
from .genbank import SUFFIXES, read_genbank
from .gff import Feature, read_gff3
from .intervals import Interval, unknown_record
from .sequence import Bytes, Record, reverse_complement

INTERGENIC, INTRON, EXON, MIXED = 0, 1, 2, 3
"""Codes of `region_map`."""


@dataclass(frozen=True, slots=True, eq=False)
class Genome:
    """Sequences in memory, one byte a base, and what is annotated on them.

    Args:
        name: name of the genome, e.g. the species.
        records: record → uint8 [L] of A C G T N.
        features: what is annotated, in file order; may be empty.

    Raises:
        ValueError: no record, a record that is no uint8 vector, or a feature off its record.
    """

    name: str
    records: Mapping[str, Bytes]
    features: tuple[Feature, ...] = ()

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("records is empty; a genome has at least one sequence")
        for name, letters in self.records.items():
            if letters.dtype != np.uint8 or letters.ndim != 1 or not len(letters):
                raise ValueError(
                    f"records[{name!r}] is {letters.dtype} {letters.shape}; it must be uint8 [L], L ≥ 1"
                )
        for feature in self.features:
            if feature.record not in self.records or feature.end > len(self.records[feature.record]):
                raise ValueError(f"features: {feature.type} {feature.interval} does not lie on a record")

    @property
    def lengths(self) -> dict[str, int]:
        """Record → length in bp."""
        return {name: len(letters) for name, letters in self.records.items()}

    def fetch(self, interval: Interval) -> Bytes:
        """Bases of an interval on its strand, uint8 [end − start]; a copy.

        Raises:
            ValueError: the interval does not lie on a record.
        """
        letters = self.records.get(interval.record)
        if letters is None or interval.end > len(letters):
            raise ValueError(f"interval is {interval}; it does not lie on a record of {self.name!r}")
        piece = letters[interval.start : interval.end]
        return reverse_complement(piece) if interval.strand == "-" else piece.copy()


def read_genome(fasta: str | Path, annotation: str | Path | None = None, name: str | None = None) -> Genome:
    """Read sequences and annotation.

    Args:
        fasta: FASTA (plain, gzip, bgzf), or GenBank (by its suffix: .gb .gbk .gbff .genbank), which brings
            its own annotation.
        annotation: GFF3 for a FASTA file. Features on the record `.` are taken for the only record of a
            genome of one record.
        name: name of the genome; the file name without suffixes when None.

    Returns:
        `Genome`.

    Raises:
        DataError: naming the file and what to do; a feature on an unknown record or past the end of its
            record, unless a region line says `Is_circular=true`: such a feature is left out.
    """
    fasta = Path(fasta)
    stem = fasta.name.removesuffix(".gz").removesuffix(".bgz")
    name = name or Path(stem).stem
    if Path(stem).suffix.lower() in SUFFIXES:
        if annotation is not None:
            raise ValueError(f"annotation is {annotation}; a GenBank file brings its own")
        pairs = read_genbank(fasta)
        records = {record.name: record.sequence for record, _ in pairs}
        return Genome(name, records, tuple(f for _, features in pairs for f in features))
    records = {record.name: record.sequence for record in read_fasta(fasta)}
    if annotation is None:
        return Genome(name, records)
    return Genome(name, records, tuple(_fitted(read_gff3(annotation), records, Path(annotation), fasta)))


def genome_records(genome: Genome) -> Iterable[Record]:
    """The sequences as `Record`, e.g. for `write_fasta`."""
    return (Record(name, letters) for name, letters in genome.records.items())


def _fitted(
    features: Iterable[Feature], records: Mapping[str, Bytes], annotation: Path, fasta: Path
) -> Iterable[Feature]:
    circular: set[str] = set()
    for feature in features:
        if feature.record == "." and len(records) == 1:
            feature = replace(feature, record=next(iter(records)))
        if feature.record not in records:
            raise DataError(
                f"{annotation}: {feature.type} on {unknown_record(feature.record, records)} ({fasta})"
            )
        if feature.attributes.get("Is_circular", ("",))[0].lower() == "true":
            circular.add(feature.record)
        if feature.end <= len(records[feature.record]):
            yield feature
        elif feature.record not in circular:
            raise DataError(
                f"{annotation}: {feature.type} {feature.interval} ends past the end of its record, "
                f"{len(records[feature.record]):,} bp in {fasta}; is it the same assembly?"
            )


def transcripts(genome: Genome, *, pseudogenes: bool = False) -> dict[str, list[Feature]]:
    """Exons of each transcript, by position.

    A transcript is what `exon` lines name as their parent; a parent that has no exon lines (GenBank, many
    prokaryotic files) is taken with its CDS lines. Lines without a parent or ID – evidence such as RNA-seq
    junctions, repeats, reads – are no part of a gene model and are not used here. Features that carry the
    attribute `exception` (trans-splicing, over the origin) are left out.

    Args:
        genome: with features.
        pseudogenes: take the exons of pseudogenes and transposons too. Their splice sites are relics, or
            drawn around frame shifts.

    Returns:
        transcript ID → its exons, sorted by start, all on one record and strand.
    """
    exons: dict[str, list[Feature]] = defaultdict(list)
    coding: dict[str, list[Feature]] = defaultdict(list)
    for feature in genome.features:
        if feature.strand == "." or "exception" in feature.attributes:
            continue
        if feature.type in ("exon", "pseudogenic_exon"):
            for parent in feature.parents or ((feature.id,) if feature.id else ()):
                exons[parent].append(feature)
        elif feature.type == "CDS":
            for parent in (feature.id,) if feature.source == "GenBank" else feature.parents:
                coding[parent].append(feature)
    proteins = {
        f.id for f in genome.features if f.type in ("protein", "polypeptide")
    }  # the same CDS once more
    for parent, lines in coding.items():
        if parent not in exons and parent not in proteins:
            exons[parent] = lines
    relics = {f.id for f in genome.features if f.id and _is_relic(f)}
    models: dict[str, list[Feature]] = {}
    for parent, lines in exons.items():
        if not pseudogenes and (parent in relics or any(_is_relic(line) for line in lines)):
            continue
        if len({(line.record, line.strand) for line in lines}) == 1:
            models[parent] = sorted(set(lines), key=lambda line: (line.start, line.end))
    return models


def _is_relic(feature: Feature) -> bool:
    words = f"{feature.type} {feature.source}".lower()
    return "pseudo" in words or "transpos" in words or "pseudo" in feature.attributes


def introns(genome: Genome, *, pseudogenes: bool = False) -> list[Interval]:
    """Gaps between neighbouring exons of a transcript (see `transcripts`), each place once, sorted.

    They are computed from the exons, not read from `intron` lines: not every file has those for its gene
    models (the TAIR10 models do not), and where files have them they are often RNA-seq junctions, most of
    which belong to no annotated gene.

    Returns:
        list of `Interval` with strand; the name is that of the first transcript with it.
    """
    found: dict[tuple[str, int, int, str], str] = {}
    for name, exons in transcripts(genome, pseudogenes=pseudogenes).items():
        for left, right in pairwise(exons):
            if right.start > left.end:
                found.setdefault((left.record, left.end, right.start, left.strand), name)
    return sorted(Interval(*place, name=name) for place, name in found.items())


def region_map(genome: Genome) -> dict[str, NDArray[np.uint8]]:
    """What each base is, by the gene models.

    Returns:
        record → uint8 [L]: `INTERGENIC` (outside everything that is part of a gene model: features with an ID
        that have children, their children, and genes), `INTRON` (in an intron of some transcript and in no
        exon), `EXON` (in an exon of some transcript and in no intron), `MIXED` (anything else: alternative
        exons, genes without exons, pseudogenes, transposons).
    """
    maps = {name: np.zeros(len(letters), np.uint8) for name, letters in genome.records.items()}
    used = {parent for feature in genome.features for parent in feature.parents}
    exon = {name: np.zeros(len(m), bool) for name, m in maps.items()}
    intron = {name: np.zeros(len(m), bool) for name, m in maps.items()}
    for feature in genome.features:
        if feature.parents or feature.id in used or "gene" in feature.type or feature.source == "GenBank":
            maps[feature.record][feature.start : feature.end] = MIXED
    for exons in transcripts(genome).values():
        for line in exons:
            exon[line.record][line.start : line.end] = True
    for gap in introns(genome):
        intron[gap.record][gap.start : gap.end] = True
    for name, codes in maps.items():
        codes[exon[name] | intron[name]] = MIXED
        codes[exon[name] & ~intron[name]] = EXON
        codes[intron[name] & ~exon[name]] = INTRON
    return maps


def genome_lengths(genomes: Sequence[Genome]) -> dict[str, int]:
    """Record → length over several genomes, under the names that `WindowDataset` understands.

    Args:
        genomes: with different names.

    Returns:
        plain record names for one genome, `genome/record` for several.

    Raises:
        ValueError: two genomes of one name.
    """
    if len({genome.name for genome in genomes}) != len(genomes):
        raise ValueError(f"genomes have the names {[g.name for g in genomes]}; each must be different")
    if len(genomes) == 1:
        return genomes[0].lengths
    return {f"{g.name}/{name}": size for g in genomes for name, size in g.lengths.items()}
