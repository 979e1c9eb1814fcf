"""Class probabilities of sequences, from a fine-tuned classifier: files in, a table out.

FASTA, tables (CSV, TSV, Parquet) and intervals (BED with its reference) are read a batch at a time, so that
memory does not grow with the input; the table appears whole or not at all.
"""

from __future__ import annotations

import csv
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.files import replacing

from .embed import Piece, tiles_of
from .embed._source import padded
from .finetune import LoadedClassifier
from .heads import real_letters

SUFFIXES = (".tsv", ".parquet")
LONGEST = 4096  # bp of a sequence that is read whole, where training has seen none longer
_LETTERS = 1 << 18  # of a batch, padding included
_SEQUENCE, _NAME = ("sequence", "seq", "dna", "text"), ("name", "id", "record")
_COLUMNS = ("file", "record", "name", "start", "end", "strand", "predicted")
Row = tuple[str, Piece, npt.NDArray[np.float64] | None]


@dataclass(slots=True)
class Predicted:
    """What was predicted.

    Attributes:
        sequences: rows of the table.
        bases: their letters.
        counts: class → rows it was the likeliest in.
        unknown: rows without a nucleotide, which have no prediction.
        seconds: wall time of reading, computing and writing.
    """

    sequences: int = 0
    bases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    unknown: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """One line for people."""
        shown = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        none = f"; {self.unknown} of N alone" if self.unknown else ""
        rate = self.bases / max(self.seconds, 1e-9) / 1e3
        return f"{self.sequences} sequences: {shown or 'none predicted'}{none}; {rate:.4g} kb/s"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "sequences": self.sequences,
            "bases": self.bases,
            "counts": dict(self.counts),
            "unknown": self.unknown,
            "seconds": self.seconds,
        }


