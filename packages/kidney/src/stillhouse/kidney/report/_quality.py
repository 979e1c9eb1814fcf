"""The sections on quality: scores, views, classes, confidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stillhouse.core.metrics import Interval, ReliabilityCurve, seed_interval
from stillhouse.core.report import Report

from ._numbers import drawable, inside, interval, spoken
from ._results import KidneyResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAIN = {"accuracy": "accuracy", "precision_at_1": "P@1", "map_at_r": "MAP@R"}
_FURTHER = {"accuracy_knn": "k-NN accuracy", "r_precision": "R-precision"}


def add_quality(report: Report, results: KidneyResults) -> None:
    """Scores of all models, paired differences, trainings with several seeds."""
    section = report.section("Quality", "All models answer the same test images with the same references.")
    rows, further = [], []
    for model in results.models:
        scores = model.scores
        row = {heading: interval(scores[key]) for key, heading in _MAIN.items()}
        rows.append({"model": model.name, **row, "macro F1": scores["macro_f1"]})
        row = {heading: interval(scores[key]) for key, heading in _FURTHER.items()}
        further.append({"model": model.name, **row, "NMI": scores["nmi"], "AMI": scores["ami"]})
    captions = (
        "Accuracy is by the nearest prototype; P@1 and MAP@R as pytorch-metric-learning has them.",
        f"The vote of the {results.student.scores['k']} nearest references, R-precision, and how k-means "
        f"clusters agree "
        "with the classes.",
    )
    for table, caption, note in ((rows, captions[0], _lone(results)), (further, captions[1], "")):
        headings = list(table[0])[1:]
        section.table(
            table,
            best=dict.fromkeys(headings, "max"),
            formats=dict.fromkeys(headings, ".3f"),
            caption=caption,
            note=note,
        )
    notes = [f"- **{model.name}**: {model.note}" for model in results.models if model.note]
    if notes:
        section.text("\n".join(notes))
    if results.differences:
        section.table(
            [
                {"difference in accuracy": name, "points": interval(value), "beyond chance": _beyond(value)}
                for name, value in results.differences.items()
            ],
            formats={"points": "+.3f"},
            caption="Paired on the same images; “beyond chance” says whether the interval leaves out zero.",
        )
    if any(len(values) > 1 for values in results.seeds.values()):
        section.table(
            [
                {
                    "model": name,
                    "accuracy over trainings": seed_interval(list(values)) if len(values) > 1 else values[0],
                    "trainings": len(values),
                    "each": ", ".join(f"{value:.3f}" for value in values),
                }
                for name, values in results.seeds.items()
            ],
            formats={"accuracy over trainings": ".3f"},
            caption="Trainings that differ by their seed alone, with Student’s t interval.",
        )


def _lone(results: KidneyResults) -> str:
    lone = results.student.scores.get("lone") or []
    return f"Without a reference, and so left out of every score: {', '.join(lone)}." if lone else ""


def _beyond(value: Mapping[str, Any]) -> str:
    if value.get("low") is None:
        return "–"
    return "yes" if value["low"] > 0 or value["high"] < 0 else "no"


def add_views(report: Report, results: KidneyResults) -> None:
    """Each view alone, all images, and views fused per stone."""
    views = list(results.student.scores.get("per_view") or {})
    fused = results.student.scores.get("fused")
    if not views and not fused:
        return
    section = report.section(
        "Views",
        "A stone is seen from its surface and in section; each view alone, all together, and fused per "
        "stone.",
    )
    groups: list[tuple[str, tuple[str, ...]]] = [(f"{view} only", ("per_view", view)) for view in views] + [
        ("all images", ())
    ]
    if fused:
        groups.append((f"fused per stone ({fused['how']})", ("fused",)))
    values: dict[str, list[Any]] = {}
    for model in results.models:
        found = [inside(model.scores, path) for _, path in groups]
        if all(part is not None for part in found):
            values[model.name] = [drawable(part["accuracy"]) for part in found if part is not None]
    from stillhouse.core.report.figures import interval_bars

    if values:
        names = [name for name, _ in groups]
        section.figure(
            interval_bars(names, values),
            caption="Accuracy by the nearest prototype.",
            alt="Accuracy of each model for each view: " + "; ".join(spoken(names, values)),
        )
    rows = []
    for name, path in groups:
        part = inside(results.student.scores, path)
        if part is not None:
            rows.append(
                {
                    "student on": name,
                    "accuracy": interval(part["accuracy"]),
                    "MAP@R": interval(part["map_at_r"]),
                    "macro F1": part["macro_f1"],
                    "answers": part["items"],
                    "stones": part["stones"],
                }
            )
    section.table(
        rows, formats={"accuracy": ".3f", "MAP@R": ".3f", "macro F1": ".3f"}, note=_fused_note(fused)
    )


def _fused_note(fused: Mapping[str, Any] | None) -> str:
    if not fused:
        return ""
    text = f"{fused['complete_stones']} of {fused['items']} fused stones show every view."
    if fused.get("mixed_stones"):
        text += f" {fused['mixed_stones']} stones with images of two classes are left out."
    return text


def add_classes(report: Report, results: KidneyResults) -> None:
    """Confusion matrices and recall of each class."""
    from stillhouse.core.report.figures import confusion_matrix, interval_bars

    section = report.section(
        "Classes", "Where the models err. Rows are true classes; shade and percentage are shares of a row."
    )
    shown = [model for model in results.models if model.role != "baseline"]
    figures: list[tuple[Figure, str, str]] = []
    for model in shown:
        table = model.scores["confusion"]
        figures.append(
            (
                confusion_matrix(table["counts"], table["classes"], title=model.name),
                "",
                f"Confusion matrix of the {model.name}. " + _confused(table),
            )
        )
    section.figures(figures)
    names = list(results.student.scores["per_class"])
    values = {}
    for model in shown:
        recalls = [model.scores["per_class"].get(name) for name in names]
        if all(part is not None for part in recalls):
            values[model.name] = [_wilson(part) for part in recalls if part is not None]
    section.figure(
        interval_bars(names, values, label="recall"),
        caption=(
            "Recall of each class with Wilson’s interval, stones (or images, where stones are unknown) as "
            "trials."
        ),
        alt="Recall of each class: " + "; ".join(spoken(names, values)),
    )
    section.table(
        [
            {"class": name, **{key: part[key] for key in ("recall", "precision", "items", "stones")}}
            for name, part in results.student.scores["per_class"].items()
        ],
        caption="Student.",
        formats={"recall": ".3f", "precision": ".3f"},
    )


def _wilson(part: Mapping[str, Any]) -> Interval:
    from stillhouse.core.metrics import proportion_interval

    trials = part["stones"] or part["items"]
    around = proportion_interval(round(part["recall"] * trials), trials)
    return Interval(
        part["recall"], min(around.low, part["recall"]), max(around.high, part["recall"]), 0.95, "Wilson"
    )


def _confused(table: Mapping[str, Any]) -> str:
    counts = np.asarray(table["counts"])
    off = counts - np.diag(np.diag(counts))
    if not off.any():
        return "Nothing is confused."
    row, column = np.unravel_index(int(off.argmax()), off.shape)
    return (
        f"Most often confused: {table['classes'][row]} taken for {table['classes'][column]}, "
        f"{off[row, column]} times."
    )


def add_confidence(report: Report, results: KidneyResults) -> None:
    """Reliability diagram and calibration scores."""
    from stillhouse.core.report.figures import reliability_diagram

    shown = [m for m in results.models if m.role != "baseline" and m.scores.get("calibration")]
    if not shown:
        return
    section = report.section(
        "Confidence",
        "Whether a confidence of 80 % is right four times in five. Confidence is among the known classes "
        "only; that an image is of no "
        "known class is told by its distance.",
    )
    curves = {}
    for model in shown:
        curve = model.scores["calibration"]["reliability"]
        arrays = {key: np.asarray(curve[key], dtype=float) for key in ("confidence", "accuracy")}
        count = np.asarray(curve["count"], dtype=np.int64)
        curves[model.name] = ReliabilityCurve(
            **arrays, count=count, edges=np.asarray(curve["edges"], dtype=float)
        )
    section.figure(
        reliability_diagram(curves),
        caption="On the diagonal, confidence is what it says.",
        alt="Reliability diagram. "
        + "; ".join(
            f"{name}: expected calibration error {curve.error:.3f}" for name, curve in curves.items()
        ),
    )
    section.table(
        [
            {
                "model": model.name,
                "calibration error": model.scores["calibration"]["ece"],
                "Brier score": model.scores["calibration"]["brier"],
                "log-likelihood loss": model.scores["calibration"]["nll"],
                "temperature τ": model.scores["calibration"]["temperature"],
            }
            for model in results.models
            if model.scores.get("calibration")
        ],
        best={"calibration error": "min", "Brier score": "min", "log-likelihood loss": "min"},
        formats=dict.fromkeys(
            ("calibration error", "Brier score", "log-likelihood loss", "temperature τ"), ".3f"
        ),
    )
