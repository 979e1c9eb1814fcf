"""Embed a FASTA into a file, a batch at a time: memory does not grow with the input."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.files import replacing

from ._source import batches_of, padded, pieces_of
from ._windows import POOLS, Pool, embed_windows

if TYPE_CHECKING:
    from ..teacher import Teacher

SUFFIXES = (".parquet", ".safetensors")


@dataclass(frozen=True, slots=True)
class Embedded:
    """What was embedded.

    Attributes:
        windows: how many.
        bases: their letters, overlaps counted twice.
        width: channels of an embedding.
        seconds: wall time of reading, computing and writing.
    """

    windows: int
    bases: int
    width: int
    seconds: float

    def summary(self) -> str:
        """One line for people, with the throughput."""
        rate = self.bases / max(self.seconds, 1e-9)
        return (
            f"{self.windows} windows, {self.bases} bases, in {self.seconds:.1f} s: {rate / 1e3:.4g} kb/s, "
            f"{self.windows / max(self.seconds, 1e-9):.4g} windows/s"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "windows": self.windows,
            "bases": self.bases,
            "width": self.width,
            "seconds": self.seconds,
            "bases_per_second": self.bases / max(self.seconds, 1e-9),
        }


def check_options(out: Path, *, length: int, overlap: int, pool: str) -> None:
    """Refuse options that cannot work before anything is read.

    Raises:
        ConfigError: naming the option.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: the name must end in {' or '.join(SUFFIXES)}")
    if overlap >= length:
        raise ConfigError(f"--overlap {overlap}: must be less than --length {length}")
    if pool not in POOLS:
        raise ConfigError(f"--pool {pool}: allowed are {', '.join(POOLS)}")


def embed_file(
    model: nn.Module | Teacher,
    fasta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bed: str | os.PathLike[str] | None = None,
    length: int = 1024,
    overlap: int = 0,
    pool: Pool = "mean",
    batch: int = 32,
    conjoin: bool = False,
    device: str | None = None,
    model_name: str = "",
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Embed the records of a FASTA, or intervals of it; the file appears whole or not at all.

    Parquet has a row a window with `record`, `name`, `start`, `end`, `strand` and `embedding`, a list of d
    numbers (with "none" a list of such lists, one a base, in the direction of the strand). safetensors has
    `embedding` [N, d] (with "none" the bases of all windows one after another, and `offset` [N + 1]),
    `start`, `end`, `reverse` and `record` [N], an index into the names in the metadata's `records`.

    Args:
        model: a student's encoder or a teacher.
        fasta: sequences.
        out: file to write, .parquet or .safetensors.
        bed: intervals to embed; None embeds every record.
        length: longest window; longer sequences are tiled.
        overlap: bases that neighbouring tiles share.
        pool: "mean", "center" or "none".
        batch: windows at a time.
        conjoin: average over both strands.
        device: where to compute.
        model_name: said in the file's metadata.
        progress: called with the number of windows done since the last call.

    Raises:
        ConfigError: an option that cannot work.
        DataError: a file cannot be read or written, or there is nothing to embed.
    """
    from ._writers import ParquetSink, SafetensorsSink

    target = Path(out)
    check_options(target, length=length, overlap=overlap, pool=pool)
    begun = time.perf_counter()
    about = {
        "model": model_name,
        "source": Path(fasta).name,
        "pool": pool,
        "length": str(length),
        "overlap": str(overlap),
        "conjoin": str(conjoin).lower(),
        "coordinates": "0-based, half-open, forward strand",
    }
    windows = bases = width = 0
    with replacing(target) as work:
        sink = (ParquetSink if target.suffix == ".parquet" else SafetensorsSink)(work, pool, about)
        try:
            for pieces in batches_of(pieces_of(fasta, bed=bed, length=length, overlap=overlap), batch):
                letters, lengths = padded(pieces)
                vectors = embed_windows(
                    model, letters, lengths=lengths, pool=pool, batch=batch, device=device, conjoin=conjoin
                )
                sink.write(pieces, vectors)
                windows, bases, width = windows + len(pieces), bases + int(lengths.sum()), vectors.shape[-1]
                if progress is not None:
                    progress(len(pieces))
            if not windows:
                raise DataError(f"{fasta if bed is None else bed}: holds nothing to embed")
            sink.close()
        except BaseException:
            sink.abandon()
            raise
    return Embedded(windows, bases, width, time.perf_counter() - begun)
