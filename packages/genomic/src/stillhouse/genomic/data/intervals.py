"""Places on a genome, and BED.

All coordinates in this package are zero-based and half-open, as in BED; formats that count otherwise (GFF3,
GenBank) are converted on reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stillhouse.core.errors import DataError

from ._source import text_lines

STRANDS = ("+", "-")


@dataclass(frozen=True, slots=True, order=True)
class Interval:
    """A stretch of a record.

    Args:
        record: name of the sequence record (chromosome, contig).
        start: first base, zero-based.
        end: one past the last base; greater than `start`.
        strand: `+`, or `-` where the reverse complement is meant.
        name: anything; empty where there is none.

    Raises:
        ValueError: start below 0, end not above start, or another strand.

    Example:
        >>> len(Interval("chr1", 10, 30))
        20
    """

    record: str
    start: int
    end: int
    strand: str = "+"
    name: str = ""

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it must be at least 0 (zero-based)")
        if self.end <= self.start:
            raise ValueError(f"end is {self.end}; it must be greater than start, {self.start} (half-open)")
        if self.strand not in STRANDS:
            raise ValueError(f"strand is {self.strand!r}; it must be '+' or '-'")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.record}:{self.start}-{self.end}"

    def overlaps(self, other: Interval) -> bool:
        """Whether the two share a base, on either strand."""
        return self.record == other.record and self.start < other.end and other.start < self.end

    def resized(self, size: int, limit: int) -> Interval:
        """An interval of another size about the same middle, moved inwards at the ends of the record.

        This is what common hg38 loaders do to the rows of a BED file (131,072 bp stretched to 2²⁰); rows of
        different splits overlap afterwards (see `check_disjoint`). Nothing in this package calls it on split
        rows.

        Args:
            size: new length, from 1 to `limit`.
            limit: length of the record.

        Raises:
            ValueError: a size out of range.

        Example:
            >>> print(Interval("chr1", 10, 20).resized(30, 1000))
            chr1:0-30
        """
        if not 1 <= size <= limit:
            raise ValueError(f"size is {size}; it must lie in [1, {limit}], the length of {self.record}")
        start = (self.start + self.end - size) // 2
        start = min(max(start, 0), limit - size)
        return replace(self, start=start, end=start + size)


def read_bed(path: str | Path, lengths: Mapping[str, int] | None = None) -> list[Interval]:
    """Rows of a BED file.

    Accepted by rule: three or more columns, separated by tabs (or spaces where a line holds no tab);
    comments, `track` and `browser` lines and blank lines are skipped; CRLF; gzip and bgzf; a missing
    strand, or `.`, is `+`. The fourth column becomes the name, the sixth the strand.

    Args:
        path: the file.
        lengths: record → length in bp; where given, rows on other records or past the end are refused.

    Returns:
        list of `Interval`, in file order.

    Raises:
        DataError: naming the file, the line and what to do.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".bed") as file:
        ...     _ = file.write(b"chr1\\t0\\t10\\tpeak\\t0\\t-\\r\\n"); file.flush()
        ...     read_bed(file.name, {"chr1": 10})
        [Interval(record='chr1', start=0, end=10, strand='-', name='peak')]
    """
    path = Path(path)
    rows: list[Interval] = []
    for line, text in text_lines(path):
        if not text.strip() or text.startswith(("#", "track", "browser")):
            continue
        fields = text.split("\t") if "\t" in text else text.split()
        where = f"{path}, line {line}"
        if len(fields) < 3:
            raise DataError(
                f"{where}: {len(fields)} columns; BED has at least chrom, start and end, tab-separated"
            )
        record = fields[0].strip()
        try:
            start, end = int(fields[1]), int(fields[2])
        except ValueError:
            raise DataError(
                f"{where}: start {fields[1]!r} and end {fields[2]!r} must be whole numbers; is this "
                "a BED file?"
            ) from None
        strand = fields[5].strip() if len(fields) > 5 else "+"
        name = fields[3].strip() if len(fields) > 3 else ""
        try:
            interval = Interval(record, start, end, "+" if strand in (".", "") else strand, name)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if lengths is not None:
            check_inside(interval, lengths, where)
        rows.append(interval)
    if not rows:
        raise DataError(f"{path}: holds no row; BED has one interval a line: chrom, start, end")
    return rows


def write_bed(path: str | Path, intervals: Iterable[Interval]) -> None:
    """Write intervals as BED with six columns; the file appears when it is whole."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        for item in intervals:
            row = (item.record, item.start, item.end, item.name or ".", 0, item.strand)
            file.write("\t".join(map(str, row)) + "\n")
    part.replace(path)


def check_inside(interval: Interval, lengths: Mapping[str, int], where: str) -> None:
    """Refuse an interval on an unknown record or past the end of its record.

    Args:
        interval: what to check.
        lengths: record → length in bp.
        where: what the message begins with, e.g. file and line.

    Raises:
        DataError: it does not lie inside.
    """
    if interval.record not in lengths:
        raise DataError(f"{where}: {unknown_record(interval.record, lengths)}")
    if interval.end > lengths[interval.record]:
        raise DataError(
            f"{where}: {interval} ends past the end of its record, {lengths[interval.record]:,} bp; "
            "is it the same assembly?"
        )


def unknown_record(name: str, known: Iterable[str]) -> str:
    """Words for a record name that a genome does not have."""
    names = list(known)
    shown = ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    other = name.removeprefix("chr") if name.startswith("chr") else f"chr{name}"
    hint = f"; names differ by the prefix 'chr': rename, as {other!r} is there" if other in names else ""
    return f"no record {name!r}; the sequences have {shown}{hint}"
