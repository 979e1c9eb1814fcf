"""Readers of the field's two benchmarks: Genomic Benchmarks, and the Nucleotide Transformer's tasks."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.core.errors import DataError

from ._source import text_lines
from .access import Fasta
from .intervals import Interval, unknown_record
from .labelled import Row, _rows, build
from .sequences import Sequences, overlap_groups, pack

_HEADER = ["id", "region", "start", "end", "strand"]


def read_genomic_benchmark(
    folder: str | Path, reference: Fasta, split: Literal["train", "test"] | None = None
) -> Sequences:
    """A data set of Genomic Benchmarks: intervals, and the sequences that they name.

    The data sets ship intervals only, `<folder>/{train,test}/<class>.csv.gz` with the columns id, region,
    start, end, strand: zero-based and half-open, reverse complement for `-` (source:
    ML-Bioinfo-CEITEC/genomic_benchmarks). Classes are the file names in alphabetical order: a loader that
    takes them in the order of the file system gives other labels on other machines.

    Args:
        folder: of the data set.
        reference: the genome (or transcriptome) whose coordinates they are, e.g. Ensembl release 97 of
            GRCh38. A region `chr1` finds a record `1`, and the other way round.
        split: part to read; None reads both.

    Returns:
        `Sequences` with `split`; intervals that overlap, in either part, are one group.

    Raises:
        DataError: naming the file, the line and what to do.
    """
    folder = Path(folder)
    if split not in (None, "train", "test"):
        raise ValueError(f"split is {split!r}; it must be 'train', 'test' or None for both")
    parts = ("train", "test") if split is None else (split,)
    files = {part: _class_files(folder, part) for part in parts}
    classes = sorted(next(iter(files.values())))
    for part, found in files.items():
        if sorted(found) != classes:
            raise DataError(f"{folder / part}: has the classes {sorted(found)}, not {classes}")
    intervals: list[Interval] = []
    labels: list[int] = []
    splits: list[str] = []
    for part, found in files.items():
        for label, name in enumerate(classes):
            rows = _read_intervals(found[name], reference)
            intervals += rows
            labels += [label] * len(rows)
            splits += [part] * len(rows)
    letters = [reference.fetch_interval(item) for item in intervals]
    return pack(folder.name, letters, labels, classes, overlap_groups(intervals), splits)


def _class_files(folder: Path, part: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    if not (folder / part).is_dir():
        raise DataError(f"{folder / part}: no such folder; a data set has the folders train and test")
    for path in sorted((folder / part).iterdir()):
        for suffix in (".csv.gz", ".csv"):
            if path.name.endswith(suffix):
                found[path.name.removesuffix(suffix)] = path
                break
    if len(found) < 2:
        raise DataError(f"{folder / part}: {len(found)} class files; <class>.csv.gz for two or more is meant")
    return found


def _read_intervals(path: Path, reference: Fasta) -> list[Interval]:
    rows: list[Interval] = []
    for line, text in text_lines(path):
        fields = [field.strip() for field in next(csv.reader([text]), [])]
        if line == 1:
            if fields != _HEADER:
                raise DataError(f"{path}: the header is {fields}; {','.join(_HEADER)} is meant")
            continue
        if not any(fields):
            continue
        where = f"{path}, line {line}"
        if len(fields) != len(_HEADER):
            raise DataError(f"{where}: {len(fields)} columns; {','.join(_HEADER)} is meant")
        identity, region, start, end, strand = fields
        if region not in reference:
            other = region.removeprefix("chr") if region.startswith("chr") else f"chr{region}"
            if other not in reference:
                raise DataError(f"{where}: {unknown_record(region, reference.names)} ({reference.path})")
            region = other
        try:
            item = Interval(region, int(start), int(end), strand or "+", identity)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if item.end > reference.length(region):
            raise DataError(
                f"{where}: {item} ends past the end of its record, {reference.length(region):,} bp in "
                f"{reference.path}; is it the same assembly?"
            )
        rows.append(item)
    return rows


@dataclass(frozen=True, slots=True)
class NtTask:
    """Facts of a task of the Nucleotide Transformer benchmark.

    Args:
        name: its name in the data set.
        length: longest sequence in bp.
        classes: number of classes.
        kind: which metric convention applies: histone, enhancer, promoter, splice or splice_all, as in
            `stillhouse.genomic.metrics`.
        train: training sequences, where known.
    """

    name: str
    length: int
    classes: int
    kind: str
    train: int | None = None


def _tasks(*rows: tuple[str, int, int, str, int | None]) -> dict[str, NtTask]:
    return {row[0]: NtTask(*row) for row in rows}


NT_ORIGINAL = _tasks(
    ("H3", 500, 2, "histone", 13_468),
    ("H3K14ac", 500, 2, "histone", 29_743),
    ("H3K36me3", 500, 2, "histone", 31_392),
    ("H3K4me1", 500, 2, "histone", 28_509),
    ("H3K4me2", 500, 2, "histone", 27_614),
    ("H3K4me3", 500, 2, "histone", 33_119),
    ("H3K79me3", 500, 2, "histone", 25_953),
    ("H3K9ac", 500, 2, "histone", 25_003),
    ("H4", 500, 2, "histone", 13_140),
    ("H4ac", 500, 2, "histone", 30_685),
    ("enhancers", 200, 2, "enhancer", 14_968),
    ("enhancers_types", 200, 3, "enhancer", 14_968),
    ("promoter_all", 300, 2, "promoter", 53_276),
    ("promoter_no_tata", 300, 2, "promoter", 47_759),
    ("promoter_tata", 300, 2, "promoter", 5_517),
    ("splice_sites_acceptors", 600, 2, "splice", 19_961),
    ("splice_sites_all", 400, 3, "splice_all", 27_000),
    ("splice_sites_donors", 600, 2, "splice", 19_775),
)
"""The 18 tasks of `nucleotide_transformer_downstream_tasks`.

