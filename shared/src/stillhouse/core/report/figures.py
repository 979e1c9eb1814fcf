"""Ready figures for reports: arrays in, a matplotlib figure out, in colours that `Report` carries into the
dark.

Matplotlib is imported when a figure is made, and without pyplot: no global state, no windows, nothing to
close.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..metrics import Interval, ReliabilityCurve
from ._format import bytes_text, count_text
from .palette import INK, MARKERS, MUTED, PAPER, RULE, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = 9.0  # points


def confusion_matrix(counts: npt.ArrayLike, classes: Sequence[str], *, title: str = "") -> Figure:
    """Draw a confusion matrix: shade and number are shares of the true class; counts stand below when there
    is room.

    Args:
        counts: `[C, C]` whole numbers ≥ 0; rows are true classes, columns predicted ones.
        classes: C names.
        title: A short title, for example "student".

    Raises:
        ValueError: When the counts are not a matrix of whole numbers that fits the classes.
    """
    table = np.asarray(counts)
    size = len(classes)
    if table.shape != (size, size) or table.dtype.kind not in "iu" or table.size == 0 or table.min() < 0:
        raise ValueError(
            f"counts has shape {table.shape} and dtype {table.dtype}; give counts [{size}, {size}] ≥ 0"
        )
    totals = table.sum(axis=1, keepdims=True)
    shares = np.divide(table, totals, out=np.zeros(table.shape), where=totals > 0)
    side = min(1.3 + 0.52 * size, 7.2) + 0.06 * max(map(len, classes))
    figure, axes = _axes(side, side * 0.94, grid=False)
    from matplotlib.patches import Rectangle

    for row in range(size):
        for column in range(size):
            share = float(shares[row, column])
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=series(0), alpha=share, edgecolor="none"))
            if size <= 16 and table[row, column]:
                style: dict[str, Any] = {
                    "ha": "center",
                    "va": "center",
                    "color": PAPER if share > 0.65 else INK,
                }
                both = size <= 10
                middle = row + (0.42 if both else 0.5)
                axes.text(column + 0.5, middle, f"{100 * share:.0f} %", fontsize=_SIZE, **style)
                if both:
                    below = count_text(table[row, column])
                    axes.text(column + 0.5, row + 0.74, below, fontsize=_SIZE - 2, alpha=0.85, **style)
    for edge in range(size + 1):
        axes.axhline(edge, color=RULE, linewidth=0.7)
        axes.axvline(edge, color=RULE, linewidth=0.7)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xlabel="predicted", ylabel="true")
    axes.set_xticks(np.arange(size) + 0.5, classes)
    axes.set_yticks(np.arange(size) + 0.5, classes)
    if max(map(len, classes)) > 5:
        for label in axes.get_xticklabels():
            label.set(rotation=40, horizontalalignment="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _title(axes, title)
    return figure


def reliability_diagram(curves: Mapping[str, ReliabilityCurve], *, title: str = "") -> Figure:
    """Draw accuracy over confidence, one line a model, above the share of items at each confidence.

    The larger a marker, the more items its bin holds.

    Args:
        curves: Name → `stillhouse.core.metrics.reliability_curve`.
        title: A short title.

    Raises:
        ValueError: When there is no curve.
    """
    if not curves:
        raise ValueError("curves is empty; give at least one reliability curve")
    figure, (axes, below) = _two_axes(4.6, 4.9, ratios=(3.4, 1))
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, dashes=(4, 3), zorder=1)
    lowest = min(float(curve.confidence.min()) for curve in curves.values())
    for i, (name, curve) in enumerate(curves.items()):
        share = curve.count / curve.count.sum()
        mark = MARKERS[i % len(MARKERS)]
        axes.plot(curve.confidence, curve.accuracy, color=series(i), linewidth=1.3, alpha=0.6, zorder=2)
        axes.scatter(
            curve.confidence,
            curve.accuracy,
            s=14 + 110 * share,
            color=series(i),
            marker=mark,
            linewidth=0,
            label=f"{name}, ECE {curve.error:.3f}",
            clip_on=False,
            zorder=3,
        )
        start, width = curve.edges[:, 0], np.maximum(np.diff(curve.edges, axis=1)[:, 0], 0.004)
        below.bar(start, share, width, align="edge", color=series(i), alpha=0.3, linewidth=0)
        below.hlines(share, start, start + width, color=series(i), linewidth=1.5)
    left = max(0.0, np.floor(10 * lowest) / 10 - 0.02) if lowest > 0.15 else 0.0
    axes.set(xlim=(left, 1), ylim=(0, 1), ylabel="accuracy")
    axes.tick_params(labelbottom=False)
    below.set(xlim=(left, 1), xlabel="confidence of the predicted class", ylabel="share of items")
    below.set_ylim(bottom=0)
    _legend_below(figure, axes, same_size=True)
    _title(axes, title)
    return figure


def embedding_map(
    points: npt.ArrayLike,
    labels: npt.ArrayLike,
    classes: Sequence[str],
    *,
    prototypes: npt.ArrayLike | None = None,
    title: str = "",
) -> Figure:
    """Draw a two-dimensional map of embeddings, classes told apart by colour and by marker.

    Args:
        points: `[N, 2]` positions, for example from a principal component analysis.
        labels: `[N]` integers in 0…C−1; −1 for items without a label.
        classes: C names.
        prototypes: `[C, 2]` positions of the class prototypes, drawn large; None leaves them out.
        title: A short title.

    Raises:
        ValueError: When the shapes or labels do not fit.
    """
    xy, y = np.asarray(points, dtype=float), np.asarray(labels)
    if xy.ndim != 2 or xy.shape[1] != 2 or y.shape != xy.shape[:1] or not np.isfinite(xy).all():
        raise ValueError(f"points has shape {xy.shape} and labels {y.shape}; give finite [N, 2] and [N]")
    if y.dtype.kind not in "iu" or (len(y) and not -1 <= y.min() <= y.max() < len(classes)):
        raise ValueError(
            f"labels must be integers in −1…{len(classes) - 1}, one for each of {len(classes)} classes"
        )
    centres = None if prototypes is None else np.asarray(prototypes, dtype=float)
    if centres is not None and centres.shape != (len(classes), 2):
        raise ValueError(f"prototypes has shape {centres.shape}; give [{len(classes)}, 2]")
    every = xy if centres is None else np.concatenate([xy, centres])
    spans = np.ptp(every, axis=0) if len(every) else np.ones(2)
    shape = float(np.clip(spans[1] / spans[0] if spans[0] > 0 else 1.0, 0.5, 1.1))
    figure, axes = _axes(5.0, 4.9 * shape + 0.45, grid=False)
    area = float(np.clip(9000 / max(len(y), 1), 7, 34))
    rest = xy[y < 0]
    if len(rest):
        axes.scatter(
            rest[:, 0], rest[:, 1], s=0.7 * area, color=MUTED, alpha=0.35, linewidth=0, label="unlabelled"
        )
    for c, name in enumerate(classes):
        mine = xy[y == c]
        axes.scatter(
            mine[:, 0],
            mine[:, 1],
            s=area,
            color=series(c),
            marker=MARKERS[c % len(MARKERS)],
            alpha=0.7,
            linewidth=0,
            label=name,
        )
        if centres is not None:
            mark = MARKERS[c % len(MARKERS)]
            look: dict[str, Any] = {
                "color": series(c),
                "marker": mark,
                "edgecolor": PAPER,
                "linewidth": 1.6,
                "zorder": 4,
            }
            axes.scatter(centres[c, 0], centres[c, 1], s=150, **look)
    axes.set(xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set(visible=True, color=RULE)
    _legend_below(figure, axes, same_size=True)
    _title(axes, title)
    return figure


def training_curves(
    log: str | Path | Sequence[Mapping[str, Any]], *, terms: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Draw the unweighted loss terms of a run over its steps, and its evaluation beside them when there is
    one.

    Args:
        log: A `log.jsonl` of the trainer, or its rows: `{"step", "role", "total", "terms": {name: value},
            …}` for training, `{"step", "evaluate": {name: value}}` for evaluation. None and NaN are gaps.
        terms: Names of terms and evaluation metrics to draw; None draws all, and the total.
        title: A short title.

    Raises:
        DataError: When the file cannot be read as a log.
        ValueError: When nothing is left to draw.
    """
    rows = _read_log(Path(log)) if isinstance(log, str | Path) else list(log)
    roles = {row["role"] for row in rows if "role" in row}
    training: dict[str, list[tuple[float, float]]] = {}
    evaluation: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "evaluate" in row:
            _collect(evaluation, row["step"], row["evaluate"], "", terms)
        elif "terms" in row or "total" in row:
            head = f"{row['role']}: " if len(roles) > 1 else ""
            total = {"total": row["total"]} if len(row.get("terms", {})) != 1 and "total" in row else {}
            _collect(training, row["step"], {**row.get("terms", {}), **total}, head, terms)
    panels = [
        (values, label) for values, label in ((training, "loss term"), (evaluation, "evaluation")) if values
    ]
    if not panels:
        raise ValueError("log holds nothing to draw; check its rows and the names in terms")
    figure, grid = _stack_of_axes(5.0, 2.5 * len(panels) + 0.4, len(panels))
    for axes, (values, label) in zip(grid, panels, strict=True):
        low, high = np.inf, 0.0
        for i, (name, pairs) in enumerate(values.items()):
            x, y = np.array(pairs, dtype=float).T
            mark = MARKERS[i % len(MARKERS)] if len(x) <= 25 else None
            axes.plot(x, y, color=series(i), linewidth=1.5, label=name, marker=mark, markersize=3.5)
            low, high = min(low, float(y.min())), max(high, float(y.max()))
        if label == "loss term" and low > 0 and high / low > 20:
            _log_axis(axes, "y")
        axes.set(ylabel=next(iter(values)) if len(values) == 1 else label)
        axes.margins(x=0.02)
        if len(values) > 1:
            _legend(axes)
    grid[-1].set_xlabel("step")
    _title(grid[0], title)
    return figure


