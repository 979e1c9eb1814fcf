"""The page: which network completes best, at what cost, what the scenes look like, how it was made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stillhouse.core.report import Report

from ._making import add_made, add_preference, add_training
from ._numbers import best_row, estimate, score
from ._quality import add_curves, add_pictures, add_tables
from ._results import LidarResults, RowResult, load_results

_CONVENTIONS = {
    "correct": (
        "Metrics are in the **correct** convention: JSD is the Jensen–Shannon divergence in nats (0 equal, "
        "0.693 disjoint), the completion IoU counts points within ±50 m at every voxel size, RMSE is a root "
        "mean square. Published tables have JSD as its square root, and most of them another IoU: "
        "these numbers are not for comparing with them."
    ),
    "reference": (
        "Metrics are in the **reference** convention, that of the code which most published tables were made "
        "with: JSD is the square root of the Jensen–Shannon divergence in nats (0 equal, 0.833 disjoint), "
        "the completion IoU keeps voxels numbered up to ±50 only, that is ±25, ±10 and ±5 m at 0.5, 0.2 and "
        "0.1 m, and “RMSE” is a mean distance. Never compare with numbers of the correct convention."
    ),
}
FEW = 8  # steps


def write_report(
    folder: str | os.PathLike[str], results: LidarResults | None = None, *, out: Path | None = None
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


def build_report(results: LidarResults, folder: Path) -> Report:
    """Build the report.

    Args:
        results: the results.
        folder: what the paths of pictures and logs in the results are relative to; a missing one is left out,
            and the report says so.
    """
    report = Report(
        "LiDAR scene completion",
        subtitle=f"Students distilled from a local point diffusion, on {results.data}",
        summary=_summary(results),
        meta={"data": results.data, "seed": _seeds(results), "made": results.made},
    )
    _headline(report, results)
    add_pictures(report, results, folder)
    add_tables(report, results)
    add_curves(report, results)
    add_preference(report, results)
    add_training(report, results, folder)
    add_made(report, results)
    return report


def _seeds(results: LidarResults) -> str:
    return ", ".join(map(str, results.seeds)) if results.seeds else str(results.seed)


def _summary(results: LidarResults) -> str:
    text = _CONVENTIONS[results.convention]
    if results.intervals:
        text += f" Brackets are 95\u202f% intervals that resample {results.intervals}."
    if results.simulated:
        text += (
            "\n\n**The networks were trained on simulated streets. The numbers are for comparing them with "
            "each other; they say little about a real sensor.**"
        )
    return text


# ---- top


def _headline(report: Report, results: LidarResults) -> None:
    name, rows = results.main
    sentences = [part for part in (_best(rows), _against_teacher(rows), _against_baseline(rows)) if part]
    report.headline(f"On {name}: " + " ".join(sentences), facts=_facts(rows))


def _best(rows: Sequence[RowResult]) -> str:
    nearest, flattest = best_row(rows, "chamfer"), best_row(rows, "jsd_bev")
    if nearest is None:
        return "no distances were measured."
    text = f"the lowest Chamfer distance is that of “{nearest.name}”, {score(nearest, 'chamfer'):.3f} m"
    if flattest is None:
        return text + "."
    if flattest is nearest:
        return text + f", which has the lowest JSD-BEV as well, {score(flattest, 'jsd_bev'):.3f}."
    return text + f"; the lowest JSD-BEV that of “{flattest.name}”, {score(flattest, 'jsd_bev'):.3f}."


def teacher_of(rows: Sequence[RowResult]) -> RowResult | None:
    """The teacher at its largest number of steps."""
    teachers = [row for row in rows if row.family == "teacher"]
    return max(teachers, key=lambda row: row.steps or 0, default=None)


def beats(row: RowResult, other: RowResult) -> bool:
    """Whether Chamfer distance and JSD-BEV are both lower."""
    pairs = [(score(row, metric), score(other, metric)) for metric in ("chamfer", "jsd_bev")]
    return all(mine is not None and theirs is not None and mine < theirs for mine, theirs in pairs)


def _against_teacher(rows: Sequence[RowResult]) -> str:
    teacher = teacher_of(rows)
    students = [row for row in rows if row.family != "teacher" and not row.undistilled and _few(row)]
    if teacher is None or not students:
        return ""
    winners = [row for row in students if beats(row, teacher)]
    if not winners:
        return (
            f"No student of at most {FEW} steps beats “{teacher.name}” in both Chamfer distance and JSD-BEV."
        )
    fastest = min(winners, key=lambda row: row.seconds)
    text = (
        f"{len(winners)} of {len(students)} rows of students with at most {FEW} steps beat “{teacher.name}” "
        f"in both Chamfer distance and JSD-BEV; the fastest of them is “{fastest.name}”"
    )
    speed = estimate(fastest.speedup)
    return text + (f", {speed:.3g} times as fast." if speed is not None else ".")


def _few(row: RowResult) -> bool:
    return row.steps is None or row.steps <= FEW


def _against_baseline(rows: Sequence[RowResult]) -> str:
    """The distilled single pass against the same network trained without the teacher."""
    baseline = next((row for row in rows if row.undistilled), None)
    if baseline is None or score(baseline, "chamfer") is None:
        return ""
    students = [row for row in rows if row.family != "teacher" and not row.undistilled]
    winners = [row for row in students if beats(row, baseline) and row.seconds <= 1.1 * baseline.seconds]
    if winners:
        return f"“{winners[0].name}” beats “{baseline.name}” in both within a tenth of its time."
    slower = [row for row in students if beats(row, baseline)]
    if slower:
        first = min(slower, key=lambda row: row.seconds)
        return f"Better than “{baseline.name}” in both is “{first.name}”, in more time."
    return f"No student beats “{baseline.name}” in both."


def _facts(rows: Sequence[RowResult]) -> list[tuple[str, str]]:
    teacher = teacher_of(rows)
    students = [row for row in rows if row.family != "teacher" and not row.undistilled and _few(row)]
    winners = [row for row in students if teacher is not None and beats(row, teacher)]
    shown = min(winners, key=lambda row: row.seconds) if winners else best_row(students, "chamfer")
    if shown is None:
        return []
    facts = []
    value = score(shown, "chamfer")
    if value is not None:
        facts.append((f"{value:.3f} m", f"Chamfer distance of {shown.name}"))
    theirs = None if teacher is None else score(teacher, "chamfer")
    if teacher is not None and theirs is not None:
        facts.append((f"{theirs:.3f} m", f"of {teacher.name}"))
    speed = estimate(shown.speedup)
    if speed is not None:
        facts.append((f"{speed:.3g} ×", "as fast as that teacher"))
    facts.append((f"{shown.seconds:.3g} s", "a scene"))
    return facts[:4]
