"""What the verbs `tasks` and `simulate` write: labelled windows as tables, genomes as FASTA and GFF3."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillhouse.core.errors import ConfigError, DataError

from ._atomic import replacing

if TYPE_CHECKING:
    from .data import Sequences

TASKS = ("donor", "acceptor", "regions", "species")
FORMATS = ("csv", "tsv", "parquet")
_COLUMNS = ("sequence", "label", "split", "group")
Progress = Callable[[int, int], None]


def build_tasks(
    fasta: Sequence[Path],
    annotation: Sequence[Path],
    *,
    names: Sequence[str] = (),
    length: int = 256,
    decoys: str = "hard",
    limit: int = 2000,
    test: float = 0.3,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Sequences]:
    """Cut labelled windows out of annotated genomes and split them by group.

    Args:
        fasta: genomes.
        annotation: GFF3 of each, in their order; empty: no annotation, and `species` alone can be built.
        names: of `TASKS`; empty: all that the files allow.
        length: bases of a window.
        decoys: negatives of the splice sites, "easy" (random GT or AG) or "hard" (with the letter frequencies
            of true sites).
        limit: most windows of a class and genome.
        test: share of the groups for the test part.
        seed: of the choice and of the split.
        progress: called as `progress(done, total)`.

    Returns:
        A task for each name and, but for species, each genome; each with a split into "train" and "test" that
        keeps groups whole.

    Raises:
        ConfigError: an unknown name, or one that the files do not allow.
        DataError: a file cannot be used, or a task has too few windows.
    """
    from .data import read_genome, regions, species, splice_sites

    strange = [name for name in names if name not in TASKS]
    if strange:
        raise ConfigError(f"--task {strange[0]}: allowed are {', '.join(TASKS)}")
    if decoys not in ("easy", "hard"):
        raise ConfigError(f"--decoys {decoys}: allowed are easy, hard")
    wanted = list(names) or [
        name for name in TASKS if (len(fasta) > 1 if name == "species" else bool(annotation))
    ]
    if not annotation and set(wanted) - {"species"}:
        raise ConfigError(f"--task {wanted[0]}: needs --annotation")
    if "species" in wanted and len(fasta) < 2:
        raise ConfigError("--task species: needs --fasta at least twice")
    if not wanted:
        raise ConfigError("nothing to build: give --annotation, or --fasta twice for species")
    genomes = [read_genome(path, annotation[at] if annotation else None) for at, path in enumerate(fasta)]
    own = [name for name in wanted if name != "species"]
    total, done = len(own) * len(genomes) + ("species" in wanted), 0
    found: list[Sequences] = []
    for genome in genomes:
        for name in own:
            if name == "regions":
                made = regions(genome, length=length, seed=seed)
            else:
                made = splice_sites(genome, kind=name, length=length, decoys=decoys, seed=seed)  # type: ignore[arg-type]
            found.append(_split(_named(made, f"{genome.name}-{name}"), limit, test, seed))
            done += 1
            if progress is not None:
                progress(done, total)
    if "species" in wanted:
        made = species(genomes, length=length, seed=seed)
        found.append(_split(_named(made, "species"), limit, test, seed))
        if progress is not None:
            progress(total, total)
    return found


def write_tasks(tasks: Sequence[Sequences], folder: Path, *, format: str = "csv") -> list[dict[str, Any]]:
    """Write tasks, a file each, with the columns sequence, label, split, group.

    Args:
        tasks: with splits.
        folder: made if need be.
        format: of `FORMATS`.

    Returns:
        A row a file: `file`, `windows`, `bases`, `counts`.

    Raises:
        ConfigError: an unknown format.
        DataError: a file cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: allowed are {', '.join(FORMATS)}")
    rows = []
    for task in tasks:
        path = folder / f"{task.name}.{format}"
        write_sequences(task, path)
        counts = ", ".join(f"{name} {int((task.labels == at).sum())}" for at, name in enumerate(task.classes))
        rows.append(
            {
                "file": str(path),
                "windows": len(task.labels),
                "bases": int(task.sequences.shape[1]),
                "counts": counts,
            }
        )
    return rows


def write_sequences(data: Sequences, path: str | os.PathLike[str]) -> None:
    """Write labelled sequences as CSV, TSV or Parquet, by the name's end; whole or not at all."""
    target = Path(path)
    letters = [
        row[: int(length)].tobytes().decode("ascii")
        for row, length in zip(data.sequences, data.lengths, strict=True)
    ]
    labels = [data.classes[int(label)] for label in data.labels]
    split = list(data.split) if data.split is not None else [""] * len(labels)
    groups = list(data.groups) if len(data.groups) else [""] * len(labels)
    with replacing(target) as work:
        if target.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns = dict(zip(_COLUMNS, (letters, labels, split, groups), strict=True))
            pq.write_table(pa.table(columns), work, compression="zstd")
            return
        with work.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter="\t" if target.suffix == ".tsv" else ",", lineterminator="\n")
            table.writerow(_COLUMNS)
            table.writerows(zip(letters, labels, split, groups, strict=True))


def _named(data: Sequences, name: str) -> Sequences:
    return replace(data, name=name)


def _split(data: Sequences, limit: int, test: float, seed: int) -> Sequences:
    """Thin the classes out at random, and split by group."""
    from .finetune import rows_of
    from .probe import split_groups

    rng = np.random.default_rng(seed)
    kept = np.concatenate(
        [rng.permutation(np.flatnonzero(data.labels == at))[:limit] for at in range(len(data.classes))]
    )
    data = rows_of(data, np.sort(kept))
    if len(set(data.groups)) < 2:
        raise DataError(
            f"{data.name}: all windows are of one group, which cannot be split; give more sequence"
        )
    train, _ = split_groups(np.asarray(data.groups), test=test, seed=seed)
    marks = np.full(len(data.labels), "test", dtype=object)
    marks[train] = "train"
    return replace(data, split=tuple(marks.tolist()))
