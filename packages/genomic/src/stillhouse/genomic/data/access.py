"""Random access to FASTA through samtools' `.fai`: plain files at any byte, bgzf files block by block."""

from __future__ import annotations

import io
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from Bio import bgzf

from stillhouse.core.errors import DataError

from ._index import IndexEntry, build_index, check_index, read_index, write_index
from ._source import check_bgzf_end, compression, open_binary
from .intervals import Interval, unknown_record
from .sequence import ALLOWED, LETTER_TABLE, Bytes, no_nucleotide, reverse_complement

_LINE_ENDS = b"\r\n"
_BLOCKS_KEPT = 128  # decompressed bgzf blocks kept at hand, 64 KB each


class Fasta:
    """A FASTA file whose pieces are read where they lie; the file itself is never loaded.

    The index is `<file>.fai` where that
    exists (it must fit the file, else a DataError), and is otherwise built in memory in one pass.

    Args:
        path: plain or bgzf FASTA with lines of one length within each record. A gzip file that is no bgzf
            cannot be entered in the middle: read it with `read_fasta` or `read_genome`, or repack it.
        save_index: write `<file>.fai` where there is none.

    Attributes:
        path: the file.
        names: record names, in file order.
        lengths: record → bases.

    Raises:
        DataError: a file that cannot be read or indexed, or an index of another version of the file.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".fa") as file:
        ...     _ = file.write(b">one\\nACGTA\\nCCgtN\\n>two\\nGG\\n"); file.flush()
        ...     fasta = Fasta(file.name)
        ...     fasta.names, fasta.fetch("one", 3, 8).tobytes(), fasta.fetch("one", 3, 8, "-").tobytes()
        (('one', 'two'), b'TACCG', b'CGGTA')
    """

    def __init__(self, path: str | Path, *, save_index: bool = False) -> None:
        self.path = Path(path)
        kind = compression(self.path)
        if kind == "gzip":
            raise DataError(
                f"{self.path}: gzip cannot be entered in the middle; repack it with bgzip "
                f"(zcat {self.path.name} | bgzip > {self.path.stem}.bgz) or unpack it, or read it as a stream"
            )
        self._bytes: _Reader = _Plain(self.path) if kind == "plain" else _Blocks(self.path)
        index = self.path.with_name(self.path.name + ".fai")
        if index.exists():
            self._entries = read_index(index)
            check_index(self.path, index, self._entries, self._bytes.size, self._bytes.read)
        else:
            with open_binary(self.path) as file:
                self._entries = build_index(self.path, file)
            if save_index:
                write_index(index, self._entries)
        self.names = tuple(self._entries)
        self.lengths: Mapping[str, int] = {name: entry.length for name, entry in self._entries.items()}

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def length(self, name: str) -> int:
        """Bases of a record.

        Raises:
            DataError: no such record.
        """
        return self._entry(name).length

    def fetch(self, name: str, start: int, end: int, strand: str = "+") -> Bytes:
        """Bases of a stretch.

        Args:
            name: record.
            start: first base, zero-based.
            end: one past the last base, at most the length of the record.
            strand: `+`, or `-` for the reverse complement.

        Returns:
            uint8 [end − start] of A C G T N; a copy that may be changed.

        Raises:
            DataError: no such record, or a byte that is no nucleotide.
            ValueError: a stretch that does not lie in the record, or another strand.
        """
        entry = self._entries.get(name) or self._entry(name)
        if not 0 <= start < end <= entry.length:
            raise ValueError(
                f"start is {start} and end {end}; 0 ≤ start < end ≤ {entry.length} (the length of {name!r})"
            )
        raw = self._bytes.read(entry.byte(start), entry.byte(end - 1) + 1)
        clean = bytearray(raw).translate(LETTER_TABLE, _LINE_ENDS)
        if len(clean) != end - start or 0 in clean:
            raise DataError(self._damage(entry, start, raw, clean, end - start))
        letters = np.frombuffer(clean, np.uint8)
        if strand == "+":
            return letters
        if strand != "-":
            raise ValueError(f"strand is {strand!r}; it must be '+' or '-'")
        return reverse_complement(letters)

    def fetch_interval(self, interval: Interval) -> Bytes:
        """Bases of an interval on its strand; see `fetch`."""
        return self.fetch(interval.record, interval.start, interval.end, interval.strand)

    def close(self) -> None:
        """Let go of the file; also happens when the object goes."""
        self._bytes.close()

    def _entry(self, name: str) -> IndexEntry:
        if name not in self._entries:
            raise DataError(f"{self.path}: {unknown_record(name, self.names)}")
        return self._entries[name]

    def _damage(self, entry: IndexEntry, start: int, raw: bytes, clean: bytearray, wanted: int) -> str:
        at = clean.find(0)
        if at < 0:
            return (
                f"{self.path}: record {entry.name!r} holds {len(clean)} letters where the index says "
                f"{wanted}; the file was changed since it was indexed: delete the .fai, it is rebuilt"
            )
        letter = raw.translate(None, _LINE_ENDS)[at]
        return f"{self.path}, record {entry.name!r}, base {start + at}: {no_nucleotide(letter)}; {ALLOWED}"

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Fasta, self.path), ()


