"""The sections on cost, data and how the student was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.core.metrics import Interval
from stillhouse.core.report import Report, Section

from ._numbers import drawable, interval, is_inside, text_of
from ._results import KidneyResults, ModelRow


def add_speed(report: Report, results: KidneyResults) -> None:
    """Size and latency of teacher and student."""
    if not results.profiles:
        return
    section = report.section("Size and speed", results.profile_note)
    section.table(
        [
            {
                "model": row["model"],
                "parameters": row["parameters"],
                "memory": row["memory"],
                "latency": Interval(row["latency"], row["p10"], row["p90"], 0.8, "median, p10 and p90"),
                "size ratio": row["size_ratio"],
                "latency ratio": row["latency_ratio"],
            }
            for row in results.profiles
        ],
        formats={
            "parameters": "count",
            "memory": "bytes",
            "latency": "ms",
            "size ratio": "ratio",
            "latency ratio": "ratio",
        },
        note="Latency is the median with the 10th and 90th percentiles; ratios are to the first model.",
    )
    from stillhouse.core.report.figures import tradeoff_scatter

    points = [(row, _find(results.models, str(row["model"]))) for row in results.profiles]
    drawn = [(row, model) for row, model in points if model is not None]
    if len(drawn) > 1:
        section.figure(
            tradeoff_scatter(
                [model.name for _, model in drawn],
                size=[row["memory"] for row, _ in drawn],
                latency=[row["latency"] for row, _ in drawn],
                quality=[drawable(model.scores["accuracy"]) for _, model in drawn],
            ),
            caption="The area of a disc is the model’s size in memory.",
            alt="Accuracy over latency: "
            + "; ".join(
                f"{m.name}: {text_of(m.scores['accuracy'])} at {r['latency']:.3g} ms" for r, m in drawn
            ),
        )


def _find(models: Sequence[ModelRow], name: str) -> ModelRow | None:
    return next((model for model in models if model.name == name), None)


def add_data(report: Report, results: KidneyResults) -> None:
    """Images in each part, notes, leakage, and the gap between split protocols."""
    section = report.section("Data and leakage")
    views = sorted({view for part in results.parts.values() for counts in part.values() for view in counts})
    names = list(dict.fromkeys(name for part in results.parts.values() for name in part))
    rows = [
        {
            "class": f"{name}, {view}" if view else name,
            **{part: classes.get(name, {}).get(view, 0) for part, classes in results.parts.items()},
        }
        for name in names
        for view in views
    ]
    if rows:
        section.table(
            rows, caption=f"Images of each class and view in each part of the split, by {results.split}."
        )
    if results.stones:
        section.kv({f"stones, {part}": count for part, count in results.stones.items()})
    if results.notes:
        section.text("\n".join(f"- {note}" for note in results.notes))
    if results.leakage is None:
        section.text("Whether the same stones or images are in training and test was not checked.")
    else:
        found = results.leakage
        verdict = (
            "No leakage was found."
            if found.get("ok")
            else "**Training and test share what is listed here: scores may be too good.**"
        )
        if not found.get("stones_known", True):
            verdict += " Stones are not known, so the same stone may be in both parts all the same."
        section.text(verdict)
        section.kv({key.replace("_", " "): _brief(value) for key, value in found.items() if key != "ok"})
    if results.split_gap:
        section.table(
            [{"split by": name, "accuracy": interval(value)} for name, value in results.split_gap.items()],
            formats={"accuracy": ".3f"},
            caption=(
                "The same student under both protocols. What the patch-level split scores above the "
                "stone-level one is leakage."
            ),
        )


def _brief(value: Any) -> Any:
    if isinstance(value, list | tuple):
        head = ", ".join(str(item) for item in list(value)[:5])
        return f"{len(value)}" + (f": {head}{', …' if len(value) > 5 else ''}" if value else "")
    return value if value is None or isinstance(value, int | float | str) else str(value)


def add_made(report: Report, results: KidneyResults, folder: Path) -> None:
    """Command, timings, training curves, gallery, configuration, libraries."""
    section = report.section("How it was made")
    section.text(f"`{results.command}`")
    if results.timings:
        section.kv(dict(results.timings), caption="Seconds.", formats=dict.fromkeys(results.timings, ".1f"))
    _curves(section, results, folder)
    if results.gallery:
        section.table(
            [
                {"class": name, "images": counts[0], "stones": counts[1]}
                for name, counts in results.gallery.items()
            ],
            caption="References in the gallery.",
        )
    section.kv(dict(_flat(results.config)), caption="Configuration.")
    if results.versions:
        section.kv(dict(results.versions), caption="Libraries.")


def _curves(section: Section, results: KidneyResults, folder: Path) -> None:
    from stillhouse.core.report.figures import training_curves

    for title, name in results.log.items():
        if is_inside(folder, name):
            section.figure(
                training_curves(folder / name, title=title),
                caption="",
                alt=f"Unweighted loss terms of the {title} over its steps.",
            )
        else:
            section.text(f"The training log of the {title} is no longer in the run’s folder.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows.extend(_flat(value, f"{prefix}{key}."))
        else:
            rows.append(
                (
                    f"{prefix}{key}",
                    value if value is None or isinstance(value, int | float | str) else str(value),
                )
            )
    return rows