def check_options(out: Path, sources: Sequence[Path], *, window: int | None, overlap: int) -> None:
    """Refuse options that cannot work before anything is read.

    Raises:
        ConfigError: naming the option.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: the name must end in {' or '.join(SUFFIXES)}")
    if any(out.resolve() == Path(source).resolve() for source in sources):
        raise ConfigError(f"--out {out}: is one of the files to read; give another")
    if overlap and window is None:
        raise ConfigError(f"--overlap {overlap}: needs --window, which cuts long sequences")
    if window is not None and overlap >= window:
        raise ConfigError(f"--overlap {overlap}: must be less than --window {window}")


def predict_files(
    loaded: LoadedClassifier,
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    window: int | None = None,
    overlap: int = 0,
    batch: int = 32,
    conjoin: bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> Predicted:
    """Predict every sequence of some files; the table appears whole or not at all.

    A row has `file`, `record`, `name`, `start`, `end`, `strand`, `predicted` and a column `p_CLASS` for each
    class; coordinates are 0-based and half-open on the forward strand. A sequence of N alone is a row without
    a prediction. In a table the record is its column `name`, `id` or `record`, else the number of the row.

    Args:
        loaded: what `load_classifier` read.
        sources: FASTA (plain, gz, bgzf), CSV, TSV or Parquet with a column `sequence` (seq, dna, text), told
            apart by what is in them; and BED, told by its name.
        out: file to write, .tsv or .parquet.
        reference: the FASTA that a BED refers to.
        window: cut sequences longer than this into windows of this length; None refuses those that are longer
            than `LONGEST` and than all that the classifier was trained on.
        overlap: bases that neighbouring windows share.
        batch: sequences at a time.
        conjoin: average the logits of both strands; None does as the classifier was scored.
        progress: called with the number of sequences done since the last call.

    Raises:
        ConfigError: an option that cannot work.
        DataError: a file cannot be read or written, or holds something else than DNA.
    """
    target, files = Path(out), [Path(source) for source in sources]
    check_options(target, files, window=window, overlap=overlap)
    if batch < 1:
        raise ConfigError(f"--batch {batch}: give at least 1")
    begun, done = time.perf_counter(), Predicted()
    both = loaded.conjoin if conjoin is None else conjoin
    longest = max(LONGEST, loaded.length)

    def rows() -> Iterator[Row]:
        pieces = _cut(_all(files, reference), window, overlap, longest)
        for part in _batches(pieces, batch):
            found = probabilities(loaded, [piece for _, piece in part], conjoin=both)
            for (name, piece), p in zip(part, found, strict=True):
                done.sequences += 1
                done.bases += len(piece.letters)
                if p is None:
                    done.unknown += 1
                else:
                    done.counts[loaded.classes[int(p.argmax())]] += 1
                yield name, piece, p
            if progress is not None:
                progress(len(part))

    with replacing(target) as work:
        (_write_parquet if target.suffix == ".parquet" else _write_tsv)(work, rows(), loaded.classes)
    done.counts = Counter({name: done.counts[name] for name in loaded.classes})
    done.seconds = time.perf_counter() - begun
    return done


@torch.no_grad()
def probabilities(
    loaded: LoadedClassifier, pieces: Sequence[Piece], *, conjoin: bool
) -> list[npt.NDArray[np.float64] | None]:
    """Class probabilities [C] of each sequence, None for one without a nucleotide."""
    windows, lengths = padded(list(pieces))
    call = loaded.classifier.conjoined if conjoin else loaded.classifier.forward
    table = call(windows, lengths).double().softmax(-1).cpu().numpy()
    known = real_letters(windows, lengths).any(1).tolist()
    return [row if real else None for row, real in zip(table, known, strict=True)]


# ---- reading


def _all(files: Sequence[Path], reference: str | os.PathLike[str] | None) -> Iterator[tuple[Path, Piece]]:
    for path in files:
        for piece in _pieces(path, reference):
            yield path, piece


def _pieces(path: Path, reference: str | os.PathLike[str] | None) -> Iterator[Piece]:
    """Whole sequences of one file, whatever kind it is of."""
    from .data import Fasta, read_bed, read_fasta
    from .data._source import text_lines

    if path.name.lower().removesuffix(".gz").endswith(".bed"):
        if reference is None:
            raise ConfigError(f"{path}: holds intervals; give the genome they are on with --reference")
        genome = Fasta(Path(reference))
        for at in read_bed(path, {name: genome.length(name) for name in genome.names}):
            letters = genome.fetch(at.record, at.start, at.end, at.strand)
            yield Piece(at.record, at.name, at.start, at.end, at.strand, letters)
        return
    if _is_parquet(path):
        yield from _parquet(path)
        return
    lines = text_lines(path)
    first = next((text for _, text in lines if text.strip()), "")
    lines.close()  # type: ignore[attr-defined]
    if first.startswith(">"):
        for record in read_fasta(path):
            yield Piece(record.name, "", 0, len(record.sequence), "+", record.sequence)
        return
    yield from _table(path, "\t" if "\t" in first else ",")


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:  # the reader of text says what is wrong
        return False


def _columns(path: Path, header: Sequence[str]) -> tuple[int, int | None]:
    """Places of the sequence and of the name."""
    lowered = [column.strip().lower() for column in header]
    found = [
        next((lowered.index(o) for o in options if o in lowered), None) for options in (_SEQUENCE, _NAME)
    ]
    if found[0] is None:
        shown = [column.strip()[:40] for column in header][:8]
        raise DataError(
            f"{path}: no column {' or '.join(map(repr, _SEQUENCE))} among {shown}; "
            "FASTA begins with '>', a table with the names of its columns"
        )
    return found[0], found[1]


def _table(path: Path, separator: str) -> Iterator[Piece]:
    from .data._source import text_lines

    places: tuple[int, int | None] | None = None
    width = count = 0
    for line, text in text_lines(path):
        if not text.strip():
            continue
        fields = next(csv.reader([text], delimiter=separator))
        if places is None:
            places, width = _columns(path, fields), len(fields)
            continue
        if len(fields) != width:
            raise DataError(f"{path}, line {line}: {len(fields)} columns, the header has {width}")
        count += 1
        name = str(count) if places[1] is None else fields[places[1]].strip()
        yield _whole(name, fields[places[0]], f"{path}, line {line}")
    if not count:
        raise DataError(f"{path}: holds no sequence")


def _parquet(path: Path) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    count = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            header = file.schema_arrow.names
            places = _columns(path, header)
            names = [header[at] for at in places if at is not None]
            for block in file.iter_batches(batch_size=1024, columns=names):
                columns = [block.column(name).to_pylist() for name in names]
                for row in zip(*columns, strict=True):
                    count += 1
                    if not isinstance(row[0], str):
                        raise DataError(f"{path}, row {count}: the sequence is missing, or is no text")
                    name = str(count) if places[1] is None else str(row[1])
                    yield _whole(name, row[0], f"{path}, row {count}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["damaged"])[0]
        raise DataError(f"{path}: damaged Parquet file ({reason}); copy it again") from None
    if not count:
        raise DataError(f"{path}: holds no sequence")


def _whole(name: str, text: str, where: str) -> Piece:
    from .data import normalise

    if len(text.split()) > 1:
        raise DataError(f"{where}: the sequence holds spaces; give letters alone, no k-mer text")
    try:
        letters = normalise(text)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if not len(letters):
        raise DataError(f"{where}: the sequence is empty; remove the row")
    return Piece(name, "", 0, len(letters), "+", letters)


def _cut(
    pieces: Iterator[tuple[Path, Piece]], window: int | None, overlap: int, longest: int
) -> Iterator[tuple[Path, Piece]]:
    """Long sequences cut into windows that count from the 5' end of the strand that is read."""
    for path, piece in pieces:
        size = len(piece.letters)
        if window is None:
            if size > longest:
                raise DataError(
                    f"{path}, {piece.record!r}: {size:,} bp, and the longest sequence that is read whole has "
                    f"{longest:,}; cut long ones with --window"
                )
            yield path, piece
            continue
        for start, end in tiles_of(size, window, overlap):
            low, high = piece.start + start, piece.start + end
            if piece.strand == "-":
                low, high = piece.end - end, piece.end - start
            yield path, Piece(piece.record, piece.name, low, high, piece.strand, piece.letters[start:end])


