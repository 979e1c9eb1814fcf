"""Convert plain values into what an annotation says, and nothing else.

The rules, one line each:

- `bool` takes true and false only; `int` takes an int that is not a bool; `float` takes a float, an int, or
  one of the words "inf", "-inf", "nan" (JSON has no other way to write them); `str` takes a string.
- `pathlib.Path` takes a string or a path; an `Enum` takes one of its members' values.
- `Literal[...]` takes exactly one of its values, and `True` is not `1`.
- `tuple[X, ...]` and `tuple[X, Y]` take a list or a tuple (never a string); `Mapping[str, X]` a mapping.
- `X | None` takes null; a union the first of its members that fits, an exact type before a converted one.
- a dataclass takes a mapping of its field names.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import enum
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from ..errors import ConfigError

_SCALARS = (bool, int, float, str)
_WORDS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
_ABSENT = object()


@dataclasses.dataclass(frozen=True, slots=True)
class FieldSpec:
    """One field of a configuration class: its name, its resolved annotation and whether it has no default."""

    name: str
    annotation: Any
    required: bool


def fields_of(cls: type) -> Mapping[str, FieldSpec]:
    """Return the init fields of a dataclass with their annotations resolved.

    Raises:
        TypeError: `cls` is no dataclass, or an annotation cannot be resolved at run time.
    """
    return _fields_of(cls)


@functools.cache
def _fields_of(cls: Any) -> Mapping[str, FieldSpec]:
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"cls must be a dataclass, got {cls!r}")
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise TypeError(
            f"an annotation of {cls.__qualname__} cannot be resolved ({error}); import the name at run time"
        ) from error
    specs = {}
    for field in dataclasses.fields(cls):
        if field.init:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            specs[field.name] = FieldSpec(field.name, hints[field.name], required)
    return specs


def is_section(annotation: Any) -> bool:
    """Say whether an annotation is a dataclass."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def arms_of(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def mapping_value(annotation: Any) -> Any:
    """Return X of `Mapping[str, X]`, or None where the annotation is no mapping."""
    if typing.get_origin(annotation) in (dict, collections.abc.Mapping):
        return typing.get_args(annotation)[1]
    return None


def tuple_items(annotation: Any, length: int) -> tuple[Any, ...] | None:
    """Return the annotations of `length` items of a tuple or sequence; None where it is neither."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is collections.abc.Sequence:
        return (args[0],) * length
    if origin is not tuple:
        return None
    if len(args) == 2 and args[1] is Ellipsis:
        return (args[0],) * length
    return args


def describe(annotation: Any) -> str:
    """Say in words what an annotation allows.

    >>> describe(float | None)
    'float or none'
    >>> describe(Literal["adam", "sgd"])
    "one of 'adam', 'sgd'"
    >>> describe(tuple[int, ...])
    'a list of int'
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    arms = arms_of(annotation)
    if len(arms) > 1:
        return " or ".join(describe(arm) for arm in arms)
    if annotation is None or annotation is type(None):
        return "none"
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(value) for value in args)
    if origin is collections.abc.Sequence or (origin is tuple and len(args) == 2 and args[1] is Ellipsis):
        return f"a list of {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} items ({', '.join(describe(arg) for arg in args)})"
    if mapping_value(annotation) is not None:
        return f"a mapping from names to {describe(mapping_value(annotation))}"
    if annotation is Path:
        return "a path"
    if is_section(annotation):
        return f"a section with the fields {', '.join(fields_of(annotation))}"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in annotation)
    return str(getattr(annotation, "__name__", annotation))


def check_class(cls: type) -> None:
    """Check that a class can be a configuration: frozen, slotted, keyword-only, at most two levels deep.

    Raises:
        TypeError: names the class or the field that breaks a rule.
    """
    _check_class(cls, level=1, place=cls.__qualname__)


def _check_class(cls: type, *, level: int, place: str) -> None:
    specs = fields_of(cls)
    parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
    if not parameters.frozen:
        raise TypeError(f"{place}: {cls.__qualname__} must be declared with frozen=True")
    if "__slots__" not in cls.__dict__:
        raise TypeError(f"{place}: {cls.__qualname__} must be declared with slots=True")
    positional = [field.name for field in dataclasses.fields(cls) if field.init and not field.kw_only]
    if positional:
        raise TypeError(f"{place}: {cls.__qualname__} needs kw_only=True ({positional[0]} is positional)")
    for spec in specs.values():
        _check_annotation(spec.annotation, level=level, place=f"{place}.{spec.name}")


def _check_annotation(annotation: Any, *, level: int, place: str) -> None:
    for arm in arms_of(annotation):
        if is_section(arm):
            if level >= 2:
                raise TypeError(f"{place}: a section in a section; the limit is two levels")
            _check_class(arm, level=level + 1, place=place)
            continue
        inner = mapping_value(arm)
        if inner is not None:
            _check_annotation(inner, level=level, place=place)
            continue
        items = tuple_items(arm, 1)
        if items is not None:
            for item in items:
                _check_annotation(item, level=level, place=place)
            continue
        known = arm in (*_SCALARS, Path, Any, None, type(None)) or typing.get_origin(arm) is Literal
        if not known and not (isinstance(arm, type) and issubclass(arm, enum.Enum)):
            raise TypeError(f"{place}: the annotation {arm!r} is none that a configuration can hold")


