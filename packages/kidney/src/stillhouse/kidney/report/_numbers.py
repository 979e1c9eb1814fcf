"""Intervals of the results as core intervals and as text, and paths that stay inside the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.core.metrics import Interval


def number(value: Mapping[str, Any]) -> float:
    """The estimate."""
    return float(value["estimate"])


def interval(value: Mapping[str, Any] | None) -> Interval | float | None:
    """A core interval; the bare number without ends; None for None."""
    if value is None:
        return None
    if value.get("low") is None:
        return number(value)
    return Interval(number(value), float(value["low"]), float(value["high"]))


def drawable(value: Mapping[str, Any]) -> Interval:
    """A core interval, without width where the ends are not known."""
    middle = number(value)
    low, high = value.get("low"), value.get("high")
    return Interval(middle, middle if low is None else float(low), middle if high is None else float(high))


def percent(share: float) -> str:
    """A share as the report writes it, "91.2 %" with a thin space."""
    return f"{100 * share:.1f}\u202f%"


def text_of(value: Mapping[str, Any]) -> str:
    """An interval as text, in per cent."""
    if value.get("low") is None:
        return percent(number(value))
    return f"{percent(number(value))} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def inside(scores: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any] | None:
    """What lies at a path of keys, where that is a mapping."""
    found: Any = scores
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def spoken(names: Sequence[str], values: Mapping[str, Sequence[Interval]]) -> list[str]:
    """One phrase a model, for readers who cannot see the figure."""
    return [
        f"{model}: "
        + ", ".join(
            f"{name} {interval.estimate:.2f}" for name, interval in zip(names, intervals, strict=True)
        )
        for model, intervals in values.items()
    ]


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file exists and lies in the folder."""
    path = (folder / name).resolve()
    return path.is_relative_to(folder.resolve()) and path.is_file()
