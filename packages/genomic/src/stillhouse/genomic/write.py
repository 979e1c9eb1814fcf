"""Files that the verbs write: tasks, a simulated genome, a plain Hugging Face folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.core.errors import ConfigError, DataError

from .config import DataConfig, EvaluateConfig, GenomicConfig, Task
from .data import Sequences

FORMATS = ("csv", "tsv", "parquet")
Progress = Callable[[int, int], None]


def build_tasks(
    fasta: Sequence[Path],
    annotation: Sequence[Path],
    *,
    names: Sequence[str] = (),
    length: int = 256,
    decoys: str = "hard",
    limit: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Sequences]:
    """Cut labelled windows out of annotated genomes, with a split by blocks that never touch.

    Args:
        fasta: genomes.
        annotation: GFF3 of each, in their order, or nothing.
        names: tasks; empty for all that the files allow.
        length: bases of a window.
        decoys: negatives of the splice sites, "easy" or "hard".
        limit: most windows of a class and genome, in each part.
        seed: of the choice of windows and of the split.
        progress: called as `progress(done, total)`, in tasks.

    Returns:
        The tasks, each with the parts "train" and "test".

    Raises:
        ConfigError: an unknown task, or settings out of range.
        DataError: files that cannot be used, or no task that they allow.
    """
    from .corpus import probe_tasks, read_corpus

    every: tuple[Task, ...] = ("donor", "acceptor", "regions", "species")
    strange = [name for name in names if name not in every]
    if strange:
        raise ConfigError(f"--task {strange[0]}: allowed are {', '.join(every)}")
    config = GenomicConfig(
        data=DataConfig(
            fasta=tuple(map(str, fasta)),
            annotation=tuple(map(str, annotation)),
            length=max(24, min(length, 512)),
            validation=0.0,
            split_seed=seed,
        ),
        evaluate=EvaluateConfig(
            tasks=tuple(names) or every,  # type: ignore[arg-type]
            length=length,
            site_length=length,
            decoys=decoys,  # type: ignore[arg-type]
            limit=limit,
        ),
    )
    corpus = read_corpus(config)
    found, left_out = probe_tasks(corpus, config.evaluate, seed=seed, progress=progress)
    if not found or (names and len(found) < len(set(names))):
        raise DataError(f"{corpus.name}: {'; '.join(left_out) or 'no task can be cut from it'}")
    return [_joined(task.name, task.fit, task.score) for task in found]


def _joined(name: str, fit: Sequences, score: Sequences) -> Sequences:
    width = max(fit.sequences.shape[1], score.sequences.shape[1])
    return Sequences(
        name=name,
        sequences=np.concatenate([_widened(part.sequences, width) for part in (fit, score)]),
        lengths=np.concatenate([fit.lengths, score.lengths]),
        labels=np.concatenate([fit.labels, score.labels]),
        classes=fit.classes,
        groups=(*fit.groups, *score.groups),
        split=(*["train"] * len(fit), *["test"] * len(score)),
    )


def _widened(windows: np.ndarray, width: int) -> np.ndarray:
    return np.pad(windows, ((0, 0), (0, width - windows.shape[1])), constant_values=ord("N"))


def write_tasks(tasks: Sequence[Sequences], folder: Path, *, format: str = "csv") -> list[dict[str, Any]]:
    """Write tasks as tables with the columns sequence, label, group, split; `finetune` reads them.

    Args:
        tasks: what to write.
        folder: where to; made where it is missing.
        format: "csv", "tsv" or "parquet".

    Returns:
        A row for each: `task`, `file`, `windows`, `bases` (of a window), `counts` (class → windows).

    Raises:
        ConfigError: another format.
        DataError: the folder cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: allowed are {', '.join(FORMATS)}")
    rows = []
    for task in tasks:
        target = Path(folder) / f"{_slug(task.name)}.{format}"
        _write_table(task, target, format)
        counts = np.bincount(task.labels, minlength=len(task.classes)).tolist()
        rows.append(
            {
                "task": task.name,
                "file": str(target),
                "windows": len(task),
                "bases": int(task.lengths.max()),
                "counts": dict(zip(task.classes, counts, strict=True)),
            }
        )
    return rows


