"""The `.fai` index of a FASTA file: built in one pass, read, written, and held against the file.

An index line holds name, length in bases, offset of the first base in bytes, bases of a line and bytes of a
line (samtools faidx). Each record must have lines of one length; only its last line may be shorter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from stillhouse.core.errors import DataError

from .fasta import parse_header

_BLOCK = 1 << 20
_BLANKS = np.frombuffer(b" \t", np.uint8)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of a `.fai` index.

    Args:
        name: record name.
        length: bases.
        offset: byte of the first base, in the uncompressed file.
        bases: bases of a full line.
        width: bytes of a full line with its line end.
    """

    name: str
    length: int
    offset: int
    bases: int
    width: int

    def byte(self, base: int) -> int:
        """Offset in the file of a base (zero-based)."""
        return self.offset + base // self.bases * self.width + base % self.bases

    @property
    def end(self) -> int:
        """One past the byte of the last base."""
        return self.byte(self.length - 1) + 1


def build_index(path: Path, file: BinaryIO) -> dict[str, IndexEntry]:
    """Index an open (decompressed) FASTA file in one pass; memory does not grow with its size.

    Raises:
        DataError: lines of unequal length within a record, no record, a name twice, an empty record.
    """
    entries: dict[str, IndexEntry] = {}
    record: _Layout | None = None
    for lines in _blocks(file):
        heads = np.flatnonzero(lines.first == ord(">")).tolist()
        for number, head in enumerate([-1, *heads]):
            if head >= 0:
                if record is not None:
                    entries[record.name] = record.entry(path)
                at = lines.number + head
                name, _ = parse_header(path, lines.header(head), at)
                if name in entries:
                    raise DataError(
                        f"{path}, line {at}: the name {name!r} comes twice; rename one of the records"
                    )
                record = _Layout(name, at, lines.offset(head) + int(lines.sizes[head]))
            stop = heads[number] if number < len(heads) else len(lines.sizes)
            if stop > head + 1:
                if record is None:
                    if (lines.sizes[head + 1 : stop] - lines.ends[head + 1 : stop]).any():
                        raise DataError(
                            f"{path}: does not begin with '>'; a FASTA record begins with a line '>name'"
                        )
                    continue
                record.add(path, lines, head + 1, stop)
    if record is None:
        raise DataError(f"{path}: holds no record; a FASTA record begins with a line '>name'")
    entries[record.name] = record.entry(path)
    return entries


def read_index(path: Path) -> dict[str, IndexEntry]:
    """Read a `.fai` file.

    Raises:
        DataError: not five columns of the right kind, or numbers that cannot be.
    """
    entries: dict[str, IndexEntry] = {}
    remedy = "delete it, it is rebuilt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the index cannot be read ({error}); {remedy}") from None
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        try:
            entry = IndexEntry(fields[0], *(int(f) for f in fields[1:5]))
            if len(fields) < 5 or not (
                entry.length > 0 and entry.offset > 0 and 0 < entry.bases <= entry.width <= entry.bases + 2
            ):
                raise ValueError
        except (ValueError, TypeError):
            raise DataError(f"{path}, line {number}: no line of a FASTA index; {remedy}") from None
        if entry.name in entries:
            raise DataError(f"{path}, line {number}: the name {entry.name!r} comes twice; {remedy}")
        entries[entry.name] = entry
    if not entries:
        raise DataError(f"{path}: the index is empty; {remedy}")
    return entries


