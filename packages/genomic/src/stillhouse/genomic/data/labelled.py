"""Tables of labelled sequences: CSV, TSV, Parquet and FASTA."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from stillhouse.core.errors import DataError

from ._source import compression, text_lines
from .fasta import read_fasta
from .sequence import normalise
from .sequences import Sequences, pack

_SEQUENCE = ("sequence", "seq", "dna", "text")
_LABEL = ("label", "labels", "class", "target")
_PARTS = {"val": "validation", "valid": "validation", "dev": "validation"}

Row = tuple[str, str, str | None, str | None]  # sequence, label, group, split


def read_labelled(
    path: str | Path,
    *,
    sequence: str | None = None,
    label: str | None = None,
    group: str | None = None,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Sequences:
    """Labelled sequences from one file.

    CSV and TSV have a header line (the separator is told by it); Parquet is told by its first bytes; FASTA by
    its first `>`, with the label after the last `|` of the header line, or as `label=…` in it.

    Accepted by rule: gzip, CRLF, lower case, U, IUPAC letters; 6-mer text with spaces (`ACGTAC CGTACG`, a
    step of one, as DNABERT has it) is put together again. Without a group column, each sequence is a group of
    its own, and equal sequences are one group.

    Args:
        path: the file.
        sequence: column of the letters; the first of sequence, seq, dna, text when None.
        label: column of the label; the first of label, labels, class, target when None.
        group: column of the groups.
        split: column of the split: train, validation (val, valid, dev) and test.
        classes: names of the classes, in the order of the labels wanted; the sorted labels when None, numbers
            by their value.
        name: name of the task; the file name without suffixes when None.

    Returns:
        `Sequences`.

    Raises:
        DataError: naming the file, the line and what to do.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        ...     _ = file.write(b"sequence,label\\nACG,1\\nTTTT,0\\n"); file.flush()
        ...     items = read_labelled(file.name)
        >>> items.labels.tolist(), items.classes, items.lengths.tolist()
        ([1, 0], ('0', '1'), [3, 4])
    """
    path = Path(path)
    names = {"sequence": sequence, "label": label, "group": group, "split": split}
    rows = _rows(path, names)
    return build(path, rows, name or path.name.split(".")[0], classes, named_split=split is not None)


def build(
    path: Path,
    rows: Sequence[tuple[str, Row]],
    name: str,
    classes: Sequence[str] | None,
    *,
    named_split: bool,
) -> Sequences:
    """`Sequences` from rows of text, each with where it stands.

    Raises:
        DataError: no row, a bad sequence, a label outside `classes`, a split of another name.
    """
    if not rows:
        raise DataError(f"{path}: holds no sequence")
    found = _sorted({row[1] for _, row in rows}) if classes is None else list(classes)
    index = {label: i for i, label in enumerate(found)}
    letters, labels, groups, splits = [], [], [], []
    for where, (text, label, group, part) in rows:
        if label not in index:
            raise DataError(f"{where}: label {label!r} is not among the classes {found}")
        try:
            letters.append(normalise(_joined(text, where)))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if not len(letters[-1]):
            raise DataError(f"{where}: the sequence is empty; remove the row")
        labels.append(index[label])
        groups.append(group if group is not None else letters[-1].tobytes().decode())
        splits.append(_PARTS.get(part or "train", part or "train"))
        if splits[-1] not in ("train", "validation", "test"):
            raise DataError(f"{where}: split {part!r} must be train, validation (val, valid, dev) or test")
    if not any(row[2] is not None for _, row in rows):  # name the groups shortly; equal sequences share one
        numbers: dict[str, int] = {}
        groups = [f"sequence {numbers.setdefault(text, len(numbers))}" for text in groups]
    return pack(name, letters, np.array(labels), found, groups, splits if named_split else None)


def _rows(path: Path, names: dict[str, str | None]) -> list[tuple[str, Row]]:
    if compression(path) == "plain":
        with open(path, "rb") as file:
            if file.read(4) == b"PAR1":
                return _parquet(path, names)
    lines = text_lines(path)
    first = next((text for _, text in lines if text.strip()), "")
    lines.close()  # type: ignore[attr-defined]
    if first.startswith(">"):
        return _fasta(path)
    return _table(path, names, "\t" if "\t" in first else ",")


def _columns(path: Path, header: Sequence[str], names: dict[str, str | None]) -> dict[str, int]:
    lowered = [column.strip().lower() for column in header]
    found: dict[str, int] = {}
    for key, usual in (("sequence", _SEQUENCE), ("label", _LABEL), ("group", ()), ("split", ())):
        wanted = names[key]
        options = [wanted.lower()] if wanted is not None else list(usual)
        at = next((lowered.index(option) for option in options if option in lowered), None)
        if at is None and options:
            raise DataError(
                f"{path}: no column {' or '.join(map(repr, options))} among {[h.strip() for h in header]}; "
                f"name it with {key}="
            )
        if at is not None:
            found[key] = at
    return found


def _table(path: Path, names: dict[str, str | None], separator: str) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    places: dict[str, int] | None = None
    for line, text in text_lines(path):
        if not text.strip():
            continue
        fields = next(csv.reader([text], delimiter=separator))
        if places is None:
            places = _columns(path, fields, names)
            width = len(fields)
            continue
        if len(fields) != width:
            raise DataError(f"{path}, line {line}: {len(fields)} columns, the header has {width}")
        get = {key: fields[at].strip() for key, at in places.items()}
        row = (get["sequence"], get["label"], get.get("group"), get.get("split"))
        rows.append((f"{path}, line {line}", row))
    return rows


def _parquet(path: Path, names: dict[str, str | None]) -> list[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        header = file.schema_arrow.names
        places = _columns(path, header, names)
        table = file.read(columns=[header[at] for at in places.values()])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: damaged Parquet file ({str(error).splitlines()[0]}); copy it again"
        ) from None
    columns = {key: table.column(header[at]).to_pylist() for key, at in places.items()}
    blank: list[str | None] = [None] * table.num_rows
    keys = [columns.get(key, blank) for key in ("sequence", "label", "group", "split")]
    rows: list[tuple[str, Row]] = []
    for number, (letters, label, group, part) in enumerate(zip(*keys, strict=True)):
        where = f"{path}, row {number}"
        if not isinstance(letters, str) or label is None:
            raise DataError(f"{where}: the sequence or the label is missing, or the sequence is no text")
        texts = (None if group is None else str(group), None if part is None else str(part))
        rows.append((where, (letters, str(label), *texts)))
    return rows


def _fasta(path: Path) -> list[tuple[str, Row]]:
    rows: list[tuple[str, Row]] = []
    for record in read_fasta(path):
        header = f"{record.name} {record.description}".strip()
        label = next((word[6:] for word in header.split() if word.startswith("label=")), None)
        if label is None and "|" in header:
            label = header.rpartition("|")[2].strip()
        if not label:
            raise DataError(
                f"{path}: record {record.name!r} has no label; '>name|label' or '>name label=…' is meant"
            )
        rows.append(
            (f"{path}, record {record.name!r}", (record.sequence.tobytes().decode(), label, None, None))
        )
    return rows


def _joined(text: str, where: str) -> str:
    """K-mer text with a step of one put together; anything else as it is."""
    words = text.split()
    if len(words) < 2:
        return text.strip()
    if len({len(word) for word in words}) > 1 or any(a[1:] != b[:-1] for a, b in pairwise(words)):
        raise DataError(f"{where}: the sequence holds spaces and is no k-mer text with a step of one")
    return words[0] + "".join(word[-1] for word in words[1:])


def _sorted(labels: set[str]) -> list[str]:
    if all(label.lstrip("-").isdigit() for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)
