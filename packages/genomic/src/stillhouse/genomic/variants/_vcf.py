"""Read the five columns of a VCF that say what a variant is; a line at a time, plain or gz."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.core.errors import DataError

_BASES = re.compile(r"[ACGTN]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of a VCF.

    Attributes:
        record: CHROM.
        position: of REF's first base, 0-based (POS − 1).
        identifier: ID, "." where there is none.
        ref: reference bases, upper case.
        alts: the alternatives as written, bases in upper case; symbolic ones too.
        line: line number in the file, from 1.
    """

    record: str
    position: int
    identifier: str
    ref: str
    alts: tuple[str, ...]
    line: int


def is_bases(allele: str) -> bool:
    """Whether an allele is written in A, C, G, T, N: not `<DEL>`, `*`, `.` or a breakend."""
    return _BASES.fullmatch(allele) is not None


def read_vcf(path: str | os.PathLike[str]) -> Iterator[Variant]:
    """Read a VCF.

    Args:
        path: the file; gz and bgzf are told by their first bytes.

    Raises:
        DataError: the file is missing, truncated, no VCF, or a line cannot be read; the message has the line.
    """
    source = Path(path)
    if not source.is_file():
        raise DataError(f"{source}: no such file")
    with source.open("rb") as probe:
        packed = probe.read(2) == b"\x1f\x8b"
    seen_header = False
    try:
        with (gzip.open if packed else open)(source, "rt", encoding="utf-8", newline=None) as file:
            for number, line in enumerate(file, start=1):
                text = line.rstrip("\r\n")
                if text.startswith("##") or not text.strip():
                    continue
                if text.startswith("#CHROM"):
                    seen_header = True
                    continue
                if not seen_header:
                    raise DataError(f"{source}: line {number} comes before #CHROM; is this a VCF?")
                yield _variant(source, number, text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source}: is damaged or cut off ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: is not text; give a VCF, plain or gz (not BCF)") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error
    if not seen_header:
        raise DataError(f"{source}: has no line #CHROM; is this a VCF?")


def _variant(source: Path, number: int, text: str) -> Variant:
    fields = text.split("\t")
    if len(fields) < 5:
        raise DataError(
            f"{source}: line {number} has {len(fields)} columns; a VCF has at least 5, tab between"
        )
    chrom, pos, identifier, ref, alt = fields[:5]
    if not pos.isascii() or not pos.isdigit():
        raise DataError(f"{source}: line {number} has POS {pos[:20]!r}; it must be a whole number")
    if int(pos) < 1:
        raise DataError(f"{source}: line {number} has POS {pos}, before the first base; leave telomeres out")
    if not is_bases(ref):
        raise DataError(f"{source}: line {number} has REF {ref[:20]!r}; it must be bases")
    alts = tuple(one.upper() if is_bases(one) else one for one in alt.split(","))
    return Variant(chrom, int(pos) - 1, identifier, ref.upper(), alts, number)
