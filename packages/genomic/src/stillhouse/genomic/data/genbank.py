"""GenBank, through Biopython: sequences and features in the same form as from FASTA and GFF3."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from Bio import SeqIO
from Bio.Seq import UndefinedSequenceError

from stillhouse.core.errors import DataError

from ._source import open_binary
from .gff import Feature
from .sequence import Record, normalise

SUFFIXES = (".gb", ".gbk", ".gbff", ".genbank")
_KEPT = ("gene", "locus_tag", "product", "protein_id", "transcript_id", "note", "pseudo", "codon_start")


def read_genbank(path: str | Path) -> list[tuple[Record, list[Feature]]]:
    """Records of a GenBank file with their features.

    Coordinates are Biopython's: zero-based, half-open. A joined feature becomes one `Feature` for each part,
    in the order of the strand, all with one ID, as a discontinuous feature of GFF3; the parent of anything
    but a gene is the gene with the same locus_tag or gene name. Joins over the origin of a circular record,
    and joins out of order or over both strands, carry the attribute `exception` (`crosses_origin`,
    `trans_splicing`), and are not taken for spliced genes. Parts on other records are left out. Fuzzy ends
    (`<1`) are taken at their number.

    Args:
        path: plain, gzip or bgzf.

    Returns:
        list of (record, features), in file order. The record name is the accession with its version.

    Raises:
        DataError: naming the file and what to do: no GenBank, no sequence, a name twice, a wrong letter.
    """
    path = Path(path)
    with open_binary(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # Biopython warns of odd LOCUS lines, which are read all the same
                parsed = list(SeqIO.parse(text, "genbank"))
        except (ValueError, AssertionError, IndexError, KeyError, StopIteration) as error:
            raise DataError(f"{path}: is no readable GenBank file ({error})") from None
        finally:
            text.detach()
    if not parsed:
        raise DataError(f"{path}: holds no GenBank record; one begins with LOCUS")
    found: list[tuple[Record, list[Feature]]] = []
    names: set[str] = set()
    for entry in parsed:
        name = entry.id if entry.id and not entry.id.startswith("<unknown") else entry.name
        if name in names:
            raise DataError(f"{path}: the record {name!r} comes twice; rename one of them")
        names.add(name)
        try:
            letters = normalise(bytes(entry.seq))
        except UndefinedSequenceError:
            raise DataError(
                f"{path}: record {name!r} has no sequence (no ORIGIN); get the full record"
            ) from None
        except ValueError as error:
            raise DataError(f"{path}, record {name!r}: {error}") from None
        if not len(letters):
            raise DataError(f"{path}: record {name!r} has no sequence (no ORIGIN); get the full record")
        record = Record(name, letters, entry.description)
        found.append((record, _features(name, entry.features, len(letters))))
    return found


def _features(record: str, entries: list[Any], length: int) -> list[Feature]:
    genes: dict[str, str] = {}
    features: list[Feature] = []
    for number, entry in enumerate(entries):
        if entry.type == "source" or entry.location is None:
            continue
        qualifiers: Mapping[str, list[str]] = entry.qualifiers
        label = next((qualifiers[k][0] for k in ("locus_tag", "gene") if qualifiers.get(k)), "")
        identity = f"{entry.type}:{label or 'feature'}:{number}"
        if entry.type == "gene" and label:
            genes[label] = identity
        attributes = {k: tuple(map(str, qualifiers[k])) for k in _KEPT if k in qualifiers}
        parts = [part for part in entry.location.parts if part.ref is None]
        if parts and (exception := _exception(parts, qualifiers, length)):
            attributes["exception"] = (exception,)
        parent = genes.get(label, "")
        phase = int(qualifiers.get("codon_start", ["1"])[0]) - 1 if entry.type == "CDS" else None
        for part in parts:
            start, end = int(part.start), int(part.end)
            if not 0 <= start < end <= length:
                continue  # e.g. a site between two bases
            features.append(
                Feature(
                    record=record,
                    source="GenBank",
                    type=entry.type,
                    start=start,
                    end=end,
                    strand={1: "+", -1: "-"}.get(part.strand, "."),
                    phase=phase,
                    id=identity,
                    parents=(parent,) if parent and entry.type != "gene" else (),
                    attributes=attributes,
                )
            )
            if phase is not None:
                phase = (phase - (end - start)) % 3
    return features


def _exception(parts: list[Any], qualifiers: Mapping[str, list[str]], length: int) -> str:
    starts = [int(part.start) for part in parts]
    one_strand = len({part.strand for part in parts}) == 1
    ordered = one_strand and starts == sorted(starts, reverse=parts[0].strand == -1)
    if ordered and "trans_splicing" not in qualifiers:
        return ""
    if one_strand and 0 in starts and length in (int(part.end) for part in parts):
        return "crosses_origin"
    return "trans_splicing"
