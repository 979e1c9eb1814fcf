"""Who is updated when: the two-time-scale rule of student and critic as a function of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSchedule:
    """Roles of a step, in order; what a distiller returns from `roles(step)`.

    Attributes:
        ratio: K ≥ 1: critic updates per student update.
        student: role of the student.
        critics: roles that are updated together, in this order.
        exclusive: a step updates either the student or the critics (FastGen); otherwise the critics are
            updated in every step and the student in each K-th as well (DMD2).
        first: who comes first in a step with both: "student" (DMD2, SwiftBrush) or "critic".
        warmup: steps at the start that update the critics alone.

    Example:
        >>> rule = UpdateSchedule(ratio=2)
        >>> [rule.roles(step) for step in range(3)]
        [('student', 'critic'), ('critic',), ('student', 'critic')]
    """

    ratio: int = 5
    student: str = "student"
    critics: tuple[str, ...] = ("critic",)
    exclusive: bool = False
    first: Literal["student", "critic"] = "student"
    warmup: int = 0

    def __post_init__(self) -> None:
        for name, least in (("ratio", 1), ("warmup", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be an integer ≥ {least}")
        if not self.critics:
            raise ValueError("critics is empty; name at least one role")
        if self.first not in ("student", "critic"):
            raise ValueError(f"first is {self.first!r}; allowed: 'student', 'critic'")

    def roles(self, step: int) -> tuple[str, ...]:
        """Roles at a zero-based step."""
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0")
        if step < self.warmup:
            return self.critics
        turn = step - self.warmup
        if self.exclusive:
            # the student closes a round of K critic steps
            return (self.student,) if turn % (self.ratio + 1) == self.ratio else self.critics
        if turn % self.ratio:
            return self.critics
        return (self.student, *self.critics) if self.first == "student" else (*self.critics, self.student)