class _Reader(Protocol):
    size: int | None

    def read(self, start: int, stop: int) -> bytes: ...
    def close(self) -> None: ...


class _Plain:
    """A plain file, read with `pread`: no file position that a fork would share, nothing resident.

    A memory map saves half a microsecond a fetch, but each page that was touched counts as resident, up to
    the size of the file, and letting go of the pages costs more than it saves.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY)
        self.size: int | None = os.fstat(self._file).st_size

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file, stop - start, start)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()


class _Blocks:
    """A bgzf file, read through Biopython; each process opens its own handle."""

    def __init__(self, path: Path) -> None:
        self._owner = -1
        self._handle: Any = None
        check_bgzf_end(path)
        self._path = path
        starts = _read_gzi(path.with_name(path.name + ".gzi"))
        self.size: int | None = None
        if starts is None:
            starts = []
            try:
                with open(path, "rb") as file:
                    for raw_start, _, data_start, data_length in bgzf.BgzfBlocks(file):
                        starts.append((raw_start, data_start))
                        self.size = data_start + data_length
            except (ValueError, struct.error, EOFError) as error:
                raise DataError(f"{path}: damaged bgzf data ({error}); copy or download it again") from None
        self._raw = [raw for raw, _ in starts]
        self._data = [data for _, data in starts]

    def read(self, start: int, stop: int) -> bytes:
        if self._owner != os.getpid():  # a fork shares the file position with its parent: open anew
            self._handle, self._owner = (
                bgzf.BgzfReader(str(self._path), "rb", max_cache=_BLOCKS_KEPT),
                os.getpid(),
            )
        block = bisect_right(self._data, start) - 1
        try:
            within = start - self._data[block]
            if within >= 1 << 16:
                raise ValueError("the .gzi index leaves blocks out; delete it")
            self._handle.seek(bgzf.make_virtual_offset(self._raw[block], within))
            return bytes(self._handle.read(stop - start))
        except (ValueError, struct.error, EOFError, io.UnsupportedOperation) as error:
            raise DataError(f"{self._path}: damaged bgzf data ({error}); copy or download it again") from None

    def close(self) -> None:
        if self._handle is not None and self._owner == os.getpid():
            self._handle.close()
        self._handle, self._owner = None, -1

    def __del__(self) -> None:
        self.close()


def _read_gzi(path: Path) -> list[tuple[int, int]] | None:
    """Blocks of bgzip's index as (compressed, uncompressed) offsets, or None where there is none."""
    if not path.exists():
        return None
    data = path.read_bytes()
    remedy = f"{path}: no bgzip index; delete it, it is not needed"
    if len(data) < 8 or len(data) != 8 + 16 * struct.unpack_from("<Q", data)[0]:
        raise DataError(remedy)
    pairs = np.frombuffer(data, "<u8", offset=8).reshape(-1, 2).astype(np.int64)
    if len(pairs) and not ((np.diff(pairs, axis=0) > 0).all() and (pairs[0] > 0).all()):
        raise DataError(remedy)
    return [(0, 0), *((int(a), int(b)) for a, b in pairs)]