def _batches(pieces: Iterator[tuple[Path, Piece]], size: int) -> Iterator[list[tuple[str, Piece]]]:
    """Up to `size` sequences, fewer where they are long."""
    found: list[tuple[str, Piece]] = []
    widest = 0
    for path, piece in pieces:
        wider = max(widest, len(piece.letters))
        if found and (len(found) == size or wider * (len(found) + 1) > _LETTERS):
            yield found
            found, wider = [], len(piece.letters)
        found.append((path.name, piece))
        widest = wider
    if found:
        yield found


# ---- writing


def _values(row: Row, classes: Sequence[str]) -> list[Any]:
    name, piece, p = row
    likely = None if p is None else classes[int(p.argmax())]
    numbers = [None] * len(classes) if p is None else p.tolist()
    return [
        name, piece.record, piece.name, piece.start, piece.end, piece.strand, likely, *numbers
    ]  # fmt: skip


def _headings(classes: Sequence[str]) -> list[str]:
    return [*_COLUMNS, *(f"p_{name}" for name in classes)]


def _write_tsv(path: Path, rows: Iterator[Row], classes: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(_headings(classes))
        for row in rows:
            cells = [f"{v:.6g}" if isinstance(v, float) else v for v in _values(row, classes)]
            table.writerow(["" if cell is None else cell for cell in cells])


def _write_parquet(path: Path, rows: Iterator[Row], classes: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"start": pa.int64(), "end": pa.int64()}
    schema = pa.schema(
        [*((name, kinds.get(name, pa.string())) for name in _COLUMNS)]
        + [(f"p_{name}", pa.float64()) for name in classes]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        block: list[list[Any]] = []

        def flush() -> None:
            columns = zip(*block, strict=True) if block else [[] for _ in schema]
            arrays = [pa.array(list(c), kind.type) for c, kind in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            block.clear()

        for row in rows:
            block.append(_values(row, classes))
            if len(block) == 8192:
                flush()
        flush()
