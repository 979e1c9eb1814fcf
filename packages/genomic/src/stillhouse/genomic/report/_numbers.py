"""Intervals as they are saved, and as they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.core.metrics import Interval


def number(value: Mapping[str, Any] | float) -> float:
    """The estimate of a saved interval, or the number itself."""
    return float(value["estimate"]) if isinstance(value, Mapping) else float(value)


def interval(value: Mapping[str, Any] | float | None) -> Interval | float | None:
    """A saved interval as one; the bare estimate where it has no ends."""
    if value is None or not isinstance(value, Mapping):
        return value
    if value.get("estimate") is None:
        return None
    if value.get("low") is None or value.get("high") is None:
        return float(value["estimate"])
    return Interval(float(value["estimate"]), float(value["low"]), float(value["high"]))


def drawable(value: Mapping[str, Any] | float) -> Interval:
    """A saved interval; of no width where it has no ends."""
    found = interval(value)
    if isinstance(found, Interval):
        return found
    return Interval(number(value), number(value), number(value))


def is_inside(folder: Path, name: str) -> bool:
    """Whether a path names a file inside a folder."""
    root, target = folder.resolve(), (folder / name).resolve()
    return target.is_relative_to(root) and target.is_file()


def spoken(names: Sequence[str], values: Mapping[str, Sequence[Interval]]) -> str:
    """Intervals in words, for readers who cannot see a figure."""
    return "; ".join(
        f"{model}: " + ", ".join(f"{name} {one.estimate:.3f}" for name, one in zip(names, found, strict=True))
        for model, found in values.items()
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested configuration as `section.field` and a value that can be shown."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows.extend(flat(value, f"{prefix}{key}."))
        else:
            plain = value is None or isinstance(value, int | float | str)
            rows.append((f"{prefix}{key}", value if plain else str(value)))
    return rows
