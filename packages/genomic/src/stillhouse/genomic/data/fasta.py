"""FASTA, read as a stream: one record in memory at a time, at the speed of the disk.

Accepted by rule: any line length, CRLF, blank lines, white space inside sequence lines, a byte order mark,
lower case, U, IUPAC letters; plain, gzip and bgzf. Refused in one line: text before the first `>`, a record
without a name or without letters, a name that comes twice, anything that is no nucleotide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from stillhouse.core.errors import DataError

from ._source import open_binary
from .sequence import ALLOWED, LETTER_TABLE, WHITE, Record, no_nucleotide

_BLOCK = 1 << 20
_LONGEST_HEADER = 1 << 16


def read_fasta(path: str | Path) -> Iterator[Record]:
    """Records of a FASTA file, in its order.

    Args:
        path: plain, gzip or bgzf (told by the content, not the name).

    Yields:
        `Record`: sequence uint8 [L] of the letters A C G T N. Memory: the record at hand and 2 MB.

    Raises:
        DataError: naming the file, the line and what to do; raised when the place is reached.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".fa") as file:
        ...     _ = file.write(b">one first of two\\nacgt\\nNR\\n>two\\nGG\\n"); file.flush()
        ...     [(r.name, r.description, r.sequence.tobytes()) for r in read_fasta(file.name)]
        [('one', 'first of two', b'ACGTNN'), ('two', '', b'GG')]
    """
    path = Path(path)
    name: str | None = None
    description, begun = "", 0
    letters = bytearray()
    seen: dict[str, int] = {}
    for kind, content, line in _pieces(path):
        if kind == "letters":
            if name is None:
                if content.strip(WHITE):
                    raise DataError(_no_header(path, content, line))
                continue
            clean = content.translate(LETTER_TABLE, WHITE)
            if 0 in clean:
                raise DataError(_bad_letter(path, content, line, name))
            letters += clean
            continue
        if name is not None:
            yield _finish(path, name, description, letters, begun)
        name, description = parse_header(path, content, line)
        if name in seen:
            raise DataError(
                f"{path}, line {line}: the name {name!r} was used in line {seen[name]}; "
                "rename one of the records"
            )
        seen[name], begun, letters = line, line, bytearray()
    if name is None:
        raise DataError(f"{path}: holds no record; a FASTA record begins with a line '>name'")
    yield _finish(path, name, description, letters, begun)


def write_fasta(path: str | Path, records: Iterable[Record], *, width: int = 60) -> None:
    """Write records as plain FASTA; the file appears when it is whole.

    Args:
        path: file to write; an existing one is replaced.
        records: what to write.
        width: letters of a line.

    Raises:
        ValueError: width below 1.
    """
    if width < 1:
        raise ValueError(f"width is {width}; it must be at least 1")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        for record in records:
            header = f">{record.name} {record.description}".rstrip()
            file.write(header.encode() + b"\n")
            data = record.sequence.tobytes()
            for start in range(0, len(data), width):
                file.write(data[start : start + width] + b"\n")
    part.replace(path)


def parse_header(path: Path, content: bytes, line: int) -> tuple[str, str]:
    """Name and description of a header line without its `>`.

    Raises:
        DataError: no name, or not text.
    """
    content = content.rstrip(WHITE)
    if b"\r" in content:
        raise DataError(f"{path}, line {line}: lines end with CR alone; convert them to LF")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if "\0" in text:
        raise DataError(f"{path}, line {line}: holds a zero byte; this is no text file")
    name, _, description = text.replace("\t", " ").partition(" ")
    if not name:
        raise DataError(f"{path}, line {line}: the record has no name after '>'; give it one")
    return name, description.strip()


def _pieces(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """The file as ("header", text without `>`, line) and ("letters", some bytes, line of the first)."""
    with open_binary(path) as file:
        header: bytes | None = None  # a header line whose end was not read yet
        fresh = True  # the next byte begins a line
        line = 1
        first = True
        while block := file.read(_BLOCK):
            if first:
                block = block.removeprefix(b"\xef\xbb\xbf")
                first = False
            at = 0
            while at < len(block):
                if header is not None:
                    end = block.find(b"\n", at)
                    header += block[at : end if end >= 0 else len(block)]
                    if len(header) > _LONGEST_HEADER:
                        raise DataError(
                            f"{path}, line {line}: a header of more than {_LONGEST_HEADER:,} bytes; "
                            "is this a FASTA file with line ends?"
                        )
                    if end < 0:
                        break
                    yield "header", header, line
                    header, fresh, line, at = None, True, line + 1, end + 1
                    continue
                if fresh and block[at] == ord(">"):
                    header, fresh, at = b"", False, at + 1
                    continue
                end = block.find(b"\n>", at)
                stop = end + 1 if end >= 0 else len(block)
                piece = block[at:stop]
                yield "letters", piece, line
                line += piece.count(b"\n")
                fresh = piece.endswith(b"\n")
                at = stop
        if header is not None:
            yield "header", header, line


def _finish(path: Path, name: str, description: str, letters: bytearray, line: int) -> Record:
    if not letters:
        raise DataError(f"{path}, line {line}: the record {name!r} has no sequence; remove it or add one")
    return Record(name, np.frombuffer(letters, np.uint8), description)


def _no_header(path: Path, content: bytes, line: int) -> str:
    line += content[: len(content) - len(content.lstrip(WHITE))].count(b"\n")
    start = content.lstrip(WHITE)[:20]
    if any(byte < 32 or byte > 126 for byte in start.translate(None, WHITE)):
        return f"{path}, line {line}: holds bytes that are no text; this is no FASTA file"
    return (
        f"{path}, line {line}: the file begins with {start.split()[0].decode()!r}, not with '>'; a FASTA "
        "record begins with a line '>name'"
    )


def _bad_letter(path: Path, content: bytes, line: int, name: str) -> str:
    kept = content.translate(LETTER_TABLE)  # white space is 0 here as well
    at = next(i for i, byte in enumerate(kept) if byte == 0 and content[i] not in WHITE)
    line += content.count(b"\n", 0, at)
    return f"{path}, line {line}, record {name!r}: {no_nucleotide(content[at])}; {ALLOWED}"