def interval_bars(
    names: Sequence[str],
    values: Mapping[str, Sequence[Interval]],
    *,
    label: str = "accuracy",
    from_zero: bool = True,
    title: str = "",
) -> Figure:
    """Draw estimates with their intervals, side by side for several models.

    Args:
        names: N groups, for example views or classes, from top to bottom.
        values: Model → N intervals.
        label: What is measured.
        from_zero: Draw bars from 0; False draws points on an axis that fits them, for values that lie close
            together.
        title: A short title.

    Raises:
        ValueError: When the numbers of names and intervals differ.
    """
    for model, intervals in values.items():
        if len(intervals) != len(names):
            raise ValueError(f"values[{model!r}] has {len(intervals)} intervals for {len(names)} names")
    if not names or not values:
        raise ValueError("names or values is empty; give at least one group and one model")
    height = 0.9 + len(names) * (0.16 + 0.2 * len(values))
    figure, axes = _axes(5.0, height, grid=True)
    axes.grid(visible=False, axis="y")
    step = 0.8 / len(values)
    for i, (model, intervals) in enumerate(values.items()):
        at = np.arange(len(names)) + (i - (len(values) - 1) / 2) * step
        middle = np.array([v.estimate for v in intervals])
        reach = np.array([[v.estimate - v.low for v in intervals], [v.high - v.estimate for v in intervals]])
        look: dict[str, Any] = {"color": series(i), "label": model}
        if from_zero:
            axes.barh(at, middle, height=0.82 * step, alpha=0.85, linewidth=0, **look)
            axes.errorbar(
                middle, at, xerr=reach.clip(min=0), fmt="none", color=INK, elinewidth=1.1, capsize=2.2
            )
        else:
            axes.errorbar(
                middle,
                at,
                xerr=reach.clip(min=0),
                fmt=MARKERS[i % len(MARKERS)],
                markersize=5.5,
                elinewidth=1.5,
                capsize=0,
                **look,
            )
    axes.set_yticks(np.arange(len(names)), names)
    axes.set(ylim=(len(names) - 0.45, -0.55), xlabel=label)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(not from_zero)
    if len(values) > 1:
        _legend_below(figure, axes)
    _title(axes, title)
    return figure


