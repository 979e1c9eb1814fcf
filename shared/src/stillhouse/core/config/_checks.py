"""Checks for `__post_init__` of configurations: each names section, field, value and what is allowed."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args

from stillhouse.core.errors import ConfigError


def check_choice(section: str, name: str, value: object, allowed: Any) -> None:
    """Refuse a value that is none of a `Literal`'s.

    Raises:
        ConfigError: it is none of them.

    Example:
        >>> from typing import Literal
        >>> check_choice("optim", "name", "adamw", Literal["adamw", "sgd"])
    """
    options = get_args(allowed)
    if value not in options:
        raise ConfigError(f"{section}.{name} is {value!r}; allowed: {', '.join(map(repr, options))}")


def check_finite(section: str, owner: Any) -> None:
    """Refuse NaN and infinity in the fields of a dataclass, tuples included.

    They pass comparisons such as `value < least`, or reach a network.

    Raises:
        ConfigError: a number is not finite.
    """
    for spec in fields(owner):
        value = getattr(owner, spec.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{section}.{spec.name} is {value!r}; it must be a finite number")


def check_at_least(section: str, owner: object, **limits: float) -> None:
    """Refuse fields below their limit, given as `field=least`.

    Raises:
        ConfigError: one is below.
    """
    for name, least in limits.items():
        value = getattr(owner, name)
        if value < least:
            raise ConfigError(f"{section}.{name} is {value!r}; it must be at least {least}")


def check_share(section: str, owner: object, *names: str, ends: tuple[bool, bool] = (True, False)) -> None:
    """Refuse fields that do not lie between 0 and 1; `ends` says whether 0 and 1 themselves are allowed.

    Raises:
        ConfigError: one lies outside.
    """
    for name in names:
        value = getattr(owner, name)
        if not (0 < value < 1 or (ends[0] and value == 0) or (ends[1] and value == 1)):
            shown = f"{'[' if ends[0] else '('}0, 1{']' if ends[1] else ')'}"
            raise ConfigError(f"{section}.{name} is {value!r}; it must lie in {shown}")
