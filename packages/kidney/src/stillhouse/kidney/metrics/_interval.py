"""Intervals of shares, also where the bootstrap has none: one stone, or every image right."""

from __future__ import annotations

import numpy as np


def share_interval(
    values: np.ndarray, groups: np.ndarray | None, *, level: float, resamples: int, seed: int
) -> dict[str, float | None]:
    """Mean of values in [0, 1] with a bootstrap interval over groups.

    Where all values are 0 or all are 1 the bootstrap has no width; Wilson's interval with the number of
    groups as the number of trials takes its place. One group alone gives no interval.

    Args:
        values: [N], N ≥ 1.
        groups: [N] or None.
        level: coverage.
        resamples: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        `estimate`, `low`, `high`; the ends are None with one group.
    """
    from stillhouse.core.metrics import bootstrap_interval, proportion_interval

    units = len(values) if groups is None else len(set(groups))
    estimate = float(np.mean(values))
    if units < 2:
        return {"estimate": estimate, "low": None, "high": None}
    if estimate in (0.0, 1.0):
        got = proportion_interval(units if estimate else 0, units, level=level)
    else:
        got = bootstrap_interval(values, groups=groups, level=level, resamples=resamples, seed=seed)
    return {"estimate": estimate, "low": got.low, "high": got.high}
