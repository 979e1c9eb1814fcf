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
    return f".{_decimals(largest)}f"


def ratio_text(ratio: float) -> str:
    """Write a ratio as people say it.

    Example:
        >>> [ratio_text(r).replace(THIN, " ") for r in (0.0625, 0.4, 0.64, 1.0, 2.5)]
        ['1/16', '1/2.5', '0.64', '1', '2.5 ×']
    """
    if 0 < ratio <= 0.5:
        inverse = 1 / ratio
        digits = 0 if inverse >= 9.95 or abs(inverse - round(inverse)) < 0.05 else 1
        return f"1/{count_text(inverse)}" if digits == 0 else f"1/{inverse:.1f}"
    return f"{ratio:.3g}" if ratio < 1.995 else f"{ratio:.3g}{THIN}×"


def _decimals(size: float) -> int:
    """How many decimals show about three digits of a number of this size."""
    return min(3, max(0, 2 - math.floor(math.log10(abs(size))))) if size else 3


def cell_text(value: Any, form: str) -> str:
    """Write one cell.

    Args:
        value: Anything; None and NaN become a dash.
        form: "count", "bytes", "si", "percent", "ms", "ratio" (1/16), or a Python format specification such
            as ".3f".
    """
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if form == "ms" and is_number(value) and math.isfinite(magnitude(value)):
        form = f"ms{_decimals(magnitude(value))}"
    if isinstance(value, Interval):
        unit = _unit(form)
        ends = (value.estimate, value.low, value.high)
        estimate, low, high = (_number(e, form).removesuffix(unit) for e in ends)
        return f"{estimate}{unit} [{low}, {high}]"
    return _number(float(value), form) if is_number(value) else str(value)


def _unit(form: str) -> str:
    return {"percent": THIN + "%", "ms": THIN + "ms"}.get(form.rstrip("0123456789"), "")


def _number(value: float, form: str) -> str:
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if form == "bytes":
        return bytes_text(value)
    if form == "ratio":
        return ratio_text(value)
    if form == "si":
        return si_text(value).replace("-", "−")
    if form == "percent":
        text = f"{100 * value:.1f}"
    elif form.startswith("ms"):
        text = f"{value:.{form[2:] or 3}f}"
    elif form == "count":
        text = count_text(value)
    else:
        text = format(value, form)
        if form.endswith("f") and "," not in form and abs(value) >= 10_000:
            text = format(value, "," + form).replace(",", THIN)
    return text.replace("-", "−") + _unit(form)
