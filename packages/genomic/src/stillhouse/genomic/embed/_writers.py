"""Files of embeddings, written as they come."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from ._source import Piece
from ._windows import Pool

_ROW_GROUP = 16 << 20  # bytes


class Sink(Protocol):
    """What embeddings are written to."""

    def write(self, pieces: list[Piece], vectors: npt.NDArray[np.float32]) -> None:
        """Add windows and their embeddings, [B, d], or [B, L, d] of which each window's own length counts."""

    def close(self) -> None:
        """Finish the file."""

    def abandon(self) -> None:
        """Let go of everything after a failure."""


class ParquetSink:
    """A Parquet file, its row groups of about 16 MiB."""

    def __init__(self, path: Path, pool: Pool, about: Mapping[str, str]) -> None:
        self._path, self._pool, self._about = path, pool, dict(about)
        self._writer: Any = None
        self._schema: Any = None
        self._waiting: list[Any] = []

    def write(self, pieces: list[Piece], vectors: npt.NDArray[np.float32]) -> None:
        """Add a batch; see `Sink`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        width = vectors.shape[-1]
        if self._writer is None:
            vector = pa.list_(pa.float32(), width)
            self._schema = pa.schema(
                [
                    ("record", pa.string()),
                    ("name", pa.string()),
                    ("start", pa.int64()),
                    ("end", pa.int64()),
                    ("strand", pa.string()),
                    ("embedding", pa.list_(vector) if self._pool == "none" else vector),
                ],
                metadata={f"stillhouse.{key}": value for key, value in self._about.items()},
            )
            self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd")
        if self._pool == "none":
            flat = np.concatenate(
                [row[: len(piece.letters)] for piece, row in zip(pieces, vectors, strict=True)]
            )
            inner = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width)
            offsets = np.cumsum([0, *(len(piece.letters) for piece in pieces)]).astype(np.int32)
            column = pa.ListArray.from_arrays(pa.array(offsets), inner)
        else:
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
        columns = [
            pa.array([piece.record for piece in pieces], pa.string()),
            pa.array([piece.name for piece in pieces], pa.string()),
            pa.array([piece.start for piece in pieces], pa.int64()),
            pa.array([piece.end for piece in pieces], pa.int64()),
            pa.array([piece.strand for piece in pieces], pa.string()),
            column,
        ]
        self._waiting.append(pa.Table.from_arrays(columns, schema=self._schema))
        if sum(table.nbytes for table in self._waiting) > _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
            self._waiting = []

    def close(self) -> None:
        """Write what waits, and the footer."""
        self._flush()
        self._writer.close()

    def abandon(self) -> None:
        """Close what is open."""
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()


class SafetensorsSink:
    """A safetensors file; vectors are spooled to the disk until their number is known.

    The layout is written by hand because the library's writer wants all tensors in memory: eight bytes with
    the length of a JSON header, the header, then the tensors one after another, little-endian.
    """

    def __init__(self, path: Path, pool: Pool, about: Mapping[str, str]) -> None:
        self._path, self._pool, self._about = path, pool, dict(about)
        self._spool: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # closed by close()
        self._rows, self._width = 0, 0
        self._records: dict[str, int] = {}
        self._columns: dict[str, list[int]] = {
            name: [] for name in ("start", "end", "record", "reverse", "size")
        }
        self._names: list[str] = []

    def write(self, pieces: list[Piece], vectors: npt.NDArray[np.float32]) -> None:
        """Add a batch; see `Sink`."""
        self._width = vectors.shape[-1]
        for piece, row in zip(pieces, vectors, strict=True):
            chosen = row[: len(piece.letters)] if self._pool == "none" else row[None]
            self._spool.write(np.ascontiguousarray(chosen, dtype="<f4").tobytes())
            self._rows += len(chosen)
            self._columns["start"].append(piece.start)
            self._columns["end"].append(piece.end)
            self._columns["record"].append(self._records.setdefault(piece.record, len(self._records)))
            self._columns["reverse"].append(int(piece.strand == "-"))
            self._columns["size"].append(len(chosen))
            self._names.append(piece.name)

    def close(self) -> None:
        """Put header and tensors together."""
        small: dict[str, npt.NDArray[np.int64]] = {
            name: np.array(self._columns[name], dtype="<i8") for name in ("start", "end", "record", "reverse")
        }
        if self._pool == "none":
            small["offset"] = np.cumsum([0, *self._columns["size"]]).astype("<i8")
        metadata = {**self._about, "records": json.dumps(list(self._records))}
        if any(self._names):
            metadata["names"] = json.dumps(self._names)
        header: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, column in small.items():  # before the vectors, so that each stands at a multiple of 8
            header[name] = {
                "dtype": "I64",
                "shape": [len(column)],
                "data_offsets": [end, end + column.nbytes],
            }
            end += column.nbytes
        size = 4 * self._rows * self._width
        header["embedding"] = {
            "dtype": "F32",
            "shape": [self._rows, self._width],
            "data_offsets": [end, end + size],
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._spool.seek(0)
        with self._path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for column in small.values():
                file.write(column.tobytes())
            while block := self._spool.read(1 << 22):
                file.write(block)
        self._spool.close()

    def abandon(self) -> None:
        """Drop the spool."""
        self._spool.close()