def tradeoff_scatter(
    names: Sequence[str],
    *,
    size: Sequence[float],
    latency: Sequence[float],
    quality: Sequence[float | Interval],
    label: str = "accuracy",
    title: str = "",
) -> Figure:
    """Draw quality over latency; the area of a disc is the model's size in memory.

    Args:
        names: N models.
        size: N sizes in bytes, > 0.
        latency: N latencies in milliseconds, > 0.
        quality: N numbers, or intervals, which are drawn as bars.
        label: What quality is called.
        title: A short title.

    Raises:
        ValueError: When the lengths differ, or a size or latency is not > 0.
    """
    if not names or not len(names) == len(size) == len(latency) == len(quality):
        lengths = len(names), len(size), len(latency), len(quality)
        raise ValueError(
            f"names, size, latency and quality have {lengths} entries; give as many of each, at least one"
        )
    if min(size) <= 0 or min(latency) <= 0:
        raise ValueError("size and latency must be > 0")
    figure, axes = _axes(5.0, 3.9, grid=True)
    largest = max(size)
    for i, name in enumerate(names):
        value = quality[i]
        middle = value.estimate if isinstance(value, Interval) else float(value)
        if isinstance(value, Interval):
            axes.plot([latency[i]] * 2, [value.low, value.high], color=series(i), linewidth=1.4, zorder=2)
        area = max(28.0, 1500 * size[i] / largest)
        axes.scatter(latency[i], middle, s=area, color=series(i), alpha=0.35, linewidth=0, zorder=2)
        axes.scatter(latency[i], middle, s=16, color=series(i), zorder=3)
        axes.annotate(
            f"{name}\n{bytes_text(size[i])}",
            (latency[i], middle),
            xytext=(5 + np.sqrt(area) / 2, 0),
            textcoords="offset points",
            va="center",
            ha="left",
            color=INK,
            fontsize=_SIZE,
            linespacing=1.35,
        )
    if max(latency) / min(latency) > 4:
        _log_axis(axes, "x")
        axes.margins(x=0.3, y=0.3)
    else:
        axes.margins(x=0.45, y=0.3)
    axes.set(xlabel="latency, ms", ylabel=label)
    _title(axes, title)
    return figure


