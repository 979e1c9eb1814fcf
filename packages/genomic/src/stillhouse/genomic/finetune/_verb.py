"""The verb `finetune`: files in; a classifier, `finetune.json`, predictions and a report out."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from stillhouse.core.errors import DataError
from stillhouse.core.files import replacing
from stillhouse.core.run import Run, jsonable

from ._config import FinetuneConfig
from ._fit import FinetuneResult, check_parts, finetune
from ._store import FOLDER, save_classifier

if TYPE_CHECKING:
    from stillhouse.core.artifact import Artifact

    from ..data import Sequences
    from ..student.store import Loaded


def finetune_student(
    student: Path,
    task: Path,
    config: FinetuneConfig,
    run: Run,
    *,
    test: Path | None = None,
    reference: Path | None = None,
    scratch: bool = False,
) -> dict[str, Any]:
    """Fine-tune a finished student on a file of labelled sequences.

    Args:
        student: its folder, or the folder of its run.
        task: see `read_parts`.
        config: the protocol.
        run: where the classifier of the best seed, `finetune.json`, `predictions.tsv`, the logs and the
            report go, and the device.
        test: the test part, where `task` has no splits.
        reference: the genome of a folder of Genomic Benchmarks.
        scratch: forget the weights.

    Returns:
        `artifact`, the classifier; `report`; the metric and its value over the seeds.

    Raises:
        DataError: a file cannot be used; nothing is written then.
    """
    from ..verbs import load

    train_part, test_part = read_parts(task, test, reference=reference)
    check_parts(train_part, test_part, config.scorer().key)
    device = run.torch_device()
    loaded = load(student, run)
    config = replace(config, accelerator=device.type)
    encoder: Any = loaded.encoder
    if scratch:
        encoder = _fresh(loaded)
    run.say(
        f"{train_part.name}: {len(train_part.labels)} sequences to train on, {len(test_part.labels)} to test "
        f"on, classes {', '.join(train_part.classes)}; metric {config.scorer().label}"
    )
    with run.progress("Fine-tuning", total=config.seeds) as bar:
        found = finetune(
            encoder,
            train_part,
            config,
            test=test_part,
            out=run.create(),
            progress=lambda count: bar.advance(count),
        )
    saved = _save(found, train_part, config, run, loaded, scratch=scratch)
    result = _write(found, test_part, config, run, student=student, task=task, scratch=scratch)
    return {"artifact": str(saved.folder), **result}


def _save(
    found: FinetuneResult,
    train: Sequences,
    config: FinetuneConfig,
    run: Run,
    loaded: Loaded,
    *,
    scratch: bool,
) -> Artifact:
    """Write the classifier of the seed with the best validation score; it inherits the student's terms."""
    from ..student.store import licence_of

    best = max(found.seeds, key=lambda one: one.validation)
    own = {"what": "labelled sequences", "name": train.name, "licence": "as their owner says"}
    inherited = [] if scratch else list(loaded.artifact.provenance.get("licences", ()))
    value = best.scores[found.key]
    start = "random weights" if scratch else "a pre-trained student"
    card = (
        f"# A classifier of DNA: {train.name}\n\n"
        f"Tells {', '.join(train.classes)} apart. Fine-tuned from {start} on {found.sizes['train']} "
        f"sequences of up to {train.lengths.max()} bp, seed {best.seed} of {len(found.seeds)}, the one with "
        f"the best validation score; epoch {best.epoch}.\n\n"
        f"{found.metric} on {found.sizes['test']} test sequences: {value.estimate:.3f} [{value.low:.3f}, "
        f"{value.high:.3f}]; over all seeds {found.summary[found.key]['mean']:.3f}."
    )
    return save_classifier(
        run.path(FOLDER),
        found.classifier,
        train.classes,
        config,
        length=int(train.lengths.max()),
        card=card,
        licence="unknown" if scratch else licence_of(loaded),
        licences=[*inherited, own],
        training=loaded.training,
        metrics=jsonable({"seed": best.seed, **found.to_dict()}),
        provenance={
            "dataset": {"name": train.name, "sizes": dict(found.sizes)},
            "student": None if scratch else {"digest": loaded.artifact.digest},
        },
    )