def unbuilt(value: Any) -> Any:
    """Turn configuration objects back into dicts of their init fields, all the way down; copy mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: unbuilt(getattr(value, name)) for name in fields_of(type(value))}
    if isinstance(value, Mapping):
        return {key: unbuilt(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(unbuilt(item) for item in value)
    return list(value) if isinstance(value, list) else value


def did_you_mean(name: str, allowed: Sequence[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest of `allowed`, or an empty string."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def wrong(where: str, annotation: Any, value: Any) -> ConfigError:
    """Build the error for a value that an annotation does not allow."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    hint = ""
    if isinstance(value, str):
        words = [arg for arm in arms_of(annotation) for arg in typing.get_args(arm) if isinstance(arg, str)]
        hint = did_you_mean(value, words)
    elif int in arms_of(annotation) and isinstance(value, float) and value.is_integer():
        hint = f"; write {int(value)}"
    return ConfigError(
        f"{where}: expected {describe(annotation)}, got {shown} ({type(value).__name__}){hint}"
    )


def convert(annotation: Any, value: Any, where: str) -> Any:
    """Convert `value` to `annotation` by the rules of this module.

    Args:
        annotation: a resolved type annotation.
        value: what a file, a mapping or an override gave.
        where: the dotted path of the field, for the error.

    Raises:
        ConfigError: the value does not fit; the message names the field, the value and what is allowed.
    """
    arms = arms_of(annotation)
    if len(arms) > 1:
        return _convert_union(annotation, arms, value, where)
    plain = _convert_plain(annotation, value)
    if plain is not _ABSENT:
        return plain
    if is_section(annotation) and isinstance(value, Mapping):
        return convert_section(annotation, value, where)
    inner = mapping_value(annotation)
    if inner is not None and isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: the names of a mapping must be strings, got {key!r}")
        return {key: convert(inner, item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = tuple_items(annotation, len(value))
        if items is not None:
            if len(items) != len(value):
                raise wrong(where, annotation, value)
            return tuple(
                convert(item, part, f"{where}[{index}]")
                for index, (item, part) in enumerate(zip(items, value, strict=True))
            )
    raise wrong(where, annotation, value)


def _convert_plain(annotation: Any, value: Any) -> Any:
    """Convert to a leaf type; `_ABSENT` where the annotation is no leaf or the value does not fit."""
    if annotation is Any:
        return value
    if annotation is None or annotation is type(None):
        return None if value is None else _ABSENT
    if typing.get_origin(annotation) is Literal:
        for allowed in typing.get_args(annotation):
            if type(allowed) is type(value) and allowed == value:
                return allowed
        return _ABSENT
    if annotation is float:
        if isinstance(value, str):
            return _WORDS.get(value, _ABSENT)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _ABSENT
    if annotation in (bool, int, str):
        return value if type(value) is annotation else _ABSENT
    if annotation is Path:
        return Path(value) if isinstance(value, str | Path) else _ABSENT
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        if isinstance(value, annotation):
            return value
        members = {member.value: member for member in annotation}
        return members[value] if isinstance(value, str | int) and value in members else _ABSENT
    return _ABSENT


def _convert_union(annotation: Any, arms: tuple[Any, ...], value: Any, where: str) -> Any:
    for arm in arms:
        if isinstance(arm, type) and type(value) is arm and not is_section(arm):
            return value
    nested: list[ConfigError] = []
    for arm in arms:
        try:
            return convert(arm, value, where)
        except ConfigError as error:
            if isinstance(value, Mapping | list | tuple) and (is_section(arm) or typing.get_args(arm)):
                nested.append(error)
    raise nested[0] if len(nested) == 1 else wrong(where, annotation, value)


def convert_section(cls: type, values: Mapping[Any, Any], where: str) -> Any:
    """Build a dataclass from a mapping of its fields; `where` is empty for the root.

    Raises:
        ConfigError: an unknown key, a missing field, a wrong type, or a value that `__post_init__` refuses.
    """
    specs = fields_of(cls)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in specs:
            hint = did_you_mean(str(key), list(specs))
            raise ConfigError(f"{prefix}{key}: no such field{hint}; allowed: {', '.join(specs)}")
    arguments = {
        key: convert(specs[key].annotation, value, f"{prefix}{key}") for key, value in values.items()
    }
    for spec in specs.values():
        if spec.required and spec.name not in arguments:
            if is_section(spec.annotation):
                arguments[spec.name] = convert_section(spec.annotation, {}, f"{prefix}{spec.name}")
                continue
            raise ConfigError(f"{prefix}{spec.name}: required, expected {describe(spec.annotation)}")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        section = where if where else cls.__name__
        raise ConfigError(f"{section}: {error}") from error
