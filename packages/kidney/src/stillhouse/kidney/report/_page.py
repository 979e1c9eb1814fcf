"""The page: what the student can do, against whom, and how far the numbers can be trusted."""

from __future__ import annotations

import os
from pathlib import Path

from stillhouse.core.report import Report

from ._making import add_data, add_made, add_speed
from ._numbers import number, percent, text_of
from ._quality import add_classes, add_confidence, add_quality, add_views
from ._results import KidneyResults, ModelRow, load_results
from ._seeing import add_embedding, add_new_classes


def write_report(
    folder: str | os.PathLike[str], results: KidneyResults | None = None, *, out: Path | None = None
) -> Path:
    """Build the report of a run and write it.

    Args:
        folder: the run's folder, with `results.json` and the pictures it names.
        results: the results; None reads them from the folder.
        out: where the report goes; the run's folder where None.

    Returns:
        Path of report.html.
    """
    got = load_results(folder) if results is None else results
    return build_report(got, Path(folder)).write(Path(folder) if out is None else out)


def build_report(results: KidneyResults, folder: Path) -> Report:
    """Build the report.

    Args:
        results: the results.
        folder: what the paths of pictures and logs in the results are relative to; a missing one is left out,
            and the report says so.
    """
    report = Report(
        "Kidney-stone identification",
        subtitle=f"A student distilled from a multi-branch few-shot teacher, on {results.data}",
        summary=_summary(results),
        meta={
            "data": results.data,
            "split": f"by {results.split}",
            "seed": results.seed,
            "made": results.made,
        },
    )
    _headline(report, results)
    add_quality(report, results)
    add_views(report, results)
    add_classes(report, results)
    add_confidence(report, results)
    add_embedding(report, results, folder)
    add_new_classes(report, results)
    add_speed(report, results)
    add_data(report, results)
    add_made(report, results, folder)
    return report


# ---- top


def _summary(results: KidneyResults) -> str:
    scores = results.student.scores
    of = f"{scores['stones']} stones" if scores.get("stones") else "stones that are not told apart"
    text = f"Every number is on {scores['items']} test images of {of}"
    if results.split == "stone":
        text += ", none of which was seen in training."
    elif results.split == "patch":
        text += (
            ". **The split is by patch: images of the same stone are in training and test, so scores are "
            "too good.**"
        )
    else:
        text += ", split as the data set comes."
    text += f" Brackets are {100 * scores['level']:.0f}\u202f% intervals that resample {scores['resampled']}."
    if results.simulated:
        text += (
            "\n\n**The images are simulated. These numbers are for trying the software out; they say nothing "
            "about patients.**"
        )
    return text


def _headline(report: Report, results: KidneyResults) -> None:
    student, mine = results.student, number(results.student.scores["accuracy"])
    facts = [(percent(mine), "accuracy of the student")]
    sentence = f"The student names {text_of(student.scores['accuracy'])} of the test images rightly"
    teachers = results.by_role("teacher")
    if teachers:
        theirs = number(teachers[0].scores["accuracy"])
        if theirs > 0:
            facts.append((percent(mine / theirs), "of the teacher’s accuracy"))
        sentence += f"; its teacher {text_of(teachers[0].scores['accuracy'])}"
    baselines = results.by_role("baseline")
    if baselines:
        sentence += ", " + ", ".join(f"{row.name} {text_of(row.scores['accuracy'])}" for row in baselines)
    better = [
        f"{row.name}{_beyond(results, row)}" for row in baselines if number(row.scores["accuracy"]) > mine
    ]
    if better:
        sentence += f". Better than the student: {', '.join(better)}"
    ratio = next(
        (row.get("size_ratio") for row in results.profiles if row.get("model") == student.name), None
    )
    if isinstance(ratio, float) and 0 < ratio < 1:
        facts.append((f"1/{1 / ratio:.1f}", "of the teacher’s size"))
    new = results.new_class.get(student.name)
    if new:
        facts.append(
            (
                percent(number(new["accuracy"])),
                f"on {new['classes']} new classes from {new['shots']} images each",
            )
        )
    report.headline(sentence + ".", facts=facts[:4])


def _beyond(results: KidneyResults, row: ModelRow) -> str:
    """Whether the student falls short of a row by more than chance, in brackets; empty where not measured."""
    found = results.differences.get(f"{results.student.name} − {row.name}")
    if found is None or found.get("low") is None:
        return ""
    return " (beyond chance)" if found["high"] < 0 else " (within chance)"