def step_curves(
    lines: Mapping[str, Sequence[tuple[float, float | Interval, str]]],
    *,
    label: str,
    xlabel: str = "seconds",
    title: str = "",
) -> Figure:
    """Draw quality over time for models that can take more or fewer steps: one line a model, a point a number
    of steps.

    Args:
        lines: Model → points (time > 0, quality, mark beside the point, for example "8"); a model without
            steps has one point. Points are joined in the order of their time.
        label: What quality is called, with its unit and whether less is better.
        xlabel: What time is called.
        title: A short title.

    Raises:
        ValueError: When there is no point, or a time that is not > 0.
    """
    if not any(lines.values()) or not all(x > 0 for points in lines.values() for x, _, _ in points):
        raise ValueError("lines must hold at least one point, and every time must be > 0")
    figure, axes = _axes(4.6, 3.7, grid=True)
    for i, (name, points) in enumerate(lines.items()):
        if not points:
            continue
        ordered = sorted(points, key=lambda point: point[0])
        x = [point[0] for point in ordered]
        values = [point[1] for point in ordered]
        middle = [v.estimate if isinstance(v, Interval) else float(v) for v in values]
        look: dict[str, Any] = {"color": series(i), "zorder": 3}
        axes.plot(
            x, middle, linewidth=1.4, marker=MARKERS[i % len(MARKERS)], markersize=5, label=name, **look
        )
        for at, value, y, mark in zip(x, values, middle, [p[2] for p in ordered], strict=True):
            if isinstance(value, Interval):
                axes.plot([at, at], [value.low, value.high], linewidth=1.1, alpha=0.55, **look)
            if mark:
                axes.annotate(
                    mark,
                    (at, y),
                    xytext=(0, 5),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    color=series(i),
                    fontsize=_SIZE - 1.5,
                )
    times = [x for points in lines.values() for x, _, _ in points]
    if max(times) / min(times) > 4:
        _log_axis(axes, "x")
    axes.margins(x=0.07, y=0.14)
    axes.set(xlabel=xlabel, ylabel=label)
    _legend_below(figure, axes)
    _title(axes, title)
    return figure


