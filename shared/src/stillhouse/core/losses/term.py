"""Weighted terms of a distillation objective, and the watch that notices a term which does nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class RatioWatch:
    """Counts how long each KD term has been negligible beside the task term.

    The commonest silent failure of distillation code is a KD term that is orders of magnitude smaller than
    the task term (a wrong reduction, a forgotten T², a zero-initialised projector): training goes on and the
    teacher teaches nothing. This class only counts; whoever owns the log prints the warning.

    A term is *small* in one update when ``|weight · value| < threshold · |weight_task · value_task|``. Its
    name is returned once, when it has been small for `patience` updates in a row, and again only after it has
    recovered in between. A term whose weight is zero is switched off on purpose (a warm-up, for example), and
    a non-finite value says nothing about the ratio: neither counts, and both start the count anew.

    Args:
        threshold: Ratio below which a term is small, in (0, 1).
        patience: Consecutive small updates after which the name is returned, ≥ 1.

    Raises:
        ValueError: A threshold or patience outside its range.

    Example:
        >>> watch = RatioWatch(threshold=0.01, patience=2)
        >>> watch.update({"ce": 1.0, "kd": 1e-4}, {"ce": 1.0, "kd": 0.5}, task="ce")
        ()
        >>> watch.update({"ce": 1.0, "kd": 1e-4}, {"ce": 1.0, "kd": 0.5}, task="ce")
        ('kd',)
        >>> watch.counts["kd"], watch.ratios["kd"]
        (2, 5e-05)
    """

    def __init__(self, threshold: float = 0.01, patience: int = 100) -> None:
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold!r}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 update, got {patience!r}")
        self.threshold = float(threshold)
        self.patience = int(patience)
        self.counts: dict[str, int] = {}
        self.ratios: dict[str, float] = {}

    def update(
        self, terms: Mapping[str, float], weights: Mapping[str, float] | None = None, *, task: str | None
    ) -> tuple[str, ...]:
        """Takes the terms of one update and returns the names that have just reached the patience.

        Args:
            terms: Unweighted value of each term, floats or scalar tensors.
            weights: Weight of each term; a missing one counts as 1.
            task: Name of the task term. With None, or a name that is not among `terms`, there is nothing to
                compare with and nothing is counted.

        Returns:
            Names of the terms to warn of now, in the order of `terms`; empty most of the time. `ratios` holds
            the last ratio of each term, `counts` the length of its present run of small updates.
        """
        if task is None or task not in terms:
            return ()
        weights = weights or {}
        reference = abs(float(weights.get(task, 1.0)) * float(terms[task]))
        warned = []
        for name, value in terms.items():
            if name == task:
                continue
            weight = float(weights.get(name, 1.0))
            part = abs(weight * float(value))
            if weight == 0.0 or not math.isfinite(part) or not math.isfinite(reference):
                self.counts[name] = 0
                continue
            self.ratios[name] = part / reference if reference > 0.0 else math.inf
            if part < self.threshold * reference:
                self.counts[name] = self.counts.get(name, 0) + 1
                if self.counts[name] == self.patience:
                    warned.append(name)
            else:
                self.counts[name] = 0
        return tuple(warned)

    def message(self, name: str, task: str) -> str:
        """The one-line warning for a term returned by `update`: what is wrong and what to look at."""
        return (
            f"the weighted term {name!r} has been below {self.threshold:.1%} of {task!r} for "
            f"{self.counts.get(name, 0)} steps (ratio now {self.ratios.get(name, math.nan):.1e}): the "
            "teacher hardly teaches. Check the reduction, the weight and the T² factor of that term."
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: the running counts and the last ratios."""
        return {"counts": dict(self.counts), "ratios": dict(self.ratios)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.counts = {str(name): int(count) for name, count in state["counts"].items()}
        self.ratios = {str(name): float(ratio) for name, ratio in state["ratios"].items()}
