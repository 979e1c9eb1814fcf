"""The sections on scenes, scores and the curve of quality over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.core.metrics import Interval
from stillhouse.core.report import Report, Section

from ._numbers import FURTHER, better, form, heading, interval, is_inside, metrics_of, score
from ._results import LidarResults, RowResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VIEWS = {"above": "From above, driving direction up.", "oblique": "Obliquely, from behind and above."}


def add_pictures(report: Report, results: LidarResults, folder: Path) -> None:
    """Each scene before and after."""
    if not results.pictures:
        return
    section = report.section("Scenes", "Colour is height above the road; what is far is darker.")
    missing = 0
    for group in results.pictures:
        there = [(caption, name) for caption, name in group.tiles if is_inside(folder, name)]
        missing += len(group.tiles) - len(there)
        if there:
            section.images(
                [[(folder / name, caption, "") for caption, name in there]],
                caption=f"{group.scene}. {_VIEWS.get(group.view, group.view)}",
                max_side=520,
                size=248,
            )
    if missing:
        many = f"{missing} pictures are left out: their files are"
        which = "1 picture is left out: its file is" if missing == 1 else many
        section.text(f"{which} no longer in the run’s folder.")


def add_tables(report: Report, results: LidarResults) -> None:
    """All rows of every data set: scores, cost, paired differences."""
    section = report.section("Quality and cost", _explain(results))
    for name, rows in results.tables.items():
        if not rows:
            continue
        metrics = metrics_of(rows)
        overlap = [m for m in metrics if m.startswith("iou_")]
        further = [m for m in metrics if m in FURTHER]
        _scores(section, results, name, rows, [m for m in metrics if m not in (*overlap, *further)])
        _costs(section, results, name, rows)
        for group in (overlap, further):
            if group:
                _scores(section, results, name, rows, group)
        notes = [f"- **{row.name}**: {row.note}" for row in rows if row.note]
        if notes:
            section.text("\n".join(notes))
        found = results.differences.get(name)
        if found:
            section.table(
                [
                    {"difference": title, "value": interval(value), "beyond chance": _beyond(value)}
                    for title, value in found.items()
                ],
                formats={"value": "+.4f"},
                caption=f"{name}: paired on the same sweeps; “beyond chance” says whether the interval "
                "leaves out zero.",
            )
        if results.scans.get(name):
            section.text(f"Sweeps that were scored, {name}: {', '.join(results.scans[name])}.")


def _explain(results: LidarResults) -> str:
    text = (
        f"Convention “{results.convention}”, see above. CD is half the sum of the mean distances from the "
        "completion to the truth and back, in metres, not squared. JSD compares histograms of 0.5 m bins, in "
        "three dimensions and from above (BEV). IoU is that of occupied voxels. A network evaluation is one "
        "pass of the noise net, or of a single-pass network; a guided step takes two."
    )
    return f"{text} {results.timing_note}".strip()


def _scores(
    section: Section, results: LidarResults, name: str, rows: Sequence[RowResult], metrics: Sequence[str]
) -> None:
    headings = {metric: heading(metric) for metric in metrics}
    section.table(
        [
            {"row": row.name, **{title: interval(row.scores.get(m)) for m, title in headings.items()}}
            for row in rows
        ],
        best={
            title: better(m) for m, title in headings.items() if any(score(r, m) is not None for r in rows)
        },
        formats={title: form(m) for m, title in headings.items()},
        caption=f"{name}, {results.convention} convention.",
    )


def _costs(section: Section, results: LidarResults, name: str, rows: Sequence[RowResult]) -> None:
    ratio = any(row.speedup is not None for row in rows)
    section.table(
        [
            {
                "row": row.name,
                "steps": row.steps,
                "guidance w": row.guidance,
                "evaluations": row.evaluations,
                "seconds": row.seconds,
                **({"times as fast": interval(row.speedup)} if ratio else {}),
                "parameters": row.parameters,
            }
            for row in rows
        ],
        formats={
            "guidance w": ".3g",
            "evaluations": ".4g",
            "seconds": ".3g",
            "parameters": "count",
            **({"times as fast": ".1f"} if ratio else {}),
        },
        best={"seconds": "min"},
        caption=f"{name}: cost of one scene.",
        note="Seconds are medians; all rows complete a sweep in turns before the next sweep is begun."
        + (" “Times as fast” compares with the teacher at its largest number of steps." if ratio else ""),
    )


def _beyond(value: Mapping[str, Any]) -> str:
    if value.get("low") is None or value.get("high") is None:
        return "–"
    return "yes" if value["low"] > 0 or value["high"] < 0 else "no"


def add_curves(report: Report, results: LidarResults) -> None:
    """Chamfer distance and JSD-BEV over seconds, one line a network."""
    from stillhouse.core.report.figures import step_curves

    drawn: list[tuple[str, list[tuple[Figure, str, str]]]] = []
    for name, rows in results.tables.items():
        figures: list[tuple[Figure, str, str]] = []
        for metric in ("chamfer", "jsd_bev"):
            lines = _lines(rows, metric)
            if sum(map(len, lines.values())) > 1:
                label = f"{heading(metric)} (less is better)"
                figures.append(
                    (step_curves(lines, label=label, xlabel="seconds a scene"), "", _spoken(lines, metric))
                )
        if figures:
            drawn.append((name, figures))
    if not drawn:
        return
    section = report.section(
        "Steps, quality, time", "Marks are numbers of steps; lower and further left is better."
    )
    for name, figures in drawn:
        section.text(f"{name}:")
        section.figures(figures)


def _lines(rows: Sequence[RowResult], metric: str) -> dict[str, list[tuple[float, float | Interval, str]]]:
    lines: dict[str, list[tuple[float, float | Interval, str]]] = {}
    for row in rows:
        value = interval(row.scores.get(metric))
        if value is None or not row.seconds > 0:
            continue
        mark = "" if row.family == "single_pass" or row.steps is None else str(row.steps)
        lines.setdefault(row.model, []).append((row.seconds, value, mark))
    return lines


def _spoken(lines: Mapping[str, Sequence[tuple[float, float | Interval, str]]], metric: str) -> str:
    """The curve for readers who cannot see it."""
    parts = []
    for name, points in lines.items():
        said = ", ".join(
            f"{value.estimate if isinstance(value, Interval) else value:.3f} in {seconds:.2g} s"
            + (f" ({mark} steps)" if mark else "")
            for seconds, value, mark in points
        )
        parts.append(f"{name}: {said}")
    return f"{heading(metric)} over seconds. " + "; ".join(parts)
