"""The sections on cost, training, data, licences, and how the student was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.core.metrics import Interval
from stillhouse.core.report import Report, Section

from ._numbers import drawable, flat, is_inside, number
from ._results import GenomicResults


def add_cost(report: Report, results: GenomicResults) -> None:
    """Size, latency and embedding throughput of teacher and student."""
    if not results.profiles and not results.throughput:
        return
    section = report.section("Size and speed", results.profile_note)
    if results.profiles:
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
                "parameters": "si",
                "memory": "bytes",
                "latency": "ms",
                "size ratio": "ratio",
                "latency ratio": "ratio",
            },
            note="Latency is the median with the 10th and 90th percentiles; ratios are to the first model.",
        )
        _tradeoff(section, results)
    if results.throughput:
        base = float(results.throughput[0]["bases_per_second"])
        section.table(
            [
                {
                    "model": row["model"],
                    "bases per second": float(row["bases_per_second"]),
                    "times the first": float(row["bases_per_second"]) / base if base > 0 else None,
                }
                for row in results.throughput
            ],
            formats={"bases per second": "si", "times the first": ".3g"},
            caption="Embedding, from letters to one vector a window, tokenisation included.",
        )


def _tradeoff(section: Section, results: GenomicResults) -> None:
    from stillhouse.core.report.figures import tradeoff_scatter

    tasks = [task.name for task in results.tasks]
    drawn = [
        (row, results.scores[str(row["model"])])
        for row in results.profiles
        if tasks and all(task in results.scores.get(str(row["model"]), {}) for task in tasks)
    ]
    if len(drawn) < 2:
        return
    first = tasks[0]
    section.figure(
        tradeoff_scatter(
            [str(row["model"]) for row, _ in drawn],
            size=[row["memory"] for row, _ in drawn],
            latency=[row["latency"] for row, _ in drawn],
            quality=[drawable(scored[first]) for _, scored in drawn],
            label=f"{results.tasks[0].metric}, {first}",
        ),
        caption="The area of a disc is the model’s size in memory.",
        alt=f"Quality on {first} over latency: "
        + "; ".join(
            f"{row['model']}: {number(scored[first]):.3f} at {row['latency']:.3g} ms" for row, scored in drawn
        ),
    )


def add_training(report: Report, results: GenomicResults, folder: Path) -> None:
    """Loss terms, and the gradient norms that say whether the two terms are in balance."""
    if not results.logs and not results.gradient_logs:
        return
    section = report.section(
        "Training", "Unweighted loss terms; each row of the log is a mean over its steps."
    )
    _curves(section, results.logs, folder, gradients=False)
    if results.gradient_logs:
        section.text(
            "Gradient norms of the alignment and of the reconstruction term, with respect to the student. "
            "Where one is far below the other, the smaller term does not steer training: change the weights."
        )
        _curves(section, results.gradient_logs, folder, gradients=True)


def _curves(section: Section, logs: Any, folder: Path, *, gradients: bool) -> None:
    import json

    from stillhouse.core.report.figures import training_curves

    figures = []
    for title, name in logs.items():
        if not is_inside(folder, name):
            section.text(f"The training log of {title} is no longer in the run’s folder.")
            continue
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines() if line]
        rows += [  # shares belong on an axis of their own, not among the losses
            {"step": row["step"], "evaluate": {"accuracy": row["terms"].pop("accuracy")}}
            for row in list(rows)
            if "accuracy" in row.get("terms", {})
        ]
        terms = {term for row in rows for term in row.get("terms", {})}
        norms = {term for term in terms if term.startswith("grad")}
        wanted = sorted(norms - {"grad_norm"}) if gradients else sorted(terms - norms)
        if not gradients:
            wanted += sorted({key for row in rows for key in row.get("evaluate", {})})
        if not wanted:
            continue
        what = "Gradient norms" if gradients else "Unweighted loss terms"
        figure = training_curves(rows, terms=wanted, title=title)
        if gradients:
            figure.axes[0].set_ylabel("norm of the gradient")
        figures.append((figure, "", f"{what} of {title} over its steps."))
    if figures:
        section.figures(figures)


def add_data(report: Report, results: GenomicResults) -> None:
    """Tiles in each part of the split, and notes."""
    if not results.parts and not results.notes:
        return
    section = report.section("Data")
    if results.parts:
        section.table(
            [{"part": name, **counts} for name, counts in results.parts.items() if any(counts.values())],
            caption="Pre-training tiles; no base is in two parts.",
        )
    if results.notes:
        section.text("\n".join(f"- {note}" for note in results.notes))


def add_card(report: Report, results: GenomicResults) -> None:
    """Licences that the student inherits, and its card."""
    if not results.licences and not results.card:
        return
    section = report.section("Licences and card")
    if results.licences:
        section.table(
            [
                {"what": row.get("what"), "name": row.get("name"), "licence": row.get("licence")}
                for row in results.licences
            ],
            caption="A distilled student may inherit the terms of its teacher’s weights and of its data.",
        )
    if results.card:
        section.text(_plain(results.card))


def _plain(card: str) -> str:
    """Markdown headings as bold lines, so that the page's small markup shows a card well."""
    lines = []
    for line in card.strip().splitlines():
        if line.startswith("#"):
            lines += ["", f"**{line.lstrip('#').strip()}**", ""]
        else:
            lines.append(line)
    return "\n".join(lines)


def add_made(report: Report, results: GenomicResults) -> None:
    """Command, timings, configuration, libraries."""
    section = report.section("How it was made")
    if results.command:
        section.text(f"`{results.command}`")
    if results.timings:
        section.kv(dict(results.timings), caption="Seconds.", formats=dict.fromkeys(results.timings, ".1f"))
    if results.config:
        section.kv(dict(flat(results.config)), caption="Configuration.")
    if results.versions:
        section.kv(dict(results.versions), caption="Libraries.")