def write_index(path: Path, entries: dict[str, IndexEntry]) -> None:
    """Write a `.fai` file; it appears when it is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    rows = (f"{e.name}\t{e.length}\t{e.offset}\t{e.bases}\t{e.width}\n" for e in entries.values())
    part.write_text("".join(rows), encoding="utf-8", newline="\n")
    part.replace(path)


def check_index(
    path: Path,
    index: Path,
    entries: dict[str, IndexEntry],
    size: int | None,
    read: Callable[[int, int], bytes],
) -> None:
    """Hold an index against its file: every record must be announced by its header right where it says.

    Args:
        path: the FASTA file.
        index: the index file, for messages.
        entries: what it says.
        size: bytes of the (uncompressed) FASTA file; None skips the test of the end.
        read: (start, stop) → those bytes of the uncompressed file.

    Raises:
        DataError: the index belongs to another version of the file.
    """
    stale = f"{index}: does not fit {path}; the file was changed since: delete the index, it is rebuilt"
    before = 0
    for entry in sorted(entries.values(), key=lambda e: e.offset):
        if entry.offset <= before or (size is not None and entry.end > size):
            raise DataError(f"{stale} (record {entry.name!r})")
        header = read(before, entry.offset).strip()
        words = header[1:].split()
        if header[:1] != b">" or b"\n" in header or not words or words[0] != entry.name.encode():
            raise DataError(f"{stale} (record {entry.name!r})")
        before = entry.end
    if size is not None and read(before, min(size, before + _BLOCK)).strip():
        raise DataError(f"{stale} (text after the last record)")


@dataclass(slots=True)
class _Lines:
    """The lines that end in one block of a file."""

    number: int  # of the first line, from one
    start: int  # file offset of the first line
    sizes: NDArray[np.int64]  # bytes, [lines], with the line end
    ends: NDArray[np.int64]  # [lines], bytes of the line end: 0 (end of file), 1 or 2
    first: NDArray[np.uint8]  # [lines], first byte
    last: NDArray[np.uint8]  # [lines], last byte before the line end
    block: bytes
    base: int  # file offset of the block
    head: bytes  # of a header that began before the block

    def offset(self, line: int) -> int:
        return self.start + int(self.sizes[:line].sum())

    def header(self, line: int) -> bytes:
        start = self.offset(line) - self.base
        text = self.block[max(start, 0) : start + int(self.sizes[line])]
        return ((self.head if start < 0 else b"") + text).rstrip(b"\r\n")[1:]


class _Layout:
    """How the lines of the record at hand lie."""

    def __init__(self, name: str, line: int, offset: int) -> None:
        self.name, self.line, self.offset = name, line, offset
        self.length = self.bases = self.width = 0
        self.short = 0  # number of the line that was shorter than the first; none may follow

    def add(self, path: Path, lines: _Lines, begin: int, stop: int) -> None:
        ends = lines.ends[begin:stop]
        bases = lines.sizes[begin:stop] - ends
        white = np.isin(lines.last[begin:stop], _BLANKS) | np.isin(lines.first[begin:stop], _BLANKS)
        if (white & (bases > 0)).any():
            at = lines.number + begin + int(np.flatnonzero(white & (bases > 0))[0])
            raise DataError(
                f"{path}, line {at}: white space at the beginning or the end of a sequence line, so that no "
                "index can point into it; remove it, or read the file as a stream"
            )
        if self.length == 0 and not self.short and bases[0]:
            self.bases, self.width = int(bases[0]), int(bases[0]) + max(1, int(ends[0]))
        odd = np.flatnonzero((bases != self.bases) | (bases + ends != self.width))
        if odd.size or self.short:
            first = 0 if self.short else int(odd[0])  # a last line, and after it nothing but blank ones
            self.short = self.short or lines.number + begin + first
            rest = bases[first if lines.number + begin + first != self.short else first + 1 :]
            if rest.any() or bases[first] > self.bases:
                raise DataError(
                    f"{path}, line {self.short}: record {self.name!r} has lines of unequal length, so that "
                    "no index can point into it; rewrite it with equal lines (seqtk seq -l 60), or "
                    "read it as a stream"
                )
        self.length += int(bases.sum())

    def entry(self, path: Path) -> IndexEntry:
        if not self.length:
            raise DataError(
                f"{path}, line {self.line}: the record {self.name!r} has no sequence; remove it or add one"
            )
        return IndexEntry(self.name, self.length, self.offset, self.bases, self.width)


def _blocks(file: BinaryIO) -> Iterator[_Lines]:
    """The file by blocks, each with the lines that end in it; an unended last line comes alone."""
    number, start, base = 1, 0, 0
    first, tail, head = 0, b"\n\n", b""
    while block := file.read(_BLOCK):
        view = np.frombuffer(tail + block, np.uint8)  # two bytes before the block, for line ends at its start
        stops = np.flatnonzero(view[2:] == 10)
        if start == base:
            first = block[0]
        if stops.size:
            begins = np.concatenate([[start - base], stops[:-1] + 1])
            firsts = view[2 + begins.clip(0)]
            if start < base:
                firsts[0] = first
            returns = (view[stops + 1] == 13).astype(np.int64)
            size = stops + 1 - begins
            ends = np.minimum(1 + returns, size)
            yield _Lines(number, start, size, ends, firsts, view[stops + 1 - returns], block, base, head)
            number += len(stops)
            start, head = base + int(stops[-1]) + 1, b""
            rest = block[int(stops[-1]) + 1 :]
            first = rest[0] if rest else 0
        else:
            rest = block
        if first == ord(">") and rest:
            head = (head + rest)[: 1 << 16]
        base += len(block)
        tail = (tail + block)[-2:]
    if start < base:
        size = np.array([base - start])
        letters = np.array([first], np.uint8), np.array([tail[-1]], np.uint8)
        yield _Lines(number, start, size, np.array([0]), *letters, b"", base, head)
