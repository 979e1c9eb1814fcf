"""Overrides of single fields, `section.field=value`, typed by the field's annotation."""

from __future__ import annotations

import contextlib
import enum
import json
import re
from collections.abc import Iterator, MutableMapping
from typing import Any, Literal, get_args, get_origin

from ..errors import ConfigError
from ._convert import (
    arms_of,
    convert,
    did_you_mean,
    fields_of,
    is_section,
    mapping_value,
    tuple_items,
    unbuilt,
    wrong,
)

_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}
_NONE = {"none", "null", ""}


def apply_override(cls: type, values: MutableMapping[str, Any], override: str) -> None:
    """Write one override into a nested mapping of raw values.

    Args:
        cls: the configuration class; its annotations say how the text is read.
        values: nested dicts, changed in place.
        override: `"section.field=value"`.

    Raises:
        ConfigError: no `=`, an unknown field, a section instead of a field, or a text that the annotation
            does not allow.
    """
    path, separator, text = override.partition("=")
    path = path.strip()
    if not separator or not path:
        raise ConfigError(f"--set {override}: expected FIELD=VALUE, for example train.steps=100")
    parts = path.split(".")
    annotation: Any = cls
    target = values
    for depth, part in enumerate(parts):
        annotation = _step(annotation, part, ".".join(parts[:depth]), override)
        if depth < len(parts) - 1:
            inner = target.get(part)
            if not isinstance(inner, MutableMapping):
                inner = target[part] = {}
            target = inner
    if all(is_section(arm) for arm in arms_of(annotation)):
        names = ", ".join(f"{path}.{name}" for name in fields_of(arms_of(annotation)[0]))
        raise ConfigError(f"--set {override}: {path} is a section; set one of {names}")
    try:
        target[parts[-1]] = unbuilt(parse_text(annotation, text, path))
    except ConfigError as error:
        raise ConfigError(f"--set {override}: {error}") from error


def _step(annotation: Any, part: str, so_far: str, override: str) -> Any:
    """Return the annotation of `part` under a dataclass or a mapping."""
    for arm in arms_of(annotation):
        if is_section(arm):
            specs = fields_of(arm)
            if part in specs:
                return specs[part].annotation
            place = f"{so_far}." if so_far else ""
            hint = did_you_mean(part, list(specs))
            raise ConfigError(f"--set {override}: no field {place}{part}{hint}; allowed: {', '.join(specs)}")
        inner = mapping_value(arm)
        if inner is not None:
            return inner
    raise ConfigError(f"--set {override}: {so_far} is a single value and has no field {part!r}")


def parse_text(annotation: Any, text: str, where: str) -> Any:
    """Read a text as the annotation says and convert it.

    >>> parse_text(float, "1e-3", "lr"), parse_text(tuple[int, ...], "3,5", "sizes")
    (0.001, (3, 5))
    """
    for value in _readings(annotation, text.strip(), where):
        try:
            return convert(annotation, value, where)
        except ConfigError:
            continue
    raise wrong(where, annotation, text)


def _readings(annotation: Any, text: str, where: str) -> Iterator[Any]:
    """Yield the values that a text can stand for, the most specific first."""
    arms = arms_of(annotation)
    for arm in arms:
        if arm in (None, type(None)) and text.lower() in _NONE:
            yield None
        elif arm is bool and text.lower() in _TRUE | _FALSE:
            yield text.lower() in _TRUE
        elif arm is int and re.fullmatch(r"[-+]?\d[\d_]*", text):
            yield int(text)
        elif arm is float:
            with contextlib.suppress(ValueError):
                yield float(text)
        elif get_origin(arm) is Literal:
            yield from (allowed for allowed in get_args(arm) if str(allowed).lower() == text.lower())
        elif tuple_items(arm, 1) is not None:
            parts = _split(text)
            items = tuple_items(arm, len(parts))
            if items is not None and len(items) == len(parts):
                yield [
                    parse_text(item, part, f"{where}[{index}]")
                    for index, (item, part) in enumerate(zip(items, parts, strict=True))
                ]
        elif mapping_value(arm) is not None:
            with contextlib.suppress(ValueError):
                yield json.loads(text)
        elif isinstance(arm, type) and issubclass(arm, enum.Enum):
            yield from (member for member in arm if str(member.value).lower() == text.lower())
    yield text


def _split(text: str) -> list[str]:
    """Split `1,2`, `(1, 2)` or `[(1,2),(3,4)]` at the commas of the outer level."""
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    parts = [part.strip().strip("'\"") for part in parts]
    return [part for index, part in enumerate(parts) if part or index < len(parts) - 1]
