"""GFF3: annotated features, one line at a time.

GFF3 counts from one and includes the end; here everything is zero-based and half-open, so that a line
`chr1 . exon 11 20` becomes start 10, end 20.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from stillhouse.core.errors import DataError

from ._source import text_lines
from .intervals import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """An annotated stretch of a record.

    Args:
        record: name of the sequence record.
        source: who says so (column 2), e.g. `WormBase`, `RNASeq_splice`; empty where unknown.
        type: what it is, e.g. `gene`, `mRNA`, `exon`, `CDS`, `intron`.
        start: first base, zero-based.
        end: one past the last base.
        strand: `+`, `-`, or `.` where it has none.
        phase: of a CDS: bases to skip to the first whole codon (0, 1, 2); None elsewhere.
        score: column 6; None where there is none.
        id: its ID, which lines of one discontinuous feature share; empty where it has none.
        parents: IDs of its parents.
        attributes: the other attributes, name → values.

    Raises:
        ValueError: start below 0, end not above start, or another strand or phase.
    """

    record: str
    type: str
    start: int
    end: int
    strand: str = "."
    source: str = ""
    phase: int | None = None
    score: float | None = None
    id: str = ""
    parents: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.start < 0 or self.end <= self.start:
            raise ValueError(f"start is {self.start} and end {self.end}; 0 ≤ start < end")
        if self.strand not in ("+", "-", "."):
            raise ValueError(f"strand is {self.strand!r}; it must be '+', '-' or '.'")
        if self.phase not in (None, 0, 1, 2):
            raise ValueError(f"phase is {self.phase}; it must be 0, 1, 2 or None")

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def interval(self) -> Interval:
        """The stretch alone; a feature without a strand lies on `+`."""
        strand = "+" if self.strand == "." else self.strand
        return Interval(self.record, self.start, self.end, strand, self.id)


def read_gff3(path: str | Path) -> Iterator[Feature]:
    """Features of a GFF3 file, in its order.

    Accepted by rule: comments, directives and blank lines are skipped; reading stops at `##FASTA`; CRLF; gzip
    and bgzf; percent escapes are decoded; a strand of `?` is `.`; several parents; a trailing `;`.

    Args:
        path: the file.

    Yields:
        `Feature`, zero-based and half-open.

    Raises:
        DataError: naming the file, the line and what to do; GTF is told apart and refused.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".gff3") as file:
        ...     _ = file.write(b"chr1\\tx\\texon\\t11\\t20\\t.\\t-\\t.\\tParent=t1,t2\\n"); file.flush()
        ...     next(read_gff3(file.name)).interval, next(read_gff3(file.name)).parents
        (Interval(record='chr1', start=10, end=20, strand='-', name=''), ('t1', 't2'))
    """
    path = Path(path)
    found = False
    for line, text in text_lines(path):
        if text.startswith("##FASTA"):
            break
        if text.startswith(">") and not found:
            raise DataError(f"{path}, line {line}: this is FASTA, not GFF3")
        if not text.strip() or text.startswith("#"):
            continue
        found = True
        yield _feature(text, f"{path}, line {line}")
    if not found:
        raise DataError(f"{path}: holds no feature; GFF3 has nine tab-separated columns a line")


def write_gff3(path: str | Path, features: Iterable[Feature]) -> None:
    """Write features as GFF3; the file appears when it is whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        file.write("##gff-version 3\n")
        for f in features:
            named = {"ID": (f.id,) if f.id else (), "Parent": f.parents, **f.attributes}
            pairs = (f"{k}={','.join(quote(v, safe=_SAFE) for v in vs)}" for k, vs in named.items() if vs)
            phase = "." if f.phase is None else f.phase
            score = "." if f.score is None else f"{f.score:g}"
            row = (quote(f.record, safe=_SAFE), f.source or ".", f.type, f.start + 1, f.end)
            file.write("\t".join(map(str, (*row, score, f.strand, phase, ";".join(pairs) or "."))) + "\n")
    part.replace(path)


_SAFE = " ()[]{}|/:.+-_*^$!?@#'<>\"~`\\"


def _feature(text: str, where: str) -> Feature:
    columns = text.split("\t")
    if len(columns) != 9:
        raise DataError(f"{where}: {len(columns)} columns; GFF3 has nine, separated by tabs")
    record, source, kind, start, end, score, strand, phase, rest = (c.strip() for c in columns)
    attributes = _attributes(rest, where)
    identity = attributes.pop("ID", ("",))[0]
    parents = attributes.pop("Parent", ())
    try:
        return Feature(
            record=unquote(record),
            source="" if source == "." else unquote(source),
            type=kind,
            start=int(start) - 1,
            end=int(end),
            strand="." if strand == "?" else strand,
            phase=None if phase == "." else int(phase),
            score=None if score == "." else float(score),
            id=identity,
            parents=parents,
            attributes=attributes,
        )
    except ValueError as error:
        raise DataError(
            f"{where}: start {start!r}, end {end!r}, score {score!r}, strand {strand!r}, phase {phase!r}: "
            f"{error}; GFF3 counts from 1 and includes the end"
        ) from None


def _attributes(text: str, where: str) -> dict[str, tuple[str, ...]]:
    attributes: dict[str, tuple[str, ...]] = {}
    if text in (".", ""):
        return attributes
    for pair in text.split(";"):
        if not pair.strip():
            continue
        name, equals, values = pair.partition("=")
        if not equals:
            kind = (
                "this is GTF; convert it (gffread in.gtf -o out.gff3)"
                if '"' in pair
                else "name=value is meant"
            )
            raise DataError(f"{where}: the attribute {pair.strip()[:40]!r} has no '='; {kind}")
        found = tuple(unquote(value.strip()) for value in values.split(",") if value.strip())
        attributes[unquote(name.strip())] = found
    return {name: values for name, values in attributes.items() if values}