# ---------------------------------------------------------------------------------------------- log and style


def _read_log(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict) or "step" not in row:
                    raise ValueError(f"line {number} is not a row with a step")
                rows.append(row)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as a training log ({error}); give the run's log.jsonl"
        ) from error
    return rows


def _collect(
    into: dict[str, list[tuple[float, float]]],
    step: float,
    values: Mapping[str, Any],
    head: str,
    wanted: Sequence[str] | None,
) -> None:
    for name, value in values.items():
        if (wanted is None or name in wanted) and isinstance(value, int | float) and np.isfinite(value):
            into.setdefault(head + name, []).append((step, float(value)))


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="none", layout="constrained")


def _axes(width: float, height: float, *, grid: bool) -> tuple[Figure, Axes]:
    figure = _new_figure(width, height)
    axes = figure.add_subplot()
    _style(axes, grid=grid)
    return figure, axes


def _two_axes(
    width: float, height: float, *, ratios: tuple[float, float]
) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = _new_figure(width, height)
    top, bottom = figure.subplots(2, 1, height_ratios=ratios)
    _style(top, grid=True)
    _style(bottom, grid=True)
    return figure, (top, bottom)


def _stack_of_axes(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    figure = _new_figure(width, height)
    stack = list(figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0])
    for axes in stack:
        _style(axes, grid=True)
    return figure, stack


def _log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    _ticks(axes)


def _style(axes: Axes, *, grid: bool) -> None:
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=MUTED, linewidth=0.8)
    if grid:
        axes.grid(color=RULE, linewidth=0.7)
    _ticks(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=INK, fontsize=_SIZE)


def _ticks(axes: Axes) -> None:
    axes.tick_params(which="both", color=MUTED, labelcolor=MUTED, labelsize=_SIZE - 0.5, width=0.8, length=3)


def _title(axes: Axes, title: str) -> None:
    if title:
        axes.set_title(title, loc="left", fontsize=_SIZE + 1, fontweight="bold", color=INK, pad=9)


def _legend(axes: Axes) -> None:
    axes.legend(loc="best", frameon=False, fontsize=_SIZE, labelcolor=INK, handlelength=1.6)


def _legend_below(figure: Figure, axes: Axes, *, same_size: bool = False) -> None:
    from matplotlib.collections import PathCollection

    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), int(62 / (6 + max(map(len, labels))))))
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=_SIZE,
        labelcolor=INK,
        handlelength=1.2,
        columnspacing=1.4,
    )
    for handle in legend.legend_handles if same_size else ():
        if isinstance(handle, PathCollection):
            handle.set_sizes([32.0])
            handle.set_alpha(1.0)
