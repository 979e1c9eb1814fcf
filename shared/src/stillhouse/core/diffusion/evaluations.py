"""Counting network evaluations: the number that few-step methods are compared by.

Everything in this package that asks a network says so with `tally`; guidance asks twice where it needs both
answers, and therefore counts two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_ACTIVE: ContextVar[tuple[Evaluations, ...]] = ContextVar("stillhouse_evaluations", default=())


@dataclass(slots=True)
class Evaluations:
    """How many network evaluations (of a whole batch each) were made inside a `count_evaluations` block."""

    count: int = 0


@contextmanager
def count_evaluations() -> Iterator[Evaluations]:
    """Count the evaluations made in the block; blocks nest, and each counts all that is inside it.

    Example:
        >>> with count_evaluations() as made:
        ...     tally()
        >>> made.count
        1
    """
    counter = Evaluations()
    token = _ACTIVE.set((*_ACTIVE.get(), counter))
    try:
        yield counter
    finally:
        _ACTIVE.reset(token)


def tally(count: int = 1) -> None:
    """Say that a network was evaluated `count` times."""
    for counter in _ACTIVE.get():
        counter.count += count
