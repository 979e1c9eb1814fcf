"""The page of a fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillhouse.core.metrics import Interval
from stillhouse.core.report import Report

from ._numbers import flat

if TYPE_CHECKING:
    from ..data import Sequences
    from ..finetune import FinetuneResult


def finetune_report(table: Mapping[str, Any], found: FinetuneResult, test: Sequences, folder: Path) -> Path:
    """Write the report of a fine-tuning.

    Args:
        table: what `finetune.json` holds.
        found: the result.
        test: the test part.
        folder: the run's folder; the report and the logs are there.

    Returns:
        Path of report.html.
    """
    from stillhouse.core.report.figures import confusion_matrix, training_curves

    from ..metrics import confusion

    main = found.summary[found.key]
    start = "random weights" if table["scratch"] else "the pre-trained student"
    report = Report(
        f"Fine-tuning on {table['task']}",
        subtitle=f"From {start}, {len(found.seeds)} training{'' if len(found.seeds) == 1 else 's'}",
        summary=f"Scored on {found.sizes['test']} test sequences. The metric is {found.metric}; the name in "
        "brackets says whose definition it is.",
        meta={"task": table["task"], "student": table["student"], "classes": ", ".join(test.classes)},
    )
    report.headline(
        f"{found.metric}: {main['mean']:.3f} over {len(found.seeds)} "
        f"seed{'' if len(found.seeds) == 1 else 's'}.",
        facts=[
            (f"{main['mean']:.3f}", found.metric),
            (f"± {main['half_range']:.3f}", "half the range over seeds"),
            (f"{found.summary['accuracy']['mean']:.3f}", "accuracy"),
            (f"{found.sizes['train']}", "training sequences"),
        ],
    )
    section = report.section("Scores")
    keys = list(found.summary)
    section.table(
        [
            {"seed": one.seed, "best epoch": one.epoch, "validation": one.validation, **dict(one.scores)}
            for one in found.seeds
        ],
        formats={"validation": ".3f", **dict.fromkeys(keys, ".3f")},
        caption="Each training on the test part; brackets resample the test sequences, or their groups.",
        note="The validation score chose the epoch and is no result.",
    )
    section.table(
        [
            {
                "metric": key,
                "mean over seeds": value["mean"]
                if value["low"] is None
                else Interval(value["mean"], value["low"], value["high"]),
                "± (max − min)/2": value["half_range"],
            }
            for key, value in found.summary.items()
        ],
        formats={"mean over seeds": ".3f", "± (max − min)/2": ".3f"},
        caption="Over the seeds: Student’s t interval, and half the range.",
    )
    mean = np.mean([one.probabilities for one in found.seeds], axis=0)
    counts = confusion(test.labels, mean.argmax(axis=1), len(test.classes))
    section.figure(
        confusion_matrix(counts, test.classes, title="mean of the seeds"),
        caption="Rows are true classes; shade and percentage are shares of a row.",
        alt=f"Confusion matrix: {counts.tolist()}",
    )
    logs = [(one.seed, folder / f"seed-{one.seed}" / "log.jsonl") for one in found.seeds]
    figures = [
        (training_curves(path, title=f"seed {seed}"), "", f"Training of seed {seed}.")
        for seed, path in logs
        if path.is_file()
    ]
    if figures:
        report.section("Training").figures(figures[:4])
    made = report.section("How it was made")
    made.kv(dict(flat(table["config"])), caption="Configuration.")
    made.kv(dict(found.sizes), caption="Sequences.")
    return report.write(folder)
