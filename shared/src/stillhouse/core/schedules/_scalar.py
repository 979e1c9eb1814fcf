"""Closed-form scalar schedules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Schedule(ABC):
    """A number that depends on the optimizer step.

    Attach one to any weight or temperature. Subclasses implement `__call__`, a pure function of the step and
    of the state; those that keep state also extend `state_dict` and `load_state_dict`.
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Value at an optimizer step, counted from 0."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state. A closed-form schedule keeps only its kind, so that a mix-up is noticed on
        resume."""
        return {"kind": type(self).__name__}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: The state is that of another kind of schedule.
        """
        kind = state.get("kind")
        if kind != type(self).__name__:
            raise ValueError(
                f"state of a {kind!r} schedule given to a {type(self).__name__!r} schedule; "
                "build the same schedules as in the run that is resumed"
            )


def as_schedule(value: float | Schedule, name: str = "value") -> Schedule:
    """Makes a `Constant` of a number and leaves a schedule as it is.

    Args:
        value: A finite number or a schedule.
        name: Argument name for the error message.

    Raises:
        TypeError: Neither a number nor a schedule.
        ValueError: A number that is not finite.

    Example:
        >>> as_schedule(0.5)(1000)
        0.5
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a Schedule, got {type(value).__name__}: {value!r}")
    return Constant(float(value))


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step."""

    value: float

    def __post_init__(self) -> None:
        _finite("value", self.value)

    def __call__(self, step: int) -> float:
        _progress(step, 0, 1)
        return float(self.value)


@dataclass(frozen=True)
class Linear(Schedule):
    """``start + (end − start) · x`` with ``x = clip((step − after) / steps, 0, 1)``.

    Args:
        start: Value up to step `after`.
        end: Value from step ``after + steps`` on.
        steps: Length of the ramp in optimizer steps, ≥ 1.
        after: Step at which the ramp begins, ≥ 0.

    Example:
        >>> Linear(1.0, 0.0, steps=4)(1)
        0.75
    """

    start: float
    end: float
    steps: int
    after: int = 0

    def __post_init__(self) -> None:
        _check_ramp(self.start, self.end, self.steps, self.after)

    def __call__(self, step: int) -> float:
        x = _progress(step, self.after, self.steps)
        return self.end if x == 1.0 else self.start + (self.end - self.start) * x


@dataclass(frozen=True)
class Cosine(Schedule):
    """``end + (start − end) · (1 + cos πx) / 2`` with ``x = clip((step − after) / steps, 0, 1)``.

    Args:
        start: Value up to step `after`.
        end: Value from step ``after + steps`` on.
        steps: Length of the half wave in optimizer steps, ≥ 1.
        after: Step at which it begins, ≥ 0.

    Example:
        >>> round(Cosine(1.0, 0.0, steps=100)(50), 12)
        0.5
    """

    start: float
    end: float
    steps: int
    after: int = 0

    def __post_init__(self) -> None:
        _check_ramp(self.start, self.end, self.steps, self.after)

    def __call__(self, step: int) -> float:
        x = _progress(step, self.after, self.steps)
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * x))


@dataclass(frozen=True)
class Exponential(Schedule):
    """``start · (end / start)^x`` with ``x = clip((step − after) / steps, 0, 1)``: a straight line in the
    logarithm.

    Args:
        start: Value up to step `after`, not zero.
        end: Value from step ``after + steps`` on, of the same sign as `start`.
        steps: Length of the decay in optimizer steps, ≥ 1.
        after: Step at which it begins, ≥ 0.

    Example:
        >>> round(Exponential(8.0, 2.0, steps=2)(1), 12)
        4.0
    """

    start: float
    end: float
    steps: int
    after: int = 0

    def __post_init__(self) -> None:
        _check_ramp(self.start, self.end, self.steps, self.after)
        if self.start * self.end <= 0.0:
            raise ValueError(
                f"start and end must be non-zero and of one sign, got {self.start!r} and {self.end!r}; "
                "use Linear or Cosine to reach zero"
            )

    def __call__(self, step: int) -> float:
        x = _progress(step, self.after, self.steps)
        return self.end if x == 1.0 else self.start * (self.end / self.start) ** x


@dataclass(frozen=True)
class Piecewise(Schedule):
    """A step function: ``values[i]`` where i is the number of milestones that are ≤ step.

    Args:
        milestones: Strictly increasing steps, each ≥ 1.
        values: One value more than there are milestones.

    Example:
        >>> schedule = Piecewise((10, 20), (1.0, 0.5, 0.1))
        >>> schedule(9), schedule(10), schedule(25)
        (1.0, 0.5, 0.1)
    """

    milestones: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        if any(b <= a for a, b in zip((0, *self.milestones), self.milestones, strict=False)):
            raise ValueError(f"milestones must be ≥ 1 and strictly increasing, got {self.milestones!r}")
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(
                f"values must hold one value more than milestones ({len(self.milestones) + 1}), "
                f"got {len(self.values)}"
            )
        for value in self.values:
            _finite("values", value)

    def __call__(self, step: int) -> float:
        _progress(step, 0, 1)
        return self.values[bisect_right(self.milestones, step)]


class Warmup(Schedule):
    """Another schedule multiplied by ``start + (1 − start) · min(1, step / steps)``.

    With ``start = 0`` the first step has weight 0, as in DKD's ``min(epoch / warmup, 1)``.

    Args:
        target: The schedule, or the constant, that is reached.
        steps: Length of the ramp in optimizer steps, ≥ 1.
        start: Factor at step 0, in [0, 1].

    Example:
        >>> Warmup(2.0, steps=4)(1), Warmup(2.0, steps=4)(4)
        (0.5, 2.0)
    """

    def __init__(self, target: float | Schedule, steps: int, start: float = 0.0) -> None:
        if not 0.0 <= start <= 1.0:
            raise ValueError(f"start must lie in [0, 1], got {start!r}")
        self.target = as_schedule(target, "target")
        self._factor = Linear(start, 1.0, steps)

    def __call__(self, step: int) -> float:
        return self._factor(step) * self.target(step)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: that of the target."""
        return {**super().state_dict(), "target": self.target.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        super().load_state_dict(state)
        self.target.load_state_dict(state["target"])


def _progress(step: int, after: int, steps: int) -> float:
    if step < 0:
        raise ValueError(f"step must be ≥ 0, got {step!r}")
    return min(1.0, max(0.0, (step - after) / steps))


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def _check_ramp(start: float, end: float, steps: int, after: int) -> None:
    _finite("start", start)
    _finite("end", end)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps!r}")
    if after < 0:
        raise ValueError(f"after must be ≥ 0, got {after!r}")
