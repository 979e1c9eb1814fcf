"""Scores as core intervals and as text; which metrics there are and which end of them is good."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.core.metrics import Interval

from ._results import RowResult, Score

HEADINGS = {
    "chamfer": "CD, m",
    "jsd_3d": "JSD-3D",
    "jsd_bev": "JSD-BEV",
    "emd": "EMD, m",
    "precision": "precision, %",
    "recall": "recall, %",
    "f_score": "F, %",
    "rmse": "RMSE, m",
}
_LESS = ("chamfer", "jsd_3d", "jsd_bev", "emd", "rmse")
_FORMATS = {"precision": ".1f", "recall": ".1f", "f_score": ".1f", "emd": ".2f"}
FURTHER = ("precision", "recall", "f_score", "rmse")


def heading(metric: str) -> str:
    """What a table calls a metric: "CD, m", "IoU 0.5 m"."""
    if metric.startswith("iou_"):
        return f"IoU {metric.removeprefix('iou_')} m"
    return HEADINGS.get(metric, metric)


def better(metric: str) -> str:
    """ "min" where less is better, else "max"."""
    return "min" if metric in _LESS else "max"


def form(metric: str) -> str:
    """The format of a metric's column."""
    return _FORMATS.get(metric, ".3f")


def estimate(value: float | Score | None) -> float | None:
    """The number of a score or of a plain number; None where there is none."""
    found = value.get("estimate") if isinstance(value, Mapping) else value
    return None if found is None or not math.isfinite(found) else float(found)


def interval(value: float | Score | None) -> Interval | float | None:
    """A core interval; the bare number without ends; None for None."""
    middle = estimate(value)
    if middle is None or not isinstance(value, Mapping):
        return middle
    low, high = value.get("low"), value.get("high")
    return middle if low is None or high is None else Interval(middle, float(low), float(high))


def cell(value: Any) -> Any:
    """A cell of a table of anything: intervals as such, everything else as it is."""
    if isinstance(value, Mapping) and "estimate" in value:
        return interval(value)
    return value if value is None or isinstance(value, int | float | str) else str(value)


def score(row: RowResult, metric: str) -> float | None:
    """The estimate of a row's metric; None where it was not measured."""
    return estimate(row.scores.get(metric))


def metrics_of(rows: Sequence[RowResult]) -> list[str]:
    """All metrics of some rows, in the usual order, unknown ones last."""
    found = list(dict.fromkeys(name for row in rows for name in row.scores))
    order = [*HEADINGS]
    order[3:3] = sorted((name for name in found if name.startswith("iou_")), reverse=True)
    return [name for name in order if name in found] + [name for name in found if name not in order]


def best_row(rows: Sequence[RowResult], metric: str) -> RowResult | None:
    """The row with the best estimate of a metric; None where none has it."""
    known = [(score(row, metric), row) for row in rows]
    have = [(value, row) for value, row in known if value is not None]
    if not have:
        return None
    pick = min if better(metric) == "min" else max
    return pick(have, key=lambda pair: pair[0])[1]


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file exists and lies in the folder."""
    path = (folder / name).resolve()
    return path.is_relative_to(folder.resolve()) and path.is_file()
