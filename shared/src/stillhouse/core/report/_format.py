"""How a report writes numbers: few digits, the same decimals down a column, units that people read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics import Interval

THIN = "\u202f"  # narrow no-break space: between thousands, and between a number and its unit
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def is_number(value: object) -> bool:
    """Whether a cell holds a number or an interval."""
    return isinstance(value, int | float | np.integer | np.floating | Interval) and not isinstance(
        value, bool
    )


def magnitude(value: Any) -> float:
    """The number that a cell is compared by: its value, or the estimate of an interval."""
    return float(value.estimate if isinstance(value, Interval) else value)


def bytes_text(count: float) -> str:
    """Write a number of bytes with a decimal unit.

    Example:
        >>> bytes_text(94_300_000).replace(THIN, " ")
        '94.3 MB'
    """
    size, unit = float(count), 0
    while abs(size) >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return (f"{size:.0f}" if unit == 0 or abs(size) >= 99.95 else f"{size:.3g}") + THIN + _UNITS[unit]


def si_text(count: float) -> str:
    """Write a large number with an SI prefix, for example "1.82 G" for operations."""
    size, unit = float(count), 0
    while abs(size) >= 999.5 and unit < 5:
        size, unit = size / 1000, unit + 1
    return f"{size:.3g}" + (THIN + " kMGTP"[unit] if unit else "")


def count_text(count: float) -> str:
    """Write a whole number with thin spaces between thousands."""
    return f"{round(count):,}".replace(",", THIN)


def column_format(cells: Sequence[Any]) -> str:
    """Choose a format for a column of numbers: counts for whole numbers, else decimals by the largest."""
    numbers = [cell for cell in cells if is_number(cell)]
    if all(isinstance(n, int | np.integer) for n in numbers):
        return "count"
    sizes = [abs(magnitude(n)) for n in numbers if math.isfinite(magnitude(n))]
    largest = max(sizes, default=0.0)
    if 0 < largest < 0.1 or largest >= 1e6:
        return ".3g"
    return f".{min(3, max(0, 2 - math.floor(math.log10(largest))))}f" if largest > 0 else ".3f"


def cell_text(value: Any, form: str) -> str:
    """Write one cell.

    Args:
        value: Anything; None and NaN become a dash.
        form: "count", "bytes", "si", "percent", "ms", "times", or a Python format specification such as
            ".3f".
    """
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Interval):
        unit = _unit(form)
        ends = (value.estimate, value.low, value.high)
        estimate, low, high = (_number(e, form).removesuffix(unit) for e in ends)
        return f"{estimate}{unit} [{low}, {high}]"
    return _number(float(value), form) if is_number(value) else str(value)


def _unit(form: str) -> str:
    return {"percent": THIN + "%", "ms": THIN + "ms", "times": THIN + "×"}.get(form, "")


def _number(value: float, form: str) -> str:
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if form == "bytes":
        return bytes_text(value)
    if form == "si":
        return si_text(value).replace("-", "−")
    if form == "percent":
        text = f"{100 * value:.1f}"
    elif form in ("ms", "times"):
        text = f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
    elif form == "count":
        text = count_text(value)
    else:
        text = format(value, form)
        if form.endswith("f") and "," not in form and abs(value) >= 10_000:
            text = format(value, "," + form).replace(",", THIN)
    return text.replace("-", "−") + _unit(form)
