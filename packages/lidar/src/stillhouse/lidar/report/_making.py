"""The sections on the preference ablation, the training and what else it took."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.core.errors import DataError
from stillhouse.core.report import Report

from ._numbers import cell, is_inside
from ._results import LidarResults


def add_preference(report: Report, results: LidarResults) -> None:
    """What the preference is worth: the same distillation with other weights of the loser."""
    if not results.preference:
        return
    section = report.section("Preference", results.preference_note)
    section.table(
        _filled(results), caption="One training a row; a loser’s weight of 0 is plain distillation."
    )


def _filled(results: LidarResults) -> list[dict[str, Any]]:
    """Rows with the columns of all, None for what a row lacks."""
    columns = list(dict.fromkeys(name for row in results.preference for name in row))
    return [{name: cell(row.get(name)) for name in columns} for row in results.preference]


def add_training(report: Report, results: LidarResults, folder: Path) -> None:
    """Curves of the training logs."""
    if not results.log:
        return
    from stillhouse.core.report.figures import training_curves

    section = report.section("Training", "Unweighted terms of the losses over the steps.")
    figures, gone = [], []
    for title, name in results.log.items():
        if not is_inside(folder, name):
            gone.append(f"- {title}: its log is no longer in the run’s folder.")
            continue
        try:
            figure = training_curves(folder / name, title=title)
        except (DataError, ValueError) as error:
            gone.append(f"- {title}: nothing to draw ({error}).")
            continue
        figures.append((figure, "", f"Unweighted loss terms of {title} over its steps."))
    if figures:
        section.figures(figures)
    if gone:
        section.text("\n".join(gone))


def add_made(report: Report, results: LidarResults) -> None:
    """Command, notes, poses, memory, timings, configuration, libraries."""
    section = report.section("How it was made")
    section.text(f"`{results.command}`")
    if results.notes:
        section.text("\n".join(f"- {note}" for note in results.notes))
    if results.poses:
        section.text("Poses:")
        section.text("\n".join(f"- {note}" for note in results.poses))
    if results.memory:
        section.kv(dict(results.memory), caption="Memory, estimated before training.")
    if results.timings:
        section.kv(dict(results.timings), caption="Seconds.", formats=dict.fromkeys(results.timings, ".1f"))
    if results.config:
        section.kv(dict(_flat(results.config)), caption="Configuration.")
    if results.versions:
        section.kv(dict(results.versions), caption="Libraries.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows.extend(_flat(value, f"{prefix}{key}."))
        else:
            plain = value is None or isinstance(value, int | float | str)
            rows.append((f"{prefix}{key}", value if plain else str(value)))
    return rows
