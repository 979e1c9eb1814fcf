"""The page: what the student can do, against whom, and how far the numbers can be trusted."""

from __future__ import annotations

import os
from pathlib import Path

from stillhouse.core.report import Report

from ._made import add_card, add_cost, add_data, add_made, add_training
from ._numbers import number
from ._quality import add_ablation, add_consistency, add_embedding, add_finetuned, add_quality
from ._results import GenomicResults, ModelRow, load_results


def write_report(
    folder: str | os.PathLike[str], results: GenomicResults | None = None, *, out: Path | None = None
) -> Path:
    """Build the report of a run and write it.

    Args:
        folder: the run's folder, with `results.json` and the logs it names.
        results: the results; None reads them from the folder.
        out: where the report goes; the run's folder where None.

    Returns:
        Path of report.html.
    """
    got = load_results(folder) if results is None else results
    return build_report(got, Path(folder)).write(Path(folder) if out is None else out)


def build_report(results: GenomicResults, folder: Path) -> Report:
    """Build the report.

    Args:
        results: the results.
        folder: what the paths of logs in the results are relative to; a missing one is left out, and the
            report says so.
    """
    report = Report(
        "Genomic distillation",
        subtitle=f"A small encoder distilled from a 6-mer teacher, on {results.data}",
        summary=_summary(results),
        meta={"data": results.data, "seed": results.seed, "made": results.made},
    )
    _headline(report, results)
    add_quality(report, results)
    add_ablation(report, results)
    add_finetuned(report, results)
    add_embedding(report, results)
    add_consistency(report, results)
    add_cost(report, results)
    add_training(report, results, folder)
    add_data(report, results)
    add_card(report, results)
    add_made(report, results)
    return report


def _summary(results: GenomicResults) -> str:
    metrics = sorted({task.metric for task in results.tasks})
    text = "Every model answers the same test windows; none of them was seen in training."
    if metrics:
        text += f" Scores are {', '.join(metrics)}: the convention in brackets says whose definition it is."
    if results.simulated:
        text += (
            "\n\n**The genome is simulated. These numbers are for trying the software out; they say nothing "
            "about organisms.**"
        )
    return text


def _headline(report: Report, results: GenomicResults) -> None:
    """Say how the student stands beside its teacher and the ablations, losses included."""
    student, teachers = results.student, results.by_role("teacher")
    facts: list[tuple[str, str]] = []
    parts: list[str] = []
    if teachers:
        teacher = teachers[0]
        common, better = _compare(results, student, teacher)
        if common:
            tasks = f"task{'' if common == 1 else 's'}"
            parts.append(
                f"The student scores at or above its teacher on {better} of {common} {tasks}"
                if better
                else f"The student scores below its teacher on all of {common} {tasks}"
            )
            facts.append((f"{better} of {common}", "tasks at or above the teacher"))
        if student.parameters and teacher.parameters:
            times = teacher.parameters / student.parameters
            parts.append(f"with {times:.3g} times fewer parameters" if times >= 1 else "and is not smaller")
            facts.append((f"1/{times:.3g}" if times >= 1 else f"{1 / times:.3g} ×", "of its parameters"))
    faster = _speed_up(results, student.name)
    if faster is not None:
        facts.append((f"{faster:.3g} ×", "its embedding speed"))
    ahead = []
    for row in results.by_role("ablation", "baseline"):
        common, better = _compare(results, student, row)
        if common and better < common:
            ahead.append(f"{row.name} on {common - better} of {common}")
    if ahead:
        parts.append(f"higher than the student: {', '.join(ahead)}")
    if not parts:
        parts = [f"The student {student.name} was evaluated on {len(results.tasks)} tasks"]
    report.headline("; ".join(parts).replace("; with", " with") + ".", facts=facts[:4])


def _compare(results: GenomicResults, first: ModelRow, second: ModelRow) -> tuple[int, int]:
    """Tasks that both have a score on, and on how many the first is not below the second."""
    mine, theirs = results.scores.get(first.name, {}), results.scores.get(second.name, {})
    common = [task for task in mine if task in theirs]
    return len(common), sum(number(mine[task]) >= number(theirs[task]) for task in common)


def _speed_up(results: GenomicResults, student: str) -> float | None:
    rates = {str(row["model"]): float(row["bases_per_second"]) for row in results.throughput}
    teachers = [row.name for row in results.by_role("teacher") if row.name in rates]
    if student not in rates or not teachers or rates[teachers[0]] <= 0:
        return None
    return rates[student] / rates[teachers[0]]
