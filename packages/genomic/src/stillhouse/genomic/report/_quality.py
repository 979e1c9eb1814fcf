"""The sections on quality: the tasks, the ablation, fine-tuning, maps, the two strands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stillhouse.core.metrics import Interval
from stillhouse.core.report import Report, Section

from ._numbers import drawable, interval, number, spoken
from ._results import GenomicResults, ModelRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 10  # groups below which a bootstrap over groups is not to be trusted
_SHOWN_ROLES = ("teacher", "student")
_FURTHER = {"accuracy": "accuracy", "auroc": "AUROC"}


def add_quality(report: Report, results: GenomicResults) -> None:
    """Student against teacher on every task, with intervals."""
    if not results.tasks:
        return
    section = report.section(
        "Quality",
        "A linear probe on frozen features: what the representation holds, read by a logistic regression "
        "whose penalty is chosen on training groups alone. Whole groups are on one side of the split.",
    )
    _figure(section, results)
    section.table(
        [
            {
                "task": task.name,
                "metric": task.metric,
                "classes": len(task.classes) or None,
                "train": task.train,
                "test": task.test,
                "groups": task.groups,
                "chance": task.chance,
            }
            for task in results.tasks
        ],
        formats={"chance": ".3g"},
        caption="The tasks: windows to fit and to test on, and the groups behind the test windows.",
        note=_few(results),
    )
    notes = [f"- **{task.name}**: {task.note}" for task in results.tasks if task.note]
    if notes:
        section.text("\n".join(notes))
    further = {key: name for key, name in _FURTHER.items() if _has(results, key)}
    if further:
        rows = [
            {
                "task": task.name,
                "model": model.name,
                **{further[key]: _extra(results, model, task.name, key) for key in further},
            }
            for task in results.tasks
            for model in results.by_role(*_SHOWN_ROLES)
            if task.name in results.scores.get(model.name, {})
        ]
        section.table(
            rows, formats=dict.fromkeys(further.values(), ".3f"), caption="The same probes by other metrics."
        )


def _few(results: GenomicResults) -> str:
    """A warning where intervals rest on a handful of groups."""
    few = [task.name for task in results.tasks if task.groups is not None and task.groups < FEW]
    if not few:
        return ""
    return (
        f"Fewer than {FEW} groups: {', '.join(few)}. Resampling so few makes intervals that are too narrow; "
        "take them as a hint, not as a measure."
    )


def _figure(section: Section, results: GenomicResults) -> None:
    from stillhouse.core.report.figures import interval_bars

    shown = [model for model in results.by_role(*_SHOWN_ROLES) if results.scores.get(model.name)]
    tasks = [task.name for task in results.tasks if all(task.name in results.scores[m.name] for m in shown)]
    if not shown or not tasks:
        return
    values = {model.name: [drawable(results.scores[model.name][task]) for task in tasks] for model in shown}
    metrics = sorted({task.metric for task in results.tasks if task.name in tasks})
    section.figure(
        interval_bars(tasks, values, label=" or ".join(metrics)),
        caption="Student and teacher on every task; whiskers are 95\u202f% intervals.",
        alt="Scores: " + spoken(tasks, values),
    )


def _has(results: GenomicResults, key: str) -> bool:
    return any(key in scored for found in results.scores.values() for scored in found.values())


def _extra(results: GenomicResults, model: ModelRow, task: str, key: str) -> Any:
    return interval(results.scores.get(model.name, {}).get(task, {}).get(key))


def add_ablation(report: Report, results: GenomicResults) -> None:
    """Every row against every task: what each part of the objective is worth."""
    rows = [model for model in results.models if results.scores.get(model.name)]
    if len(rows) < 2 or not results.tasks:
        return
    section = report.section(
        "Ablation",
        "Each row is trained with the same data, steps and seeds; only what its name says differs. The best "
        "of a column is bold, whoever it is.",
    )
    tasks = [task.name for task in results.tasks]
    seeds = max(
        (len(found.get("seeds") or ()) for scored in results.scores.values() for found in scored.values()),
        default=0,
    )
    note = (
        f"Intervals are over {seeds} seeds."
        if seeds > 1
        else "Intervals resample the groups of the test windows; there is one training a row."
    )
    section.table(
        [
            {
                "model": model.name,
                "parameters": model.parameters,
                **{task: _estimate(results, model, task) for task in tasks},
                "mean": _mean(results, model, tasks),
            }
            for model in rows
        ],
        best={**dict.fromkeys(tasks, "max"), "mean": "max"},
        formats={**dict.fromkeys(tasks, ".3f"), "mean": ".3f", "parameters": "si"},
        caption="All rows on all tasks.",
        note=note,
    )
    for some in _in_threes(tasks):
        section.table(
            [
                {
                    "model": model.name,
                    **{task: interval(results.scores[model.name].get(task)) for task in some},
                }
                for model in rows
            ],
            best=dict.fromkeys(some, "max"),
            formats=dict.fromkeys(some, ".3f"),
            caption="The same with intervals." if some[0] == tasks[0] else "",
        )
    _ablation_figure(section, results, rows, tasks)
    described = [f"- **{model.name}**: {model.note}" for model in rows if model.note]
    if described:
        section.text("\n".join(described))
    if results.differences:
        names = list(dict.fromkeys(row["difference"] for row in results.differences))
        held = {(row["difference"], row["task"]): row for row in results.differences}
        for some in _in_threes([task for task in tasks if any((name, task) in held for name in names)]):
            section.table(
                [
                    {"difference": name, **{task: interval(held.get((name, task))) for task in some}}
                    for name in names
                ],
                formats=dict.fromkeys(some, "+.3f"),
                caption="Differences, paired on the same test windows." if some[0] == tasks[0] else "",
                note="Beyond chance where the interval leaves out zero.",
            )


def _in_threes(tasks: list[str]) -> list[list[str]]:
    """At most three tasks a table, which is what intervals have room for, in parts of like size."""
    size = -(-len(tasks) // max(-(-len(tasks) // 3), 1)) or 1
    return [tasks[at : at + size] for at in range(0, len(tasks), size)]


def _estimate(results: GenomicResults, model: ModelRow, task: str) -> float | None:
    scored = results.scores[model.name].get(task)
    return None if scored is None else number(scored)


def _ablation_figure(
    section: Section, results: GenomicResults, rows: list[ModelRow], tasks: list[str]
) -> None:
    from stillhouse.core.report.figures import interval_bars

    figures: list[tuple[Figure, str, str]] = []
    for task in tasks:
        shown = [row.name for row in rows if task in results.scores[row.name]]
        if len(shown) < 2:
            continue
        values = {task: [drawable(results.scores[name][task]) for name in shown]}
        metric = next(one.metric for one in results.tasks if one.name == task)
        figures.append(
            (
                interval_bars(shown, values, label=metric, from_zero=False, title=task),
                "",
                f"{task}: "
                + ", ".join(f"{n} {v.estimate:.3f}" for n, v in zip(shown, values[task], strict=True)),
            )
        )
    if figures:
        section.figures(figures)


def _mean(results: GenomicResults, model: ModelRow, tasks: list[str]) -> float | None:
    """Mean over the tasks; only for a row that has them all."""
    scored = results.scores[model.name]
    if any(task not in scored for task in tasks):
        return None
    return float(np.mean([number(scored[task]) for task in tasks]))


def add_finetuned(report: Report, results: GenomicResults) -> None:
    """Fine-tuning on the tasks of the run."""
    if not results.finetuned:
        return
    section = report.section("Fine-tuning", "The encoder trained on with a linear head, once for each seed.")
    section.table(
        [
            {
                "task": row["task"],
                "model": row.get("model"),
                "metric": row["metric"],
                "mean": interval(row),
                "± half the range": row.get("half_range"),
                "seeds": row.get("seeds"),
            }
            for row in results.finetuned
        ],
        formats={"mean": ".3f", "± half the range": ".3f"},
        note="Brackets are Student’s t interval of the mean over seeds.",
    )


def add_embedding(report: Report, results: GenomicResults) -> None:
    """Maps of embeddings, classes told apart by colour and marker."""
    if not results.embedding:
        return
    from stillhouse.core.report.figures import embedding_map

    section = report.section("Maps", "Test windows, coloured by class; nothing was fitted to the classes.")
    figures: list[tuple[Figure, str, str]] = []
    for table in results.embedding:
        points, labels = np.asarray(table["points"], dtype=float), np.asarray(table["labels"], dtype=int)
        explained = table.get("explained")
        how = (
            f"Two principal components, {100 * explained:.0f}\u202f% of the variance."
            if explained is not None
            else "t-SNE: neighbourhoods count, distances between clusters do not."
        )
        figures.append(
            (
                embedding_map(points, labels, table["classes"], title=table.get("title", "")),
                how,
                f"{table.get('title', 'Map')}: {len(points)} windows, {len(table['classes'])} classes. {how}",
            )
        )
    section.figures(figures)


def add_consistency(report: Report, results: GenomicResults) -> None:
    """How alike the embeddings of the two strands are."""
    if not results.consistency:
        return
    section = report.section(
        "The two strands",
        "A window and its reverse complement are the same molecule. Cosine similarity of their embeddings, "
        "after the mean over windows is taken away: 1 is the same, 0 as alike as two different windows.",
    )
    section.table(
        [{"model": name, "cosine": _cosine(found)} for name, found in results.consistency.items()],
        formats={"cosine": ".3f"},
        note="Mean over windows, and its 95\u202f% interval.",
    )


def _cosine(found: Any) -> Any:
    if found.get("low") is None:
        return found.get("cosine")
    return Interval(float(found["cosine"]), float(found["low"]), float(found["high"]), 0.95, "bootstrap")