def read_parts(
    task: Path, test: Path | None = None, *, reference: Path | None = None
) -> tuple[Sequences, Sequences]:
    """Read the training part (validation rows included) and the test part.

    Args:
        task: a table or FASTA of labelled sequences, a folder of the Nucleotide Transformer benchmark, or
            with `reference` a folder of Genomic Benchmarks.
        test: the test part, where `task` has none.
        reference: the genome that the intervals of Genomic Benchmarks refer to.

    Raises:
        DataError: a file cannot be used, or there is no test part.
    """
    from ..data import Fasta, read_genomic_benchmark, read_labelled, read_nt_benchmark

    if reference is not None:
        whole = read_genomic_benchmark(task, Fasta(reference))
    elif task.is_dir():
        whole = read_nt_benchmark(task)
    else:
        whole = read_labelled(task, **own_columns(task))
    if test is not None:
        columns = own_columns(test) | {"split": None}
        return whole, read_labelled(test, classes=whole.classes, **columns)
    marks = np.asarray(whole.split if whole.split is not None else ())
    if "test" not in marks:
        raise DataError(f"{task}: has no column `split` with rows `test`; give the test part with --test")
    return whole.subset(marks != "test"), whole.subset(marks == "test")


def own_columns(path: Path) -> dict[str, str | None]:
    """The columns `group` and `split`, where a table has them; what cannot be read is told by the reader."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start == b"PAR1":
            import pyarrow.parquet as pq

            names = list(pq.read_schema(path).names)
        else:
            opened = gzip.open if start[:2] == b"\x1f\x8b" else open
            with opened(path, "rt", encoding="utf-8") as text:
                header = next((line for line in text if line.strip()), "")
            names = [] if header.startswith(">") else re.split("[,\t]", header.strip().lower())
    except (OSError, EOFError, ValueError, zlib.error):
        names = []
    return {name: name if name in names else None for name in ("group", "split")}


def _fresh(loaded: Any) -> Any:
    """A function from a seed to the same network with random weights."""
    import torch

    from ..student import build_student

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build_student(loaded.config)

    return make


def _write(
    found: FinetuneResult,
    test: Sequences,
    config: FinetuneConfig,
    run: Run,
    *,
    student: Path,
    task: Path,
    scratch: bool,
) -> dict[str, Any]:
    from ..report import finetune_report

    table = {
        "task": task.name,
        "student": student.name,
        "scratch": scratch,
        "classes": list(test.classes),
        "config": asdict(config),
        **found.to_dict(),
    }
    text = json.dumps(jsonable(table), indent=1, ensure_ascii=False) + "\n"
    with replacing(run.path("finetune.json")) as work:
        work.write_text(text, encoding="utf-8")
    with replacing(run.path("predictions.tsv")) as work, work.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        mean = np.mean([one.probabilities for one in found.seeds], axis=0)
        writer.writerow(["row", "group", "label", "predicted", *(f"p_{name}" for name in test.classes)])
        for at, (label, p) in enumerate(zip(test.labels, mean, strict=True)):
            group = test.groups[at] if at < len(test.groups) else ""
            names = test.classes[int(label)], test.classes[int(p.argmax())]
            writer.writerow([at, group, *names, *(f"{value:.6g}" for value in p)])
    page = finetune_report(table, found, test, run.create())
    summary = found.summary[found.key]
    return {
        "report": str(page),
        "metric": found.metric,
        "mean": summary["mean"],
        "half_range": summary["half_range"],
        "low": summary["low"],
        "high": summary["high"],
        "seeds": len(found.seeds),
        "sizes": dict(found.sizes),
    }