def _write_table(task: Sequences, target: Path, format: str) -> None:
    import csv

    letters = [row[:n].tobytes().decode("ascii") for row, n in zip(task.sequences, task.lengths, strict=True)]
    labels = [task.classes[label] for label in task.labels]
    split = task.split or ("train",) * len(task)
    columns = {"sequence": letters, "label": labels, "group": list(task.groups), "split": list(split)}

    def write(path: Path) -> None:
        if format == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table(columns), path)
            return
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter="," if format == "csv" else "\t", lineterminator="\n")
            table.writerow(columns)
            table.writerows(zip(*columns.values(), strict=True))

    _replaced(target, write)


def write_simulated(folder: Path, *, seed: int = 0, kilobases: int | None = None) -> dict[str, Any]:
    """Write the two simulated genomes, each as FASTA and GFF3.

    Args:
        folder: where to; made where it is missing.
        seed: which genomes.
        kilobases: size of each; None: the simulator's.

    Returns:
        "fasta" and "annotation": paths, in order.

    Raises:
        DataError: the folder cannot be written.
    """
    from .corpus import simulated
    from .data import genome_records, write_fasta, write_gff3

    config = DataConfig(simulate_seed=seed)
    if kilobases is not None:
        config = DataConfig(simulate_seed=seed, simulate_kilobases=max(kilobases, 40))
    fasta, annotation = [], []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for genome in simulated(config):
            fasta.append(Path(folder) / f"{_slug(genome.name)}.fa")
            annotation.append(fasta[-1].with_suffix(".gff3"))
            write_fasta(fasta[-1], genome_records(genome))
            write_gff3(annotation[-1], genome.features)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
    return {"fasta": [str(path) for path in fasta], "annotation": [str(path) for path in annotation]}


def export_huggingface(artifact: Path, folder: Path) -> dict[str, Any]:
    """Write a student as a model folder of Hugging Face alone and check that it computes the same.

    The folder of a student is a Hugging Face folder already; the export leaves out what only this package
    reads.

    Args:
        artifact: the student's folder, or a run's.
        folder: where to; made where it is missing.

    Returns:
        "format", "files", and "parity": the largest difference between the features of both on random
        letters.

    Raises:
        DataError: the student cannot be read, the folder cannot be written, or the two differ.
    """
    import torch
    from transformers import AutoModel

    from . import huggingface
    from .student.store import TRAINING, load_student

    loaded = load_student(artifact)
    source, own = loaded.artifact.folder, {"artifact.json", "metrics.json", "provenance.json", "SHA256SUMS"}
    names = [p.name for p in sorted(source.iterdir()) if p.is_file() and p.name not in {*own, TRAINING}]
    work = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        for name in names:
            shutil.copyfile(source / name, work / name)
        assert huggingface.StudentModel is not None  # importing it registers the classes
        model = AutoModel.from_pretrained(work).eval()
        letters = torch.tensor(loaded.tokenizer.nucleotide_ids)
        ids = letters[torch.randint(4, (2, 96), generator=torch.Generator().manual_seed(0))]
        with torch.no_grad():
            difference = (model(ids).last_hidden_state - loaded.encoder(ids)).abs().max().item()
        if not difference <= 1e-5:
            raise DataError(f"{artifact}: the exported model differs from the student by {difference:.2g}")
        for name in names:
            os.replace(work / name, folder / name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"format": "huggingface", "files": names, "parity": difference, "folder": str(folder)}


def _replaced(target: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name and rename it."""
    work = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(work)
        os.replace(work, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); give another --out") from error
    finally:
        work.unlink(missing_ok=True)


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