Names: the folders of that data set. Lengths, classes and sizes: HazyResearch/hyena-dna
configs/dataset/nucleotide_transformer.yaml, but splice_sites_all, which it lacks: kuleshov-group/caduceus,
the file of the same name.
"""

NT_REVISED = _tasks(
    ("H2AFZ", 1000, 2, "histone", None),
    ("H3K27ac", 1000, 2, "histone", None),
    ("H3K27me3", 1000, 2, "histone", None),
    ("H3K36me3", 1000, 2, "histone", None),
    ("H3K4me1", 1000, 2, "histone", None),
    ("H3K4me2", 1000, 2, "histone", None),
    ("H3K4me3", 1000, 2, "histone", None),
    ("H3K9ac", 1000, 2, "histone", None),
    ("H3K9me3", 1000, 2, "histone", None),
    ("H4K20me1", 1000, 2, "histone", None),
    ("enhancers", 400, 2, "enhancer", None),
    ("enhancers_types", 400, 3, "enhancer", None),
    ("promoter_all", 300, 2, "promoter", None),
    ("promoter_no_tata", 300, 2, "promoter", None),
    ("promoter_tata", 300, 2, "promoter", None),
    ("splice_sites_acceptors", 600, 2, "splice", None),
    ("splice_sites_all", 600, 3, "splice_all", None),
    ("splice_sites_donors", 600, 2, "splice", None),
)
"""The 18 tasks of `nucleotide_transformer_downstream_tasks_revised`: names shared with the original set name
other data, and numbers cannot be compared.

Names, lengths and classes: a task list in a public user's repository (leonardosalsi/msc_thesis); the lengths
are not from the authors, check them on the data.
"""

_SUFFIXES = (
    ".parquet",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
    ".fna",
    ".fna.gz",
    ".fasta",
    ".fa",
    ".fasta.gz",
    ".fa.gz",
)


def read_nt_benchmark(path: str | Path, *, task: str | None = None, revised: bool | None = None) -> Sequences:
    """A task of the Nucleotide Transformer benchmark from the user's own copy.

    Args:
        path: the task's folder with one or more files named `train…` and `test…` (parquet, csv, tsv or FASTA
            with `|label` at the end of the header), or one such file.
        task: name of the task; the name of the folder (or of the folder that the file is in) when None. The
            revised set keeps all tasks in one table with a column `task`: its rows are chosen by this name.
        revised: which of the two sets it is. Given, the name must be one of its tasks, and the labels are
            checked against the number of classes. None: no check.

    Returns:
        `Sequences` with `split`; classes are the label numbers.

    Raises:
        DataError: naming the file and what to do.
    """
    path = Path(path)
    files = _nt_files(path)
    task = task or (path.name if path.is_dir() else path.resolve().parent.name)
    known = NT_REVISED if revised else NT_ORIGINAL
    if revised is not None and task not in known:
        which = "revised" if revised else "original"
        raise DataError(f"{path}: no task {task!r} in the {which} set; it has {', '.join(known)}")
    rows: list[tuple[str, Row]] = []
    for part, file in files:
        names: dict[str, str | None] = {"sequence": None, "label": None, "group": None, "split": None}
        for where, row in _nt_rows(file, names, task):
            rows.append((where, (row[0], row[1], None, part)))
    classes = None if revised is None else [str(i) for i in range(known[task].classes)]
    return build(path, rows, task, classes, named_split=True)


def _nt_files(path: Path) -> list[tuple[str, Path]]:
    if path.is_file():
        return [("test" if path.name.startswith("test") else "train", path)]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = [
        (part, file)
        for part in ("train", "test")
        for file in sorted(path.iterdir())
        if file.name.startswith(part) and file.name.endswith(_SUFFIXES)
    ]
    if not files:
        raise DataError(f"{path}: no files train… and test… (parquet, csv, tsv, fna) in it")
    return files


def _nt_rows(file: Path, names: dict[str, str | None], task: str) -> list[tuple[str, Row]]:
    try:
        rows = _rows(file, {**names, "group": "task"})
    except DataError as error:
        if "no column 'task'" not in str(error):
            raise
        return _rows(file, names)
    if all(row[2] is None for _, row in rows):  # FASTA
        return rows
    chosen = [(where, row) for where, row in rows if row[2] == task]
    if not chosen:
        found = sorted({row[2] or "" for _, row in rows})
        raise DataError(f"{file}: no rows of the task {task!r}; it has {', '.join(found)}")
    return chosen
